#include "streaming/defaults.h"

#include <algorithm>
#include <string>

#include "llm/kv_cache.h"
#include "runtime/cpu_info.h"
#include "runtime/error.h"
#include "runtime/ops/attention.h"
#include "streaming/session.h"

namespace sluice {

GenerateOptions RecommendedGeneration(const GenerationDefaults& defaults) {
  GenerateOptions options;
  if (defaults.max_new_tokens) options.max_new_tokens = *defaults.max_new_tokens;
  SamplingOptions& sampling = options.sampling;
  sampling.repetition_penalty = defaults.repetition_penalty;
  // Without do_sample these count only where a temperature is asked for.
  sampling.top_k = defaults.top_k;
  sampling.top_p = defaults.top_p;
  if (defaults.do_sample) sampling.temperature = defaults.temperature;
  return options;
}

void ApplyPreset(std::string_view preset, SessionOptions& options) {
  if (preset == "exact") return;
  if (preset != "stc" && preset != "fast") {
    throw InputError("[options] expected preset exact, stc or fast, got '" + std::string(preset) +
                     "'");
  }
  options.cacher = StcCacherOptions{.shared_selection = true};
  options.compressors = {preset == "stc" ? "stc-pruner" : "turbo-merge=0.34"};
  if (preset == "fast") options.cacher->interval = 4;
}

std::optional<std::string> AddDefaultMemory(const Vlm& vlm, const BlockStoreOptions& store,
                                            int64_t kv_bytes, SessionOptions& options) {
  const auto none = [](const std::string& why) {
    return "[memory] " + why + ", so this stream ends with its context";
  };
  if (options.pyramid.mode != PyramidMode::kOff)
    return none("PyramidDrop and a memory exclude each other");
  if (store.host_bytes < 1) return none("no host memory is set aside for earlier frames");
  SessionOptions with = options;
  with.memory = MemoryOptions{.window_tokens = 0, .store = store};
  with.memory->store.when_full = WhenFull::kThin;
  // Small beside what the machine has, however much a stream may ask for.
  with.memory->store.host_bytes =
      std::min(store.host_bytes, std::max(CpuInfo::Detect().memory_bytes / 16, int64_t{64} << 20));
  const auto prefix = static_cast<int64_t>(
      vlm.prompt_format().EncodePrefix(vlm.tokenizer(), options.system_prompt).size());
  if (kv_bytes > 0) {
    const KvGeometry geometry = vlm.decoder().kv_geometry();
    const int64_t row = 2 * int64_t{geometry.num_layers} * geometry.kv_heads * geometry.head_dim *
                        static_cast<int64_t>(SizeOf(geometry.dtype));
    const int64_t batch = int64_t{vlm.encoder().tokens_per_frame()} * options.frames_per_batch *
                          (options.compressors.empty() ? 1 : 2);
    // Of whole blocks in every layer, and one that is partly filled.
    const int64_t rows = kv_bytes / row / kKvBlockTokens * kKvBlockTokens;
    const int64_t window = rows - prefix - batch - 2 * kKvBlockTokens;
    const int64_t limit = options.max_context_tokens > 0
                              ? std::min(options.max_context_tokens, vlm.decoder().max_positions())
                              : vlm.decoder().max_positions();
    if (rows < limit && window < 1) {
      return none("its budget of keys and values is too small for a window");
    }
    if (rows < limit) with.memory->window_tokens = window;
  }
  try {
    MemoryFor(vlm, with, prefix);
  } catch (const InputError&) {
    return none("the context is too short for a window that slides");
  }
  options.memory = with.memory;
  return std::nullopt;
}

}  // namespace sluice
