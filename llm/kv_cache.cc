#include "llm/kv_cache.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <utility>

#include "runtime/error.h"
#include "runtime/ops/kv_layers.h"
#include "runtime/ops/rope.h"
#include "runtime/ops/rows.h"
#include "runtime/transfer.h"

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

void KvBlockPool::Copy(ExecContext& ctx, const void* from, void* to) const {
  Transfer(ctx, ConstTensorView(from, DType::kU8, {1, block_bytes_}, -1, geometry_.device),
           TensorView(to, DType::kU8, {1, block_bytes_}, -1, geometry_.device));
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
void KvCache::MakeOwn(ExecContext& ctx, void*& block) {
  if (!pool_->IsShared(block)) return;
  void* const copy = pool_->Acquire();
  pool_->Copy(ctx, block, copy);
  pool_->Release(block);
  block = copy;
}

// Makes sure of blocks for `rows` rows, those behind the layer's present ones to be written to.
void KvCache::Grow(ExecContext& ctx, Layer& layer, int64_t rows) {
  const int64_t needed = BlocksFor(rows);
  const size_t open = layer.rows / kKvBlockTokens;  // the first block that has room
  if (rows > layer.rows && open < layer.blocks.size()) MakeOwn(ctx, layer.blocks[open]);
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

int64_t KvCache::Reserve(ExecContext& ctx, int64_t num_tokens) {
  if (num_tokens < 0) throw Error("[kv_cache] cannot reserve " + std::to_string(num_tokens));
  const int64_t before = length_;
  if (num_tokens > std::numeric_limits<int32_t>::max() - before) {
    throw ResourceExhausted("[kv_cache] a stream has at most 2^31 - 1 tokens, this one has " +
                            std::to_string(before) + ": begin a new one");
  }
  try {
    for (Layer& layer : layers_) {
      Grow(ctx, layer, layer.rows + num_tokens);
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

void KvCache::ReserveRows(ExecContext& ctx, int index, std::span<const int32_t> tokens) {
  Layer& layer = layers_[index];
  Grow(ctx, layer, layer.rows + static_cast<int64_t>(tokens.size()));
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
    Grow(ctx, kept, static_cast<int64_t>(rows.size()));
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
  branch->gone_ = gone_;
  branch->pinned_ = pinned_;
  branch->pinned_keys_ = pinned_keys_;
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
  const auto gone = static_cast<int32_t>(gone_ + blocks * kBlock);
  const int64_t head = BlocksFor(pinned), head_rows = head * kBlock;
  // What stands in the head's last block behind the pinned rows; the newest rows may end in it.
  const int64_t joint = std::min(head_rows, held - blocks * kBlock) - pinned;
  std::vector<Layer> heads(layers_.size());  // the blocks to be
  try {
    if (pinned > 0) {
      std::vector<KvLayerView> views;
      for (Layer& layer : heads) {
        Grow(ctx, layer, pinned);
        views.push_back(View(layer.blocks));
      }
      pinned_keys_ = FillHeads(ctx, frequencies, pinned, blocks * kBlock, joint, views);
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
  }
  gone_ = gone;
  pinned_ = pinned;
}

// Stores in new heads of the layers the pinned rows, turned to where they stand once `leaving` more
// rows are gone, and the `joint` rows that then follow them. Returns the pinned keys as they were
// stored first.
std::shared_ptr<const Tensor> KvCache::FillHeads(ExecContext& ctx, ConstTensorView frequencies,
                                                 int64_t pinned, int64_t leaving, int64_t joint,
                                                 std::span<const KvLayerView> heads) const {
  const KvGeometry& geometry = pool_->geometry();
  const int64_t width = int64_t{geometry.kv_heads} * geometry.head_dim;
  const int64_t count = geometry.num_layers;
  const std::vector<KvLayerView> old = layers();
  const Workspace::Scope scope(ctx.workspace());
  const auto packed = [&](int64_t rows) {
    return ctx.workspace().Allocate(geometry.dtype, {count, 2 * rows * width});
  };
  const auto bytes = [](TensorView rows) {
    return TensorView(rows.raw(), DType::kU8, {static_cast<int64_t>(rows.SizeBytes())}, -1,
                      rows.device());
  };
  const TensorView front = packed(pinned), behind = packed(joint);
  PackKv(ctx, old, 0, pinned, KvPacking::kPlain, bytes(front));
  const TensorView keys = front.Columns(0, pinned * width);
  std::shared_ptr<const Tensor> first = pinned_keys_;
  if (!first) {
    first = std::make_shared<Tensor>(geometry.dtype, Shape{count * pinned, width}, geometry.device);
    CopyRows(ctx, keys,
             TensorView(first->view().raw(), geometry.dtype, keys.shape(), -1, geometry.device));
  }
  const TensorView turned = ctx.workspace().Allocate(DType::kF32, first->shape());
  Convert(ctx, *first, turned);
  const std::vector<int32_t> turns(count * pinned, static_cast<int32_t>(gone_ + leaving));
  Rope(ctx, turned, geometry.head_dim, turns, frequencies);
  Convert(ctx, TensorView(turned.raw(), DType::kF32, keys.shape(), -1, geometry.device), keys);
  UnpackKv(ctx, bytes(front), pinned, heads, 0);
  PackKv(ctx, old, pinned + leaving, joint, KvPacking::kPlain, bytes(behind));
  UnpackKv(ctx, bytes(behind), joint, heads, pinned);
  return first;
}

ConstTensorView KvCache::PinnedKeys(int layer) const {
  if (!pinned_keys_) return {};
  return pinned_keys_->view().Slice(layer * pinned_, (layer + 1) * pinned_);
}

void KvCache::Restore(ExecContext& ctx, int64_t length, int64_t gone,
                      std::span<const Tensor> pinned_keys) {
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
  std::shared_ptr<const Tensor> keys;
  if (!pinned_keys.empty()) {
    const int64_t width = int64_t{geometry.kv_heads} * geometry.head_dim;
    keys = std::make_shared<Tensor>(geometry.dtype, Shape{geometry.num_layers * pinned, width},
                                    geometry.device);
    for (int64_t i = 0; i < geometry.num_layers; ++i) {
      Transfer(ctx, pinned_keys[i], keys->view().Slice(i * pinned, (i + 1) * pinned));
    }
  }
  Reserve(ctx, length - gone);
  length_ = length;
  gone_ = gone;
  pinned_ = pinned;
  pinned_keys_ = std::move(keys);
}

void KvCache::RewindTo(Mark mark) {
  if (mark.length == 0) {
    gone_ = pinned_ = 0;
    pinned_keys_.reset();
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

std::vector<KvLayerView> KvCache::layers() const {
  std::vector<KvLayerView> views;
  for (const Layer& layer : layers_) views.push_back(View(layer.blocks));
  return views;
}

int64_t KvCache::SizeBytes() const {
  int64_t blocks = 0;
  for (const Layer& layer : layers_) blocks += layer.blocks.size();
  for (const auto& hidden : hidden_) blocks += hidden ? hidden->layer.blocks.size() : 0;
  return blocks * pool_->block_bytes() +
         static_cast<int64_t>(pinned_keys_ ? pinned_keys_->SizeBytes() : 0);
}

}  // namespace sluice
