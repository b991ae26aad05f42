#include "runtime/ops/rope.h"

#include <string>

#include "runtime/error.h"
#include "runtime/ops/cpu/rope.h"
#include "runtime/ops/cuda/rope.h"
#include "runtime/transfer.h"

namespace sluice {

void Rope(ExecContext& ctx, TensorView x, int head_dim, std::span<const int32_t> positions,
          ConstTensorView inv_freq) {
  if (head_dim < 2 || head_dim % 2 != 0) {
    throw Error("[rope] head_dim must be even and positive, got " + std::to_string(head_dim));
  }
  if (x.shape().rank() != 2 || x.dim(1) % head_dim != 0 ||
      (x.dtype() != DType::kF32 && x.dtype() != DType::kBF16)) {
    throw Error("[rope] x must be [S, heads * " + std::to_string(head_dim) + "] f32 or bf16, got " +
                x.shape().ToString() + " " + Name(x.dtype()));
  }
  if (static_cast<int64_t>(positions.size()) != x.dim(0)) {
    throw Error("[rope] positions must be one for each of " + std::to_string(x.dim(0)) +
                " rows, got " + std::to_string(positions.size()));
  }
  if (inv_freq.shape() != Shape{head_dim / 2} || inv_freq.dtype() != DType::kF32) {
    throw Error("[rope] inv_freq must be " + Shape{head_dim / 2}.ToString() + " f32, got " +
                inv_freq.shape().ToString() + " " + Name(inv_freq.dtype()));
  }
  if (OnGpu("rope", ctx, {x, inv_freq})) {
    const Workspace::Scope scope(ctx.workspace());
    return ctx.Queue(cuda::Rope, x, head_dim, Within(ctx, positions), inv_freq);
  }
  if (ctx.reference_kernels()) {
    RopeReference(x, head_dim, positions, inv_freq.data<float>());
  } else {
    RopeSimd(ctx, x, head_dim, positions, inv_freq.data<float>());
  }
}

}  // namespace sluice
