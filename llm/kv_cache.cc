#include "llm/kv_cache.h"

#include <algorithm>
#include <cstring>
#include <numeric>
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

void KvBlockPool::Share(void* block) {
  const std::lock_guard lock(mutex_);
  ++others_[block];
}

bool KvBlockPool::IsShared(void* block) const {
  const std::lock_guard lock(mutex_);
  return others_.contains(block);
}

void KvBlockPool::Release(void* block) {
  const std::lock_guard lock(mutex_);
  if (const auto shared = others_.find(block); shared != others_.end()) {
    if (--shared->second == 0) others_.erase(shared);
    return;
  }
  free_.push_back(block);
  --in_use_;
}

int64_t KvBlockPool::bytes_in_use() const {
  const std::lock_guard lock(mutex_);
  return in_use_ * block_bytes_;
}

KvCache::KvCache(std::shared_ptr<KvBlockPool> pool, KvPositions positions)
    : pool_(std::move(pool)),
      positions_(positions),
      layers_(pool_->geometry().num_layers),
      hidden_(pool_->geometry().num_layers) {}

KvCache::~KvCache() { RewindTo({0}); }

// Before a block is written to.
void KvCache::MakeOwn(void*& block) {
  if (!pool_->IsShared(block)) return;
  void* const copy = pool_->Acquire();
  std::memcpy(copy, block, pool_->block_bytes());
  pool_->Release(block);
  block = copy;
}

// Makes sure of blocks for `rows` rows, those behind the layer's present ones to be written to.
void KvCache::Grow(Layer& layer, int64_t rows) {
  const int64_t needed = BlocksFor(rows);
  const size_t open = layer.rows / kKvBlockTokens;  // the first block that has room
  if (rows > layer.rows && open < layer.blocks.size()) MakeOwn(layer.blocks[open]);
  if (static_cast<int64_t>(layer.blocks.capacity()) < needed) layer.blocks.reserve(2 * needed);
  while (static_cast<int64_t>(layer.blocks.size()) < needed) {
    layer.blocks.push_back(pool_->Acquire());
  }
}

// Forgets rows from `rows` on, and gives blocks back that none uses, also if only reserved.
void KvCache::Shrink(Layer& layer, int64_t rows) {
  layer.rows = rows;
  if (!layer.all_tokens) layer.tokens.resize(rows);
  const size_t kept = BlocksFor(rows);
  while (layer.blocks.size() > kept) {
    pool_->Release(layer.blocks.back());
    layer.blocks.pop_back();
  }
}

int64_t KvCache::Reserve(int64_t num_tokens) {
  if (num_tokens < 0) throw Error("[kv_cache] cannot reserve " + std::to_string(num_tokens));
  const int64_t before = length_;
  try {
    for (Layer& layer : layers_) {
      Grow(layer, layer.rows + num_tokens);
      if (layer.all_tokens) continue;
      const size_t old = layer.tokens.size();
      layer.tokens.resize(old + num_tokens);
      std::iota(layer.tokens.begin() + old, layer.tokens.end(), static_cast<int32_t>(before));
    }
  } catch (...) {
    RewindTo({before});
    throw;
  }
  for (Layer& layer : layers_) layer.rows += num_tokens;
  length_ += num_tokens;
  return before;
}

void KvCache::ReserveRows(int index, std::span<const int32_t> tokens) {
  Layer& layer = layers_[index];
  Grow(layer, layer.rows + static_cast<int64_t>(tokens.size()));
  for (const int32_t token : tokens) {
    if (layer.all_tokens && token != layer.rows) {
      layer.tokens.resize(layer.rows);
      std::iota(layer.tokens.begin(), layer.tokens.end(), 0);
      layer.all_tokens = false;
    }
    if (!layer.all_tokens) layer.tokens.push_back(token);
    ++layer.rows;
  }
}

