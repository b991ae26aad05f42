// SageAttention 1, 2 and 2++ (arXiv 2410.02367, 2411.10958, 2505.21136) as plain loops: every
// variant that a kernel of ours or of the papers computes, number by number. What fast paths, of
// this processor and of a GPU, are compared with.
//
//   k' = k - mean(k)      softmax does not see a vector subtracted from all keys
//   q' = q - mean(q)      of a tile of queries; its product with k' is added to the scores
//   z  = scale log2(e) (q_scale k_scale Q8 K8^T + mean(q) k')
//   p  = 2^(z - m),  m: the largest z so far, less log2 of the range that probabilities fill
//   O  = 2^(old m - m) O + R,  R = P V of some keys, P and V rounded;  out = O / sum p
#ifndef SLUICE_RUNTIME_OPS_CPU_ATTENTION_SAGE_H_
#define SLUICE_RUNTIME_OPS_CPU_ATTENTION_SAGE_H_

#include <cstdint>

#include "runtime/exec_context.h"
#include "runtime/ops/attention.h"
#include "runtime/tensor.h"

namespace sluice::cpu {

// The largest magnitude of a group counts as at least this: groups of zeros stay finite.
inline constexpr float kSageFloor = 1e-7f;

// Which rows share a scale, in tiles of `tile_keys` keys and warps of `warp_queries` queries. A
// thread's are those whose scores a lane of a tensor core's result holds.
enum class SageGroups { kToken, kBlock, kWarp, kThread };
// What probabilities and values are rounded to before they are multiplied.
enum class SageValues { kF32, kF16, kFp8 };
// How R is summed: in f32; as the tensor cores of Ada and Hopper, which keep 13 bits behind the
// largest term of 32 products; in f16, promoted every 64 keys.
enum class SageSums { kExact, kFp22, kF16 };

struct SageVariant {
  int qk_bits = 8;  // 8 or 4
  SageGroups groups = SageGroups::kToken;
  int tile_queries = 128, tile_keys = 64, warp_queries = 32;
  bool smooth_keys = true, smooth_queries = false, smooth_values = false;
  SageValues values = SageValues::kF32;
  // kFp8: values have a scale a channel; with this, one a channel (from all keys) and tile as well.
  bool tile_value_scales = false;
  float probability_range = 448, value_range = 448;  // of fp8: largest numbers used
  SageSums sums = SageSums::kExact;
  // The sum of p is that of probabilities as they are rounded: what a product with ones gives.
  bool sum_rounded = false;

  // What this processor's fast path computes.
  static SageVariant Cpu() { return {}; }
  // The Hopper kernel of this repository (runtime/ops/cuda/attention_sage.cu), but for the channel
  // scales and the mean of keys, which it takes from a sample.
  static SageVariant Hopper();
  // int8 scores with f16 values (SageAttention 1), on tiles of mma.sync.
  static SageVariant Int8F16();
  // int4 scores with smoothed queries and fp8 values.
  static SageVariant Int4Fp8();
};

// Which group of a head's queries or keys a row belongs to.
int64_t SageGroupOfQuery(const SageVariant& variant, int64_t query);
int64_t SageGroupOfKey(const SageVariant& variant, int64_t key);

// Nearest, ties to even, of the numbers that fp8 e4m3 has; beyond +-448 those.
float RoundToFp8(float value);

// One sequence and one head. Rows of D elements, f32 in and out.
struct SageProblem {
  const float* q = nullptr;  // [queries, D]
  const float* k = nullptr;  // [keys, D]
  const float* v = nullptr;  // [keys, D]
  int64_t queries = 0, keys = 0;
  int head_dim = 0;
  float scale = 0;
  bool causal = false;              // query i sees keys [0, i + keys - queries]
  const float* key_bias = nullptr;  // [keys], added to scaled scores, or null
  const float* key_mean = nullptr;  // [D], any vector; null: that of these keys
};
// out: [queries, D]. log_sums: [queries] natural logarithms of the sums of exponentials of true
// scores, or null.
void SageReference(const SageProblem& problem, const SageVariant& variant, float* out,
                   float* log_sums = nullptr);

// Ops as in runtime/ops/cpu/attention.h. The references compute SageVariant::Cpu().
void EncoderAttentionSageReference(ExecContext& ctx, ConstTensorView q, ConstTensorView k,
                                   ConstTensorView v, int64_t batch, int heads, int head_dim,
                                   float scale, TensorView out, ConstTensorView key_bias = {});
void CausalAttentionSageReference(ExecContext& ctx, ConstTensorView q, int64_t begin, int heads,
                                  float scale, const KvLayerView& kv, TensorView out);

// The fast path on any vectors (runtime/ops/cpu/attention_simd.cc). The mean of keys is that of all
// keys of the call, so a prefill in chunks rounds a little differently in each.
void EncoderAttentionSage(ExecContext& ctx, ConstTensorView q, ConstTensorView k, ConstTensorView v,
                          int64_t batch, int heads, int head_dim, float scale, TensorView out,
                          ConstTensorView key_bias = {});
void CausalAttentionSage(ExecContext& ctx, ConstTensorView q, int64_t begin, int heads, float scale,
                         const KvLayerView& kv, TensorView out);
// Whether its instruction set multiplies int8 (AVX512-VNNI, AVX-VNNI). Elsewhere it is right but
// slower than exact attention.
bool HasInt8Dot();

}  // namespace sluice::cpu

#endif  // SLUICE_RUNTIME_OPS_CPU_ATTENTION_SAGE_H_
