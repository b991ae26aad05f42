// sluice info: what a checkpoint is, what this machine offers, which fast paths will be used.
#include <algorithm>
#include <cstdio>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "demos/cli/commands.h"
#include "demos/cli/common.h"
#include "llm/family_registry.h"
#include "runtime/ops/attention.h"
#include "runtime/ops/cuda/device.h"
#include "runtime/ops/linear.h"

namespace sluice::cli {
namespace {

struct InfoFlags {
  ModelFlags model;
  bool json = false;
};

Json CountPrecisions(const std::vector<AttentionPrecision>& layers) {
  const auto sage = std::count(layers.begin(), layers.end(), AttentionPrecision::kSage);
  return {{"exact", static_cast<int64_t>(layers.size()) - sage}, {"sage", sage}};
}

Json Describe(const Vlm& vlm) {
  const VlmInfo& info = vlm.info();
  const VisionEncoder& encoder = vlm.encoder();
  const Decoder& decoder = vlm.decoder();
  const KvGeometry kv = decoder.kv_geometry();
  const int64_t kv_bytes_per_token = int64_t{2} * kv.num_layers * kv.kv_heads * kv.head_dim *
                                     static_cast<int64_t>(SizeOf(kv.dtype));
  return {
      {"name", info.name},
      {"architecture", info.architecture},
      {"notice", info.notice},
      {"parameters", info.parameters},
      {"file_bytes", info.file_bytes},
      {"file_dtype", Name(info.file_type)},
      {"weight_bytes", info.weight_bytes},
      {"compute_dtype", Name(info.compute_type)},
      {"weights", WeightsName(info)},
      {"load_seconds", info.load_seconds},
      {"vision",
       {{"input_width", encoder.preprocess_config().width},
        {"input_height", encoder.preprocess_config().height},
        {"patches_per_frame", encoder.patches_per_frame()},
        {"tokens_per_frame", encoder.tokens_per_frame()},
        {"gflop_per_frame", encoder.FlopsPerFrame() * 1e-9}}},
      {"decoder",
       {{"hidden_size", decoder.hidden_size()},
        {"layers", kv.num_layers},
        {"kv_heads", kv.kv_heads},
        {"head_dim", kv.head_dim},
        {"vocabulary_rows", decoder.vocab_size()},
        {"tokens", vlm.tokenizer().vocab_size()},
        {"max_positions", decoder.max_positions()},
        {"kv_bytes_per_token", kv_bytes_per_token}}},
      {"attention_layers",
       {{"tower", CountPrecisions(info.attention.tower)},
        {"decoder", CountPrecisions(info.attention.decoder)}}},
      {"context_frames", decoder.max_positions() / encoder.tokens_per_frame()},
      {"template_revision", vlm.prompt_format().name()},
  };
}

// What the layers that are to be quantised ask for; exact where none is.
AttentionPrecision MostOf(const std::vector<AttentionPrecision>& layers) {
  const bool sage = std::count(layers.begin(), layers.end(), AttentionPrecision::kSage) > 0;
  return sage ? AttentionPrecision::kSage : AttentionPrecision::kExact;
}

// The name of a kernel, and that it is not what was asked for.
template <typename Kernel>
std::string AttentionName(Kernel kernel, AttentionPrecision precision) {
  const bool instead = precision == AttentionPrecision::kSage && kernel != Kernel::kSage;
  return std::string(Name(kernel)) + (instead ? " (exact: sage is not faster here)" : "");
}

// Which implementations the shapes of this model lead to.
Json FastPaths(const Vlm& vlm, const CpuInfo& cpu) {
  const DType dtype = vlm.info().compute_type;
  const AttentionPrecision tower = MostOf(vlm.info().attention.tower);
  const AttentionPrecision decoder = MostOf(vlm.info().attention.decoder);
  if (vlm.info().device == Device::kCuda) {
    const KvGeometry kv = vlm.decoder().kv_geometry();
    const int capability = cuda::ComputeCapability();
    const int heads = vlm.decoder().num_heads();
    const auto linear = [&](int64_t rows) {
      return Name(ChooseGpuLinear(rows, vlm.decoder().hidden_size(), vlm.decoder().hidden_size(),
                                  /*aligned=*/true, dtype, vlm.info().weights, Activation::kNone));
    };
    const auto causal = [&](int64_t queries) {
      return AttentionName(
          ChooseGpuAttention(capability, queries, heads, kv.kv_heads, kv.head_dim, dtype,
                             /*causal=*/true, /*biased=*/false, decoder),
          decoder);
    };
    return {{"encode_linear", linear(vlm.encoder().patches_per_frame())},
            {"encode_attention",
             AttentionName(ChooseGpuAttention(capability, vlm.encoder().patches_per_frame(), 1, 1,
                                              vlm.encoder().head_dim(), dtype,
                                              /*causal=*/false, /*biased=*/false, tower),
                           tower)},
            {"prefill_linear", linear(vlm.encoder().tokens_per_frame())},
            {"prefill_attention",
             causal(SessionOptions().frames_per_batch * vlm.encoder().tokens_per_frame())},
            {"decode_linear", linear(1)},
            {"decode_attention", causal(1)}};
  }
  const int64_t width = vlm.decoder().hidden_size();
  const int64_t patches = vlm.encoder().patches_per_frame();
  const int64_t tokens = vlm.encoder().tokens_per_frame();
  const int head_dim = vlm.decoder().kv_geometry().head_dim;
  const int64_t seen = 16 * tokens;
  const Bf16Rows bf16_rows = FastestBf16Rows();
  const auto linear = [&](int64_t rows) {
    return Name(ChooseLinear(rows, width, width, dtype, bf16_rows, /*reference=*/false));
  };
  const int group = vlm.decoder().num_heads() / vlm.decoder().kv_geometry().kv_heads;
  const auto attention = [&](int64_t queries, int64_t keys, AttentionPrecision precision) {
    return AttentionName(ChooseAttention(queries, keys, head_dim, dtype, cpu.amx_bf16,
                                         /*reference=*/false, precision, cpu.Int8Dot()),
                         precision);
  };
  return {{"many_bf16_rows", Name(bf16_rows)},
          {"encode_linear", linear(patches)},
          {"encode_attention", attention(patches, patches, tower)},
          {"prefill_linear", linear(tokens)},
          {"prefill_attention", attention(tokens * group, seen, decoder)},
          {"decode_linear", linear(1)},
          {"decode_attention", attention(group, seen, decoder)}};
}

// For people: bytes in the unit that fits, four digits of what was measured.
std::string Text(const std::string& key, const Json& value) {
  if (value.is_string()) return value.get<std::string>();
  char text[32];
  if (key.find("bytes") != key.npos && value.is_number()) {
    double number = value.get<double>();
    const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    size_t unit = 0;
    for (; number >= 1024 && unit + 1 < std::size(units); ++unit) number /= 1024;
    std::snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.1f %s", number, units[unit]);
    return text;
  }
  if (!value.is_number_float()) return value.dump();
  std::snprintf(text, sizeof text, "%.4g", value.get<double>());
  return text;
}

void PrintSection(const char* title, const Json& section) {
  std::printf("%s\n", title);
  for (const auto& [key, value] : section.items()) {
    if (value.is_object()) {
      for (const auto& [inner, number] : value.items()) {
        std::printf("  %-28s %s\n", (key + "." + inner).c_str(), Text(inner, number).c_str());
      }
    } else {
      std::printf("  %-28s %s\n", key.c_str(), Text(key, value).c_str());
    }
  }
}

// By the "model_type" of config.json: the architecture.
Json Families() {
  Json families = Json::object();
  for (const ModelFamily& family : ModelFamilies()) {
    families[family.model_type] = family.architecture;
  }
  return families;
}

void Info(const InfoFlags& flags) {
  const Engine engine = OpenEngine(flags.model);
  const CpuInfo cpu = CpuInfo::Detect();
  Json machine = ToJson(cpu);
  machine["threads"] = engine.num_threads();
  machine["device"] = Name(engine.vlm()->info().device);
  if (cuda::DeviceCount() > 0) {
    machine["gpu"] = cuda::DeviceName();
    machine["compute_capability"] = cuda::ComputeCapability() / 10.0;
  }
  const Json report = {{"checkpoint", Describe(*engine.vlm())},
                       {"machine", machine},
                       {"fast_paths", FastPaths(*engine.vlm(), cpu)},
                       {"families", Families()}};
  if (flags.json) {
    PrintJson(report);
    return;
  }
  PrintSection("checkpoint", report["checkpoint"]);
  PrintSection("machine", report["machine"]);
  PrintSection("fast paths", report["fast_paths"]);
  PrintSection("families this build can load", report["families"]);
}

}  // namespace

void AddInfo(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "info", "What a checkpoint is, what this machine offers, which fast paths will be used");
  auto flags = std::make_shared<InfoFlags>();
  AddModelFlags(*command, flags->model);
  command->add_flag("--json", flags->json, "Print one JSON object");
  command->callback([flags] { Info(*flags); });
}

}  // namespace sluice::cli
