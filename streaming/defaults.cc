#include "streaming/defaults.h"

#include <string>

#include "runtime/error.h"

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

}  // namespace sluice
