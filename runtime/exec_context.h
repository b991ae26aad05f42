// What one step of work runs with: threads or a GPU's stream, scratch memory, the tracer. Passed,
// never looked up.
// Belongs to one thread at a time; contexts of different threads share nothing.
#ifndef SLUICE_RUNTIME_EXEC_CONTEXT_H_
#define SLUICE_RUNTIME_EXEC_CONTEXT_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "runtime/ops/cuda/device.h"
#include "runtime/ops/cuda/recorder.h"
#include "runtime/tensor.h"
#include "runtime/trace.h"
#include "runtime/workspace.h"

namespace sluice {

namespace cuda {
class Products;  // runtime/ops/cuda/linear.h
}
class ProductCache;  // prepared oneDNN primitives, see runtime/ops/cpu/product_cache.h

// Which implementations ops may choose.
enum class KernelChoice { kFast, kReference };

struct ExecOptions {
  int num_threads = 1;
  KernelChoice kernels = KernelChoice::kFast;
  Device device = Device::kCpu;  // where ops run and their tensors lie
};

class ExecContext {
 public:
  explicit ExecContext(const ExecOptions& options);
  ~ExecContext();
  ExecContext(const ExecContext&) = delete;
  ExecContext& operator=(const ExecContext&) = delete;

  // Of loops over host memory in this context; 1 on a GPU, whose ops need no more to queue them.
  int num_threads() const { return device() == Device::kCpu ? options_.num_threads : 1; }
  Device device() const { return options_.device; }
  // A context for what is done in host memory, with as many threads as the options say: this one on
  // the CPU.
  ExecContext& host();
  // Where everything this context does on the GPU is queued; null on the CPU.
  cuda::Stream stream() const { return stream_; }
  // Calls launch(args..., stream()), which queues an op's kernels, unless the step that the op is
  // part of is replayed.
  template <typename Launch, typename... Args>
  void Queue(const Launch& launch, const Args&... args) {
    if (!recorder_->replaying()) launch(args..., stream_);
  }
  // Runs a step that recurs, on a GPU as a graph from the third time on: see
  // runtime/ops/cuda/recorder.h for what it may do. key: what it is and its sizes.
  void Recurring(const std::string& key, const std::function<void()>& step);
  // Null on the CPU.
  cuda::Recorder* recorder() const { return recorder_.get(); }
  // Waits for what was queued; nothing to do on the CPU. Throws Error with what the GPU reported.
  void Synchronize() const;
  // Makes libraries that bring their own parallel loops (oneDNN) use num_threads() when called from
  // this thread. OpenMP keeps that number for each thread, and a context may be used from another
  // thread than the one that made it: call this before every such call, it costs nanoseconds.
  void UseThreads() const;
  // Calls body(own, i) for all i < parts at once, each on a thread of its own with a context of one
  // thread; with one part, on this thread with this context. For work that falls into parts which
  // need nothing of each other: they stay in their cores' caches. parts <= num_threads(). What is
  // traced is added to tracer(), seconds as the mean of the threads. Rethrows what a body throws.
  void Split(int parts, const std::function<void(ExecContext& own, int part)>& body);
  bool reference_kernels() const { return options_.kernels == KernelChoice::kReference; }
  Workspace& workspace() { return workspace_; }
  Tracer& tracer() { return tracer_; }
  ProductCache& product_cache() { return *product_cache_; }
  // REQUIRES: device() is a GPU.
  cuda::Products& gpu_products() { return *gpu_products_; }

 private:
  ExecOptions options_;
  cuda::Stream stream_ = nullptr;
  Workspace workspace_;
  Tracer tracer_;
  std::unique_ptr<ProductCache> product_cache_;
  std::unique_ptr<cuda::Products> gpu_products_;
  std::unique_ptr<cuda::Recorder> recorder_;
  std::vector<std::unique_ptr<ExecContext>> parts_;  // made when first needed
  std::unique_ptr<ExecContext> host_;                // likewise, on a GPU
};

}  // namespace sluice

#endif  // SLUICE_RUNTIME_EXEC_CONTEXT_H_
