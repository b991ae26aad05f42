// Where frames come from: one string names a file, a URI, a camera or a test pattern; GStreamer
// does the rest.
#ifndef SLUICE_STREAMING_SOURCE_H_
#define SLUICE_STREAMING_SOURCE_H_

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "runtime/clock.h"
#include "vision/frame.h"

namespace sluice {

// How frames are picked from the stream, by their time stamps; frame_sampler.h states the rule and
// how it differs from the reference's way with offline clips. A frame is never delivered twice.
struct SamplingRate {
  double fps = 2.0;   // frames a second of media time; used when every_nth is 0
  int every_nth = 0;  // every N-th decoded frame instead
};

class Counter;  // streaming/metrics.h

// What happens when a stream without an end of its own breaks: it is opened again, after pauses
// that double from `first_pause` to `longest_pause`.
struct ReconnectOptions {
  static constexpr int kForever = -1;
  int most_tries = 10;  // in a row; 0: a break is a failure at once; or kForever
  std::chrono::milliseconds first_pause{1000}, longest_pause{30000};
  Counter* reconnections = nullptr;  // counts each success; outlives the source
};

struct SourceOptions {
  SamplingRate rate;
  std::optional<MediaTime> begin, end;  // of recordings: only frames in [begin, end)
  int64_t max_frames = 0;               // stop after so many sampled frames; 0: all
  // A source that delivers nothing for so long has failed. Frames that sampling passes over count
  // as delivered. What comes in segments, as live HLS does, may be late by two of them besides.
  std::chrono::milliseconds stall_timeout{10000};
  ReconnectOptions reconnect;
  // Told, in one line, what goes wrong while the stream goes on, such as the gap where it was
  // opened again. Called by Open and Next on their thread.
  std::function<void(const std::string& line)> on_warning;
  int max_side_pixels = 8192;  // larger pictures are refused
};

struct SourceInfo {
  bool live = false;                  // cannot be asked to wait: read it as fast as it comes
  bool endless = false;               // has no end of its own: live, or a playlist that grows
  std::optional<MediaTime> duration;  // as the container says; none of live sources
  int width = 0, height = 0;          // of the first frame; later ones may differ
  std::string codec;                  // "H.264 (High Profile)"
};

// A stream of frames: upright as the stream says, in the stream's own colour matrix, HDR and
// BT.2020 mapped to ordinary pictures (tone_map.h), never scaled (pixels that are not square stay
// so). Frame times begin at 0 with the first frame of the stream, also when `begin` skips it. Used
// by one thread at a time, except Cancel.
class Source {
 public:
  // `source`: a path, also of a named pipe, "-" (standard input), file://, http(s)://, rtsp(s)://,
  // "camera" or "camera:/dev/videoN", "test" or "test:PATTERN[:SECONDS]" (GStreamer's videotestsrc
  // at 640x480 and 30 frames a second, e.g. "test:smpte:3"; live and endless without SECONDS; the
  // pattern "camera" is a moving ball). Waits until the first frame's format is known. Throws
  // InputError in one line: missing path, directory, empty or unreadable file, not a media file, no
  // video in it, unsupported codec (named), pictures larger than allowed, no key frame in it,
  // stall.
  static std::unique_ptr<Source> Open(const std::string& source, const SourceOptions& options);
  virtual ~Source() = default;

  virtual const SourceInfo& info() const = 0;
  // The next sampled frame, or null at the end of the stream (or after Cancel). An endless stream
  // that stalls or breaks is opened again as the options say; its frames then go on in time by the
  // wall time that passed between. Throws InputError on a stall, when that was in vain, and when a
  // recording ends before `begin`. A damaged recording delivers what could be decoded and ends with
  // a warning; it throws when that is not a single frame.
  virtual FramePtr Next() = 0;
  // Wakes Next; it then returns null. Thread-safe.
  virtual void Cancel() = 0;
  // Set at the end of a stream that was damaged or cut off, that did not begin with a key frame, or
  // of which a part was not read: one line that says what is missing.
  virtual std::optional<std::string> warning() const = 0;
};

}  // namespace sluice

#endif  // SLUICE_STREAMING_SOURCE_H_
