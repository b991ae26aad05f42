#include "runtime/exec_context.h"

#include <omp.h>

#include <exception>
#include <string>

#include "runtime/error.h"
#include "runtime/ops/cpu/product_cache.h"
#include "runtime/ops/cuda/linear.h"

namespace sluice {

ExecContext::ExecContext(const ExecOptions& options)
    : options_(options), workspace_(options.device) {
  if (options.num_threads < 1) {
    throw InputError("[exec_context] num_threads must be at least 1, got " +
                     std::to_string(options.num_threads));
  }
  UseThreads();
  product_cache_ = std::make_unique<ProductCache>();
  if (options.device == Device::kCuda) {
    stream_ = cuda::NewStream();
    gpu_products_ = std::make_unique<cuda::Products>();
    recorder_ = std::make_unique<cuda::Recorder>(stream_);
  }
}

ExecContext::~ExecContext() {
  recorder_.reset();  // it waits for the stream
  if (stream_) cuda::EndStream(stream_);
}

ExecContext& ExecContext::host() {
  if (device() == Device::kCpu) return *this;
  if (!host_) {
    host_ = std::make_unique<ExecContext>(
        ExecOptions{.num_threads = options_.num_threads, .kernels = options_.kernels});
  }
  return *host_;
}

void ExecContext::Recurring(const std::string& key, const std::function<void()>& step) {
  recorder_ ? recorder_->Run(key, step) : step();
}

void ExecContext::Synchronize() const {
  if (stream_) cuda::Synchronize(stream_);
}

void ExecContext::UseThreads() const {
  if (omp_get_max_threads() != num_threads()) omp_set_num_threads(num_threads());
}

void ExecContext::Split(int parts, const std::function<void(ExecContext&, int)>& body) {
  if (parts > num_threads()) {
    throw Error("[exec_context] " + std::to_string(parts) + " parts need as many threads, got " +
                std::to_string(num_threads()));
  }
  if (parts <= 1) {
    if (parts == 1) body(*this, 0);
    return;
  }
  while (static_cast<int>(parts_.size()) < parts) {
    parts_.push_back(
        std::make_unique<ExecContext>(ExecOptions{.num_threads = 1, .kernels = options_.kernels}));
  }
  UseThreads();  // the contexts just made have set their own number
  std::vector<std::exception_ptr> errors(parts);
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int i = 0; i < parts; ++i) {
    try {
      body(*parts_[i], i);
    } catch (...) {
      errors[i] = std::current_exception();
    }
  }
  for (int i = 0; i < parts; ++i) {
    for (auto [name, cost] : parts_[i]->tracer_.stages()) {
      cost.seconds /= parts;
      tracer_.Add(name, cost);
    }
    parts_[i]->tracer_.Clear();
  }
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace sluice
