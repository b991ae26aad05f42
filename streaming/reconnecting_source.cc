#include "streaming/reconnecting_source.h"

#include <algorithm>
#include <cstdio>
#include <utility>

#include "runtime/error.h"
#include "streaming/metrics.h"

namespace sluice {
namespace {

std::string Seconds(std::chrono::nanoseconds time) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f s", static_cast<double>(time.count()) * 1e-9);
  return text;
}

}  // namespace

ReconnectingSource::ReconnectingSource(std::string label, std::unique_ptr<Source> first,
                                       StreamOpener open, const SourceOptions& options,
                                       const Clock& clock, Pause pause)
    : label_(std::move(label)),
      open_(std::move(open)),
      options_(options),
      clock_(clock),
      pause_(pause ? std::move(pause) : [this](std::chrono::milliseconds time) {
        std::unique_lock lock(mutex_);
        cancelling_.wait_for(lock, time, [this] { return cancelled_; });
      }),
      info_(first->info()),
      source_(std::move(first)),
      last_arrival_(clock.Now()),
      current_(source_.get()) {}

void ReconnectingSource::Warn(const std::string& line) const {
  if (options_.on_warning) options_.on_warning("[source] '" + label_ + "': " + line);
}

bool ReconnectingSource::Cancelled() const {
  const std::lock_guard lock(mutex_);
  return cancelled_;
}

void ReconnectingSource::Cancel() {
  {
    const std::lock_guard lock(mutex_);
    cancelled_ = true;
    if (current_) current_->Cancel();
  }
  cancelling_.notify_all();
}

void ReconnectingSource::SetCurrent(Source* source) {
  const std::lock_guard lock(mutex_);
  current_ = source;
  if (cancelled_ && source) source->Cancel();
}

std::optional<std::string> ReconnectingSource::warning() const {
  return source_ ? source_->warning() : std::nullopt;
}

FramePtr ReconnectingSource::Next() {
  while (source_ && !Cancelled()) {
    if (options_.max_frames > 0 && delivered_ >= options_.max_frames) return nullptr;
    std::string broke;
    try {
      FramePtr frame = source_->Next();
      return frame ? Continued(std::move(frame)) : nullptr;
    } catch (const Error& error) {  // a decoder that died is one, too
      if (options_.reconnect.most_tries == 0) throw;
      broke = error.what();
    }
    if (!after_gap_) {
      Warn("broke at " + last_time_.ToString() + " and is opened again (" + broke + ")");
      after_gap_ = true;
      tries_ = 0;
    }
    if (!OpenAgain(broke)) return nullptr;
  }
  return nullptr;
}

bool ReconnectingSource::OpenAgain(const std::string& broke) {
  SetCurrent(nullptr);
  source_.reset();
  std::string why = broke;
  const int most = options_.reconnect.most_tries;
  while (most == ReconnectOptions::kForever || tries_ < most) {
    const auto doubled = options_.reconnect.first_pause * (int64_t{1} << std::min(tries_, 20));
    pause_(std::min<std::chrono::milliseconds>(doubled, options_.reconnect.longest_pause));
    if (Cancelled()) return false;
    ++tries_;
    try {
      source_ = open_([this](Source* source) { SetCurrent(source); });
      SetCurrent(source_.get());
      return true;
    } catch (const Error& error) {
      SetCurrent(nullptr);
      why = error.what();
    }
    if (Cancelled()) return false;
  }
  throw InputError("[source] '" + label_ + "': broke after " + std::to_string(delivered_) +
                   " frames, and opening it again failed " + std::to_string(tries_) +
                   " times; the last time: " + why);
}

std::unique_ptr<Source> KeepOpen(const std::string& label, const SourceOptions& options,
                                 const StreamOpener& open) {
  static const SystemClock clock;
  std::unique_ptr<Source> first = open([](Source*) {});
  if (!first->info().endless || options.reconnect.most_tries == 0) return first;
  return std::make_unique<ReconnectingSource>(label, std::move(first), open, options, clock);
}

// Frames are ours alone until they are handed on, and were made without const.
FramePtr ReconnectingSource::Continued(FramePtr frame) {
  const WallTime now = clock_.Now();
  if (after_gap_) {
    const std::chrono::nanoseconds away = now - last_arrival_;
    const int64_t gap_ns = delivered_ == 0 ? 0 : std::max<int64_t>(away.count(), 1000000);
    const MediaTime resumed = last_time_ + MediaTime::FromNanoseconds(gap_ns);
    offset_ = resumed - frame->time;
    after_gap_ = false;
    if (options_.reconnect.reconnections) options_.reconnect.reconnections->Add();
    Warn("was away for " + Seconds(away) + ": nothing was seen from " + last_time_.ToString() +
         " to " + resumed.ToString() + " (opened again at try " + std::to_string(tries_) + ")");
  }
  tries_ = 0;
  last_arrival_ = now;
  const MediaTime time = frame->time + offset_;
  if (time != frame->time || frame->index != delivered_) {
    const auto own = std::const_pointer_cast<Frame>(frame);
    own->time = time;
    own->index = delivered_;
  }
  last_time_ = time;
  ++delivered_;
  return frame;
}

}  // namespace sluice
