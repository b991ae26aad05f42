// Steps that recur, replayed as CUDA graphs.
//
// A step is host code that queues kernels. The first time it runs as it is, the second time what it
// queues is captured, from then on its host code runs without launching anything: it only notes
// what each op would work on and writes the numbers that change (positions, tables of blocks) where
// the graph's kernels read them. If all ops got the same tensors as when a graph was captured, one
// launch replays it; else another is captured beside it, and the few used last are kept: caches of
// different lengths need different ones. So a step need not know that it is replayed, and cannot
// replay something else by mistake.
#ifndef SLUICE_RUNTIME_OPS_CUDA_RECORDER_H_
#define SLUICE_RUNTIME_OPS_CUDA_RECORDER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "runtime/ops/cuda/device.h"

namespace sluice::cuda {

// Belongs to one context and its stream.
class Recorder {
 public:
  explicit Recorder(Stream stream);
  ~Recorder();
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;

  // Runs `step`, possibly twice: it must change nothing on the host that it reads. Inside, memory
  // on the device comes from the workspace only, and nothing waits for the device. key: what the
  // step is and the sizes that recur. Throws what `step` throws, and Error with what the device
  // reported.
  void Run(const std::string& key, const std::function<void()>& step);

  // Inside a step that is captured or replayed:
  bool active() const { return mode_ != Mode::kDirect; }
  bool replaying() const { return mode_ == Mode::kReplaying; }
  void Note(uint64_t value);  // something that must be the same when replayed
  // Numbers that may differ each time, where kernels of the step find them.
  const int32_t* Numbers(std::span<const int32_t> numbers);

  struct Counts {
    int64_t direct = 0, captured = 0, replayed = 0;  // steps
  };
  const Counts& counts() const { return counts_; }

 private:
  enum class Mode { kDirect, kCapturing, kReplaying };
  struct Recording;
  struct State;
  class Running;
  bool Replay(Recording& recording, const std::function<void()>& step);
  void Capture(Recording& recording, const std::function<void()>& step);
  void LaunchNewest(Recording& recording);

  const Stream stream_;
  Mode mode_ = Mode::kDirect;
  Counts counts_;
  std::unique_ptr<State> state_;
};

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_RECORDER_H_
