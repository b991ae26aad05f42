// Memory for packed weights. Private to runtime/.
#ifndef SLUICE_RUNTIME_OPS_CPU_WEIGHT_MEMORY_H_
#define SLUICE_RUNTIME_OPS_CPU_WEIGHT_MEMORY_H_

#include <memory>

#include "runtime/tensor.h"

namespace sluice {

// Uninitialised, 64-byte aligned memory for a matrix, cut from blocks that sit on huge pages: a
// decoder reads its weights end to end for every token, and with 4 KB pages that costs a quarter of
// the bandwidth (measured on one core: 12.4 instead of 16.5 GB/s). Matrices of one or two megabytes
// would fill huge pages of their own badly. A block goes back when the last matrix in it is gone.
// Thread-safe.
struct WeightMemory {
  TensorView view;
  std::shared_ptr<const void> keeper;
};
WeightMemory AllocateWeight(DType dtype, Shape shape);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_CPU_WEIGHT_MEMORY_H_
