#include "llm/kv_cache.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <utility>

#include "runtime/error.h"
#include "runtime/ops/rope.h"
#include "runtime/ops/rows.h"

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
      block_bytes_(KvBlockBytes(geometry.kv_heads, geometry.head_dim, geometry.dtype)) {
  if (geometry_.device == Device::kCuda) {
    memory_ = std::make_unique<cuda::GrowingMemory>(budget_bytes);
  }
}

// Called with none free and at least one in the budget.
void KvBlockPool::AddBlocks() {
  int64_t blocks = std::max<int64_t>(1, kSlabBytes / block_bytes_);
  if (budget_bytes_ > 0) blocks = std::min(blocks, budget_bytes_ / block_bytes_ - existing_);
  uint8_t* first = nullptr;
  slabs_.reserve(slabs_.size() + 1);
  free_.reserve(existing_ + blocks);
  if (geometry_.device == Device::kCuda) {
    if (!memory_->GrowTo((existing_ + blocks) * block_bytes_)) {
      throw ResourceExhausted("[kv_cache] no memory on the GPU for " + std::to_string(blocks) +
                              " more blocks of " + std::to_string(block_bytes_) + " bytes");
    }
    first = memory_->data() + existing_ * block_bytes_;
  } else {
    Tensor slab(DType::kU8, {blocks, block_bytes_});
    first = slab.data<uint8_t>();
    std::memset(first, 0, slab.SizeBytes());
    slabs_.push_back(std::move(slab));
  }
  // Reversed, so that blocks are handed out in the order of their addresses.
  for (int64_t i = blocks - 1; i >= 0; --i) free_.push_back(first + i * block_bytes_);
  existing_ += blocks;
}

