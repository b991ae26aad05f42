#include "vision/orientation.h"

#include <cstring>

namespace sluice {

void CopyUpright(const uint8_t* rgb, size_t row_bytes, int width, int height, Orientation how,
                 Frame& frame) {
  const auto code = static_cast<int>(how);
  const bool swapped = code >= 5;  // rows become columns
  frame.width = swapped ? height : width;
  frame.height = swapped ? width : height;
  const size_t out_row = size_t{3} * frame.width;
  frame.rgb.clear();
  if (how == Orientation::kUpright) {
    frame.rgb.reserve(out_row * height);
    for (int y = 0; y < height; ++y, rgb += row_bytes) {
      frame.rgb.insert(frame.rgb.end(), rgb, rgb + out_row);
    }
    return;
  }
  // Along an output row and along an output column the source moves by a constant step; each
  // begins at the end where its step is negative.
  const bool from_right = how == Orientation::kMirrored || how == Orientation::kUpsideDown ||
                          how == Orientation::kTransversed ||
                          how == Orientation::kTurnAnticlockwise;
  const bool from_bottom = how == Orientation::kUpsideDown || how == Orientation::kFlipped ||
                           how == Orientation::kTurnClockwise || how == Orientation::kTransversed;
  const ptrdiff_t along_row = from_right ? -3 : 3;
  const auto stride = static_cast<ptrdiff_t>(row_bytes);
  const ptrdiff_t along_column = from_bottom ? -stride : stride;
  const uint8_t* start = rgb + (from_bottom ? (height - 1) * stride : 0) +
                         (from_right ? ptrdiff_t{3} * (width - 1) : 0);
  const ptrdiff_t step_x = swapped ? along_column : along_row;
  const ptrdiff_t step_y = swapped ? along_row : along_column;
  frame.rgb.resize(out_row * frame.height);
  uint8_t* out = frame.rgb.data();
  for (int y = 0; y < frame.height; ++y, start += step_y) {
    const uint8_t* in = start;
    for (int x = 0; x < frame.width; ++x, in += step_x, out += 3) std::memcpy(out, in, 3);
  }
}

}  // namespace sluice
