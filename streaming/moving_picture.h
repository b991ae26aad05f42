// The pictures of a moving PNG or WebP, which no element of GStreamer 1.22 reads.
#ifndef SLUICE_STREAMING_MOVING_PICTURE_H_
#define SLUICE_STREAMING_MOVING_PICTURE_H_

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

#include "streaming/container_file.h"

namespace sluice {

// Used by one thread at a time.
class MovingPicture {
 public:
  struct Picture {
    const uint8_t* rgba = nullptr;  // [height, width, 4], valid until the next call; null: the end
    std::chrono::nanoseconds begin{0}, end{0};
  };

  virtual ~MovingPicture() = default;
  virtual int width() const = 0;
  virtual int height() const = 0;
  // Throws Error on a damaged picture.
  virtual Picture Next() = 0;
};

// `format` is not kNone. Throws Error on a file that is damaged, larger than 256 MiB, or whose
// pictures have a side above `max_side_pixels`. Memory: the file and three pictures.
std::unique_ptr<MovingPicture> OpenMovingPicture(MovingFormat format,
                                                 const std::filesystem::path& path,
                                                 int max_side_pixels);

// The two formats. `bytes` is the whole file. Throw as above.
std::unique_ptr<MovingPicture> ReadMovingPng(std::string bytes, int max_side_pixels);
std::unique_ptr<MovingPicture> ReadMovingWebp(std::string bytes, int max_side_pixels);

// Throws Error when a side is above `max_side_pixels`.
void CheckSides(int64_t width, int64_t height, int max_side_pixels);

}  // namespace sluice

#endif  // SLUICE_STREAMING_MOVING_PICTURE_H_