void* KvBlockPool::Acquire() {
  const std::lock_guard lock(mutex_);
  if (budget_bytes_ > 0 && (in_use_ + 1) * block_bytes_ > budget_bytes_) {
    throw ResourceExhausted("[kv_cache] the budget is " + std::to_string(budget_bytes_) +
                            " bytes, of which " + std::to_string(in_use_ * block_bytes_) +
                            " are in use; one more block of " + std::to_string(block_bytes_) +
                            " does not fit: raise the budget or shorten the context");
  }
  if (free_.empty()) AddBlocks();
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

void KvBlockPool::Copy(const void* from, void* to) const {
  if (geometry_.device == Device::kCuda) {
    cuda::CopyNow(to, from, block_bytes_);
  } else {
    std::memcpy(to, from, block_bytes_);
  }
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
  pool_->Copy(block, copy);
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
  if (num_tokens > std::numeric_limits<int32_t>::max() - before) {
    throw ResourceExhausted("[kv_cache] a stream has at most 2^31 - 1 tokens, this one has " +
                            std::to_string(before) + ": begin a new one");
  }
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
    if (layer.all_tokens && gone_ > 0) {
      throw Error("[kv_cache] rows cannot be left out once the window has slid");
    }
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
  if (positions_ == KvPositions::kRows || gone_ > 0) {
    throw Error(
        "[kv_cache] rows can be hidden only where positions are those of tokens and none has left "
        "the window");
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
    if (!from.pinned_keys.empty()) layer.pinned_keys = from.pinned_keys.Clone();
  }
  branch->length_ = length_;
  branch->gone_ = gone_;
  branch->pinned_ = pinned_;
  return branch;
}

int64_t KvCache::Reach() const {
  if (positions_ == KvPositions::kTokens) return length_ - gone_;
  int64_t most = 0;
  for (const Layer& layer : layers_) most = std::max(most, layer.rows);
  return most;
}

// Layer by layer, old blocks from the one where pinned rows end:
//
//   | p p p p | p a b c | d e f g | h ...       p: pinned, a - d: leave
//   | P P P P | P e f g | h ...                 P: turned; both blocks before h are new
void KvCache::Slide(ExecContext& ctx, ConstTensorView frequencies, int64_t pinned, int64_t blocks) {
  constexpr int64_t kBlock = kKvBlockTokens;
  const int64_t held = length_ - gone_;
  const bool whole = std::all_of(layers_.begin(), layers_.end(), [&](const Layer& layer) {
    return layer.all_tokens && layer.rows == held;
  });
  if (!whole || positions_ != KvPositions::kTokens || pinned < 0 || blocks < 1 ||
      (gone_ > 0 && pinned != pinned_) || pinned + blocks * kBlock > held) {
    throw Error("[kv_cache] cannot slide by " + std::to_string(blocks) + " blocks behind " +
                std::to_string(pinned) +
                " pinned tokens: expected whole rows at token positions, " +
                "so many tokens and the same pinned ones as before, got " + std::to_string(held) +
                " tokens and " + std::to_string(pinned_) + " pinned");
  }
  const KvGeometry& geometry = pool_->geometry();
  const int64_t width = int64_t{geometry.kv_heads} * geometry.head_dim;
  const auto gone = static_cast<int32_t>(gone_ + blocks * kBlock);
  const int64_t head = BlocksFor(pinned), head_rows = head * kBlock;
  // What stands in the head's last block behind the pinned rows; the newest rows may end in it.
  const int64_t joint = std::min(head_rows, held - blocks * kBlock) - pinned;
  std::vector<Layer> heads(layers_.size());  // the blocks and pinned keys to be
  try {
    if (pinned > 0) {
      const std::vector<int32_t> turns(pinned, gone);
      for (size_t i = 0; i < layers_.size(); ++i) {
        Layer& layer = heads[i];
        Grow(layer, pinned);
        const Tensor keys(geometry.dtype, {pinned + joint, width}, geometry.device);
        const Tensor values(geometry.dtype, {pinned + joint, width}, geometry.device);
        const KvLayerView old = View(layers_[i].blocks);
        LoadKv(ctx, old, 0, keys.view().Slice(0, pinned), values.view().Slice(0, pinned));
        LoadKv(ctx, old, pinned + blocks * kBlock, keys.view().Slice(pinned, pinned + joint),
               values.view().Slice(pinned, pinned + joint));
        if (gone_ == 0) {
          layer.pinned_keys = Tensor(geometry.dtype, {pinned, width}, geometry.device);
          CopyRows(ctx, keys.view().Slice(0, pinned), layer.pinned_keys);
        }
        const Tensor turned(DType::kF32, {pinned, width}, geometry.device);
        Convert(ctx, gone_ == 0 ? layer.pinned_keys : layers_[i].pinned_keys, turned);
        Rope(ctx, turned, geometry.head_dim, turns, frequencies);
        Convert(ctx, turned, keys.view().Slice(0, pinned));
        StoreKv(ctx, keys, values, 0, View(layer.blocks));
      }
    }
  } catch (...) {
    for (Layer& layer : heads) Shrink(layer, 0);
    throw;
  }
  for (size_t i = 0; i < layers_.size(); ++i) {
    Layer& layer = layers_[i];
    // Of the old blocks the head's go, and as many behind them as leave the window.
    for (int64_t b = 0; b < head + blocks; ++b) pool_->Release(layer.blocks[b]);
    layer.blocks.erase(layer.blocks.begin() + head, layer.blocks.begin() + head + blocks);
    std::copy(heads[i].blocks.begin(), heads[i].blocks.end(), layer.blocks.begin());
    layer.rows -= blocks * kBlock;
    if (gone_ == 0) layer.pinned_keys = std::move(heads[i].pinned_keys);
  }
  gone_ = gone;
  pinned_ = pinned;
}

ConstTensorView KvCache::PinnedKeys(int layer) const { return layers_[layer].pinned_keys; }

void KvCache::Restore(int64_t length, int64_t gone, std::vector<Tensor> pinned_keys) {
  const KvGeometry& geometry = pool_->geometry();
  const int64_t pinned = pinned_keys.empty() ? 0 : pinned_keys.front().dim(0);
  const bool fits = std::all_of(pinned_keys.begin(), pinned_keys.end(), [&](const Tensor& keys) {
    return keys.shape() == Shape{pinned, int64_t{geometry.kv_heads} * geometry.head_dim} &&
           keys.dtype() == geometry.dtype;
  });
  if (length_ != 0 || gone < 0 || gone % kKvBlockTokens != 0 || length - gone < pinned || !fits ||
      length > std::numeric_limits<int32_t>::max() ||
      (!pinned_keys.empty() && (gone == 0 || pinned_keys.size() != layers_.size()))) {
    throw InputError("[kv_cache] cannot restore " + std::to_string(length) + " tokens, of which " +
                     std::to_string(gone) + " have left, and pinned keys of " +
                     std::to_string(pinned_keys.size()) + " layers: no cache has these");
  }
  Reserve(length - gone);
  length_ = length;
  gone_ = gone;
  pinned_ = pinned;
  for (size_t i = 0; i < pinned_keys.size(); ++i) {
    layers_[i].pinned_keys = std::move(pinned_keys[i]);
  }
}

void KvCache::RewindTo(Mark mark) {
  if (mark.length == 0) {
    gone_ = pinned_ = 0;
    for (Layer& layer : layers_) layer.pinned_keys = Tensor();
  } else if (mark.length < gone_ + pinned_) {
    throw Error("[kv_cache] cannot rewind to token " + std::to_string(mark.length) +
                ": the window begins at token " + std::to_string(gone_ + pinned_));
  }
  for (size_t i = 0; i < layers_.size(); ++i) {
    Layer& layer = layers_[i];
    if (hidden_[i] && mark.length <= hidden_[i]->length) {
      Shrink(layer, 0);
      layer = std::move(hidden_[i]->layer);
      hidden_[i].reset();
    }
    int64_t rows = std::min(layer.rows, mark.length - gone_);
    if (!layer.all_tokens) {
      rows = std::lower_bound(layer.tokens.begin(), layer.tokens.end(), mark.length) -
             layer.tokens.begin();
    }
    Shrink(layer, rows);
    if (rows == mark.length - gone_) {  // so many different tokens below it are all of them
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
    rows += layer.rows - (layer.all_tokens ? std::clamp<int64_t>(token - gone_, 0, layer.rows)
                                           : std::lower_bound(tokens.begin(), tokens.end(), token) -
                                                 tokens.begin());
  }
  return rows / static_cast<int64_t>(layers_.size());
}

int32_t KvCache::TokenOf(int index, int64_t row) const {
  const Layer& layer = layers_[index];
  if (!layer.all_tokens) return layer.tokens[row];
  return static_cast<int32_t>(row < pinned_ ? row : row + gone_);
}

KvLayerView KvCache::View(const std::vector<void*>& blocks) const {
  const KvGeometry& geometry = pool_->geometry();
  return {.blocks = blocks,
          .kv_heads = geometry.kv_heads,
          .head_dim = geometry.head_dim,
          .dtype = geometry.dtype,
          .device = geometry.device,
          .base = pool_->base()};
}

KvLayerView KvCache::layer(int index) const { return View(layers_[index].blocks); }

int64_t KvCache::SizeBytes() const {
  int64_t blocks = 0, keys = 0;
  for (const Layer& layer : layers_) {
    blocks += layer.blocks.size();
    keys += layer.pinned_keys.SizeBytes();
  }
  for (const auto& hidden : hidden_) blocks += hidden ? hidden->layer.blocks.size() : 0;
  return blocks * pool_->block_bytes() + keys;
}

}  // namespace sluice
