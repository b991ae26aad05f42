// Scratch memory for one step: a bump allocator that grows once to its high-water mark.
// Used by one thread at a time. Views die with the Scope they were allocated in; on a GPU what was
// queued before still finds them, if all work that uses the memory is queued in one stream.
#ifndef SLUICE_RUNTIME_WORKSPACE_H_
#define SLUICE_RUNTIME_WORKSPACE_H_

#include <cstddef>
#include <vector>

#include "runtime/tensor.h"

namespace sluice {

class Workspace {
 public:
  explicit Workspace(Device device = Device::kCpu) : device_(device) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // Gives back everything allocated after its construction.
  class Scope {
   public:
    explicit Scope(Workspace& workspace);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Workspace& workspace_;
    size_t chunk_, used_;
  };

  // Uninitialised, 256-byte aligned (64 on the CPU). Throws ResourceExhausted when the system has
  // no memory.
  TensorView Allocate(DType dtype, Shape shape);
  size_t high_water_bytes() const { return high_water_bytes_; }

 private:
  const Device device_;
  std::vector<Tensor> chunks_;  // u8 chunks, each at least as large as the one before
  size_t chunk_ = 0;            // the chunk in use
  size_t used_ = 0;             // bytes used of it
  size_t high_water_bytes_ = 0;
};

}  // namespace sluice

#endif  // SLUICE_RUNTIME_WORKSPACE_H_
