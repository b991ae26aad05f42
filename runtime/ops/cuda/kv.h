// Blocks of a paged KV cache on a CUDA device, and attention over them that needs no matrix
// instructions. A block holds 64 positions of one layer: keys [kv_heads, 64, D], then values
// [kv_heads, 64, D]. Tables hold numbers of blocks, counted from `base`. Contracts:
// runtime/ops/attention.h. Arguments have been checked by the caller; tables and lists are device
// memory.
#ifndef SLUICE_RUNTIME_OPS_CUDA_KV_H_
#define SLUICE_RUNTIME_OPS_CUDA_KV_H_

#include <cstddef>
#include <cstdint>

#include "runtime/dtype.h"
#include "runtime/ops/cuda/device.h"

namespace sluice::cuda {

struct KvBlocks {
  void* base = nullptr;
  int kv_heads = 0, head_dim = 0;
  DType dtype = DType::kF32;  // f32 or bf16
};

// Rows of a matrix that holds the kv heads of a position side by side.
struct KvRows {
  void* keys = nullptr;
  void* values = nullptr;
  int64_t keys_stride = 0, values_stride = 0;  // elements
  int64_t count = 0;
};
// where: {offset, blocks...}: row i belongs at position offset + i of these blocks.
void StoreKv(const KvBlocks& kv, const int32_t* where, const KvRows& rows, Stream stream);
void LoadKv(const KvBlocks& kv, const int32_t* where, const KvRows& rows, Stream stream);
// Rotates the query and key heads of `count` rows, [heads + 2 kv_heads, D] each with queries first
// and values last, to `positions`, in place, and stores their keys and values: row i at position
// slots[i] % 64 of block slots[i] / 64. inv_freq: [D / 2], see runtime/ops/rope.h. All on the
// device, rows at multiples of 16 bytes.
void RotateAndStore(const KvBlocks& kv, void* rows, int64_t stride, int64_t count, int heads,
                    const int32_t* positions, const int32_t* slots, const float* inv_freq,
                    Stream stream);
// Whether that takes such rows: bf16, D a multiple of 16, `stride` one of 8.
bool CanRotateAndStore(int head_dim, int64_t stride, DType dtype);
// Position i of blocks `to` = position rows[i] of blocks `from`.
void GatherKv(const KvBlocks& kv, const int32_t* from, const int32_t* rows, int64_t count,
              const int32_t* to, Stream stream);

// Queries of one or more sequences over keys and values that lie in blocks, or as matrices.
struct PlainAttentionArgs {
  const void* q = nullptr;  // [sum of queries, heads * D], rows q_stride elements apart
  int64_t q_stride = 0;
  void* out = nullptr;                        // [sum of queries, heads * D] contiguous
  int heads = 0, kv_heads = 0, head_dim = 0;  // head_dim <= 256
  DType dtype = DType::kF32;
  float scale = 0;
  // Matrices: `batch` sequences of q_len queries and kv_len keys each, all of them seen.
  const void* k = nullptr;
  const void* v = nullptr;
  int64_t k_stride = 0, v_stride = 0, batch = 0, q_len = 0, kv_len = 0;
  const float* key_bias = nullptr;  // [batch * kv_len] or null
  // Blocks instead, where `base` is set: one sequence of q_len queries, the last of so many
  // positions. table: {how many positions, blocks...}.
  const void* base = nullptr;
  const int32_t* table = nullptr;
};
void PlainAttention(const PlainAttentionArgs& args, Stream stream);

// One query of each of `sequences` sequences over its keys, in bf16, D 64 or 128, at most 8 query
// heads a kv head: what decoding does. Bound by reading the keys and values once. With `inv_freq`
// the rows hold keys and values behind the queries, as those of RotateAndStore do, and it does
// first what that does: the rows' own are the last of a sequence.
struct DecodeAttentionArgs {
  const void* q = nullptr;  // [sequences, heads * D] bf16
  int64_t q_stride = 0;
  void* out = nullptr;  // [sequences, heads * D] bf16 contiguous
  int heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 0;
  const void* base = nullptr;
  // Of each sequence {how many keys, blocks...}, `table_pitch` numbers apart.
  const int32_t* tables = nullptr;
  int64_t table_pitch = 0;
  int64_t sequences = 0;
  const float* inv_freq = nullptr;     // [D / 2], or null: the rows are queries, rotated already
  const int32_t* positions = nullptr;  // with inv_freq: of each sequence's row
};
constexpr int kMostDecodeGroup = 8;  // query heads of a kv head
constexpr bool CanDecode(int heads, int kv_heads, int head_dim, DType dtype) {
  return dtype == DType::kBF16 && (head_dim == 64 || head_dim == 128) &&
         heads / kv_heads <= kMostDecodeGroup;
}
size_t DecodeWorkspaceBytes(const DecodeAttentionArgs& args);
void DecodeAttention(const DecodeAttentionArgs& args, void* workspace, Stream stream);

// scores[(b * Q + j) * H + h, i] = q_bjh . k_bi * scale + key_bias_bi for all keys of sequence b:
// rows of k, or positions rows[i] of blocks, then the rows of k.
struct KeyScoreArgs {
  const void* q = nullptr;  // [batch * queries, heads * D]
  int64_t q_stride = 0, batch = 1, queries = 1;
  int heads = 0, kv_heads = 0, head_dim = 0;
  DType dtype = DType::kF32;
  float scale = 0;
  const void* k = nullptr;  // [batch * keys, kv_heads * D]
  int64_t k_stride = 0, keys = 0;
  const float* key_bias = nullptr;
  const void* base = nullptr;
  const int32_t* table = nullptr;
  const int32_t* rows = nullptr;
  int64_t row_count = 0;
  float* scores = nullptr;  // [batch * queries * heads, row_count + keys]
};
void KeyScores(const KeyScoreArgs& args, Stream stream);
// mean[b, i] = the mean over r of x[b * rows + r, i]. x: [batch * rows, width].
void MeanOfRows(const float* x, int64_t batch, int64_t rows, int64_t width, float* mean,
                Stream stream);

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_KV_H_
