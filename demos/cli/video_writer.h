// Writes H.264 in mp4 through GStreamer (x264).
#ifndef SLUICE_DEMOS_CLI_VIDEO_WRITER_H_
#define SLUICE_DEMOS_CLI_VIDEO_WRITER_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>

namespace sluice::cli {

// Frames of constant size at a constant rate. Used by one thread at a time.
class VideoWriter {
 public:
  // Throws Error when the file cannot be made or a GStreamer plugin is missing (named).
  VideoWriter(const std::filesystem::path& path, int width, int height, int fps);
  // Without Finish the file is left unfinished.
  ~VideoWriter();
  VideoWriter(const VideoWriter&) = delete;
  VideoWriter& operator=(const VideoWriter&) = delete;

  // rgb: [height, width, 3]; width must be a multiple of 4 (GStreamer pads rows to 4 bytes).
  // Waits while the encoder has enough to do. Throws Error when encoding fails.
  void Write(std::span<const uint8_t> rgb);
  // Waits until everything is on disk. Throws Error when that fails.
  void Finish();

 private:
  struct Pipeline;
  std::unique_ptr<Pipeline> pipeline_;
  const int width_, height_, fps_;
  int64_t frames_ = 0;
};

}  // namespace sluice::cli

#endif  // SLUICE_DEMOS_CLI_VIDEO_WRITER_H_
