#include "llm/kv_cache.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "runtime/error.h"

namespace sluice {
namespace {

constexpr int64_t kSlabBytes = int64_t{4} << 20;

int64_t BlocksFor(int64_t positions) { return (positions + kKvBlockTokens - 1) / kKvBlockTokens; }

const KvGeometry& Checked(const KvGeometry& geometry) {
  if (geometry.num_layers < 1 || geometry.kv_heads < 1 || geometry.head_dim < 1) {
    throw InputError("[kv_cache] needs layers, heads and a head size of at least 1, got " +
                     std::to_string(geometry.num_layers) + ", " +
                     std::to_string(geometry.kv_heads) + ", " + std::to_string(geometry.head_dim));
  }
  return geometry;
}

}  // namespace

KvBlockPool::KvBlockPool(const KvGeometry& geometry, int64_t budget_bytes)
    : geometry_(Checked(geometry)),
      budget_bytes_(budget_bytes),
      block_bytes_(KvBlockBytes(geometry.kv_heads, geometry.head_dim, geometry.dtype)) {}

void* KvBlockPool::Acquire() {
  const std::lock_guard lock(mutex_);
  if (budget_bytes_ > 0 && (in_use_ + 1) * block_bytes_ > budget_bytes_) {
    throw ResourceExhausted("[kv_cache] the budget is " + std::to_string(budget_bytes_) +
                            " bytes, of which " + std::to_string(in_use_ * block_bytes_) +
                            " are in use; one more block of " + std::to_string(block_bytes_) +
                            " does not fit: raise the budget or shorten the context");
  }
  if (free_.empty()) {
    const int64_t existing = in_use_;
    int64_t blocks = std::max<int64_t>(1, kSlabBytes / block_bytes_);
    if (budget_bytes_ > 0) blocks = std::min(blocks, budget_bytes_ / block_bytes_ - existing);
    free_.reserve(existing + blocks);
    slabs_.reserve(slabs_.size() + 1);
    Tensor slab(DType::kU8, {blocks, block_bytes_});
    std::memset(slab.data<uint8_t>(), 0, slab.SizeBytes());
    // Reversed, so that blocks are handed out in the order of their addresses.
    for (int64_t i = blocks - 1; i >= 0; --i) {
      free_.push_back(slab.data<uint8_t>() + i * block_bytes_);
    }
    slabs_.push_back(std::move(slab));
  }
  void* block = free_.back();
  free_.pop_back();
  ++in_use_;
  return block;
}

void KvBlockPool::Release(void* block) {
  const std::lock_guard lock(mutex_);
  free_.push_back(block);
  --in_use_;
}

int64_t KvBlockPool::bytes_in_use() const {
  const std::lock_guard lock(mutex_);
  return in_use_ * block_bytes_;
}

KvCache::KvCache(std::shared_ptr<KvBlockPool> pool)
    : pool_(std::move(pool)), blocks_(pool_->geometry().num_layers) {}

KvCache::~KvCache() { RewindTo({0}); }

int64_t KvCache::Reserve(int64_t num_tokens) {
  if (num_tokens < 0) throw Error("[kv_cache] cannot reserve " + std::to_string(num_tokens));
  const int64_t before = length_;
  const int64_t needed = BlocksFor(length_ + num_tokens);
  try {
    for (std::vector<void*>& layer : blocks_) {
      if (static_cast<int64_t>(layer.capacity()) < needed) layer.reserve(2 * needed);
      while (static_cast<int64_t>(layer.size()) < needed) layer.push_back(pool_->Acquire());
    }
  } catch (...) {
    RewindTo({before});
    throw;
  }
  length_ += num_tokens;
  return before;
}

void KvCache::RewindTo(Mark mark) {
  const size_t kept = BlocksFor(mark.length);
  for (std::vector<void*>& layer : blocks_) {
    while (layer.size() > kept) {
      pool_->Release(layer.back());
      layer.pop_back();
    }
  }
  length_ = mark.length;
}

KvLayerView KvCache::layer(int layer) const {
  const KvGeometry& geometry = pool_->geometry();
  return {.blocks = blocks_[layer],
          .kv_heads = geometry.kv_heads,
          .head_dim = geometry.head_dim,
          .dtype = geometry.dtype};
}

int64_t KvCache::SizeBytes() const {
  int64_t blocks = 0;
  for (const std::vector<void*>& layer : blocks_) blocks += layer.size();
  return blocks * pool_->block_bytes();
}

}  // namespace sluice
