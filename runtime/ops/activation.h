// Element-wise functions that stand alone (those that follow a product are fused into it, see
// linear.h).
#ifndef SLUICE_RUNTIME_OPS_ACTIVATION_H_
#define SLUICE_RUNTIME_OPS_ACTIVATION_H_

#include "runtime/exec_context.h"
#include "runtime/tensor.h"

namespace sluice {

// y = silu(gate) * up with gate_up: [M, 2I] = gate | up (f32 or bf16); y: [M, I] f32 or bf16.
// silu(x) = x / (1 + e^-x).
void SiluMul(ExecContext& ctx, ConstTensorView gate_up, TensorView y);

// In place over the last dimension, f32: p = exp(x - max) / sum.  x: [M, N].
void Softmax(ExecContext& ctx, TensorView x);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_ACTIVATION_H_
