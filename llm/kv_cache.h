// Keys and values of one stream, in fixed-size blocks from a pool that outlives the cache.
// A cache is used by one thread at a time; the pool is thread-safe.
#ifndef SLUICE_LLM_KV_CACHE_H_
#define SLUICE_LLM_KV_CACHE_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "runtime/exec_context.h"
#include "runtime/ops/attention.h"
#include "runtime/ops/cuda/device.h"
#include "runtime/tensor.h"

namespace sluice {

struct KvGeometry {
  int num_layers = 0;
  int kv_heads = 0;
  int head_dim = 0;
  DType dtype = DType::kF32;
  Device device = Device::kCpu;  // where the blocks lie
};

// All KV memory of one device, so that a byte budget across sessions can be kept. On a GPU a block
// is handed out again as soon as it is released, though kernels that were queued before may still
// read it: caches whose blocks come from one pool do their work in one stream, which keeps order.
class KvBlockPool {
 public:
  // budget_bytes: the most that may be out at once; 0 means no limit. Memory is taken from the
  // system as it is needed and kept until the pool ends. Throws InputError on a geometry
  // without layers, heads or size.
  KvBlockPool(const KvGeometry& geometry, int64_t budget_bytes);

  // One block of one layer. Its elements are finite (attention multiplies the unused positions of a
  // block with zero). Throws ResourceExhausted, naming the budget, when it would be exceeded or the
  // system has no memory.
  void* Acquire();
  // One more owner of a block that is out: each releases it once, the last one gives it back.
  void Share(void* block);
  bool IsShared(void* block) const;
  void Release(void* block);
  // to = from, both of the pool.
  void Copy(ExecContext& ctx, const void* from, void* to) const;
  const KvGeometry& geometry() const { return geometry_; }
  // On a GPU, where the first block lies or would lie; else null.
  const void* base() const { return memory_ ? memory_->data() : nullptr; }
  int64_t block_bytes() const { return block_bytes_; }
  int64_t bytes_in_use() const;
  int64_t budget_bytes() const { return budget_bytes_; }

 private:
  void AddBlocks();

  const KvGeometry geometry_;
  const int64_t budget_bytes_;
  const int64_t block_bytes_;
  mutable std::mutex mutex_;
  std::vector<Tensor> slabs_;                    // in host memory
  std::unique_ptr<cuda::GrowingMemory> memory_;  // on a GPU: one piece, as its kernels want it
  std::vector<void*> free_;  // has room for every block there is: Release never allocates
  int64_t in_use_ = 0;       // blocks
  int64_t existing_ = 0;     // blocks
  std::unordered_map<void*, int64_t> others_;  // owners besides the first, where there are any
};

// What the rotary position of a row is, where not every token has a row in every layer.
enum class KvPositions {
  kTokens,  // the number of its token in the sequence: the same in every layer
  kRows,    // its place among the rows of its layer: every layer has a clock of its own
};

// A sequence of tokens. Normally each has one row in every layer; a layer policy may leave a layer
// fewer rows than there are tokens (llm/layer_policy.h). Rows stand in the order of their tokens.
//
// A cache that slides (Slide) holds the first tokens, the pinned ones, and a window: the newest.
// Keys in the window stay rotated to the numbers of their tokens, so that nothing is rotated again
// and distances are true; the pinned ones are turned to the positions in front of the window.
class KvCache {
 public:
  explicit KvCache(std::shared_ptr<KvBlockPool> pool, KvPositions positions = KvPositions::kTokens);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  // Appends `num_tokens` tokens with a row in every layer and returns the number of the first. What
  // is shared and will be written to is copied first. Throws ResourceExhausted if that would exceed
  // the budget; the cache is then unchanged.
  int64_t Reserve(ExecContext& ctx, int64_t num_tokens);
  int64_t length() const { return length_; }  // tokens, also those that have left the window
  // Positions from the first row's to where the next token goes: what a model's limit is about.
  int64_t Reach() const;

  // Forgets the oldest `blocks` * kKvBlockTokens tokens behind the first `pinned`, in every layer,
  // and gives their blocks back. frequencies: as of Rope (runtime/ops/rope.h). Blocks are replaced
  // where pinned and window rows share one, never written to, and pinned keys are always turned
  // from what was stored first, so errors do not add up. Marks before the window cannot be rewound
  // to any more, but for the empty cache. Throws ResourceExhausted, the cache then unchanged, and
  // Error unless the window has so many rows, every token has a row in every layer, `pinned` is
  // the same each time and positions are those of tokens.
  void Slide(ExecContext& ctx, ConstTensorView frequencies, int64_t pinned, int64_t blocks);
  // Tokens that have left the window, and those in front of it.
  int64_t gone() const { return gone_; }
  int64_t pinned() const { return pinned_; }
  // Of the pinned rows as they were stored, [pinned(), kv_heads * D]; empty while gone() is 0.
  ConstTensorView PinnedKeys(int layer) const;
  // Makes an empty cache one of `length` tokens of which `gone` have left behind the pinned ones,
  // with rows still to be stored (StoreKv): what a saved stream begins with. pinned_keys: as
  // PinnedKeys told, of every layer, in host memory; none where gone or pinned is 0. Throws
  // ResourceExhausted, the cache then empty, and InputError on numbers and tensors that no cache
  // has.
  void Restore(ExecContext& ctx, int64_t length, int64_t gone, std::span<const Tensor> pinned_keys);

