// Attention on a CUDA device of compute capability 8.0 (Ampere) or later.
//
//   out[i, h] = softmax_t(q[i, h] . k[t, h / (H / K)] * scale) v[t, h / (H / K)]
//
// Causal: query i sees keys t <= i + kv_len - q_len, so the last query sees all of them.
#ifndef SLUICE_RUNTIME_OPS_CUDA_ATTENTION_H_
#define SLUICE_RUNTIME_OPS_CUDA_ATTENTION_H_

#include <cstddef>
#include <cstdint>

#include "runtime/ops/cuda/device.h"

namespace sluice::cuda {

enum class AttentionPrecision {
  kBF16,     // exact: both products in bf16 with f32 sums
  kInt8Fp8,  // SageAttention2 (arXiv 2411.10958): scores in int8, values in fp8
  // SageAttention2++ (arXiv 2505.21136): the same, where values of 64 keys are summed in f16
  kInt8Fp8HalfSums,
  kInt8Fp16,  // scores in int8, values in f16
  kInt4Fp8,   // scores in int4, of queries without the mean of their tile; values in fp8
  kInt4Fp16,  // the same with values in f16
};

// Which kernels compute it.
enum class AttentionFamily {
  kByChip,  // the fastest that the device has
  kHopper,  // products of warpgroups, fed by the tensor copy engine: capability 9.0 alone
  kMma,     // products of warps (mma.sync): every chip
};

// How many scores share a factor. Of 32 queries by 64 keys, those of a thread: 4 by 16; or all.
enum class ScaleGroups { kByChip, kThread, kWarp };

// All pointers are device memory that begins at a multiple of 16 bytes.
struct AttentionArgs {
  const void* q = nullptr;  // [batch * q_len, heads, head_dim] bf16
  const void* k = nullptr;  // [batch * kv_len, kv_heads, head_dim] bf16
  const void* v = nullptr;  // as k
  void* out = nullptr;      // as q
  // Or, instead of k and v, blocks of a paged cache (runtime/ops/cuda/kv.h) from `blocks` on and
  // table: {kv_len, numbers of blocks...}. Then the problem is causal and exact, batch is 1, and
  // kv_len is read on the device only, so that a launch serves any length.
  const void* blocks = nullptr;
  const int32_t* table = nullptr;
  // Elements between tokens; multiples of 8. Heads of a token follow each other.
  int64_t q_stride = 0, k_stride = 0, v_stride = 0, out_stride = 0;
  int64_t batch = 1, q_len = 0, kv_len = 0;
  int heads = 0, kv_heads = 0;  // heads is a multiple of kv_heads
  int head_dim = 0;             // 64, 72, 80 or 128
  float scale = 0;              // > 0
  bool causal = false;          // needs kv_len >= q_len
  AttentionPrecision precision = AttentionPrecision::kBF16;
  AttentionFamily family = AttentionFamily::kByChip;
  ScaleGroups groups = ScaleGroups::kByChip;  // of quantised precisions
};

// What a device of compute capability `capability` (90 for 9.0) computes `args` with: family and
// groups by name. A pure function. Throws Error where the chip lacks the products; where they are
// only emulated, slowly but with the same results, it does so unless the family is asked for.
struct AttentionVariant {
  AttentionFamily family;
  ScaleGroups groups;
};
AttentionVariant ChooseAttentionVariant(int capability, const AttentionArgs& args);

// The quantised precision that is fastest where a chip has its products, of those with scores in
// int8. A pure function.
AttentionPrecision QuantizedPrecision(int capability);

// Bytes of device memory that Attention needs besides its operands on device 0, at a multiple of
// 256 bytes. Nothing is kept there between calls. Throws Error as ChooseAttentionVariant does.
size_t AttentionWorkspaceBytes(const AttentionArgs& args);

// Queues the kernels in `stream` and returns; allocates nothing and waits for nothing. Throws Error
// when the arguments do not fit, the workspace is too small, the device lacks what the arguments
// ask for or a launch is refused; what goes wrong on the device appears at the next Synchronize.
void Attention(const AttentionArgs& args, void* workspace, size_t workspace_bytes, Stream stream);

// The faster precision for these sizes, quantisation included; a pure function, from measurements
// on an H100: short or narrow problems do not earn back the cost of quantising.
AttentionPrecision FastestAttention(const AttentionArgs& args);

// Warpgroups of 64 query rows that may share a tile on the exact path of Hopper. A thread has
// registers for 64 scores, 32 probabilities and head_dim / 2 sums: three warpgroups share less
// traffic of keys and values, but leave each thread 160 only.
constexpr int MostGroups(int head_dim) { return head_dim <= 80 ? 3 : 2; }
// How many of three do in a problem that is neither causal nor over blocks, on a device of so many
// multiprocessors: fewer where tiles are too few for it. A pure function.
int PlanGroups(const AttentionArgs& args, int processors);

// How the exact path of Hopper cuts a problem over blocks. A pure function of the sizes but kv_len.
struct PagedPlan {
  // Query heads of a kv head that share a tile: all of them where that makes fewer tiles, or 1.
  int heads_together = 1;
  int tokens = 0;  // of a warpgroup's 64 query rows, of which heads_together * tokens are used
  int tiles = 0;   // of one head or group of heads
  // Parts of the keys, where tiles are too few for the device; joined in a second kernel.
  int parts = 1;
};
PagedPlan PlanPaged(const AttentionArgs& args);

// Where the quantised path of Hopper keeps its operands in the workspace: offsets in bytes. Tiles
// hold kTileKeys keys; padded_len is kv_len rounded up to whole tiles.
struct QuantizedKvLayout {
  static constexpr int kTileKeys = 128;
  static constexpr int kKeyScales = 4;  // scales of a tile's keys: key j has scale (j % 8) / 2
  int64_t padded_len = 0;
  int64_t key_pitch = 0;      // bytes of a key: head_dim rounded up to 16
  size_t counter = 0;         // u32: the next piece of work
  size_t key_mean = 0;        // [batch * kv_heads, head_dim] f32
  size_t value_channels = 0;  // [batch * kv_heads, head_dim] f32
  size_t key_scales = 0;      // [batch * kv_heads, tiles, kKeyScales] f32
  size_t value_scales = 0;    // [batch * kv_heads, tiles] f32
  size_t keys = 0;            // [batch * kv_heads, padded_len, key_pitch] i8
  size_t values = 0;          // [batch * kv_heads, head_dim, padded_len] e4m3, keys permuted
  size_t bytes = 0;
};
QuantizedKvLayout LayOutQuantizedKv(const AttentionArgs& args);

// The same for kMma. A tile of fp8 values is [channels, kTileKeys] with keys permuted, one tile
// after another; f16 values are [padded_len, channels] in units of value_channels.
struct MmaKvLayout {
  static constexpr int kTileQueries = 128, kTileKeys = 64;
  static constexpr int kKeyScales = 4;  // of a tile's keys: key j has scale (j % 8) / 2
  int64_t padded_len = 0;
  int64_t q_tiles = 0;        // of a head
  int64_t channels = 0;       // of a value: head_dim rounded up to 16
  int64_t key_pitch = 0;      // bytes of a key: rounded up to 32
  size_t key_mean = 0;        // [batch * kv_heads, head_dim] f32
  size_t value_channels = 0;  // [batch * kv_heads, head_dim] f32
  size_t key_scales = 0;      // [batch * kv_heads, tiles, kKeyScales] f32
  size_t value_scales = 0;    // [batch * kv_heads, tiles] f32, of fp8 values
  size_t keys = 0;            // [batch * kv_heads, padded_len, key_pitch] i8, or i4 two a byte
  size_t values = 0;          // [batch * kv_heads, padded_len * channels] e4m3 or f16
  // Of int4 only: means of tiles of queries, [batch * heads, q_tiles, head_dim] f32, and their
  // products with the keys, [batch * heads, q_tiles, padded_len] f32, in powers of two.
  size_t query_means = 0, mean_scores = 0;
  size_t bytes = 0;
};
MmaKvLayout LayOutMmaKv(const AttentionArgs& args);

// Throws Error unless Attention takes these arguments.
void CheckAttention(const AttentionArgs& args);

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_ATTENTION_H_
