// The implementations behind SiluMul and Softmax. Private to runtime/.
#ifndef SLUICE_RUNTIME_OPS_CPU_ACTIVATION_H_
#define SLUICE_RUNTIME_OPS_CPU_ACTIVATION_H_

#include "runtime/exec_context.h"
#include "runtime/tensor.h"

namespace sluice {

void SiluMulReference(ConstTensorView gate_up, TensorView y);
void SiluMulSimd(ExecContext& ctx, ConstTensorView gate_up, TensorView y);
void SoftmaxReference(TensorView x);
void SoftmaxSimd(ExecContext& ctx, TensorView x);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_CPU_ACTIVATION_H_
