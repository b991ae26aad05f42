// sluice serve: the gRPC service, until a signal ends it.
#include <malloc.h>
#include <signal.h>
#include <sys/resource.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "demos/cli/commands.h"
#include "demos/cli/common.h"
#include "demos/cli/help.h"
#include "proto/json_log.h"
#include "proto/metrics_endpoint.h"
#include "proto/server_config.h"
#include "proto/service.h"
#include "runtime/cpu_info.h"
#include "runtime/error.h"
#include "runtime/ops/cuda/device.h"

namespace sluice::cli {
namespace {

constexpr rlim_t kMostDescriptors = 65536;

// Waits on a thread of its own, so that no handler has to be safe inside a signal. The signals are
// blocked before other threads begin, which inherit that.
sigset_t BlockSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGHUP);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  return signals;
}

// As many descriptors as this process may have: connections take two each.
void RaiseDescriptorLimit() {
  rlimit descriptors = {};
  if (getrlimit(RLIMIT_NOFILE, &descriptors) != 0) return;
  descriptors.rlim_cur = std::min<rlim_t>(descriptors.rlim_max, kMostDescriptors);
  setrlimit(RLIMIT_NOFILE, &descriptors);  // what it is then is logged with the connections
}

// Reads tokens and certificates again. What makes no sense is logged, and nothing has changed.
void Reload(const std::string& file, Service& service) {
  try {
    std::optional<std::vector<AccessToken>> tokens;
    if (!file.empty()) {
      ServerConfig config;
      ReadServerConfig(file, config);
      tokens = config.service.tokens;
    }
    service.Reload(tokens);
    LogEvent(spdlog::level::info, "reloaded");
  } catch (const std::exception& error) {
    LogEvent(spdlog::level::err, "not_reloaded", {{"error", error.what()}});
  }
}

int64_t WeightBytes(const std::filesystem::path& model) {
  int64_t bytes = 0;
  std::error_code error;  // a model that is not there is refused where it is opened
  for (const auto& file : std::filesystem::directory_iterator(model, error)) {
    if (file.path().extension() == ".safetensors") bytes += static_cast<int64_t>(file.file_size());
  }
  return bytes;
}

void LogLimits(const ServerConfig& config, const ServiceOptions& options) {
  LogEvent(spdlog::level::info, "limits",
           {{"max_streams", config.scheduler.max_streams},
            {"kv_mb", config.kv_mb},
            {"stream_kv_mb", config.stream_kv_mb},
            {"stream_host_mb", config.stream_host_mb},
            {"stream_disk_mb", config.stream_disk_mb},
            {"queued_picture_mb", config.queued_picture_mb},
            {"max_sources", options.max_sources},
            {"account_sources", options.account_sources},
            {"saved_streams", options.saved.streams},
            {"saved_mb", options.saved.bytes >> 20},
            {"all_saved_streams", options.all_saved.streams},
            {"all_saved_mb", options.all_saved.bytes >> 20}});
}

void Serve(const ServerConfig& given, const std::string& file) {
  Finished(given);  // what makes no sense is refused first
  const bool gpu = given.device.empty() ? cuda::DeviceCount() > 0 : given.device == "cuda";
  const ServerConfig config =
      WithMemory(given, CpuInfo::Detect().memory_bytes,
                 WeightBytes(given.model.empty() ? BundledPath("models/sluice-mini")
                                                 : std::filesystem::path(given.model)),
                 gpu);
  const ServiceOptions options = Finished(config);
  const sigset_t signals = BlockSignals();
  signal(SIGPIPE, SIG_IGN);
  UseJsonLog();
  // Pictures, messages and frames' keys begin on one thread and end on another. With a heap for
  // each thread, what stays gets scattered among them: 10 KiB a frame of a stream that off-loads.
  mallopt(M_ARENA_MAX, 1);

  RaiseDescriptorLimit();
  Metrics metrics;
  std::unique_ptr<MetricsEndpoint> endpoint;  // a port that is taken is told before a model is read
  if (!config.metrics.empty()) {
    endpoint = std::make_unique<MetricsEndpoint>(metrics, config.metrics);
  }
  LogLimits(config, options);

  EngineOptions engine_options;
  engine_options.kv_budget_bytes = config.kv_mb << 20;
  const auto engine = std::make_shared<const Engine>(OpenEngine({.model = config.model,
                                                                 .dtype = config.dtype,
                                                                 .threads = config.threads,
                                                                 .device = config.device,
                                                                 .weights = config.weights,
                                                                 .attention = config.attention},
                                                                engine_options));
  const LayerPrecisions& layers = engine->vlm()->info().attention;
  const auto quantised = [](const std::vector<AttentionPrecision>& of) {
    return std::count(of.begin(), of.end(), AttentionPrecision::kSage);
  };
  // What becomes of them call by call is in the metrics.
  LogEvent(spdlog::level::info, "attention",
           {{"asked_for", config.attention},
            {"quantised_tower_layers", quantised(layers.tower)},
            {"quantised_decoder_layers", quantised(layers.decoder)}});
  const SystemClock clock;
  Scheduler scheduler(engine, config.scheduler, clock, metrics);
  Service service(engine->vlm(), scheduler, metrics, clock, options);
  if (endpoint) LogEvent(spdlog::level::info, "metrics", {{"port", endpoint->port()}});

  int number = 0;
  while (sigwait(&signals, &number) == 0 && number == SIGHUP) Reload(file, service);
  LogEvent(spdlog::level::info, "signal", {{"number", number}});
  std::thread([signals] {  // a second signal ends the program at once
    int again = 0;
    while (sigwait(&signals, &again) == 0 && again == SIGHUP) continue;
    std::_Exit(128 + again);
  })
      .detach();
  service.Shutdown();
}

}  // namespace

void AddServe(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("serve", "Serve live video sessions over gRPC (docs/service.md)");
  auto config = std::make_shared<ServerConfig>();
  auto file = std::make_shared<std::string>();
  // The file first, so that flags win over it.
  command
      ->add_option_function<std::string>(
          "--config",
          [config, file](const std::string& name) {
            ReadServerConfig(name, *config);
            *file = name;
          },
          "JSON file with the same settings, as \"max_streams\", and tokens")
      ->trigger_on_parse();
  command->add_option("--model", config->model,
                      "Checkpoint directory in Hugging Face layout (default: the bundled model)");
  command->add_option("--dtype", config->dtype, "Compute in f32 or bf16 (default: bf16)");
  command->add_option("--threads", config->threads, "Threads (default: physical cores)");
  command->add_option("--device", config->device, "cpu or cuda (default: a GPU if there is one)");
  command->add_option("--weights", config->weights, kWeightsHelp);
  AddAttentionFlag(*command, config->attention);
  for (const Setting& setting : SettingsOf(*config)) {
    std::string flag = "--" + setting.name;
    std::replace(flag.begin(), flag.end(), '_', '-');
    std::visit(
        [&](auto* value) {
          if constexpr (std::is_same_v<decltype(value), bool*>) {
            command->add_flag(flag, *value, setting.help);
          } else {
            command->add_option(flag, *value, setting.help)->capture_default_str();
          }
        },
        setting.value);
  }
  ShowFirst(*command, {"--config", "--listen", "--model", "--device", "--certificate", "--key",
                       "--allow-plain-text", "--allow-everybody", "--source-urls",
                       "--source-directories", "--state-directory", "--max-streams", "--metrics"});
  command->callback([config, file] { Serve(*config, *file); });
}

}  // namespace sluice::cli
