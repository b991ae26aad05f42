// One decoder a format, and what they share. Private to image_decoder.cc and the codecs.
#ifndef SLUICE_PROTO_IMAGE_CODECS_H_
#define SLUICE_PROTO_IMAGE_CODECS_H_

#include <csetjmp>
#include <cstdint>
#include <string>
#include <string_view>

#include "proto/image_decoder.h"
#include "vision/orientation.h"

namespace sluice {

// Each sets width, height and rgb, the pixels as they are stored, and returns their orientation
// (exif.h). REQUIRES: the bytes begin as such a file does. Throws as DecodeImage does.
Orientation DecodeJpeg(std::string_view bytes, const ImageLimits& limits, Frame& frame);
Orientation DecodePng(std::string_view bytes, const ImageLimits& limits, Frame& frame);
Orientation DecodeWebp(std::string_view bytes, const ImageLimits& limits, Frame& frame);

// Throws InputError unless a picture of this size is within the limits.
void CheckImageSize(int64_t width, int64_t height, const ImageLimits& limits);

// "[frame] the PNG file is damaged: why". why: a library's words.
[[noreturn]] void ThrowDamaged(const char* format, std::string_view why);

// The time of a processor that this thread has spent on a picture.
class DecodeTimer {
 public:
  explicit DecodeTimer(double seconds);
  // To be asked often: looks at the clock now and then. True from when the time is over.
  bool Over();

 private:
  const double end_;
  unsigned calls_ = 0;
  bool over_ = false;
};
[[noreturn]] void ThrowTooSlow(const char* format, const ImageLimits& limits);

// Where C libraries go back to when they fail.
struct CFailure {
  std::jmp_buf back;
  char line[256] = "";  // what the library said
};

// Runs work(), which calls a C library that leaves by longjmp(failure.back, 1). False if it did.
// REQUIRES: neither work nor what it calls has objects with destructors between here and the
// library.
template <typename Work>
bool CallC(CFailure& failure, const Work& work) {
  if (setjmp(failure.back) != 0) return false;
  work();
  return true;
}

}  // namespace sluice

#endif  // SLUICE_PROTO_IMAGE_CODECS_H_
