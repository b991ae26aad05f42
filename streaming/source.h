// Where frames come from: one string names a file, a URI, a camera or a test pattern; GStreamer
// does the rest.
#ifndef SLUICE_STREAMING_SOURCE_H_
#define SLUICE_STREAMING_SOURCE_H_

#include <chrono>
#include <memory>
#include <optional>
#include <string>

#include "runtime/clock.h"
#include "vision/frame.h"

namespace sluice {

// How frames are picked from the stream.
struct SamplingRate {
  double fps = 2.0;   // frames a second of media time; used when every_nth is 0
  int every_nth = 0;  // every N-th decoded frame instead
};

struct SourceOptions {
  SamplingRate rate;
  std::optional<MediaTime> begin, end;  // of files: only this part
  int64_t max_frames = 0;               // stop after so many sampled frames; 0: all
  std::chrono::milliseconds stall_timeout{
      10000};                  // a source that delivers nothing for so long has failed
  int max_side_pixels = 8192;  // larger pictures are refused
};

struct SourceInfo {
  bool live = false;
  std::optional<MediaTime> duration;
  int width = 0, height = 0;
  std::string codec;
};

// A stream of frames. Used by one thread at a time, except Cancel.
class Source {
 public:
  // `source`: a path, file://, http(s)://, rtsp://, "camera" or "camera:/dev/videoN", "test" or
  // "test:PATTERN[:SECONDS]" (GStreamer's videotestsrc, e.g. "test:smpte:3"). Waits until the first
  // frame's format is known. Throws InputError in one line: missing path, directory, empty file,
  // not a media file, no video in it, unsupported codec (named), stall.
  static std::unique_ptr<Source> Open(const std::string& source, const SourceOptions& options);
  virtual ~Source() = default;

  virtual const SourceInfo& info() const = 0;
  // The next sampled frame, or null at the end of the stream (or after Cancel). Throws InputError
  // when the stream breaks (for example a truncated file, after all frames that could be decoded
  // were delivered it just ends if at least one came).
  virtual FramePtr Next() = 0;
  // Wakes Next; it then returns null. Thread-safe.
  virtual void Cancel() = 0;
  // Set when the stream ended early because it was damaged: one line that says so.
  virtual std::optional<std::string> warning() const = 0;
};

}  // namespace sluice

#endif  // SLUICE_STREAMING_SOURCE_H_
