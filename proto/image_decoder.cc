#include "proto/image_decoder.h"

#include <time.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "proto/convert.h"
#include "proto/image_codecs.h"
#include "runtime/error.h"

namespace sluice {
namespace {

using namespace std::string_view_literals;

std::string Text(int64_t width, int64_t height) {
  return std::to_string(width) + "x" + std::to_string(height);
}

double ThreadSeconds() {
  timespec time = {};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

struct Format {
  const char* name;
  bool (*begins)(std::string_view bytes);
  Orientation (*decode)(std::string_view bytes, const ImageLimits& limits, Frame& frame);
};
constexpr Format kFormats[] = {
    {"JPEG", [](std::string_view bytes) { return bytes.starts_with("\xFF\xD8"sv); }, DecodeJpeg},
    {"PNG", [](std::string_view bytes) { return bytes.starts_with("\x89PNG\r\n\x1A\n"sv); },
     DecodePng},
    {"WebP",
     [](std::string_view bytes) {
       return bytes.starts_with("RIFF"sv) &&
              bytes.substr(std::min<size_t>(bytes.size(), 8)).starts_with("WEBP"sv);
     },
     DecodeWebp}};

}  // namespace

// Sides are checked alone first, so that their product cannot overflow.
void CheckImageSize(int64_t width, int64_t height, const ImageLimits& limits) {
  if (width < 1 || height < 1 || width > limits.side || height > limits.side) {
    throw InputError("[frame] expected sides of 1 to " + std::to_string(limits.side) +
                     " pixels, got " + Text(width, height) + "; send a smaller picture");
  }
  if (width * height > limits.pixels) {
    throw InputError("[frame] expected 1 to " + std::to_string(limits.pixels) + " pixels, got " +
                     Text(width, height) + "; send a smaller picture");
  }
}

void ThrowDamaged(const char* format, std::string_view why) {
  throw InputError("[frame] the " + std::string(format) + " file is damaged: " + Utf8(why));
}

void ThrowTooSlow(const char* format, const ImageLimits& limits) {
  throw InputError("[frame] decoding the " + std::string(format) + " file takes more than " +
                   std::to_string(limits.seconds) + " s; send a smaller or simpler picture");
}

DecodeTimer::DecodeTimer(double seconds) : end_(ThreadSeconds() + seconds) {}

bool DecodeTimer::Over() {
  // Asking the system takes as long as decoding some hundred pixels.
  if (!over_ && calls_++ % 8 == 0) over_ = ThreadSeconds() >= end_;
  return over_;
}

void DecodeImage(ImageFormat format, std::string_view bytes, const ImageLimits& limits,
                 Frame& frame) {
  const Format& of = kFormats[static_cast<int>(format)];
  if (!of.begins(bytes)) {
    throw InputError("[frame] expected a " + std::string(of.name) + " file, got other bytes");
  }
  const Orientation stored = of.decode(bytes, limits, frame);
  if (stored == Orientation::kUpright) return;
  const std::vector<uint8_t> rgb = std::move(frame.rgb);
  CopyUpright(rgb.data(), size_t{3} * frame.width, frame.width, frame.height, stored, frame);
}

void TakeRawImage(int64_t width, int64_t height, std::string_view bytes, const ImageLimits& limits,
                  Frame& frame) {
  CheckImageSize(width, height, limits);
  if (bytes.size() != static_cast<size_t>(width * height * 3)) {
    throw InputError("[frame] expected " + std::to_string(width * height * 3) + " bytes for " +
                     Text(width, height) + " pixels, got " + std::to_string(bytes.size()));
  }
  frame.width = static_cast<int>(width);
  frame.height = static_cast<int>(height);
  frame.rgb.assign(bytes.begin(), bytes.end());
}

}  // namespace sluice
