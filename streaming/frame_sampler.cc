#include "streaming/frame_sampler.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "runtime/error.h"

namespace sluice {

FrameSampler::FrameSampler(const SourceOptions& options)
    : fps_(options.rate.fps),
      every_nth_(options.rate.every_nth),
      begin_(options.begin.value_or(MediaTime())),
      end_(options.end),
      max_frames_(options.max_frames) {
  if (every_nth_ < 0) {
    throw InputError("[source] every_nth must be 0 (off) or positive, got " +
                     std::to_string(every_nth_));
  }
  // Above 1000 frames a second the targets would be closer than the time stamps of most containers.
  if (every_nth_ == 0 && !(fps_ > 0 && fps_ <= 1000)) {
    throw InputError("[source] fps must be above 0 and at most 1000, got " + std::to_string(fps_));
  }
  if (begin_ < MediaTime()) {
    throw InputError("[source] begin must not be negative, got " +
                     std::to_string(begin_.seconds()) + " s");
  }
  if (end_ && *end_ <= begin_) {
    throw InputError("[source] end must be later than begin (" + begin_.ToString() + "), got " +
                     end_->ToString());
  }
  if (max_frames_ < 0) {
    throw InputError("[source] max_frames must be 0 (all) or positive, got " +
                     std::to_string(max_frames_));
  }
}

void FrameSampler::Reset() {
  previous_.reset();
  next_target_ = in_range_ = taken_ = 0;
}

FrameSampler::Verdict FrameSampler::Decide(MediaTime time) {
  if ((end_ && time >= *end_) || (max_frames_ > 0 && taken_ >= max_frames_)) return Verdict::kEnd;
  if (previous_ && time <= *previous_) return Verdict::kSkip;
  bool take = false;
  if (time >= begin_) {
    take = every_nth_ > 0 ? in_range_ % every_nth_ == 0 : TakeByRate(time);
    ++in_range_;
  }
  previous_ = time;
  if (!take) return Verdict::kSkip;
  ++taken_;
  return Verdict::kTake;
}

MediaTime FrameSampler::Target(int64_t k) const {
  return begin_ + MediaTime::FromSeconds(static_cast<double>(k) / fps_);
}

bool FrameSampler::TakeByRate(MediaTime time) {
  const int64_t half_period_ns = std::llround(0.5e9 / fps_);
  // The first frame in range has no spacing: a source that sought never saw what came before.
  const int64_t half_spacing_ns = in_range_ > 0 ? (time - *previous_).nanoseconds() / 2 : 0;
  const MediaTime reach =
      time + MediaTime::FromNanoseconds(std::min(half_period_ns, half_spacing_ns));
  if (reach < Target(next_target_)) return false;
  // Start just below the estimate, whose rounding may be off by one either way.
  const auto estimate = static_cast<int64_t>((reach - begin_).seconds() * fps_) - 1;
  next_target_ = std::max(next_target_, estimate);
  while (Target(next_target_) <= reach) ++next_target_;
  return true;
}

}  // namespace sluice
