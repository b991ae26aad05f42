// Streams that last: a window of the newest tokens stays in the KV cache, frames that leave it go
// to host memory and to a file, and a question calls back, in every layer, those it matches best.
//
// After ReKV (Di et al. 2025, arXiv 2503.00540): a frame is a block; its index vector in a layer is
// the mean of its un-rotated keys; blocks are ranked by the dot product with the mean of the
// question's un-rotated queries; the question then sees the prompt's beginning and the chosen
// blocks, in order of time at contiguous positions, and layers choose independently.
// Where this differs:
//   - keys are stored rotated to the number of their token and turned by the difference of
//     positions when they are read elsewhere; index vectors come from keys turned back;
//   - a quarter of the recalled blocks are the newest ones, whatever their rank;
//   - in the window the prompt's beginning stands in front of the oldest token, as in StreamingVLM
//     (2510.09608), not at a constant distance; the window moves by whole KV blocks;
//   - blocks are as long as compressors left them, and layers may differ in length;
//   - until something has left the window a question is answered from the cache as it is;
//   - the question and the answer's prompt are one pass.
//
// On a GPU what leaves the window is packed there, all layers of a frame at once, and copied to the
// host beside the computing (runtime/staged_copies.h); so are index vectors. Both arrive a batch of
// frames later, and a question waits for them.
#ifndef SLUICE_COMPRESSION_STREAM_MEMORY_H_
#define SLUICE_COMPRESSION_STREAM_MEMORY_H_

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "compression/block_store.h"
#include "llm/kv_cache.h"
#include "llm/kv_policy.h"
#include "runtime/exec_context.h"
#include "runtime/ops/kv_layers.h"
#include "runtime/staged_copies.h"
#include "vision/visual_tokens.h"

namespace sluice {

struct MemoryOptions {
  // At least so many of the newest stay visible. 0: as many as the context holds, and nothing is
  // let go before that; recall_blocks and dialogue_tokens are then the most, fewer in a short
  // context.
  int64_t window_tokens = 15000;
  int recall_blocks = 64;  // frames that a question calls back; 0: window only
  int recall_chunk = 1;    // neighbouring frames that are ranked together
  BlockStoreOptions store = {};
  bool int8 = false;  // off-loaded keys and values, with a scale for each block and head
  int64_t dialogue_tokens = 512;  // of earlier questions and answers that a question is told

  bool operator==(const MemoryOptions&) const = default;
};

// Throws InputError on what is out of range for any model.
void CheckMemoryOptions(const MemoryOptions& options);

// Used by one thread at a time.
class StreamMemory {
 public:
  // A frame that can be recalled.
  struct Block {
    int64_t number = 0;  // counts the frames of the stream that had tokens
    int64_t begin = 0;   // the number of its first token
    int64_t tokens = 0;
    MediaTime time;
    // Then the store has it, or will once it has arrived, also if some rows are still in the
    // window.
    bool off_loaded = false;
    // [L, kv_heads * D]: the mean of its keys before their rotation; empty until that has arrived.
    std::vector<float> index;
  };
  struct Counts {
    int64_t blocks = 0, host_blocks = 0, disk_blocks = 0,
            dropped = 0;  // that can be recalled; lost
    int64_t host_bytes = 0, disk_bytes = 0, index_bytes = 0;
  };
  // On a GPU, what is on its way takes at most so many bytes of pinned host memory and as many of
  // the GPU's, or as many as one frame needs: eight frames of 196 tokens of a 7B model in bf16.
  static constexpr int64_t kMostStagedBytes = int64_t{96} << 20;

  // frequencies: Decoder::rotary_frequencies(), which outlive the memory. pinned: tokens of the
  // prompt's beginning, which never leave. Throws InputError on options out of range, as
  // CheckMemoryOptions does.
  StreamMemory(const MemoryOptions& options, const KvGeometry& geometry,
               ConstTensorView frequencies, int64_t pinned);

