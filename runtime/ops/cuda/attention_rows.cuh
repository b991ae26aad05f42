// Rows of scores and sums as matrix products leave them in registers: what the attention kernels of
// all families do with them. Lane l of a warp holds rows l / 4 and l / 4 + 8 of 16, and of every 8
// columns 2 (l % 4) and the next: elements 4 i, 4 i + 1 of the first row and 4 i + 2, 4 i + 3 of
// the second lie in columns 8 i onwards.
#ifndef SLUICE_RUNTIME_OPS_CUDA_ATTENTION_ROWS_CUH_
#define SLUICE_RUNTIME_OPS_CUDA_ATTENTION_ROWS_CUH_

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "runtime/ops/cuda/mma_bf16.cuh"
#include "runtime/ops/cuda/status.cuh"

namespace sluice::cuda {

__device__ inline float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Over the four lanes that share a row.
__device__ inline float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ inline float QuadSum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Sets scores of keys from first_key on that a row does not see to -infinity. limit0 and limit1:
// keys seen by rows lane / 4 and lane / 4 + 8.
template <int kCount>
__device__ inline void Mask(float (&s)[kCount], int first_key, int limit0, int limit1) {
  const int column = first_key + 2 * (threadIdx.x % 4);
  const int left0 = limit0 - column, left1 = limit1 - column;
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (8 * i + j >= left0) s[4 * i + j] = -INFINITY;
      if (8 * i + j >= left1) s[4 * i + 2 + j] = -INFINITY;
    }
  }
}

// Writes rows lane / 4 and lane / 4 + 8 of kHeadDim columns of sums, scaled, as bf16. Lanes of a
// quad exchange pieces, so that each writes 16 bytes at once where four groups of 8 columns are
// full.
template <int kHeadDim, int kCount>
__device__ inline void StoreRows(const float (&o)[kCount], float scale0, float scale1,
                                 __nv_bfloat16* row0, __nv_bfloat16* row1, bool store0,
                                 bool store1) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float scale = half ? scale1 : scale0;
    __nv_bfloat16* row = half ? row1 : row0;
    const bool store = half ? store1 : store0;
#pragma unroll
    for (int i = 0; i < kHeadDim / 32 * 4; i += 4) {
      uint32_t v[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        v[k] = PackBf16(o[4 * (i + k) + 2 * half] * scale, o[4 * (i + k) + 2 * half + 1] * scale);
      }
      // A transposition of 4 x 4 among the four lanes: pieces go to lane ^ 1, then to lane ^ 2.
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, lane & 1 ? v[k] : v[k + 1], 1);
        (lane & 1 ? v[k] : v[k + 1]) = got;
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, lane & 2 ? v[k] : v[k + 2], 2);
        (lane & 2 ? v[k] : v[k + 2]) = got;
      }
      if (store) {
        *reinterpret_cast<uint4*>(row + 8 * (i + lane)) = make_uint4(v[0], v[1], v[2], v[3]);
      }
    }
#pragma unroll
    for (int i = kHeadDim / 32 * 4; i < kHeadDim / 8; ++i) {
      if (store) {
        *reinterpret_cast<uint32_t*>(row + 8 * i + 2 * lane) =
            PackBf16(o[4 * i + 2 * half] * scale, o[4 * i + 2 * half + 1] * scale);
      }
    }
  }
}

// ---- on the host ---------------------------------------------------------------------------

// Calls use with the head size as a constant: one that CheckAttention lets pass.
template <typename Use>
void WithHeadDim(int head_dim, const Use& use) {
  switch (head_dim) {
    case 64:
      return use(std::integral_constant<int, 64>());
    case 72:
      return use(std::integral_constant<int, 72>());
    case 80:
      return use(std::integral_constant<int, 80>());
    default:
      return use(std::integral_constant<int, 128>());
  }
}

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_ATTENTION_ROWS_CUH_
