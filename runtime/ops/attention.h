// Scaled dot-product attention, softmax in f32.
//   o = softmax(q k^T * scale [+ causal mask]) v
#ifndef SLUICE_RUNTIME_OPS_ATTENTION_H_
#define SLUICE_RUNTIME_OPS_ATTENTION_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "runtime/exec_context.h"
#include "runtime/tensor.h"

namespace sluice {

// How scores and values are multiplied: what users choose for a model or for each of its layers.
// Which kernel that leads to is the choosers' business (below).
enum class AttentionPrecision {
  kExact,  // in the tensors' own dtype
  // SageAttention2 (arXiv 2411.10958), in whatever variant the chip has a kernel for, where that
  // kernel is the faster one; else exact. The tracer counts both, as "attention/sage" and
  // "attention/exact".
  kSage,
  // The same wherever there is such a kernel, faster or not: to measure what it does to results.
  kSageAlways,
};
const char* Name(AttentionPrecision precision);  // "exact", "sage", "sage, always"

// Bidirectional attention inside each of `batch` sequences of equal length (the patches of one
// frame): Q queries of each over its S keys. q: [batch * Q, heads * D]; k, v: [batch * S, heads *
// D]; all f32 or all bf16; rows may be strided (columns of one product). out: [batch * Q, heads *
// D] same dtype, contiguous. scale: positive, usually D^-0.5. Any D >= 1 (72 included); fast paths
// pad D inside. key_bias: [batch * S] f32, finite, added to the scaled scores of its key (a key
// that stands for s keys has log s); or empty. Throws Error naming shapes or dtypes that do not
// fit.
void EncoderAttention(ExecContext& ctx, ConstTensorView q, ConstTensorView k, ConstTensorView v,
                      int64_t batch, int heads, int head_dim, float scale, TensorView out,
                      ConstTensorView key_bias = {},
                      AttentionPrecision precision = AttentionPrecision::kExact);

// How much every key is attended to, on average over heads and queries, without its values:
//   received[b, i] = 1/(H Q) sum over h, j of softmax_i(q_bjh . k_bih * scale + key_bias_bi).
// Arguments as of EncoderAttention; received: [batch, S] f32. Meant for few queries, Q << S: it
// multiplies in f32 vectors whatever the dtype.
void AttentionReceived(ExecContext& ctx, ConstTensorView q, ConstTensorView k, int64_t batch,
                       int heads, int head_dim, float scale, ConstTensorView key_bias,
                       TensorView received);

// Keys and values of one layer in blocks of kKvBlockTokens positions. A block holds, for every kv
// head h,
//   keys   K[h] : [kKvBlockTokens, D] row-major            (offset h * kKvBlockTokens * D)
//   values V[h] : [D, kKvBlockTokens] row-major (transposed; offset (kv_heads + h) * kKvBlockTokens
//   * D)
// in f32 or bf16. Values are transposed because the product with the probabilities reads them so.
// On a GPU values are [kKvBlockTokens, D] row-major as the keys are, and all blocks lie in one
// range of addresses, a multiple of their size from its beginning.
inline constexpr int kKvBlockTokens = 64;

struct KvLayerView {
  std::span<void* const>
      blocks;  // blocks[i] holds positions [i * kKvBlockTokens, ...) of this layer
  int kv_heads = 0;
  int head_dim = 0;
  DType dtype = DType::kF32;
  Device device = Device::kCpu;
  const void* base = nullptr;  // on a GPU: where that range begins
};
// Bytes of one block of one layer: 2 * kv_heads * kKvBlockTokens * head_dim * SizeOf(dtype).
size_t KvBlockBytes(int kv_heads, int head_dim, DType dtype);

// Stores keys and values of positions [begin, begin + S). keys, values: [S, kv_heads * D] in
// kv.dtype, rows may be strided. Positions outside of the range are not touched.
void StoreKv(ExecContext& ctx, ConstTensorView keys, ConstTensorView values, int64_t begin,
             const KvLayerView& kv);

// Rows [row, row + rows) of a matrix that belong to one sequence, whose first row stands at
// position `begin` of its cache.
struct KvSegment {
  int64_t row = 0, rows = 0, begin = 0;
  KvLayerView kv;
};

// Rotates the query and key heads of all rows in place, row i to positions[i], as Rope does
// (runtime/ops/rope.h), and stores the keys and values of each segment's rows, as StoreKv does; on
// a GPU in one launch. qkv: [S, (heads + 2 kv_heads) * D] in kv.dtype, queries first, values last,
// rows may be strided; segments are of one pool and together all S rows. inv_freq: [D / 2] f32.
void RotateAndStore(ExecContext& ctx, TensorView qkv, int heads, std::span<const int32_t> positions,
                    ConstTensorView inv_freq, std::span<const KvSegment> segments);

// The reverse of StoreKv: copies positions [begin, begin + keys.dim(0)) to the rows of `keys` and
// `values`.
void LoadKv(ExecContext& ctx, const KvLayerView& kv, int64_t begin, TensorView keys,
            TensorView values);

// Copies positions `rows` of `from` to positions 0, 1, ... of `to`: views of the same geometry and
// pool whose blocks are not shared.
void GatherKv(ExecContext& ctx, const KvLayerView& from, std::span<const int32_t> rows,
              const KvLayerView& to);

// How one query attends, on average over heads, without its values:
//   out[i] = 1/H sum_j softmax_i(q_j . k_i * scale),
// the softmax over all keys: positions `rows` of `kv`, then the rows of `more`. Query head j uses
// kv head j / (heads / kv_heads). q: [1, heads * D]; more: [S, kv_heads * D], rows may be strided;
// both in kv.dtype. out: rows.size() + S values.
void MeanAttentionRow(ExecContext& ctx, ConstTensorView q, int heads, float scale,
                      const KvLayerView& kv, std::span<const int32_t> rows, ConstTensorView more,
                      std::span<float> out);

// Causal grouped-query attention of S new positions over everything cached: query i stands at
// position begin + i and sees positions [0, begin + i]. Query head j uses kv head j / (heads /
// kv_heads). q: [S, heads * D] in kv.dtype (rows may be strided); out: [S, heads * D] same dtype,
// contiguous. scale: positive. Positions [begin, begin + S) must have been stored; what blocks hold
// beyond them (NaN included) has no influence.
void CausalAttention(ExecContext& ctx, ConstTensorView q, int64_t begin, int heads, float scale,
                     const KvLayerView& kv, TensorView out,
                     AttentionPrecision precision = AttentionPrecision::kExact);

// The same for several sequences. out: the rows of all segments, one after another. Decoding on a
// GPU, one row a segment, is a single launch.
void CausalAttention(ExecContext& ctx, ConstTensorView q, std::span<const KvSegment> segments,
                     int heads, float scale, TensorView out,
                     AttentionPrecision precision = AttentionPrecision::kExact);

// RotateAndStore, then CausalAttention of the rows' queries: what decoding does with a row of each
// sequence, on a GPU in one launch. Arguments as of these; qkv is used up. There it may read what
// the caches hold of earlier positions while the op in front still runs: that must not store them.
void RotateStoreAndAttend(ExecContext& ctx, TensorView qkv, int heads,
                          std::span<const int32_t> positions, ConstTensorView inv_freq,
                          std::span<const KvSegment> segments, float scale, TensorView out,
                          AttentionPrecision precision = AttentionPrecision::kExact);

// Which implementation runs, as a pure function that can be printed and tested. `queries`: rows
// that share a head of keys. `amx`: this process may use AMX-BF16 tiles; `reference`: the context
// asks for reference kernels; `int8_dot`: the vectors multiply int8 (cpu::HasInt8Dot).
enum class AttentionKernel { kReference, kSimd, kAmx, kSageReference, kSage };
const char* Name(AttentionKernel kernel);
AttentionKernel ChooseAttention(int64_t queries, int64_t keys, int head_dim, DType dtype, bool amx,
                                bool reference,
                                AttentionPrecision precision = AttentionPrecision::kExact,
                                bool int8_dot = false);

// The same on a GPU. `capability`: of the device, 90 for 9.0. `causal`: over blocks. `biased`: with
// a key_bias.
enum class GpuAttention { kPlain, kFlash, kFlashMma, kDecode, kSage };
const char* Name(GpuAttention kernel);
GpuAttention ChooseGpuAttention(int capability, int64_t queries, int heads, int kv_heads,
                                int head_dim, DType dtype, bool causal, bool biased,
                                AttentionPrecision precision = AttentionPrecision::kExact);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_ATTENTION_H_
