#include <cstdlib>

#include "proto/image_decoder.h"
#include "runtime/error.h"
#include "tests/fuzz/targets.h"

namespace sluice {

void FuzzImage(std::string_view bytes) {
  constexpr int64_t kMaxPixels = 1 << 20;
  if (bytes.size() < 5) throw InputError("[fuzz] expected five bytes, got fewer");
  const auto byte = [&](size_t at) {
    return static_cast<int64_t>(static_cast<uint8_t>(bytes[at]));
  };
  Frame frame;
  if (const int64_t format = byte(0) % 4; format < 3) {
    DecodeImage(static_cast<ImageFormat>(format), bytes.substr(1), kMaxPixels, frame);
  } else {
    TakeRawImage(byte(1) | byte(2) << 8, byte(3) | byte(4) << 8, bytes.substr(5), kMaxPixels,
                 frame);
  }
  const int64_t pixels = int64_t{frame.width} * frame.height;
  if (pixels < 1 || pixels > kMaxPixels || frame.rgb.size() != static_cast<size_t>(3 * pixels)) {
    std::abort();
  }
}

}  // namespace sluice
