// Moving and adding rows: what reuse of features and selection of tokens need around the products.
// x, y: [M, D] with rows that may be strided, f32 or bf16. Throw Error naming what does not fit.
#ifndef SLUICE_RUNTIME_OPS_ROWS_H_
#define SLUICE_RUNTIME_OPS_ROWS_H_

#include <cstdint>
#include <span>

#include "runtime/exec_context.h"
#include "runtime/tensor.h"

namespace sluice {

// y = x; same shape and dtype.
void CopyRows(ExecContext& ctx, ConstTensorView x, TensorView y);

// y = x rounded to its dtype; same shape.
void Convert(ExecContext& ctx, ConstTensorView x, TensorView y);

// x has `groups` groups of rows of equal length, `indices` as many indices for each group, counted
// from the group's first row. y [indices.size(), D] = those rows of x; same dtype.
void GatherRows(ExecContext& ctx, ConstTensorView x, std::span<const int32_t> indices,
                int64_t groups, TensorView y);
// The reverse: those rows of y = the rows of x [indices.size(), D]. No index comes twice.
void ScatterRows(ExecContext& ctx, ConstTensorView x, std::span<const int32_t> indices,
                 int64_t groups, TensorView y);

// y = a - b, rounded once. a, b: f32; y: f32 or bf16.
void Subtract(ExecContext& ctx, ConstTensorView a, ConstTensorView b, TensorView y);
// The listed rows of y = the rows of a [indices.size(), D] - the listed rows of b. All f32; b and y
// of the same shape. No index comes twice.
void SubtractListed(ExecContext& ctx, ConstTensorView a, ConstTensorView b,
                    std::span<const int32_t> indices, TensorView y);
// y [indices.size(), D] = the listed rows of a + the listed rows of b. All f32; a and b of the same
// shape.
void AddListed(ExecContext& ctx, ConstTensorView a, ConstTensorView b,
               std::span<const int32_t> indices, TensorView y);
// y = a + b. a, y: f32; b: f32 or bf16. y may be a.
void Add(ExecContext& ctx, ConstTensorView a, ConstTensorView b, TensorView y);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_ROWS_H_
