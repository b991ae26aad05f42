// The implementations behind runtime/ops/attention.h. Private to runtime/: arguments have been
// checked by the caller (runtime/ops/attention.cc).
#ifndef SLUICE_RUNTIME_OPS_CPU_ATTENTION_H_
#define SLUICE_RUNTIME_OPS_CPU_ATTENTION_H_

#include <cstdint>

#include "runtime/exec_context.h"
#include "runtime/ops/attention.h"
#include "runtime/tensor.h"

namespace sluice::cpu {

// Plain loops, probabilities in f32: what the fast paths are compared with.
void EncoderAttentionReference(ExecContext& ctx, ConstTensorView qkv, int64_t batch, int heads,
                               int head_dim, float scale, TensorView out);
void CausalAttentionReference(ExecContext& ctx, ConstTensorView q, int64_t begin, int heads,
                              float scale, const KvLayerView& kv, TensorView out);

}  // namespace sluice::cpu

#endif  // SLUICE_RUNTIME_OPS_CPU_ATTENTION_H_
