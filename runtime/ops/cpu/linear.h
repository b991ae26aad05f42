// The implementations behind Linear. Private to runtime/.
//
// How bf16 weights lie in memory: [ceil(N / 64)][K' / 2][64][2], K' = K rounded up to 32, zeros in
// the padding. For every block of 64 outputs the pairs of inputs follow each other, 64 outputs x 2
// inputs = 4 cache lines a pair. This is oneDNN's BA16a64b2a, the layout its AMX and AVX512-BF16
// products ask for by themselves; the plain [N, K] makes them repack the weight in every call:
// measured 2 cores, AMX:
//   M x N x K        plain [N, K]   packed
//   49 x 320 x 320      10.6 us      6.9 us
//   196 x 768 x 256     42.5 us     41.0 us
//   8 x 4864 x 896       256 us      128 us
//   196 x 9728 x 896    2183 us     1924 us
// The matrix-vector product likes it as well: it streams through memory, every vector holds 16
// outputs, and no sum runs across a vector. So one copy serves both. The price is that a bf16
// checkpoint is copied while loading (and its mapped pages given back) instead of being mapped.
//
// f32 weights stay [N, K]: on machines without AVX-512 oneDNN multiplies only plain matrices, with
// AVX-512 a packed copy gains 5 to 10 %, and f32 is for checking, where mapping is worth more.
#ifndef SLUICE_RUNTIME_OPS_CPU_LINEAR_H_
#define SLUICE_RUNTIME_OPS_CPU_LINEAR_H_

#include <cstdint>

#include "runtime/exec_context.h"
#include "runtime/ops/linear.h"
#include "runtime/tensor.h"

namespace sluice {

inline constexpr int64_t kPackedOutputs = 64;  // outputs in a block
inline constexpr int64_t kPackedInputs = 32;   // K is padded to a multiple of this

// One call of Linear after its checks. x: [M, K] contiguous.
struct LinearArgs {
  int64_t m = 0, n = 0, k = 0;
  ConstTensorView x;
  const void* weight = nullptr;  // f32: [N, K]; bf16: packed as above
  DType dtype = DType::kF32;     // of x and weight
  const float* bias = nullptr;   // [N] or null
  TensorView y;                  // [M, N]
  LinearOptions options;
};

// Where weight (n, k) of a packed matrix lies, in elements.
inline int64_t PackedIndex(int64_t n, int64_t k, int64_t k_size) {
  const int64_t padded_k = (k_size + kPackedInputs - 1) / kPackedInputs * kPackedInputs;
  return n / kPackedOutputs * kPackedOutputs * padded_k + k / 2 * 2 * kPackedOutputs +
         n % kPackedOutputs * 2 + k % 2;
}

void LinearReference(const LinearArgs& args);
// Reads a weight from memory once: bf16 for any number of rows, f32 for up to four. Every output of
// bf16 weights is the same bits with any number of threads and whichever rows are beside it.
void LinearVector(ExecContext& ctx, const LinearArgs& args);
void LinearOneDnn(ExecContext& ctx, const LinearArgs& args);
// bf16 on AMX tiles; the only one that takes kSiluMul, for N / 2 a multiple of 16. REQUIRES:
// cpu::AmxAllowed() (runtime/ops/cpu/amx.h).
void LinearAmx(ExecContext& ctx, const LinearArgs& args);
// Whether oneDNN multiplies bf16 natively here.
bool OneDnnHasBf16();

// Packs rows [row, row + rows) of a matrix of `total_rows` rows. source: [rows, K] bf16, rows
// contiguous but possibly not aligned. On several threads.
void PackRows(const void* source, int64_t row, int64_t rows, int64_t k, BFloat16* packed);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_CPU_LINEAR_H_
