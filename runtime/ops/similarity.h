// How alike rows are.
#ifndef SLUICE_RUNTIME_OPS_SIMILARITY_H_
#define SLUICE_RUNTIME_OPS_SIMILARITY_H_

#include <cstdint>
#include <span>

#include "runtime/exec_context.h"
#include "runtime/tensor.h"

namespace sluice {

// cosines[i] = <a_i, b_i> / max(|a_i| |b_i|, 1e-8), sums in f32. a, b: [M, D], both f32 or both
// bf16, rows may be strided; cosines: [M] f32. With a center of D values, of a_i - center and
// b_i - center. Throws Error naming shapes or dtypes that do not fit.
void RowCosines(ExecContext& ctx, ConstTensorView a, ConstTensorView b, TensorView cosines,
                std::span<const float> center = {});

// mean [D] of the rows of x [M, D], f32 or bf16, M >= 1, maybe strided.
void MeanRow(ExecContext& ctx, ConstTensorView x, std::span<float> mean);

// For every row of a the row of b whose cosine with it is highest, the first of equals, and that
// cosine. a [M, D], b [N, D], N >= 1: f32, rows of length 1 or 0, maybe strided; nearest, cosines:
// M values. Runs on the calling thread and only reads `ctx`, so that threads may share it.
void NearestRows(const ExecContext& ctx, ConstTensorView a, ConstTensorView b,
                 std::span<int32_t> nearest, std::span<float> cosines);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_SIMILARITY_H_
