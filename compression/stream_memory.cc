#include "compression/stream_memory.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <functional>
#include <numeric>
#include <utility>

#include "runtime/error.h"
#include "runtime/ops/attention.h"
#include "runtime/ops/rope.h"
#include "runtime/ops/rows.h"
#include "runtime/parallel.h"
#include "runtime/transfer.h"

namespace sluice {
namespace {

// One in so many of the frames that a question calls back is of the newest, however it ranks them:
// what is asked about the present often ranks something older first.
constexpr int64_t kNewestShare = 4;

}  // namespace

void CheckMemoryOptions(const MemoryOptions& options) {
  // Far more than there is, and sums of them do not overflow.
  constexpr int64_t kMost = int64_t{1} << 40, kMostBytes = int64_t{1} << 60;
  const auto check = [](const char* what, int64_t least, int64_t most, int64_t got) {
    if (got >= least && got <= most) return;
    throw InputError(std::string("[memory] ") + what + " must be " + std::to_string(least) +
                     " to " + std::to_string(most) + ", got " + std::to_string(got));
  };
  const bool recalls = options.recall_blocks > 0;
  check("the window's tokens", 0, kMost, options.window_tokens);
  check("frames to recall", 0, 1 << 20, options.recall_blocks);
  check("frames ranked together", 1, 1 << 20, options.recall_chunk);
  check("tokens of the dialogue", 0, kMost, options.dialogue_tokens);
  check("bytes of host memory for recall", recalls ? 1 : 0, kMostBytes, options.store.host_bytes);
  check("bytes of disk", 0, kMostBytes, options.store.disk_bytes);
}

StreamMemory::StreamMemory(const MemoryOptions& options, const KvGeometry& geometry,
                           ConstTensorView frequencies, int64_t pinned)
    : options_(options),
      geometry_(geometry),
      pinned_(pinned),
      frequencies_(frequencies),
      store_(options.recall_blocks > 0 ? options.store : BlockStoreOptions()),
      staged_(geometry.device, kMostStagedBytes) {
  CheckMemoryOptions(options);
}

void StreamMemory::Arrived(ExecContext& ctx, const KvCache& cache, const VisualTokens& tokens,
                           int64_t first) {
  if (options_.recall_blocks == 0 || tokens.size() == 0) return;
  const TraceScope trace(&ctx.tracer(), "index", tokens.size());
  const int64_t number = next_number_;
  std::vector<int32_t> counts;
  for (int64_t i = 0; i < tokens.size(); ++i) {
    const TokenOrigin& origin = tokens.origins[i];
    if (i == 0 || origin.frame != tokens.origins[i - 1].frame) {
      blocks_.push_back(
          {.number = next_number_++, .begin = first + i, .time = origin.time, .index = {}});
      counts.push_back(0);
    }
    ++blocks_.back().tokens;
    ++counts.back();
  }
  const auto count = static_cast<int64_t>(counts.size());
  const Shape shape{count, geometry_.num_layers * width()};
  staged_.Send(
      ctx, shape.NumElements() * static_cast<int64_t>(sizeof(float)),
      [&](TensorView there) {
        MeanKeys(ctx, cache.layers(), first - cache.gone(), counts, static_cast<int32_t>(first),
                 frequencies_, TensorView(there.raw(), DType::kF32, shape, -1, there.device()));
      },
      [this, number, count](std::span<const uint8_t> bytes) { TakeIndex(number, count, bytes); });
}

// Index vectors of `count` frames have arrived.
void StreamMemory::TakeIndex(int64_t first, int64_t count, std::span<const uint8_t> bytes) {
  const size_t values = geometry_.num_layers * width();
  for (int64_t i = 0; i < count; ++i) {
    Block* const block = Find(first + i);
    if (!block) continue;  // forgotten meanwhile
    block->index.resize(values);
    std::memcpy(block->index.data(), bytes.data() + i * values * sizeof(float),
                values * sizeof(float));
  }
}

// A frame's rows have arrived.
void StreamMemory::TakeRows(int64_t number, std::span<const uint8_t> bytes) {
  if (!Find(number)) return;  // forgotten meanwhile
  const std::vector<int64_t> gone = store_.Add(number, bytes);
  if (gone.empty()) return;
  std::erase_if(blocks_, [&](const Block& block) {
    return std::find(gone.begin(), gone.end(), block.number) != gone.end();
  });
}

StreamMemory::Block* StreamMemory::Find(int64_t number) {
  const auto found =
      std::lower_bound(blocks_.begin(), blocks_.end(), number,
                       [](const Block& block, int64_t n) { return block.number < n; });
  return found != blocks_.end() && found->number == number ? &*found : nullptr;
}

void StreamMemory::Trim(ExecContext& ctx, KvCache& cache, int64_t window_tokens) {
  const int64_t window = cache.length() - cache.gone() - pinned_;
  const int64_t leaving = (window - window_tokens) / kKvBlockTokens;
  if (leaving < 1) return;
  const TraceScope trace(&ctx.tracer(), "trim", leaving * kKvBlockTokens);
  // First into the store: a frame may be in both.
  const int64_t window_begin = pinned_ + cache.gone() + leaving * kKvBlockTokens;
  std::vector<int64_t> numbers;  // what arrives meanwhile may drop others
  for (auto block = std::lower_bound(
           blocks_.begin(), blocks_.end(), pinned_ + cache.gone(),
           [](const Block&b, int64_t token) { return b.begin + b.tokens <= token; });
       block != blocks_.end() && block->begin < window_begin; ++block) {
    if (!block->off_loaded) numbers.push_back(block->number);
  }
  const std::vector<KvLayerView> layers = cache.layers();
  for (const int64_t number : numbers) {
    const Block& leaves = *Find(number);
    const int64_t begin = leaves.begin - cache.gone(), tokens = leaves.tokens;
    staged_.Send(
        ctx, geometry_.num_layers * LayerBytes(leaves),
        [&](TensorView there) { PackKv(ctx, layers, begin, tokens, packing(), there); },
        [this, number](std::span<const uint8_t> bytes) { TakeRows(number, bytes); });
    if (Block* const left = Find(number)) left->off_loaded = true;
  }
  cache.Slide(ctx, frequencies_, pinned_, leaving);
}

void StreamMemory::RewindTo(int64_t token) {
  while (!blocks_.empty() && blocks_.back().begin >= token) {
    store_.Remove(blocks_.back().number);
    blocks_.pop_back();
  }
}

std::vector<uint8_t> StreamMemory::OffLoaded(const Block& block) const {
  std::vector<uint8_t> bytes(geometry_.num_layers * LayerBytes(block));
  store_.Read(block.number, 0, bytes);
  return bytes;
}

void StreamMemory::Restore(const KvCache& cache, Block block, std::span<const uint8_t> bytes) {
  // So that sums and sizes cannot overflow.
  constexpr int64_t kMostTokens = int64_t{1} << 24, kMostBlocks = int64_t{1} << 60;
  const bool behind =
      blocks_.empty() || (block.number > blocks_.back().number &&
                          block.begin >= blocks_.back().begin + blocks_.back().tokens);
  const bool within = block.begin >= (block.off_loaded ? pinned_ : pinned_ + cache.gone()) &&
                      block.tokens >= 1 && block.tokens <= kMostTokens &&
                      block.begin <= cache.length() - block.tokens;
  if (!behind || !within || block.number < 0 || block.number > kMostBlocks ||
      static_cast<int64_t>(block.index.size()) != geometry_.num_layers * width() ||
      static_cast<int64_t>(bytes.size()) !=
          (block.off_loaded ? geometry_.num_layers * LayerBytes(block) : 0)) {
    throw InputError("[memory] frame " + std::to_string(block.number) + " of " +
                     std::to_string(block.tokens) + " tokens from " + std::to_string(block.begin) +
                     " on, " + std::to_string(block.index.size()) + " index values and " +
                     std::to_string(bytes.size()) +
                     " bytes does not fit this model, these options or the frames before it");
  }
  next_number_ = block.number + 1;
  blocks_.push_back(std::move(block));
  if (!blocks_.back().off_loaded) return;
  TakeRows(blocks_.back().number, bytes);
}

int64_t StreamMemory::MostRows() const {
  std::vector<int64_t> tokens;
  tokens.reserve(blocks_.size());
  for (const Block& block : blocks_) tokens.push_back(block.tokens);
  const auto most = std::min<int64_t>(std::max(options_.recall_blocks, options_.recall_chunk),
                                      static_cast<int64_t>(tokens.size()));
  std::partial_sort(tokens.begin(), tokens.begin() + most, tokens.end(), std::greater<>());
  return std::accumulate(tokens.begin(), tokens.begin() + most, pinned_);
}

StreamMemory::Counts StreamMemory::counts() const {
  const auto blocks = static_cast<int64_t>(blocks_.size());
  const int64_t index = geometry_.num_layers * width() * static_cast<int64_t>(sizeof(float));
  return {.blocks = blocks,
          .host_blocks = store_.host_blocks(),
          .disk_blocks = store_.disk_blocks(),
          .dropped = store_.dropped(),
          .host_bytes = store_.host_bytes(),
          .disk_bytes = store_.disk_bytes(),
          .index_bytes = blocks * (index + static_cast<int64_t>(sizeof(Block)))};
}

int64_t StreamMemory::SizeBytes() const {
  const Counts now = counts();
  return now.host_bytes + now.index_bytes + staged_.SizeBytes();
}

// A block off the cache is its layers, one after another, as PackKv packs them: keys rotated to the
// numbers of their tokens.
int64_t StreamMemory::LayerBytes(const Block& block) const {
  KvLayerView kv;
  kv.kv_heads = geometry_.kv_heads;
  kv.head_dim = geometry_.head_dim;
  kv.dtype = geometry_.dtype;
  return PackedKvBytes(kv, block.tokens, packing());
}

// Keys and values of one layer, keys rotated to the numbers of their tokens.
void StreamMemory::Load(ExecContext& ctx, const KvCache& cache, std::span<const int32_t> blocks,
                        int layer, TensorView keys, TensorView values) {
  int64_t at = 0;
  for (size_t i = 0, next = 0; i < blocks.size(); i = next) {
    const Block& first = blocks_[blocks[i]];
    int64_t end = at;
    for (next = i; next < blocks.size(); ++next) {
      const Block& block = blocks_[blocks[next]];
      if (block.off_loaded != first.off_loaded || (next > i && !block.off_loaded)) break;
      end += block.tokens;
    }
    if (first.off_loaded) {
      BringBack(ctx, blocks.subspan(i, next - i), layer, keys.Slice(at, end),
                values.Slice(at, end));
    } else {
      LoadKv(ctx, cache.layer(layer), first.begin - cache.gone(), keys.Slice(at, end),
             values.Slice(at, end));
    }
    at = end;
  }
}

// The same of blocks that were off-loaded: what the store has of all of them goes where the context
// works in one copy.
void StreamMemory::BringBack(ExecContext& ctx, std::span<const int32_t> blocks, int layer,
                             TensorView keys, TensorView values) {
  const int64_t rows = keys.dim(0), count = static_cast<int64_t>(blocks.size());
  std::vector<int64_t> begins(count);  // the first row of each
  for (int64_t i = 1; i < count; ++i) begins[i] = begins[i - 1] + blocks_[blocks[i - 1]].tokens;
  // Calls use(block, its place among these, its first row), on several threads: one alone copies
  // slower than the GPU computes.
  const auto for_each = [&](const auto& use) {
    std::vector<std::exception_ptr> errors(count);
    ParallelFor(ctx.host(), count, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        try {
          use(blocks_[blocks[i]], i, begins[i]);
        } catch (...) {
          errors[i] = std::current_exception();
        }
      }
    });
    for (const std::exception_ptr& error : errors) {
      if (error) std::rethrow_exception(error);
    }
  };
  const auto read = [&](const Block& block, int64_t offset, uint8_t* to, int64_t bytes) {
    store_.Read(block.number, layer * LayerBytes(block) + offset, {to, static_cast<size_t>(bytes)});
  };
  const auto view = [](ConstTensorView there, int64_t offset, DType dtype, Shape shape) {
    return ConstTensorView(static_cast<const uint8_t*>(there.raw()) + offset, dtype, shape, -1,
                           there.device());
  };
  if (!options_.int8) {
    const auto half = static_cast<int64_t>(keys.SizeBytes()), row_bytes = half / rows;
    return staged_.Bring(
        ctx, 2 * half,
        [&](std::span<uint8_t> here) {
          for_each([&](const Block& block, int64_t, int64_t row) {
            const int64_t bytes = block.tokens * row_bytes;
            read(block, 0, here.data() + row * row_bytes, bytes);
            read(block, bytes, here.data() + half + row * row_bytes, bytes);
          });
        },
        [&](ConstTensorView there) {
          CopyRows(ctx, view(there, 0, geometry_.dtype, keys.shape()), keys);
          CopyRows(ctx, view(there, half, geometry_.dtype, keys.shape()), values);
        });
  }
  // Which block a row is of, the scales of all keys and of all values, the keys, the values.
  const int64_t heads = geometry_.kv_heads, size = heads * static_cast<int64_t>(sizeof(float));
  const int64_t scales = rows * static_cast<int64_t>(sizeof(int32_t));
  const int64_t first = scales + 2 * count * size, half = rows * width();
  staged_.Bring(
      ctx, first + 2 * half,
      [&](std::span<uint8_t> here) {
        for_each([&](const Block& block, int64_t i, int64_t row) {
          const std::vector<int32_t> run(block.tokens, static_cast<int32_t>(i));
          std::memcpy(here.data() + row * sizeof(int32_t), run.data(),
                      run.size() * sizeof(int32_t));
          const int64_t bytes = block.tokens * width();
          read(block, 0, here.data() + scales + i * size, size);
          read(block, size, here.data() + scales + (count + i) * size, size);
          read(block, 2 * size, here.data() + first + row * width(), bytes);
          read(block, 2 * size + bytes, here.data() + first + half + row * width(), bytes);
        });
      },
      [&](ConstTensorView there) {
        const ConstTensorView runs = view(there, 0, DType::kI32, {rows});
        DequantiseKv(ctx, view(there, first, DType::kI8, keys.shape()), runs,
                     view(there, scales, DType::kF32, {count, heads}), keys);
        DequantiseKv(ctx, view(there, first + half, DType::kI8, keys.shape()), runs,
                     view(there, scales + count * size, DType::kF32, {count, heads}), values);
      });
}

