// What a stream does unless it is told otherwise, in one place for every way of telling it.
#ifndef SLUICE_STREAMING_DEFAULTS_H_
#define SLUICE_STREAMING_DEFAULTS_H_

#include <cstdint>
#include <optional>
#include <string>
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

// Gives a stream whose options are otherwise complete the memory that it has unless it is told
// otherwise: nothing changes while it fits in the context, then the oldest frames go to `store`,
// which is thinned when it is full, and questions recall them. kv_bytes: what it may hold of keys
// and values, if that is less than the context; 0: no limit of its own. Where there can be none the
// options stay as they are and the reason comes back, in one line.
std::optional<std::string> AddDefaultMemory(const Vlm& vlm, const BlockStoreOptions& store,
                                            int64_t kv_bytes, SessionOptions& options);

}  // namespace sluice

#endif  // SLUICE_STREAMING_DEFAULTS_H_
