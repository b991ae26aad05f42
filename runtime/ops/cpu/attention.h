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
void EncoderAttentionReference(ExecContext& ctx, ConstTensorView q, ConstTensorView k,
                               ConstTensorView v, int64_t batch, int heads, int head_dim,
                               float scale, TensorView out, ConstTensorView key_bias = {});
void CausalAttentionReference(ExecContext& ctx, ConstTensorView q, int64_t begin, int heads,
                              float scale, const KvLayerView& kv, TensorView out);
// received: [batch * heads, S], a row for each head.
void AttentionReceivedReference(ExecContext& ctx, ConstTensorView q, ConstTensorView k,
                                int64_t batch, int heads, int head_dim, float scale,
                                ConstTensorView key_bias, TensorView received);
void AttentionReceivedSimd(ExecContext& ctx, ConstTensorView q, ConstTensorView k, int64_t batch,
                           int heads, int head_dim, float scale, ConstTensorView key_bias,
                           TensorView received);

// f32 arithmetic on any vectors, f32 or bf16 tensors (runtime/ops/cpu/attention_simd.cc).
void EncoderAttentionSimd(ExecContext& ctx, ConstTensorView q, ConstTensorView k, ConstTensorView v,
                          int64_t batch, int heads, int head_dim, float scale, TensorView out,
                          ConstTensorView key_bias = {});
void CausalAttentionSimd(ExecContext& ctx, ConstTensorView q, int64_t begin, int heads, float scale,
                         const KvLayerView& kv, TensorView out);

// bf16 on AMX tiles (runtime/ops/cpu/attention_amx.cc). REQUIRES: AmxAllowed()
// (runtime/ops/cpu/amx.h); x86-64 only.
void EncoderAttentionAmx(ExecContext& ctx, ConstTensorView q, ConstTensorView k, ConstTensorView v,
                         int64_t batch, int heads, int head_dim, float scale, TensorView out,
                         ConstTensorView key_bias = {});
void CausalAttentionAmx(ExecContext& ctx, ConstTensorView q, int64_t begin, int heads, float scale,
                        const KvLayerView& kv, TensorView out);

}  // namespace sluice::cpu

#endif  // SLUICE_RUNTIME_OPS_CPU_ATTENTION_H_
