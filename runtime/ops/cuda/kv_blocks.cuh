// Where a kernel finds a row of a KV cache: see runtime/ops/cuda/kv.h for what a block holds.
#ifndef SLUICE_RUNTIME_OPS_CUDA_KV_BLOCKS_CUH_
#define SLUICE_RUNTIME_OPS_CUDA_KV_BLOCKS_CUH_

#include <cstdint>

namespace sluice::cuda {

constexpr int kBlock = 64;  // positions of a block

// Finds rows in blocks.
template <typename T>
struct Blocks {
  T* base;
  int heads, head_dim;
  __device__ int64_t BlockElements() const { return int64_t{2} * heads * kBlock * head_dim; }
  __device__ T* Key(const int32_t* table, int64_t position, int head) const {
    return base + table[position / kBlock] * BlockElements() +
           (int64_t{head} * kBlock + position % kBlock) * head_dim;
  }
  __device__ int64_t ValuesBehindKeys() const { return int64_t{heads} * kBlock * head_dim; }
};

template <typename T>
Blocks<T> BlocksOf(const void* base, int kv_heads, int head_dim) {
  return {static_cast<T*>(const_cast<void*>(base)), kv_heads, head_dim};
}

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_KV_BLOCKS_CUH_
