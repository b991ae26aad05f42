// What the fuzzers of picture files share.
#ifndef SLUICE_TESTS_FUZZ_PICTURE_H_
#define SLUICE_TESTS_FUZZ_PICTURE_H_

#include <cstdlib>
#include <string_view>

#include "proto/image_decoder.h"

namespace sluice {

// Under limits tight enough for a fuzzer to see that they hold: 64 MiB and a second are findings.
inline void FuzzPicture(ImageFormat format, std::string_view bytes) {
  constexpr ImageLimits kLimits{.pixels = 1 << 16, .bytes = int64_t{48} << 20, .seconds = 0.25};
  Frame frame;
  DecodeImage(format, bytes, kLimits, frame);
  const int64_t pixels = int64_t{frame.width} * frame.height;
  if (pixels < 1 || pixels > kLimits.pixels ||
      frame.rgb.size() != static_cast<size_t>(3 * pixels)) {
    std::abort();
  }
}

}  // namespace sluice

#endif  // SLUICE_TESTS_FUZZ_PICTURE_H_
