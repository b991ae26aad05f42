// Pictures from the network: their size is read from the header and checked before anything is
// decoded, so that a small message cannot unpack into a large picture. Pure; safe on any thread.
#ifndef SLUICE_PROTO_IMAGE_DECODER_H_
#define SLUICE_PROTO_IMAGE_DECODER_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "vision/frame.h"

namespace sluice {

enum class ImageFormat { kJpeg, kPng, kWebp };

struct ImageSize {
  int64_t width = 0, height = 0;  // pixels
};

// As the header says; none if `bytes` do not begin as such a file does.
std::optional<ImageSize> ReadImageSize(ImageFormat format, std::string_view bytes);

// Sets width, height and rgb. Throws InputError on what is no such picture, is damaged, or has more
// than max_pixels. Turned as its EXIF orientation says.
void DecodeImage(ImageFormat format, std::string_view bytes, int64_t max_pixels, Frame& frame);

// The same for rows of red, green, blue bytes. Throws InputError when the size is out of range or
// does not go with the number of bytes.
void TakeRawImage(int64_t width, int64_t height, std::string_view bytes, int64_t max_pixels,
                  Frame& frame);

// A JPEG file that looks the same (quality 95).
std::string EncodeJpeg(const Frame& frame);

}  // namespace sluice

#endif  // SLUICE_PROTO_IMAGE_DECODER_H_
