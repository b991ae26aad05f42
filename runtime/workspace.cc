#include "runtime/workspace.h"

#include <algorithm>

#include "runtime/error.h"

namespace sluice {
namespace {

constexpr size_t kFirstChunkBytes = size_t{1} << 20;

}  // namespace

Workspace::Scope::Scope(Workspace& workspace)
    : workspace_(workspace), chunk_(workspace.chunk_), used_(workspace.used_) {}

Workspace::Scope::~Scope() {
  workspace_.chunk_ = chunk_;
  workspace_.used_ = used_;
  // With nothing alive, many chunks become one as large as was ever needed, so that the next step
  // runs in a single chunk.
  if (chunk_ == 0 && used_ == 0 && workspace_.chunks_.size() > 1) {
    workspace_.chunks_.clear();
    try {
      workspace_.chunks_.emplace_back(DType::kU8,
                                      Shape{static_cast<int64_t>(workspace_.high_water_bytes_)},
                                      workspace_.device_);
    } catch (const ResourceExhausted&) {
      // The next Allocate asks again, and can tell its caller.
      workspace_.chunks_.clear();
    }
  }
}

TensorView Workspace::Allocate(DType dtype, Shape shape) {
  int64_t bytes = 0;
  if (__builtin_mul_overflow(shape.NumElements(), static_cast<int64_t>(SizeOf(dtype)), &bytes) ||
      bytes > INT64_MAX / 4) {
    throw ResourceExhausted("[workspace] no memory for " + shape.ToString() + " " + Name(dtype));
  }
  const size_t alignment = device_ == Device::kCuda ? 256 : 64;
  const size_t needed = (std::max<size_t>(bytes, 1) + alignment - 1) / alignment * alignment;
  while (chunk_ < chunks_.size() && used_ + needed > chunks_[chunk_].SizeBytes()) {
    ++chunk_;
    used_ = 0;
  }
  if (chunk_ == chunks_.size()) {
    const size_t last = chunks_.empty() ? kFirstChunkBytes / 2 : chunks_.back().SizeBytes();
    try {
      chunks_.emplace_back(DType::kU8, Shape{static_cast<int64_t>(std::max(needed, 2 * last))},
                           device_);
    } catch (...) {
      if (chunk_ > 0) used_ = chunks_[--chunk_].SizeBytes();
      throw;
    }
    used_ = 0;
  }
  const TensorView view(static_cast<char*>(chunks_[chunk_].view().raw()) + used_, dtype, shape, -1,
                        device_);
  used_ += needed;
  size_t in_use = used_;
  for (size_t i = 0; i < chunk_; ++i) in_use += chunks_[i].SizeBytes();
  high_water_bytes_ = std::max(high_water_bytes_, in_use);
  return view;
}

}  // namespace sluice
