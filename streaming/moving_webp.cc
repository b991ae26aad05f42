#include <webp/decode.h>
#include <webp/demux.h>

#include <algorithm>
#include <utility>

#include "runtime/error.h"
#include "streaming/moving_picture.h"

namespace sluice {
namespace {

using std::chrono::milliseconds;

class MovingWebp final : public MovingPicture {
 public:
  MovingWebp(std::string bytes, int max_side_pixels) : bytes_(std::move(bytes)) {
    const WebPData data = {reinterpret_cast<const uint8_t*>(bytes_.data()), bytes_.size()};
    // The size is looked at before memory for it is taken.
    WebPBitstreamFeatures features;
    if (WebPGetFeatures(data.bytes, data.size, &features) != VP8_STATUS_OK) {
      throw Error("damaged: its header cannot be read");
    }
    CheckSides(features.width, features.height, max_side_pixels);
    decoder_.reset(WebPAnimDecoderNew(&data, nullptr));
    if (!decoder_ || !WebPAnimDecoderGetInfo(decoder_.get(), &info_)) {
      throw Error("damaged: its pictures cannot be found");
    }
  }

  int width() const override { return static_cast<int>(info_.canvas_width); }
  int height() const override { return static_cast<int>(info_.canvas_height); }

  Picture Next() override {
    if (!WebPAnimDecoderHasMoreFrames(decoder_.get())) return {};
    uint8_t* rgba = nullptr;
    int end_ms = 0;
    if (!WebPAnimDecoderGetNext(decoder_.get(), &rgba, &end_ms)) {
      throw Error("a picture at " + std::to_string(next_ms_) + " ms cannot be decoded");
    }
    const Picture picture{
        .rgba = rgba, .begin = milliseconds(next_ms_), .end = milliseconds(end_ms)};
    next_ms_ = std::max<int64_t>(end_ms, next_ms_ + 1);  // pictures may be said to last 0 ms
    return picture;
  }

 private:
  struct Delete {
    void operator()(WebPAnimDecoder* decoder) const { WebPAnimDecoderDelete(decoder); }
  };
  const std::string bytes_;
  std::unique_ptr<WebPAnimDecoder, Delete> decoder_;
  WebPAnimInfo info_ = {};
  int64_t next_ms_ = 0;
};

}  // namespace

std::unique_ptr<MovingPicture> ReadMovingWebp(std::string bytes, int max_side_pixels) {
  return std::make_unique<MovingWebp>(std::move(bytes), max_side_pixels);
}

}  // namespace sluice
