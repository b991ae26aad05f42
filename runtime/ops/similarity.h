// How alike rows are, and which are least.
#ifndef SLUICE_RUNTIME_OPS_SIMILARITY_H_
#define SLUICE_RUNTIME_OPS_SIMILARITY_H_

#include <cstdint>
#include <span>

#include "runtime/exec_context.h"
#include "runtime/tensor.h"

namespace sluice {

// Rows to compare one by one: a, b: [M, D], both f32 or both bf16, maybe strided. center: [D] f32,
// subtracted from all of them before; or empty.
struct RowPairs {
  ConstTensorView a, b, center;
};

// cosines[p, i] = <a_i, b_i> / max(|a_i| |b_i|, 1e-8) of pairs[p], sums in f32. All pairs have the
// same shapes and dtype, and all a center or none. cosines: [P, M] f32. Throws Error naming shapes
// or dtypes that do not fit, likewise below.
void RowCosines(ExecContext& ctx, std::span<const RowPairs> pairs, TensorView cosines);

// mean [D] f32 of the rows of x [M, D], f32 or bf16, M >= 1, maybe strided.
void MeanRow(ExecContext& ctx, ConstTensorView x, TensorView mean);

// places [F, k] i32 = where the k lowest of each row of values [F, N] f32 stand, ascending; of
// equal values the first. What is no number counts as infinite. 1 <= k <= N <= 16384.
void LowestPlaces(ExecContext& ctx, ConstTensorView values, TensorView places);

// For every row of a the row of b whose cosine with it is highest, the first of equals, and that
// cosine. a [M, D], b [N, D], N >= 1: f32, rows of length 1 or 0, maybe strided; nearest, cosines:
// M values. Runs on the calling thread and only reads `ctx`, so that threads may share it.
void NearestRows(const ExecContext& ctx, ConstTensorView a, ConstTensorView b,
                 std::span<int32_t> nearest, std::span<float> cosines);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_SIMILARITY_H_
