// How alike rows are.
#ifndef SLUICE_RUNTIME_OPS_SIMILARITY_H_
#define SLUICE_RUNTIME_OPS_SIMILARITY_H_

#include "runtime/exec_context.h"
#include "runtime/tensor.h"

namespace sluice {

// cosines[i] = <a_i, b_i> / max(|a_i| |b_i|, 1e-8), sums in f32. a, b: [M, D], both f32 or both
// bf16, rows may be strided; cosines: [M] f32. Throws Error naming shapes or dtypes that do not
// fit.
void RowCosines(ExecContext& ctx, ConstTensorView a, ConstTensorView b, TensorView cosines);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_SIMILARITY_H_
