// Exact attention in bf16 by mma.sync: see attention_mma.cuh.
#include "runtime/ops/cuda/attention_mma.cuh"

namespace sluice::cuda::mma {

void FlashAttention(const AttentionArgs& args, cudaStream_t stream) {
  MmaShape shape = ShapeOf(args);
  const auto operand = [&](const void* data, int64_t stride) {
    return Operand{static_cast<const uint8_t*>(data), 2 * stride * args.kv_len,
                   2 * int64_t{args.head_dim},        2 * stride,
                   static_cast<int>(args.kv_len),     args.head_dim / 8};
  };
  if (args.blocks == nullptr) {
    shape.keys = operand(args.k, args.k_stride);
    shape.values = operand(args.v, args.v_stride);
  } else {
    const int64_t row_bytes = 2 * int64_t{args.head_dim}, head_bytes = kTileKeys * row_bytes;
    const auto* blocks = static_cast<const uint8_t*>(args.blocks);
    shape.keys = {blocks, 0, head_bytes, row_bytes, kTileKeys, args.head_dim / 8};
    shape.values = shape.keys;
    shape.values.data += args.kv_heads * head_bytes;
    shape.table = args.table;
    shape.block_bytes = 2 * args.kv_heads * head_bytes;
  }
  LaunchMma<Scores::kBf16, Values::kBf16>(args, shape, stream);
}

}  // namespace sluice::cuda::mma
