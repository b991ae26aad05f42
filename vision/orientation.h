// How a stored picture has to be turned to stand upright. The values are those of EXIF.
#ifndef SLUICE_VISION_ORIENTATION_H_
#define SLUICE_VISION_ORIENTATION_H_

#include <cstddef>
#include <cstdint>

#include "vision/frame.h"

namespace sluice {

enum class Orientation : uint8_t {
  kUpright = 1,
  kMirrored = 2,       // left and right are exchanged
  kUpsideDown = 3,     // turn by 180 degrees
  kFlipped = 4,        // top and bottom are exchanged
  kTransposed = 5,     // rows are columns
  kTurnClockwise = 6,  // turn clockwise by 90 degrees
  kTransversed = 7,    // as kTransposed, about the other diagonal
  kTurnAnticlockwise = 8,
};

// Fills the size and the pixels of `frame` with a picture of [height, width, 3] whose rows begin
// `row_bytes` apart, turned upright.
void CopyUpright(const uint8_t* rgb, size_t row_bytes, int width, int height, Orientation how,
                 Frame& frame);

}  // namespace sluice

#endif  // SLUICE_VISION_ORIENTATION_H_
