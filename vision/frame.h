// One decoded picture of a stream. Immutable once shared; safe to read from many threads.
#ifndef SLUICE_VISION_FRAME_H_
#define SLUICE_VISION_FRAME_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "runtime/clock.h"

namespace sluice {

// What a frame is compared by with earlier ones (compression/duplicate_frame_filter.h).
struct Thumbnail {
  int width = 0, height = 0;  // pixels of the picture it was made of
  std::vector<float> cells;   // [rows, columns, 3]
};

struct Frame {
  int width = 0;             // pixels
  int height = 0;            // pixels
  std::vector<uint8_t> rgb;  // [height, width, 3], rows contiguous
  MediaTime time;            // presentation time
  int64_t index = 0;         // number of this frame among those sampled from the source
  // Of the picture that came, where it was resized since and its stream looks for duplicates.
  std::optional<Thumbnail> thumbnail;
};
using FramePtr = std::shared_ptr<const Frame>;

}  // namespace sluice

#endif  // SLUICE_VISION_FRAME_H_
