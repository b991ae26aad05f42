// Opens a stream again when it breaks.
#ifndef SLUICE_STREAMING_RECONNECTING_SOURCE_H_
#define SLUICE_STREAMING_RECONNECTING_SOURCE_H_

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "runtime/clock.h"
#include "streaming/source.h"

namespace sluice {

// Opens the stream anew, or throws InputError. Calls `announce` with the source before it waits for
// anything, so that it can be cancelled, and with null once that source is gone because it failed.
using StreamOpener =
    std::function<std::unique_ptr<Source>(const std::function<void(Source*)>& announce)>;

// Frames go on in number and in time: the media time between the last frame before a gap and the
// first one after it is the wall time that passed. Threads as of Source.
class ReconnectingSource final : public Source {
 public:
  using Pause = std::function<void(std::chrono::milliseconds)>;

  // `label` names the source in messages. `clock` outlives this. `pause` waits, and is left early
  // by Cancel; tests replace it.
  ReconnectingSource(std::string label, std::unique_ptr<Source> first, StreamOpener open,
                     const SourceOptions& options, const Clock& clock, Pause pause = {});

  const SourceInfo& info() const override { return info_; }
  FramePtr Next() override;
  void Cancel() override;
  std::optional<std::string> warning() const override;

 private:
  bool Cancelled() const;
  // Returns false when cancelled. Throws what made the last try fail.
  bool OpenAgain(const std::string& broke);
  void SetCurrent(Source* source);
  FramePtr Continued(FramePtr frame);
  void Warn(const std::string& line) const;

  const std::string label_;
  const StreamOpener open_;
  const SourceOptions options_;
  const Clock& clock_;
  const Pause pause_;
  const SourceInfo info_;
  std::unique_ptr<Source> source_;
  int64_t delivered_ = 0;
  MediaTime last_time_;    // of the frame delivered last
  WallTime last_arrival_;  // and when that was
  bool after_gap_ = false;
  int tries_ = 0;     // in a row, since a frame was delivered
  MediaTime offset_;  // from the source's times to ours

  mutable std::mutex mutex_;
  std::condition_variable cancelling_;
  bool cancelled_ = false;
  Source* current_ = nullptr;  // whom Cancel has to reach
};

// Opens the stream, and again whenever it breaks if it is one without an end of its own.
std::unique_ptr<Source> KeepOpen(const std::string& label, const SourceOptions& options,
                                 const StreamOpener& open);

}  // namespace sluice

#endif  // SLUICE_STREAMING_RECONNECTING_SOURCE_H_