// The best blocks for a layer, by the plain dot product; ties go to the earlier.
std::vector<int32_t> StreamRecall::Choose(ExecContext& ctx, int layer,
                                          ConstTensorView queries) const {
  const StreamMemory& memory = memory_;
  const auto count = static_cast<int64_t>(memory.blocks_.size());
  const int64_t chunk = memory.options_.recall_chunk, width = memory.width();
  const int64_t size = memory.geometry_.head_dim, heads = queries.dim(1) / size;
  const int64_t chunks = (count + chunk - 1) / chunk;
  const int64_t taken =
      std::min(std::max<int64_t>(memory.options_.recall_blocks / chunk, 1), chunks);
  // Query heads that share a kv head meet the same index: their sum does.
  std::vector<float> query(width);
  const Tensor wide = ConvertTo(TransferTo(ctx, queries, Device::kCpu), DType::kF32);
  for (int64_t i = 0; i < wide.dim(0); ++i) {
    for (int64_t head = 0; head < heads; ++head) {
      const float* row = wide.data<float>() + i * queries.dim(1) + head * size;
      float* sum = query.data() + head / (heads / memory.geometry_.kv_heads) * size;
      for (int64_t d = 0; d < size; ++d) sum[d] += row[d] / static_cast<float>(wide.dim(0));
    }
  }
  std::vector<float> scores(chunks);
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t end = std::min((c + 1) * chunk, count);
    for (int64_t b = c * chunk; b < end; ++b) {
      const float* index = memory.blocks_[b].index.data() + layer * width;
      const float dot = std::inner_product(query.begin(), query.end(), index, 0.0f);
      scores[c] += dot / static_cast<float>(end - c * chunk);
    }
  }
  const int64_t newest = taken / kNewestShare;
  std::vector<int32_t> order(chunks);
  std::iota(order.begin(), order.end(), 0);
  std::rotate(order.begin(), order.end() - newest, order.end());
  std::partial_sort(
      order.begin() + newest, order.begin() + taken, order.end(),
      [&](int32_t a, int32_t b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a < b; });
  order.resize(taken);
  std::sort(order.begin(), order.end());
  std::vector<int32_t> blocks;
  for (const int32_t c : order) {
    for (int64_t b = c * chunk; b < std::min((c + 1) * chunk, count); ++b) {
      blocks.push_back(static_cast<int32_t>(b));
    }
  }
  return blocks;
}

