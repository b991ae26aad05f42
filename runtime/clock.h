// Media time and wall time are different types.
#ifndef SLUICE_RUNTIME_CLOCK_H_
#define SLUICE_RUNTIME_CLOCK_H_

#include <chrono>
#include <compare>
#include <cstdint>
#include <string>

namespace sluice {

// A position in a stream, from the container's presentation time stamps. Starts at 0 with the
// first frame.
class MediaTime {
 public:
  MediaTime() = default;
  static MediaTime FromSeconds(double seconds) {
    return MediaTime(static_cast<int64_t>(seconds * 1e9 + (seconds < 0 ? -0.5 : 0.5)));
  }
  static MediaTime FromNanoseconds(int64_t ns) { return MediaTime(ns); }
  double seconds() const { return static_cast<double>(ns_) / 1e9; }  // 0.3, not 0.30000000000000004
  int64_t nanoseconds() const { return ns_; }
  auto operator<=>(const MediaTime&) const = default;
  MediaTime operator+(MediaTime o) const { return MediaTime(ns_ + o.ns_); }
  MediaTime operator-(MediaTime o) const { return MediaTime(ns_ - o.ns_); }
  std::string ToString() const;  // "00:01:02.345"

 private:
  explicit MediaTime(int64_t ns) : ns_(ns) {}
  int64_t ns_ = 0;
};

using WallTime = std::chrono::steady_clock::time_point;

// The passing of wall time, passed in so that tests can hold it still. Thread-safe.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual WallTime Now() const = 0;
};

class SystemClock : public Clock {
 public:
  WallTime Now() const override { return std::chrono::steady_clock::now(); }
};

}  // namespace sluice

#endif  // SLUICE_RUNTIME_CLOCK_H_
