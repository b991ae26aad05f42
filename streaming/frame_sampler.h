// Which decoded frames a source hands out. Pure: time stamps in, verdicts out.
//
// By rate: the targets are T_k = begin + k / fps, k = 0, 1, ... A frame at time t, whose
// predecessor came at p, answers the earliest open target T_k if t + tolerance >= T_k, where
// tolerance is the smaller of half the spacing (t - p) / 2 and half the period 1 / (2 fps). At a
// constant frame rate that is the frame nearest to T_k; at a variable one no predecessor's duration
// is guessed. A frame answers every target up to t + tolerance at once, so it is never handed out
// twice: a stream slower than fps yields each of its frames once, and a pause in a stream yields no
// copies.
//
// The reference for offline clips takes n = int(N / source_fps * fps) of N frames, those numbered
// int(arange(0, N, N / n)): evenly spaced over the clip, so the step is N / n frames rather than
// source_fps / fps, rounded down. Both give the same frames where source_fps / fps is whole and
// divides N; elsewhere ours keep to the clock (a stream has no N) and may differ by a frame or more
// towards the end.
//
// Every N-th: frames number 0, N, 2N, ... of those at or after begin.
//
// Only frames in [begin, end) are taken. A frame that is not later than its predecessor (a copied
// or damaged time stamp) is passed over and does not count.
#ifndef SLUICE_STREAMING_FRAME_SAMPLER_H_
#define SLUICE_STREAMING_FRAME_SAMPLER_H_

#include <cstdint>
#include <optional>

#include "streaming/source.h"

namespace sluice {

// Used by one thread at a time.
class FrameSampler {
 public:
  // Throws InputError on a rate or a range that names no frames.
  explicit FrameSampler(const SourceOptions& options);

  enum class Verdict {
    kTake,
    kSkip,
    kEnd,  // this frame and all later ones are beyond the range or the number wanted
  };
  // Frames in presentation order.
  Verdict Decide(MediaTime time);
  // Forgets everything seen: the source starts over, for example after a seek.
  void Reset();

 private:
  bool TakeByRate(MediaTime time);
  MediaTime Target(int64_t k) const;

  const double fps_;
  const int every_nth_;
  const MediaTime begin_;
  const std::optional<MediaTime> end_;
  const int64_t max_frames_;

  std::optional<MediaTime> previous_;
  int64_t next_target_ = 0;
  int64_t in_range_ = 0;  // frames at or after begin
  int64_t taken_ = 0;
};

}  // namespace sluice

#endif  // SLUICE_STREAMING_FRAME_SAMPLER_H_
