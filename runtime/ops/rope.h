// Rotary position embedding, half-split form (Su et al. 2021, as in Qwen2):
// rot(x) = x * cos + [-x2, x1] * sin with angle = position * theta^(-2i/D), in f32;
// from position kExactRopeFrom on angles are exact to 1e-6 instead.
#ifndef SLUICE_RUNTIME_OPS_ROPE_H_
#define SLUICE_RUNTIME_OPS_ROPE_H_

#include <cstdint>
#include <span>

#include "runtime/exec_context.h"
#include "runtime/tensor.h"

namespace sluice {

// Up to here an angle is the f32 product, as the models' own code forms it: it is off by 2^-9 at
// most, and answers agree bit for bit. Beyond, where no published model has positions, its rounding
// would soon be larger than the angles between neighbours (1/4 at 2^22: eleven hours of video at a
// hundred tokens a second), so the product is formed in double.
inline constexpr int32_t kExactRopeFrom = 1 << 16;

// Rotates heads in place; negative positions turn back. x: [S, heads * D] f32 or bf16 (rows may be
// strided), positions: S values, inv_freq: [D / 2] f32, at most 1. q and k of one product may be
// rotated in one call (Columns).
void Rope(ExecContext& ctx, TensorView x, int head_dim, std::span<const int32_t> positions,
          ConstTensorView inv_freq);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_ROPE_H_
