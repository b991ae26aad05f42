// How kernels find the blocks of a KV cache on a GPU.
#ifndef SLUICE_RUNTIME_OPS_KV_TABLE_H_
#define SLUICE_RUNTIME_OPS_KV_TABLE_H_

#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "runtime/ops/attention.h"

namespace sluice {

// Turns where blocks lie into their numbers, counted from the view's base. A step of many sequences
// asks for some ten thousand: sizes are nearly always powers of two, which shifts divide by.
class BlockNumbers {
 public:
  explicit BlockNumbers(const KvLayerView& kv)
      : kv_(kv),
        bytes_(KvBlockBytes(kv.kv_heads, kv.head_dim, kv.dtype)),
        shift_(std::has_single_bit(bytes_) ? std::countr_zero(bytes_) : -1) {}
  int32_t operator[](int64_t block) const {
    const auto offset = static_cast<size_t>(static_cast<const char*>(kv_.blocks[block]) -
                                            static_cast<const char*>(kv_.base));
    return static_cast<int32_t>(shift_ >= 0 ? offset >> shift_ : offset / bytes_);
  }

 private:
  const KvLayerView& kv_;
  const size_t bytes_;
  const int shift_;
};

// Appends the numbers of the blocks that hold positions [begin, end).
inline void AppendBlocks(const KvLayerView& kv, int64_t begin, int64_t end,
                         std::vector<int32_t>& numbers) {
  const int64_t first = begin / kKvBlockTokens;
  const int64_t count = (end + kKvBlockTokens - 1) / kKvBlockTokens - first;
  if (count <= 0) return;
  const BlockNumbers of(kv);
  const size_t at = numbers.size();
  numbers.resize(at + count);
  for (int64_t b = 0; b < count; ++b) numbers[at + b] = of[first + b];
}

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_KV_TABLE_H_
