// Rotary position embedding, half-split form (Su et al. 2021, as in Qwen2):
// rot(x) = x * cos + [-x2, x1] * sin with angle = position * theta^(-2i/D), all in f32.
#ifndef SLUICE_RUNTIME_OPS_ROPE_H_
#define SLUICE_RUNTIME_OPS_ROPE_H_

#include <cstdint>
#include <span>

#include "runtime/exec_context.h"
#include "runtime/tensor.h"

namespace sluice {

// Rotates heads in place. x: [S, heads * D] f32 or bf16 (rows may be strided), positions: S values,
// inv_freq: [D / 2] f32, at most 1. q and k of one product may be rotated in one call (Columns).
void Rope(ExecContext& ctx, TensorView x, int head_dim, std::span<const int32_t> positions,
          ConstTensorView inv_freq);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_ROPE_H_