void StreamRecall::Recall(ExecContext& ctx, int layer, ConstTensorView queries, int64_t step_rows,
                          KvCache& cache) {
  StreamMemory& memory = memory_;
  const KvGeometry& geometry = memory.geometry_;
  const int64_t pinned = memory.pinned_;
  const std::vector<int32_t> chosen = Choose(ctx, layer, queries);
  std::vector<int64_t>& numbers = chosen_.emplace_back();
  int64_t rows = pinned;
  for (const int32_t b : chosen) {
    rows += memory.blocks_[b].tokens;
    numbers.push_back(memory.blocks_[b].number);
    // Layers choose alike: what is read for this one is fetched for the ones behind it.
    if (layer == 0) memory.store_.WillRead(memory.blocks_[b].number);
  }
  const Workspace::Scope scope(ctx.workspace());
  const Shape shape{rows, memory.width()};
  const TensorView keys = ctx.workspace().Allocate(geometry.dtype, shape);
  const TensorView values = ctx.workspace().Allocate(geometry.dtype, shape);
  const TensorView wide = ctx.workspace().Allocate(DType::kF32, shape);
  if (pinned > 0) {
    LoadKv(ctx, stream_.layer(layer), 0, keys.Slice(0, pinned), values.Slice(0, pinned));
    if (stream_.gone() > 0) CopyRows(ctx, stream_.PinnedKeys(layer), keys.Slice(0, pinned));
  }
  memory.Load(ctx, stream_, chosen, layer, keys.Slice(pinned, rows), values.Slice(pinned, rows));
  std::vector<int32_t> tokens(pinned), turns(pinned, 0);
  std::iota(tokens.begin(), tokens.end(), 0);
  tokens.reserve(rows);
  turns.reserve(rows);
  for (const int32_t b : chosen) {
    const StreamMemory::Block& block = memory.blocks_[b];
    const auto at = static_cast<int64_t>(tokens.size());
    for (int64_t i = 0; i < block.tokens; ++i) {
      tokens.push_back(static_cast<int32_t>(block.begin + i));
    }
    turns.insert(turns.end(), block.tokens, static_cast<int32_t>(at - block.begin));
  }
  Convert(ctx, keys, wide);
  Rope(ctx, wide, geometry.head_dim, turns, memory.frequencies_);
  Convert(ctx, wide, keys);
  cache.ReserveRows(ctx, layer, tokens);
  StoreKv(ctx, keys, values, 0, cache.layer(layer));

  // How the question's last row attends to them.
  const TensorView query = ctx.workspace().Allocate(geometry.dtype, {1, queries.dim(1)});
  CopyRows(ctx, queries.Slice(queries.dim(0) - 1, queries.dim(0)), query);
  const auto position = static_cast<int32_t>(rows + step_rows - 1);
  Rope(ctx, query, geometry.head_dim, {&position, 1}, memory.frequencies_);
  std::vector<float> weights(rows);
  std::vector<int32_t> all(rows);
  std::iota(all.begin(), all.end(), 0);
  MeanAttentionRow(ctx, query, static_cast<int>(queries.dim(1) / geometry.head_dim),
                   1.0f / std::sqrt(static_cast<float>(geometry.head_dim)), cache.layer(layer), all,
                   keys.Slice(0, 0), weights);
  auto weight = weights.begin() + pinned;
  for (const int32_t b : chosen) {
    const StreamMemory::Block& block = memory.blocks_[b];
    const auto end = weight + block.tokens;
    Seen& seen = seen_[block.number];
    seen.time = block.time;
    seen.mass += std::accumulate(weight, end, 0.0);
    weight = end;
  }
}

std::vector<Evidence> StreamRecall::evidence() const {
  double total = 0;
  for (const auto& [number, seen] : seen_) total += seen.mass;
  std::vector<Evidence> evidence;
  std::vector<bool> layers(chosen_.size());  // that chose a frame of the last piece
  int64_t before = -2;
  for (const auto& [number, seen] : seen_) {
    if (number != before + 1) {
      evidence.push_back({.begin = seen.time, .end = seen.time});
      layers.assign(chosen_.size(), false);
    }
    before = number;
    Evidence& piece = evidence.back();
    piece.end = seen.time;
    piece.weight += total > 0 ? seen.mass / total : 0;
    for (size_t i = 0; i < chosen_.size(); ++i) {
      if (std::binary_search(chosen_[i].begin(), chosen_[i].end(), number)) layers[i] = true;
    }
    piece.layers = static_cast<int>(std::count(layers.begin(), layers.end(), true));
  }
  constexpr double kLeast = 1e-3;  // what got less of the attention supports nothing
  std::erase_if(evidence, [](const Evidence& piece) { return piece.weight < kLeast; });
  return evidence;
}

}  // namespace sluice
