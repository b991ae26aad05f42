#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "runtime/ops/cuda/recorder.h"
#include "runtime/ops/cuda/status.cuh"

namespace sluice::cuda {
namespace {

constexpr size_t kFirstNumbers = size_t{1} << 12;
constexpr uint64_t kSeed = 0xcbf29ce484222325u;
constexpr size_t kMostGraphs = 8;  // of a step
// A step is not worth capturing whose ops differ from all its graphs so often, or more often than
// in one of four cases.
constexpr int64_t kFreeCaptures = 32;
// Graphs take memory on the device, and steps of streams that have ended do not come again.
constexpr size_t kMostRecordings = 256;

}  // namespace

struct Recorder::Recording {
  struct Graph {
    uint64_t hash = 0;  // of what its ops work on
    size_t used = 0;    // numbers
    cudaGraphExec_t run = nullptr;
  };
  bool seen = false;
  int64_t captured = 0, replayed = 0;
  uint64_t last_run = 0;
  std::vector<Graph> graphs;  // the one used last comes last
  // The step's numbers: written on the host, copied in front of each launch.
  int32_t* host = nullptr;
  int32_t* device = nullptr;
  size_t capacity = 0;
  cudaEvent_t copied = nullptr;  // when `host` may be written again

  Recording() = default;
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;
  ~Recording() {
    ForgetAll();
    if (copied) cudaEventDestroy(copied);
    cudaFreeHost(host);
    cudaFree(device);
  }
  bool IsWorthCapturing() const { return captured < kFreeCaptures + replayed / 4; }
  void ForgetAll() {
    for (const Graph& graph : graphs) cudaGraphExecDestroy(graph.run);
    graphs.clear();
  }
  void MakeRoom(size_t numbers) {
    if (numbers <= capacity) return;
    ForgetAll();  // their kernels read what is freed here
    cudaFreeHost(host);
    cudaFree(device);
    host = device = nullptr;
    capacity = 0;
    Check(cudaMallocHost(&host, numbers * sizeof(int32_t)), "allocating host memory");
    Check(cudaMalloc(&device, numbers * sizeof(int32_t)), "allocating device memory");
    if (!copied)
      Check(cudaEventCreateWithFlags(&copied, cudaEventDisableTiming), "making an event");
    capacity = numbers;
  }
};

struct Recorder::State {
  std::map<std::string, Recording> recordings;
  uint64_t runs = 0;
  // Of the step that runs.
  Recording* current = nullptr;
  uint64_t hash = kSeed;
  size_t used = 0;
};

// While a step runs; ends it however it goes.
class Recorder::Running {
 public:
  Running(Recorder& recorder, Recording& recording, Mode mode) : recorder_(recorder) {
    recorder.mode_ = mode;
    recorder.state_->current = &recording;
    recorder.state_->hash = kSeed;
    recorder.state_->used = 0;
  }
  ~Running() {
    recorder_.mode_ = Mode::kDirect;
    recorder_.state_->current = nullptr;
  }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;

 private:
  Recorder& recorder_;
};

Recorder::Recorder(Stream stream) : stream_(stream), state_(std::make_unique<State>()) {}

Recorder::~Recorder() { cudaStreamSynchronize(stream_); }

void Recorder::Note(uint64_t value) {
  state_->hash = (state_->hash ^ value) * 0x9E3779B97F4A7C15u;
  state_->hash ^= state_->hash >> 32;
}

const int32_t* Recorder::Numbers(std::span<const int32_t> numbers) {
  Recording& recording = *state_->current;
  const size_t at = state_->used;
  state_->used += (numbers.size() + 3) / 4 * 4;
  Note(numbers.size());
  // Beyond the room nothing will be launched: Run makes more and begins again.
  if (state_->used > recording.capacity) return recording.device;
  std::memcpy(recording.host + at, numbers.data(), numbers.size_bytes());
  return recording.device + at;
}

void Recorder::Run(const std::string& key, const std::function<void()>& step) {
  if (active()) return step();  // a part of a step
  Recording& recording = state_->recordings[key];
  recording.last_run = ++state_->runs;
  if (state_->recordings.size() > kMostRecordings) {
    state_->recordings.erase(std::min_element(
        state_->recordings.begin(), state_->recordings.end(),
        [](const auto& a, const auto& b) { return a.second.last_run < b.second.last_run; }));
  }
  if (!recording.graphs.empty() && Replay(recording, step)) {
    ++recording.replayed;
    ++counts_.replayed;
    return;
  }
  if (!std::exchange(recording.seen, true) || !recording.IsWorthCapturing()) {
    ++counts_.direct;
    return step();
  }
  ++recording.captured;
  ++counts_.captured;
  Capture(recording, step);
}

bool Recorder::Replay(Recording& recording, const std::function<void()>& step) {
  Check(cudaEventSynchronize(recording.copied), "waiting for a copy");
  {
    const Running running(*this, recording, Mode::kReplaying);
    step();
  }
  const auto same = std::find_if(recording.graphs.begin(), recording.graphs.end(),
                                 [&](const Recording::Graph& graph) {
                                   return graph.hash == state_->hash && graph.used == state_->used;
                                 });
  if (same == recording.graphs.end()) return false;
  std::rotate(same, same + 1, recording.graphs.end());
  LaunchNewest(recording);
  return true;
}

void Recorder::Capture(Recording& recording, const std::function<void()>& step) {
  recording.MakeRoom(kFirstNumbers);
  const CaptureScope capture;  // until the graph, which may use what the step freed, is launched
  for (;;) {
    Check(cudaEventSynchronize(recording.copied), "waiting for a copy");
    cudaGraph_t graph = nullptr;
    {
      const Running running(*this, recording, Mode::kCapturing);
      Check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed), "beginning a capture");
      try {
        step();
      } catch (...) {
        cudaStreamEndCapture(stream_, &graph);
        if (graph) cudaGraphDestroy(graph);
        cudaGetLastError();
        throw;
      }
      Check(cudaStreamEndCapture(stream_, &graph), "ending a capture");
    }
    if (state_->used > recording.capacity) {
      cudaGraphDestroy(graph);
      recording.MakeRoom(2 * state_->used);
      continue;
    }
    Recording::Graph made{state_->hash, state_->used};
    const cudaError_t error = cudaGraphInstantiate(&made.run, graph, 0);
    cudaGraphDestroy(graph);
    Check(error, "making a graph");
    if (recording.graphs.size() == kMostGraphs) {
      cudaGraphExecDestroy(recording.graphs.front().run);
      recording.graphs.erase(recording.graphs.begin());
    }
    recording.graphs.push_back(made);
    return LaunchNewest(recording);
  }
}

void Recorder::LaunchNewest(Recording& recording) {
  const Recording::Graph& graph = recording.graphs.back();
  if (graph.used > 0) {
    Check(cudaMemcpyAsync(recording.device, recording.host, graph.used * sizeof(int32_t),
                          cudaMemcpyHostToDevice, stream_),
          "copying a step's numbers");
    Check(cudaEventRecord(recording.copied, stream_), "marking a copy");
  }
  Check(cudaGraphLaunch(graph.run, stream_), "launching a graph");
}

}  // namespace sluice::cuda
