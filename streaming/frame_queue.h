// Frames on their way from a source to the worker: bounded, and it says what it drops.
// Thread-safe; one producer, one consumer.
#ifndef SLUICE_STREAMING_FRAME_QUEUE_H_
#define SLUICE_STREAMING_FRAME_QUEUE_H_

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>

#include "vision/frame.h"

namespace sluice {

enum class DropPolicy {
  kNone,        // a full queue makes the producer wait: files
  kDropOldest,  // a full queue loses its oldest frame: live sources, where the present matters
};

class FrameQueue {
 public:
  // capacity: frames that may wait, at least 1.
  FrameQueue(size_t capacity, DropPolicy policy);

  // Waits for room or makes some, as the policy says. Returns false, and forgets the frame, once
  // the consumer has cancelled.
  bool Push(FramePtr frame);
  // No more frames will come; Pop drains what is there.
  void CloseInput();
  // The oldest frame; waits for one. Returns null at the end of the stream or after Cancel.
  FramePtr Pop();
  // The consumer wants no more: wakes both sides.
  void Cancel();

  // Frames that Pop would return without waiting, unless the producer drops them first.
  size_t waiting() const;
  struct Counts {
    int64_t pushed = 0, popped = 0, dropped = 0;  // pushed = popped + dropped + waiting
  };
  Counts counts() const;

 private:
  const size_t capacity_;
  const DropPolicy policy_;
  mutable std::mutex mutex_;
  std::condition_variable not_full_, not_empty_;
  std::deque<FramePtr> frames_;
  Counts counts_;
  bool input_closed_ = false, cancelled_ = false;
};

}  // namespace sluice

#endif  // SLUICE_STREAMING_FRAME_QUEUE_H_
