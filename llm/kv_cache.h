// Keys and values of one stream, in fixed-size blocks from a pool that outlives the cache.
// A cache is used by one thread at a time; the pool is thread-safe.
#ifndef SLUICE_LLM_KV_CACHE_H_
#define SLUICE_LLM_KV_CACHE_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "runtime/ops/attention.h"
#include "runtime/tensor.h"

namespace sluice {

struct KvGeometry {
  int num_layers = 0;
  int kv_heads = 0;
  int head_dim = 0;
  DType dtype = DType::kF32;
};

// All KV memory of one device, so that a byte budget across sessions can be kept.
class KvBlockPool {
 public:
  // budget_bytes: the most that may be out at once; 0 means no limit. Memory is taken from the
  // system in slabs as it is needed and kept until the pool ends. Throws InputError on a geometry
  // without layers, heads or size.
  KvBlockPool(const KvGeometry& geometry, int64_t budget_bytes);

  // One block of one layer. Its elements are finite (attention multiplies the unused positions of a
  // block with zero). Throws ResourceExhausted, naming the budget, when it would be exceeded or the
  // system has no memory.
  void* Acquire();
  void Release(void* block);
  const KvGeometry& geometry() const { return geometry_; }
  int64_t block_bytes() const { return block_bytes_; }
  int64_t bytes_in_use() const;
  int64_t budget_bytes() const { return budget_bytes_; }

 private:
  const KvGeometry geometry_;
  const int64_t budget_bytes_;
  const int64_t block_bytes_;
  mutable std::mutex mutex_;
  std::vector<Tensor> slabs_;
  std::vector<void*> free_;  // has room for every block there is: Release never allocates
  int64_t in_use_ = 0;       // blocks
};

class KvCache {
 public:
  explicit KvCache(std::shared_ptr<KvBlockPool> pool);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  // Makes room for `num_tokens` more positions in every layer and returns where they begin.
  // Throws ResourceExhausted if that would exceed the budget; the cache is then unchanged.
  int64_t Reserve(int64_t num_tokens);
  int64_t length() const { return length_; }

  // A point to come back to. Rewinding forgets everything after it and gives its blocks back.
  struct Mark {
    int64_t length = 0;
  };
  Mark MarkHere() const { return {length_}; }
  // REQUIRES: mark.length <= length().
  void RewindTo(Mark mark);

  // Valid until the next Reserve or RewindTo.
  KvLayerView layer(int layer) const;
  int64_t SizeBytes() const;  // of the blocks it holds

 private:
  std::shared_ptr<KvBlockPool> pool_;
  std::vector<std::vector<void*>> blocks_;  // [layer][block]
  int64_t length_ = 0;
};

}  // namespace sluice

#endif  // SLUICE_LLM_KV_CACHE_H_
