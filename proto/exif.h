// The one thing that is read of a picture's EXIF data, in whatever file it came.
#ifndef SLUICE_PROTO_EXIF_H_
#define SLUICE_PROTO_EXIF_H_

#include <string_view>

#include "vision/orientation.h"

namespace sluice {

// How the picture is stored. exif: a TIFF file, or one after "Exif\0\0". Upright where it tells no
// orientation or is damaged: cameras write much that others cannot read, and the pixels are whole.
// Reads the first directory alone. Pure.
Orientation ExifOrientation(std::string_view exif);

}  // namespace sluice

#endif  // SLUICE_PROTO_EXIF_H_
