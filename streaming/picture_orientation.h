// Orientations that are said within coded pictures rather than by their container.
#ifndef SLUICE_STREAMING_PICTURE_ORIENTATION_H_
#define SLUICE_STREAMING_PICTURE_ORIENTATION_H_

#include <cstdint>
#include <optional>
#include <span>

#include "vision/orientation.h"

namespace sluice {

enum class NalCodec { kH264, kH265 };

// What the "display orientation" message (SEI type 47) of one coded picture says; none if it has
// none. `length_bytes`: the size of the length before each NAL unit, or 0 where start codes (00 00
// 01) separate them. Turns that are no multiple of 90 degrees are rounded to one.
std::optional<Orientation> SeiOrientation(std::span<const uint8_t> picture, NalCodec codec,
                                          int length_bytes);

// The EXIF data (a TIFF header and what follows) of a JPEG; empty if it has none.
std::span<const uint8_t> JpegExif(std::span<const uint8_t> jpeg);

}  // namespace sluice

#endif  // SLUICE_STREAMING_PICTURE_ORIENTATION_H_