  // The same layer by layer, for tokens that do not reach every layer. ReserveRows makes room in
  // one layer for rows of `tokens`: ascending numbers, from length() on unless a KvPolicy recalls.
  // Once every layer has its rows, Advance counts the tokens. Throws ResourceExhausted; RewindTo
  // where it began then gives back what had been reserved.
  void ReserveRows(ExecContext& ctx, int layer, std::span<const int32_t> tokens);
  void Advance(int64_t num_tokens) { length_ += num_tokens; }

  // Lets a layer hold only `rows` (ascending) of its rows, until the cache is rewound to its
  // present length or before: then the others are back. Copies what is kept into blocks of its own,
  // so the original blocks are not written to. Throws ResourceExhausted, the cache then unchanged,
  // and Error where positions are those of rows: keys are stored rotated and would have to turn.
  void KeepRows(ExecContext& ctx, int layer, std::span<const int32_t> rows);

  int64_t rows(int layer) const { return layers_[layer].rows; }
  int64_t RowsOfAllLayers() const;
  // The mean over layers: what attention reads in effect.
  int64_t MeanRows() const { return RowsOfAllLayers() / static_cast<int64_t>(layers_.size()); }
  // The same of rows whose tokens are `token` and later ones.
  int64_t MeanRowsSince(int64_t token) const;
  // The token of a row, and the position its key is rotated to. REQUIRES: row < rows(layer).
  int32_t TokenOf(int layer, int64_t row) const;
  int32_t PositionOf(int layer, int64_t row) const {
    if (positions_ == KvPositions::kRows) return static_cast<int32_t>(row);
    return layers_[layer].all_tokens ? static_cast<int32_t>(row + gone_) : TokenOf(layer, row);
  }
  KvPositions positions() const { return positions_; }
  const std::shared_ptr<KvBlockPool>& pool() const { return pool_; }

  // Another sequence that begins with all of this one. Both go on by themselves: they share blocks,
  // and whoever writes to a shared one first copies it, so a branch costs at most a block a layer.
  // Throws Error while rows are hidden.
  std::unique_ptr<KvCache> Branch() const;

  // A point to come back to. Rewinding forgets everything after it and gives its blocks back.
  struct Mark {
    int64_t length = 0;
  };
  Mark MarkHere() const { return {length_}; }
  // REQUIRES: mark.length <= length(). Throws Error on marks before the window.
  void RewindTo(Mark mark);

  // Valid until the next call that changes the cache.
  KvLayerView layer(int layer) const;
  std::vector<KvLayerView> layers() const;  // all of them
  int64_t SizeBytes() const;  // of the blocks it holds, hidden ones included, and pinned keys

 private:
  struct Layer {
    std::vector<void*> blocks;
    int64_t rows = 0;
    // Of each row. Empty where every token that is not gone has a row.
    std::vector<int32_t> tokens;
    bool all_tokens = true;
  };
  // A layer behind a selection of its rows, and when it comes back.
  struct Hidden {
    Layer layer;
    int64_t length = 0;  // of the cache when it was hidden
  };
  void Grow(ExecContext& ctx, Layer& layer, int64_t rows);
  void MakeOwn(ExecContext& ctx, void*& block);
  void Shrink(Layer& layer, int64_t rows);
  std::shared_ptr<const Tensor> FillHeads(ExecContext& ctx, ConstTensorView frequencies,
                                          int64_t pinned, int64_t leaving, int64_t joint,
                                          std::span<const KvLayerView> heads) const;
  KvLayerView View(const std::vector<void*>& blocks) const;

  std::shared_ptr<KvBlockPool> pool_;
  const KvPositions positions_;
  std::vector<Layer> layers_;
  std::vector<std::optional<Hidden>> hidden_;  // one a layer
  int64_t length_ = 0;
  int64_t gone_ = 0, pinned_ = 0;
  // Once the cache has slid, of all layers: [layers * pinned, kv_heads * D]. Branches share it.
  std::shared_ptr<const Tensor> pinned_keys_;
};

}  // namespace sluice

#endif  // SLUICE_LLM_KV_CACHE_H_
