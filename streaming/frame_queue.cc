#include "streaming/frame_queue.h"

#include <utility>

#include "runtime/error.h"

namespace sluice {

FrameQueue::FrameQueue(size_t capacity, DropPolicy policy) : capacity_(capacity), policy_(policy) {
  if (capacity == 0) throw Error("[frame_queue] capacity must be at least 1, got 0");
}

bool FrameQueue::Push(FramePtr frame) {
  std::unique_lock lock(mutex_);
  if (policy_ == DropPolicy::kNone) {
    not_full_.wait(lock, [&] { return frames_.size() < capacity_ || cancelled_; });
  }
  if (cancelled_) return false;
  if (frames_.size() == capacity_) {
    frames_.pop_front();
    ++counts_.dropped;
  }
  frames_.push_back(std::move(frame));
  ++counts_.pushed;
  lock.unlock();
  not_empty_.notify_one();
  return true;
}

void FrameQueue::CloseInput() {
  {
    const std::lock_guard lock(mutex_);
    input_closed_ = true;
  }
  not_empty_.notify_all();
}

FramePtr FrameQueue::Pop() {
  std::unique_lock lock(mutex_);
  not_empty_.wait(lock, [&] { return !frames_.empty() || input_closed_ || cancelled_; });
  if (cancelled_ || frames_.empty()) return nullptr;
  FramePtr frame = std::move(frames_.front());
  frames_.pop_front();
  ++counts_.popped;
  lock.unlock();
  not_full_.notify_one();
  return frame;
}

void FrameQueue::Cancel() {
  {
    const std::lock_guard lock(mutex_);
    cancelled_ = true;
  }
  not_full_.notify_all();
  not_empty_.notify_all();
}

size_t FrameQueue::waiting() const {
  const std::lock_guard lock(mutex_);
  return frames_.size();
}

FrameQueue::Counts FrameQueue::counts() const {
  const std::lock_guard lock(mutex_);
  return counts_;
}

}  // namespace sluice
