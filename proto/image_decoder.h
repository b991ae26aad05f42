// Pictures from the network, by libjpeg-turbo, libpng and libwebp, each under limits of its own.
// A picture is taken whole or not at all: what a library only warns of is damage here, so that
// every pixel that comes out was in the file. Nothing is printed. Pure; safe on any thread.
#ifndef SLUICE_PROTO_IMAGE_DECODER_H_
#define SLUICE_PROTO_IMAGE_DECODER_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "vision/frame.h"
#include "vision/preprocess.h"

namespace sluice {

enum class ImageFormat { kJpeg, kPng, kWebp };

// What one picture may take. The sizes are those that the decoder itself reads, before it decodes.
struct ImageLimits {
  int64_t pixels = int64_t{4096} * 2304;  // width * height
  int side = kMaxPictureSide;             // pixels
  int64_t bytes = int64_t{256} << 20;     // of memory, with the decoded picture
  double seconds = 2;                     // of one processor, not of the clock
  int scans = 64;                         // of a JPEG; usual progressive ones have 10
};

// Sets width, height and rgb. The picture is turned as its EXIF orientation says; grey and palettes
// become RGB, 16 bits a channel become 8, CMYK is converted without its colour profile, alpha is
// left out. Throws InputError, in one line, on what is no such file, is damaged, moves, is of a
// kind that is not supported, or exceeds a limit; `frame` is then of no use.
void DecodeImage(ImageFormat format, std::string_view bytes, const ImageLimits& limits,
                 Frame& frame);

// The same for rows of red, green, blue bytes. Throws InputError when the size is out of range or
// does not go with the number of bytes.
void TakeRawImage(int64_t width, int64_t height, std::string_view bytes, const ImageLimits& limits,
                  Frame& frame);

// A JPEG file that looks the same (quality 95). Throws Error on an empty picture and where there is
// no memory.
std::string EncodeJpeg(const Frame& frame);

}  // namespace sluice

#endif  // SLUICE_PROTO_IMAGE_DECODER_H_
