// The implementations behind Rope. Private to runtime/.
#ifndef SLUICE_RUNTIME_OPS_CPU_ROPE_H_
#define SLUICE_RUNTIME_OPS_CPU_ROPE_H_

#include <cstdint>
#include <span>

#include "runtime/exec_context.h"
#include "runtime/ops/rope.h"
#include "runtime/tensor.h"

namespace sluice {

inline double RopeAngle(int32_t position, float frequency) {
  if (position < kExactRopeFrom && position > -kExactRopeFrom) {
    return static_cast<float>(position) * frequency;
  }
  return static_cast<double>(position) * static_cast<double>(frequency);
}

void RopeReference(TensorView x, int head_dim, std::span<const int32_t> positions,
                   const float* inv_freq);
void RopeSimd(ExecContext& ctx, TensorView x, int head_dim, std::span<const int32_t> positions,
              const float* inv_freq);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_CPU_ROPE_H_