  // Frames have been prefilled; their tokens stand from `first` on. Throws ResourceExhausted where
  // there is no memory to work in: rewind to `first` then.
  void Arrived(ExecContext& ctx, const KvCache& cache, const VisualTokens& tokens, int64_t first);
  // Lets what exceeds the window leave the cache, by whole KV blocks. Waits for nothing on a GPU
  // unless more is on its way than kMostStagedBytes. Throws ResourceExhausted; the cache is then
  // unchanged.
  void Trim(ExecContext& ctx, KvCache& cache) { Trim(ctx, cache, options_.window_tokens); }
  // The same with another window.
  void Trim(ExecContext& ctx, KvCache& cache, int64_t window_tokens);
  // Forgets frames whose tokens are `token` and later.
  void RewindTo(int64_t token);
  // Waits for what is on its way and gives it to the store, which may drop frames for it. Before
  // frames are read or recalled.
  void Settle() { staged_.Settle(); }

  // Whether a question should be answered by recall, and how many rows that puts in front of it at
  // most.
  bool Recalls(const KvCache& cache) const {
    return options_.recall_blocks > 0 && cache.gone() > 0 && !blocks_.empty();
  }
  int64_t MostRows() const;
  const MemoryOptions& options() const { return options_; }

  const std::deque<Block>& blocks() const { return blocks_; }
  // For saving a stream, once it is settled: what the store has of a block, and a block put back
  // behind the others.
  // bytes: of an off-loaded one; others are in the restored cache. Throws InputError on what does
  // not fit this model, these options and that cache.
  std::vector<uint8_t> OffLoaded(const Block& block) const;
  void Restore(const KvCache& cache, Block block, std::span<const uint8_t> bytes);
  Counts counts() const;
  int64_t SizeBytes() const;  // resident in host memory: its tier, index, what is on its way
  std::optional<std::string> TakeWarning() { return store_.TakeWarning(); }

 private:
  friend class StreamRecall;
  int64_t width() const { return int64_t{geometry_.kv_heads} * geometry_.head_dim; }
  KvPacking packing() const { return options_.int8 ? KvPacking::kInt8 : KvPacking::kPlain; }
  int64_t LayerBytes(const Block& block) const;
  Block* Find(int64_t number);
  void TakeIndex(int64_t first, int64_t count, std::span<const uint8_t> bytes);
  void TakeRows(int64_t number, std::span<const uint8_t> bytes);
  void Load(ExecContext& ctx, const KvCache& cache, std::span<const int32_t> blocks, int layer,
            TensorView keys, TensorView values);
  void BringBack(ExecContext& ctx, std::span<const int32_t> blocks, int layer, TensorView keys,
                 TensorView values);

  const MemoryOptions options_;
  const KvGeometry geometry_;
  const int64_t pinned_;
  ConstTensorView frequencies_;
  BlockStore store_;
  std::deque<Block> blocks_;  // by number
  int64_t next_number_ = 0;
  StagedCopies staged_;  // ends first: what is on its way is not given to anybody
};

// One question's policy; leaves no trace in the memory. For one step.
class StreamRecall final : public KvPolicy {
 public:
  // Settles the memory. It and the stream's cache must outlive the policy, and not change until the
  // step has run.
  StreamRecall(StreamMemory& memory, const KvCache& cache, int64_t question_rows)
      : memory_(memory), stream_(cache), question_rows_(question_rows) {
    memory_.Settle();
  }
  int64_t question_rows() const override { return question_rows_; }
  void Recall(ExecContext& ctx, int layer, ConstTensorView queries, int64_t step_rows,
              KvCache& cache) override;

  // Numbers of the blocks that each layer chose, ascending.
  const std::vector<std::vector<int64_t>>& chosen() const { return chosen_; }
  // Once the step has run, also if the memory has changed since: by time, neighbouring frames
  // together.
  std::vector<Evidence> evidence() const;

 private:
  std::vector<int32_t> Choose(ExecContext& ctx, int layer, ConstTensorView queries) const;

  StreamMemory& memory_;
  const KvCache& stream_;
  const int64_t question_rows_;
  struct Seen {
    MediaTime time;
    double mass = 0;  // of attention, summed over layers
  };
  std::vector<std::vector<int64_t>> chosen_;
  std::map<int64_t, Seen> seen_;  // by number
};

}  // namespace sluice

#endif  // SLUICE_COMPRESSION_STREAM_MEMORY_H_
