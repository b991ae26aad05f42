// What a stream does unless it is told otherwise, in one place for every way of telling it.
#ifndef SLUICE_STREAMING_DEFAULTS_H_
#define SLUICE_STREAMING_DEFAULTS_H_

#include <string_view>

#include "llm/generator.h"
#include "llm/vlm.h"
#include "streaming/options.h"

namespace sluice {

// What the checkpoint's authors recommend.
GenerateOptions RecommendedGeneration(const GenerationDefaults& defaults);

// Sets the methods of a preset: "exact" none, "stc" cacher and pruner at the published settings,
// "fast" fewer frames computed whole and a third of the tokens by merging. Throws InputError on
// others.
void ApplyPreset(std::string_view preset, SessionOptions& options);

}  // namespace sluice

#endif  // SLUICE_STREAMING_DEFAULTS_H_
