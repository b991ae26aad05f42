#include "streaming/moving_webp.h"

#include <webp/decode.h>

#include <algorithm>
#include <fstream>
#include <iterator>

#include "runtime/error.h"

namespace sluice {
namespace {

constexpr uint64_t kMaxBytes = uint64_t{256} << 20;

}  // namespace

MovingWebp::MovingWebp(const std::filesystem::path& path, int max_side_pixels) {
  const uint64_t size = std::filesystem::file_size(path);
  if (size > kMaxBytes) {
    throw Error("a moving WebP may have " + std::to_string(kMaxBytes) + " bytes, it has " +
                std::to_string(size) + "; make a video of it");
  }
  std::ifstream in(path, std::ios::binary);
  bytes_.assign(std::istreambuf_iterator<char>(in), {});
  const WebPData data = {reinterpret_cast<const uint8_t*>(bytes_.data()), bytes_.size()};
  // The size is looked at before memory for it is taken.
  WebPBitstreamFeatures features;
  if (WebPGetFeatures(data.bytes, data.size, &features) != VP8_STATUS_OK) {
    throw Error("damaged: its header cannot be read");
  }
  if (std::max(features.width, features.height) > max_side_pixels) {
    throw Error("pictures are " + std::to_string(features.width) + "x" +
                std::to_string(features.height) + ", the longest side allowed is " +
                std::to_string(max_side_pixels));
  }
  decoder_.reset(WebPAnimDecoderNew(&data, nullptr));
  if (!decoder_ || !WebPAnimDecoderGetInfo(decoder_.get(), &info_)) {
    throw Error("damaged: its pictures cannot be found");
  }
}

MovingWebp::Picture MovingWebp::Next() {
  if (!WebPAnimDecoderHasMoreFrames(decoder_.get())) return {};
  uint8_t* rgba = nullptr;
  int end_ms = 0;
  if (!WebPAnimDecoderGetNext(decoder_.get(), &rgba, &end_ms)) {
    throw Error("a picture at " + std::to_string(next_ms_) + " ms cannot be decoded");
  }
  const Picture picture{.rgba = rgba, .begin_ms = next_ms_, .end_ms = end_ms};
  next_ms_ = std::max<int64_t>(end_ms, next_ms_ + 1);  // pictures may be said to last 0 ms
  return picture;
}

}  // namespace sluice
