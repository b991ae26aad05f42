// The pictures of a moving WebP, which no element of GStreamer 1.22 reads.
#ifndef SLUICE_STREAMING_MOVING_WEBP_H_
#define SLUICE_STREAMING_MOVING_WEBP_H_

#include <webp/demux.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

namespace sluice {

// Used by one thread at a time.
class MovingWebp {
 public:
  // Throws Error on a file that is damaged, larger than 256 MiB, or whose pictures have a side
  // above `max_side_pixels`. Memory: the file and three pictures.
  MovingWebp(const std::filesystem::path& path, int max_side_pixels);

  int width() const { return static_cast<int>(info_.canvas_width); }
  int height() const { return static_cast<int>(info_.canvas_height); }

  struct Picture {
    const uint8_t* rgba = nullptr;  // [height, width, 4], valid until the next call; null: the end
    int64_t begin_ms = 0, end_ms = 0;
  };
  // Throws Error on a damaged picture.
  Picture Next();

 private:
  struct Delete {
    void operator()(WebPAnimDecoder* decoder) const { WebPAnimDecoderDelete(decoder); }
  };
  std::string bytes_;
  std::unique_ptr<WebPAnimDecoder, Delete> decoder_;
  WebPAnimInfo info_ = {};
  int64_t next_ms_ = 0;
};

}  // namespace sluice

#endif  // SLUICE_STREAMING_MOVING_WEBP_H_
