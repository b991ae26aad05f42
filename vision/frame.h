// One decoded picture of a stream. Immutable once shared; safe to read from many threads.
#ifndef SLUICE_VISION_FRAME_H_
#define SLUICE_VISION_FRAME_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "runtime/clock.h"

namespace sluice {

struct Frame {
  int width = 0;             // pixels
  int height = 0;            // pixels
  std::vector<uint8_t> rgb;  // [height, width, 3], rows contiguous
  MediaTime time;            // presentation time
  int64_t index = 0;         // number of this frame among those sampled from the source
};
using FramePtr = std::shared_ptr<const Frame>;

}  // namespace sluice

#endif  // SLUICE_VISION_FRAME_H_
