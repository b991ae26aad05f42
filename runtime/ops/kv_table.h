// How kernels find the blocks of a KV cache on a GPU.
#ifndef SLUICE_RUNTIME_OPS_KV_TABLE_H_
#define SLUICE_RUNTIME_OPS_KV_TABLE_H_

#include <cstdint>
#include <vector>

#include "runtime/ops/attention.h"

namespace sluice {

// The number of the block that holds a position, counted from the view's base.
inline int64_t BlockOf(const KvLayerView& kv, int64_t position) {
  const auto bytes = static_cast<int64_t>(KvBlockBytes(kv.kv_heads, kv.head_dim, kv.dtype));
  const auto* const block = static_cast<const char*>(kv.blocks[position / kKvBlockTokens]);
  return (block - static_cast<const char*>(kv.base)) / bytes;
}

// Appends the numbers of the blocks that hold positions [begin, end).
inline void AppendBlocks(const KvLayerView& kv, int64_t begin, int64_t end,
                         std::vector<int32_t>& numbers) {
  const int64_t last = (end + kKvBlockTokens - 1) / kKvBlockTokens;
  for (int64_t b = begin / kKvBlockTokens; b < last; ++b) {
    numbers.push_back(static_cast<int32_t>(BlockOf(kv, b * kKvBlockTokens)));
  }
}

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_KV_TABLE_H_
