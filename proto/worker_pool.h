// A few threads for work that must not hold up the network: decoding pictures, carrying out
// requests. Thread-safe.
#ifndef SLUICE_PROTO_WORKER_POOL_H_
#define SLUICE_PROTO_WORKER_POOL_H_

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "runtime/thread_name.h"
namespace sluice {

class WorkerPool {
 public:
  // name: of the threads, as NameThread has it.
  WorkerPool(const char* name, int threads) {
    for (int i = 0; i < threads; ++i) {
      threads_.emplace_back([this, name] {
        NameThread(name);
        Work();
      });
    }
  }
  // Finishes what was posted.
  ~WorkerPool() {
    {
      const std::lock_guard lock(mutex_);
      ending_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  // Jobs of the same `whose` begin in the order in which they came; different ones take turns, so
  // that who posts many waits for nobody but himself. `job` must not throw.
  void Post(const void* whose, std::function<void()> job) {
    {
      const std::lock_guard lock(mutex_);
      auto line = std::ranges::find(lines_, whose, &Line::whose);
      if (line == lines_.end()) line = lines_.insert(line, {whose, {}});
      line->jobs.push_back(std::move(job));
    }
    changed_.notify_one();
  }

  // Returns when nothing is posted or under way.
  void WaitUntilIdle() {
    std::unique_lock lock(mutex_);
    idle_.wait(lock, [this] { return lines_.empty() && busy_ == 0; });
  }

 private:
  struct Line {
    const void* whose;
    std::deque<std::function<void()>> jobs;
  };
  void Work() {
    std::unique_lock lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return ending_ || !lines_.empty(); });
      if (lines_.empty()) return;
      Line line = std::move(lines_.front());
      lines_.pop_front();
      auto job = std::move(line.jobs.front());
      line.jobs.pop_front();
      if (!line.jobs.empty()) lines_.push_back(std::move(line));
      ++busy_;
      lock.unlock();
      job();
      job = nullptr;  // what it held is let go without the lock
      lock.lock();
      --busy_;
      if (lines_.empty() && busy_ == 0) idle_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_, idle_;
  std::deque<Line> lines_;  // with jobs that wait, in the order of their turns
  int busy_ = 0;
  bool ending_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace sluice

#endif  // SLUICE_PROTO_WORKER_POOL_H_
