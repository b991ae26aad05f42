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

// Which rows of several groups of equal length (the frames of a batch) an op works on: as many of
// each. Nobody checks lists that lie on a GPU.
struct RowLists {
  ConstTensorView rows;  // [G, k] i32 where the context works; none twice in a group
  // So many rows at the beginning of every group come before those that are listed, in any case;
  // `rows` are counted from behind them.
  int64_t ahead = 0;

  int64_t groups() const { return rows.dim(0); }
  int64_t each() const { return ahead + rows.dim(1); }  // rows of a group
};
// Of numbers on the host, as many for each group. They live as long as the workspace's scope.
RowLists ListRows(ExecContext& ctx, std::span<const int32_t> rows, int64_t groups);

// y [G * each, D] = the listed rows of x [G * R, D]; same dtype.
void GatherRows(ExecContext& ctx, ConstTensorView x, const RowLists& lists, TensorView y);
// y [G * R, D] = the rows of `rest`, a matrix [R, D] for each group, but for the listed ones, which
// are the rows of x [G * each, D]. Same dtype; lists ascend.
void OverlayRows(ExecContext& ctx, std::span<const ConstTensorView> rest, ConstTensorView x,
                 const RowLists& lists, TensorView y);

// y = 0.
void ZeroRows(ExecContext& ctx, TensorView y);
// y = a - b, rounded once. a, b: f32; y: f32 or bf16.
void Subtract(ExecContext& ctx, ConstTensorView a, ConstTensorView b, TensorView y);
// The listed rows of y [G * R, D] = the rows of a [G * each, D] - the listed rows of b, a matrix
// [R, D] for each group. All f32.
void SubtractListed(ExecContext& ctx, ConstTensorView a, std::span<const ConstTensorView> b,
                    const RowLists& lists, TensorView y);
// y = a + b. a, y: f32; b: f32 or bf16. y may be a.
void Add(ExecContext& ctx, ConstTensorView a, ConstTensorView b, TensorView y);
// y [G * each, D] = the listed rows of a, a matrix [R, D] for each group, + the listed rows of b
// [G * R, D]. All f32.
void AddListed(ExecContext& ctx, std::span<const ConstTensorView> a, ConstTensorView b,
               const RowLists& lists, TensorView y);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_ROWS_H_
