#include "runtime/ops/activation.h"

#include <string>

#include "runtime/error.h"
#include "runtime/ops/cpu/activation.h"
#include "runtime/ops/cuda/activation.h"
#include "runtime/transfer.h"

namespace sluice {
namespace {

bool FloatOrBf16(DType dtype) { return dtype == DType::kF32 || dtype == DType::kBF16; }

}  // namespace

void SiluMul(ExecContext& ctx, ConstTensorView gate_up, TensorView y) {
  if (gate_up.shape().rank() != 2 || gate_up.dim(1) % 2 != 0 || !FloatOrBf16(gate_up.dtype())) {
    throw Error("[silu_mul] gate_up must be [M, 2I] f32 or bf16, got " +
                gate_up.shape().ToString() + " " + Name(gate_up.dtype()));
  }
  const Shape expected{gate_up.dim(0), gate_up.dim(1) / 2};
  if (y.shape() != expected || !FloatOrBf16(y.dtype())) {
    throw Error("[silu_mul] y must be " + expected.ToString() + " f32 or bf16, got " +
                y.shape().ToString() + " " + Name(y.dtype()));
  }
  if (OnGpu("silu_mul", ctx, {gate_up, y})) return ctx.Queue(cuda::SiluMul, gate_up, y);
  if (ctx.reference_kernels()) {
    SiluMulReference(gate_up, y);
  } else {
    SiluMulSimd(ctx, gate_up, y);
  }
}

void Softmax(ExecContext& ctx, TensorView x) {
  if (x.shape().rank() != 2 || x.dim(1) == 0 || x.dtype() != DType::kF32) {
    throw Error("[softmax] x must be [M, N] f32, got " + x.shape().ToString() + " " +
                Name(x.dtype()));
  }
  if (OnGpu("softmax", ctx, {x})) return ctx.Queue(cuda::Softmax, x);
  if (ctx.reference_kernels()) {
    SoftmaxReference(x);
  } else {
    SoftmaxSimd(ctx, x);
  }
}

}  // namespace sluice
