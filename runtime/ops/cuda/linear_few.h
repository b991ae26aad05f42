// Products of one to four rows with a weight in bf16 on a CUDA device: what decoding does.
#ifndef SLUICE_RUNTIME_OPS_CUDA_LINEAR_FEW_H_
#define SLUICE_RUNTIME_OPS_CUDA_LINEAR_FEW_H_

#include <cstdint>

#include "runtime/dtype.h"
#include "runtime/ops/cuda/device.h"

namespace sluice::cuda {

// y = x W^T + bias (+ y), or with `silu_mul`, where W's rows are gate | up and y has N / 2 columns,
// y = silu(gate) * up. Sums and the activation in f32, rounded once. Device memory, x and weight at
// multiples of 16 bytes, y contiguous.
struct FewRowsArgs {
  int64_t m = 0, n = 0, k = 0;
  const void* x = nullptr;  // [M, K] bf16, rows x_stride elements apart
  int64_t x_stride = 0;
  const void* weight = nullptr;  // [N, K] bf16
  const float* bias = nullptr;   // [N] f32, or null
  void* y = nullptr;             // [M, N] or [M, N / 2]
  DType y_dtype = DType::kF32;   // f32 or bf16
  bool accumulate = false;       // y f32; not with silu_mul
  bool silu_mul = false;
};
// Whether the kernel takes such sizes: 1 to 4 rows, K and x_stride multiples of 8.
bool TakesFewRows(int64_t m, int64_t k, int64_t x_stride, DType weight);
void FewRows(const FewRowsArgs& args, Stream stream);

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_LINEAR_FEW_H_
