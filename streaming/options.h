// What a session may be told.
#ifndef SLUICE_STREAMING_OPTIONS_H_
#define SLUICE_STREAMING_OPTIONS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "compression/pyramid_drop.h"
#include "compression/stc_cacher.h"
#include "compression/stream_memory.h"
#include "compression/turbo_tower.h"
#include "llm/generator.h"

namespace sluice {

struct SessionOptions {
  std::string system_prompt;  // empty: none, as the published templates
  bool keep_dialogue = true;  // later questions see earlier questions and answers
  int frames_per_batch = 8;   // frames encoded and prefilled together, at most
  // Frames that differ less from the last one taken are only counted, not encoded: levels of 255,
  // compression/duplicate_frame_filter.h. None: all are taken.
  std::optional<double> duplicate_threshold;
  int64_t max_context_tokens = 0;          // 0: what the model allows
  std::optional<StcCacherOptions> cacher;  // reuses features of earlier frames; none: all whole
  std::optional<TurboOptions> turbo;       // merges tokens inside the tower; not with the cacher
  // Applied to the visual tokens in this order: compression/registry.h, "NAME" or "NAME=NUMBER".
  std::vector<std::string> compressors;
  PyramidOptions pyramid;  // which visual tokens leave between decoder layers; default: none
  // A window that slides, and frames recalled from behind it; none: the context fills up. Not with
  // PyramidDrop.
  std::optional<MemoryOptions> memory;
  GenerateOptions generate;
};

}  // namespace sluice

#endif  // SLUICE_STREAMING_OPTIONS_H_
