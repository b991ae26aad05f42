// Products of few rows in bf16 on a CUDA device, with a weight in bf16 or 8 bits: what decoding
// does.
#ifndef SLUICE_RUNTIME_OPS_CUDA_LINEAR_FEW_H_
#define SLUICE_RUNTIME_OPS_CUDA_LINEAR_FEW_H_

#include <cstdint>

#include "runtime/dtype.h"
#include "runtime/ops/cuda/device.h"
#include "runtime/weight_format.h"

namespace sluice::cuda {

constexpr int64_t kMostFewRows = 16;
// Up to so many rows each warp sums whole products.
constexpr int kMostSummedRows = 2;
// Rows may be normalised first, of so many bytes in bf16 in all: of more, every block's reading
// them takes longer than a norm in front (16 rows of 896: even; 4 of 3584: 2 % of a step).
constexpr int64_t kMostNormedBytes = 16 << 10;

// y = x W^T * factors + bias (+ y), or with `silu_mul`, where W's rows are gate | up and y has N /
// 2 columns, y = silu(gate) * up. Products of bf16, sums and the activation in f32, rounded once.
// Device memory, rows of x and weight at multiples of 16 bytes and as long as such; 1 to
// kMostFewRows rows; y contiguous.
struct FewRowsArgs {
  int64_t m = 0, n = 0, k = 0;
  const void* x = nullptr;  // [M, K] bf16, or f32 with `norm`; rows x_stride elements apart
  int64_t x_stride = 0;
  // Where set, [K] f32: x's rows are normalised first, as RmsNorm does (runtime/ops/norm.h).
  const float* norm = nullptr;
  float norm_eps = 0;
  const void* weight = nullptr;  // [N, K], rows weight_stride elements apart
  int64_t weight_stride = 0;
  WeightFormat format = WeightFormat::kPlain;  // plain: bf16
  const float* factors = nullptr;              // [N], with 8 bits
  const float* bias = nullptr;                 // [N] f32, or null
  void* y = nullptr;                           // [M, N] or [M, N / 2]
  DType y_dtype = DType::kF32;                 // f32 or bf16
  bool accumulate = false;                     // y f32; not with silu_mul
  bool silu_mul = false;
};

// How the work on up to kMostSummedRows is cut: each warp takes so many rows of W (with silu_mul
// half of them gates, the others their ups), and one of `splits` parts of K.
struct FewRowsLaunch {
  int outputs = 1;  // 1, 2 or 4; with silu_mul 2 or 4
  int splits = 1;   // 1, 2, 4 or 8
};
FewRowsLaunch ChooseFewRows(int64_t n, int64_t k, WeightFormat format, bool silu_mul);

void FewRows(const FewRowsArgs& args, Stream stream);

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_LINEAR_FEW_H_
