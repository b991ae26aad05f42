// Normalisation over the last dimension. The residual stream is f32; the result is rounded once
// to the dtype of `y` (f32 or bf16), which is what the next product reads.
#ifndef SLUICE_RUNTIME_OPS_NORM_H_
#define SLUICE_RUNTIME_OPS_NORM_H_

#include <span>

#include "runtime/exec_context.h"
#include "runtime/tensor.h"

namespace sluice {

// y = (x - mean) / sqrt(var + eps) * weight + bias.  x: [M, D] f32; weight, bias: [D] f32; y: [M,
// D] f32 or bf16. more: [M, D] f32, added to x before; or empty.
void LayerNorm(ExecContext& ctx, ConstTensorView x, ConstTensorView weight, ConstTensorView bias,
               float eps, TensorView y, ConstTensorView more = {});
// The same of matrices of one shape that lie apart; y has the rows of the first, then those of the
// next and so on, `more` those of as many of the first as it covers.
void LayerNorm(ExecContext& ctx, std::span<const ConstTensorView> x, ConstTensorView weight,
               ConstTensorView bias, float eps, TensorView y, ConstTensorView more = {});

// y = x / sqrt(mean(x^2) + eps) * weight.  x: [M, D] f32; weight: [D] f32; y: [M, D] f32 or bf16.
void RmsNorm(ExecContext& ctx, ConstTensorView x, ConstTensorView weight, float eps, TensorView y);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_NORM_H_
