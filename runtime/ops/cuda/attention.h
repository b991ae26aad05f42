// Attention on a CUDA device of compute capability 9.0 (Hopper).
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
};

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
};

// Bytes of device memory that Attention needs besides its operands, at a multiple of 256 bytes.
// Nothing is kept there between calls.
size_t AttentionWorkspaceBytes(const AttentionArgs& args);

// Queues the kernels in `stream` and returns; allocates nothing and waits for nothing. Throws Error
// when the arguments do not fit, the workspace is too small, the device is no Hopper or a launch is
// refused; what goes wrong on the device appears at the next Synchronize.
void Attention(const AttentionArgs& args, void* workspace, size_t workspace_bytes, Stream stream);

// The faster precision for these sizes, quantisation included; a pure function, from measurements
// on an H100: short or narrow problems do not earn back the cost of quantising.
AttentionPrecision FastestAttention(const AttentionArgs& args);

// How the exact path cuts a problem over blocks. A pure function of the sizes but kv_len.
struct PagedPlan {
  // Query heads of a kv head that share a tile: all of them where that makes fewer tiles, or 1.
  int heads_together = 1;
  int tokens = 0;  // of a warpgroup's 64 query rows, of which heads_together * tokens are used
  int tiles = 0;   // of one head or group of heads
  // Parts of the keys, where tiles are too few for the device; joined in a second kernel.
  int parts = 1;
};
PagedPlan PlanPaged(const AttentionArgs& args);

// Where the quantised path keeps its operands in the workspace: offsets in bytes. Tiles hold
// kTileKeys keys; padded_len is kv_len rounded up to whole tiles.
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

// Throws Error unless Attention takes these arguments.
void CheckAttention(const AttentionArgs& args);

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_ATTENTION_H_
