// Rope on a CUDA device; the contract is that of runtime/ops/rope.h. Arguments have been checked by
// the caller.
#ifndef SLUICE_RUNTIME_OPS_CUDA_ROPE_H_
#define SLUICE_RUNTIME_OPS_CUDA_ROPE_H_

#include <cstdint>

#include "runtime/ops/cuda/device.h"
#include "runtime/tensor.h"

namespace sluice::cuda {

// positions: [S] on the device.
void Rope(TensorView x, int head_dim, const int32_t* positions, ConstTensorView inv_freq,
          Stream stream);

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_ROPE_H_
