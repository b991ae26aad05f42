// The implementations behind LayerNorm and RmsNorm. Private to runtime/.
#ifndef SLUICE_RUNTIME_OPS_CPU_NORM_H_
#define SLUICE_RUNTIME_OPS_CPU_NORM_H_

#include "runtime/exec_context.h"
#include "runtime/tensor.h"

namespace sluice {

// One call after its checks.
struct NormArgs {
  ConstTensorView x;          // [M, D] f32, rows may be strided
  ConstTensorView more = {};  // likewise, added to x; or empty
  const float* weight = nullptr;
  const float* bias = nullptr;  // LayerNorm only
  float eps = 0;
  TensorView y;         // [M, D] f32 or bf16, rows may be strided
  bool centre = false;  // LayerNorm: subtract the mean
};

void NormReference(const NormArgs& args);
void NormSimd(ExecContext& ctx, const NormArgs& args);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_CPU_NORM_H_
