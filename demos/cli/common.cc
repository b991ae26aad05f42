#include "demos/cli/common.h"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iterator>
#include <system_error>

#include "demos/world/scene.h"
#include "runtime/error.h"
#include "runtime/ops/cuda/device.h"

namespace sluice::cli {

void AddModelFlags(CLI::App& command, ModelFlags& flags) {
  command.add_option("--model", flags.model,
                     "Checkpoint directory in Hugging Face layout (default: the bundled model)");
  command.add_option("--dtype", flags.dtype, "Compute in f32 or bf16 (default: bf16)")
      ->check(CLI::IsMember({"f32", "bf16"}));
  command.add_option("--threads", flags.threads, "Threads (default: physical cores)")
      ->check(CLI::Range(1, 1024));
  command
      .add_option("--device", flags.device,
                  "Run on the cpu or on a GPU with cuda (default: a GPU if there is one)")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  command.add_option("--weights", flags.weights, kWeightsHelp)
      ->check(CLI::IsMember({"bf16", "fp8", "int8"}));
  AddAttentionFlag(command, flags.attention);
}

void AddAttentionFlag(CLI::App& command, std::string& attention) {
  command
      .add_option("--attention", attention,
                  "exact; sage: quantised, where that is faster; or a file by sluice calibrate, "
                  "which says which layers bear it")
      ->capture_default_str();
}

void AddClipOptions(CLI::App& command, const ClipOptions& flags) {
  command.add_option("--clips", flags.clips, "How many")
      ->capture_default_str()
      ->check(CLI::Range(1, 1000000));
  command
      .add_option("--frames", flags.frames,
                  "Length in half seconds (default: 8, 12, 16, 24, 32 in turn)")
      ->check(CLI::Range(world::kMinFrames, world::kMaxFrames));
  command.add_option("--questions-per-clip", flags.questions, "At most so many a clip")
      ->capture_default_str()
      ->check(CLI::Range(1, 1000));
}

std::function<std::string(const std::string&)> FiniteRange(double least, double most) {
  return [=](const std::string& text) -> std::string {
    double value = 0;
    if (CLI::detail::lexical_cast(text, value) && value >= least && value <= most) return "";
    return "expected a number from " + Number(least, 3) + " to " + Number(most, 0) + ", got " +
           text;
  };
}

Engine OpenEngine(const ModelFlags& flags, EngineOptions options) {
  options.model =
      flags.model.empty() ? BundledPath("models/sluice-mini") : std::filesystem::path(flags.model);
  if (!flags.dtype.empty()) {
    options.vlm.compute_type = flags.dtype == "f32" ? DType::kF32 : DType::kBF16;
  }
  options.num_threads = flags.threads;
  if (flags.attention == Name(AttentionPrecision::kSage)) {
    options.vlm.attention.precision = AttentionPrecision::kSage;
  } else if (flags.attention != Name(AttentionPrecision::kExact)) {
    options.vlm.attention.file = flags.attention;
  }
  const bool has_gpu = cuda::DeviceCount() > 0;
  if (flags.device == "cuda" && !has_gpu) {
    throw InputError(
        "[sluice] --device cuda needs a GPU with its driver and a build with CUDA; found none");
  }
  if (flags.device.empty() ? has_gpu : flags.device == "cuda") options.vlm.device = Device::kCuda;
  if (flags.weights == "fp8") options.vlm.weights = WeightFormat::kFp8;
  if (flags.weights == "int8") options.vlm.weights = WeightFormat::kInt8;
  return Engine(options);
}

std::filesystem::path BundledPath(const std::string& relative) {
  std::error_code none;
  const auto program = std::filesystem::read_symlink("/proc/self/exe", none);
  const auto installed = program.parent_path().parent_path() / "share" / "sluice" / relative;
  if (!none && std::filesystem::exists(installed, none)) return installed;
  const auto in_source = std::filesystem::path(SLUICE_SOURCE_DIR) / relative;
  if (std::filesystem::exists(in_source, none)) return in_source;
  throw InputError("[sluice] expected " + relative + " at " + installed.string() + " or at " +
                   in_source.string() + ", found neither; install again or name it with an option");
}

void PrintJson(const Json& json) {
  // Text that is not UTF-8 is repaired rather than refused at the end of a long run.
  std::printf("%s\n", json.dump(2, ' ', false, Json::error_handler_t::replace).c_str());
}

std::string Table::ToString() const {
  std::vector<size_t> widths;
  for (const auto& row : rows_) {
    widths.resize(std::max(widths.size(), row.size()));
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string out;
  for (const auto& row : rows_) {
    for (size_t i = 0; i < row.size(); ++i) {
      const std::string pad(widths[i] - row[i].size(), ' ');
      if (i > 0) out += "  ";
      out += i == 0 ? row[i] + (row.size() > 1 ? pad : "") : pad + row[i];
    }
    out += '\n';
  }
  return out;
}

std::string Number(double value, int decimals) {
  if (value == 0 || !std::isfinite(value)) return "-";
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", decimals, value);
  return text;
}

std::string Percent(double share) {
  char text[64];
  std::snprintf(text, sizeof text, "%.1f", 100 * share);
  return text;
}

namespace {

// Where a stage stands on a frame's way; stages unknown here come last.
size_t OrderOf(std::string_view group) {
  static constexpr std::string_view kWay[] = {"duplicates",       "preprocess", "encode",
                                              "compress",         "prefill",    "question",
                                              "prefill_question", "decode"};
  return static_cast<size_t>(std::find(std::begin(kWay), std::end(kWay), group) - std::begin(kWay));
}

std::vector<std::string> StageRow(const std::string& label, const StageCost& cost) {
  const auto items = static_cast<double>(cost.items);
  return {label,
          std::to_string(cost.calls),
          cost.items > 0 ? std::to_string(cost.items) : "-",
          Number(cost.seconds * 1e3, 1),
          cost.items > 0 ? Number(cost.seconds * 1e3 / items, 3) : "-",
          cost.seconds > 0 ? Number(cost.flops / cost.seconds * 1e-9, 1) : "-",
          cost.seconds > 0 ? Number(cost.bytes / cost.seconds * 1e-9, 1) : "-"};
}

}  // namespace

std::string StageTable(const Tracer& tracer) {
  // Names before their first slash, in the order of a frame's way.
  std::vector<std::string> groups;
  for (const auto& [name, cost] : tracer.stages()) {
    const std::string group = name.substr(0, name.find('/'));
    if (groups.empty() || groups.back() != group) groups.push_back(group);
  }
  std::sort(groups.begin(), groups.end());
  groups.erase(std::unique(groups.begin(), groups.end()), groups.end());
  std::stable_sort(groups.begin(), groups.end(),
                   [](const auto& a, const auto& b) { return OrderOf(a) < OrderOf(b); });

  Table table({"stage", "calls", "items", "ms", "ms/item", "GFLOP/s", "GB/s"});
  for (const std::string& group : groups) {
    const auto own = tracer.stages().find(group);
    if (own != tracer.stages().end()) table.Add(StageRow(group, own->second));
    for (const auto& [name, cost] : tracer.stages()) {
      if (name.starts_with(group + "/")) table.Add(StageRow("  " + name, cost));
    }
  }
  return table.ToString();
}

Json ToJson(const CpuInfo& cpu) {
  return {{"model", cpu.model_name},
          {"physical_cores", cpu.physical_cores},
          {"isa", cpu.IsaName()},
          {"memory_bytes", cpu.memory_bytes}};
}

const char* WeightsName(const VlmInfo& info) {
  return info.weights == WeightFormat::kPlain ? Name(info.compute_type) : Name(info.weights);
}

double DecoderFlops(const Tracer& tracer) {
  double flops = 0;
  for (const auto& [name, cost] : tracer.stages()) {
    if (name.starts_with("decoder/") && name != "decoder/lm_head") flops += cost.flops;
  }
  return flops;
}

Progress::Progress() : terminal_(isatty(STDERR_FILENO) == 1) {}

void Progress::Show(double fraction, std::string_view text) {
  if (!terminal_) return;
  constexpr int kWidth = 24;
  std::string bar;
  if (fraction >= 0) {
    const int done = static_cast<int>(std::clamp(fraction, 0.0, 1.0) * kWidth);
    bar = "[" + std::string(done, '#') + std::string(kWidth - done, '.') + "] ";
  }
  // \033[K wipes what an earlier, longer line left.
  std::fprintf(stderr, "\r%s%.*s\033[K", bar.c_str(), static_cast<int>(text.size()), text.data());
  std::fflush(stderr);
  shown_ = true;
}

void Progress::Clear() {
  if (!shown_) return;
  std::fprintf(stderr, "\r\033[K");
  std::fflush(stderr);
  shown_ = false;
}

}  // namespace sluice::cli