void KvCache::KeepRows(ExecContext& ctx, int index, std::span<const int32_t> rows) {
  Layer& layer = layers_[index];
  if (static_cast<int64_t>(rows.size()) == layer.rows) return;
  if (positions_ == KvPositions::kRows) {
    throw Error("[kv_cache] rows can be hidden only where positions are those of tokens");
  }
  Layer kept;
  try {
    kept.tokens.reserve(rows.size());
    for (const int32_t row : rows) kept.tokens.push_back(TokenOf(index, row));
    Grow(kept, static_cast<int64_t>(rows.size()));
  } catch (...) {
    Shrink(kept, 0);
    throw;
  }
  kept.all_tokens = false;
  kept.rows = static_cast<int64_t>(rows.size());
  GatherKv(ctx, View(layer.blocks), rows, View(kept.blocks));
  if (hidden_[index]) {
    Shrink(layer, 0);
  } else {
    hidden_[index] = Hidden{std::move(layer), length_};
  }
  layer = std::move(kept);
}

std::unique_ptr<KvCache> KvCache::Branch() const {
  auto branch = std::make_unique<KvCache>(pool_, positions_);
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (hidden_[i]) throw Error("[kv_cache] a cache with hidden rows has no branches");
    const Layer& from = layers_[i];
    Layer& layer = branch->layers_[i];
    layer.tokens = from.tokens;
    layer.all_tokens = from.all_tokens;
    layer.blocks.reserve(from.blocks.size());
    for (void* const block : from.blocks) {
      pool_->Share(block);
      layer.blocks.push_back(block);
    }
    layer.rows = from.rows;
  }
  branch->length_ = length_;
  return branch;
}

void KvCache::RewindTo(Mark mark) {
  for (size_t i = 0; i < layers_.size(); ++i) {
    Layer& layer = layers_[i];
    if (hidden_[i] && mark.length <= hidden_[i]->length) {
      Shrink(layer, 0);
      layer = std::move(hidden_[i]->layer);
      hidden_[i].reset();
    }
    int64_t rows = std::min(layer.rows, mark.length);
    if (!layer.all_tokens) {
      rows = std::lower_bound(layer.tokens.begin(), layer.tokens.end(), mark.length) -
             layer.tokens.begin();
    }
    Shrink(layer, rows);
    if (rows == mark.length) {  // so many different tokens below it are all of them
      layer.tokens.clear();
      layer.all_tokens = true;
    }
  }
  length_ = mark.length;
}

int64_t KvCache::RowsOfAllLayers() const {
  int64_t rows = 0;
  for (const Layer& layer : layers_) rows += layer.rows;
  return rows;
}

int64_t KvCache::MeanRowsSince(int64_t token) const {
  int64_t rows = 0;
  for (const Layer& layer : layers_) {
    const auto& tokens = layer.tokens;
    rows += layer.rows - (layer.all_tokens ? std::min(token, layer.rows)
                                           : std::lower_bound(tokens.begin(), tokens.end(), token) -
                                                 tokens.begin());
  }
  return rows / static_cast<int64_t>(layers_.size());
}

int32_t KvCache::TokenOf(int index, int64_t row) const {
  const Layer& layer = layers_[index];
  return layer.all_tokens ? static_cast<int32_t>(row) : layer.tokens[row];
}

KvLayerView KvCache::View(const std::vector<void*>& blocks) const {
  const KvGeometry& geometry = pool_->geometry();
  return {.blocks = blocks,
          .kv_heads = geometry.kv_heads,
          .head_dim = geometry.head_dim,
          .dtype = geometry.dtype};
}

KvLayerView KvCache::layer(int index) const { return View(layers_[index].blocks); }

int64_t KvCache::SizeBytes() const {
  int64_t blocks = 0;
  for (const Layer& layer : layers_) blocks += layer.blocks.size();
  for (const auto& hidden : hidden_) blocks += hidden ? hidden->layer.blocks.size() : 0;
  return blocks * pool_->block_bytes();
}

}  // namespace sluice
