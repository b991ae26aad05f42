// Products of matrices in bf16 by one warp, which every chip from Ampere on has.
#ifndef SLUICE_RUNTIME_OPS_CUDA_MMA_BF16_CUH_
#define SLUICE_RUNTIME_OPS_CUDA_MMA_BF16_CUH_

#include <cstdint>

namespace sluice::cuda {

__device__ inline uint32_t PackBf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// d[16, 8] += a[16, 16] b[16, 8]. Lane 4 g + t holds, two values a register of bf16: of a, rows g
// and g + 8 of columns 2 t and 2 t + 1, then of those and 8 more; of b, column g of the same rows;
// of d, columns 2 t and 2 t + 1 of row g, then of row g + 8.
__device__ inline void MmaBf16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_MMA_BF16_CUH_
