#include "compression/stream_memory.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <set>
#include <utility>

#include "runtime/error.h"
#include "runtime/ops/attention.h"
#include "runtime/ops/rope.h"
#include "runtime/ops/rows.h"
#include "runtime/transfer.h"

namespace sluice {
namespace {

// One in so many of the frames that a question calls back is of the newest, however it ranks them:
// what is asked about the present often ranks something older first.
constexpr int64_t kNewestShare = 4;

// Rows [tokens, heads * D] f32 as int8, each head with a scale: scales[heads], then the rows.
void Quantise(ConstTensorView rows, int heads, float* scales, int8_t* to) {
  const int64_t width = rows.dim(1), size = width / heads;
  for (int head = 0; head < heads; ++head) {
    float most = 0;
    for (int64_t i = 0; i < rows.dim(0); ++i) {
      const float* row = rows.data<float>() + i * rows.stride0() + head * size;
      for (int64_t d = 0; d < size; ++d) most = std::max(most, std::abs(row[d]));
    }
    scales[head] = most / 127;
    const float inverse = most > 0 ? 127 / most : 0;
    for (int64_t i = 0; i < rows.dim(0); ++i) {
      const float* row = rows.data<float>() + i * rows.stride0() + head * size;
      int8_t* out = to + i * width + head * size;
      for (int64_t d = 0; d < size; ++d) {
        out[d] = static_cast<int8_t>(std::clamp(std::lround(row[d] * inverse), -127L, 127L));
      }
    }
  }
}

void Dequantise(const float* scales, const int8_t* from, int heads, TensorView rows) {
  const int64_t width = rows.dim(1), size = width / heads;
  const Tensor wide(DType::kF32, rows.shape());
  for (int64_t i = 0; i < rows.dim(0) * width; ++i) {
    wide.data<float>()[i] = scales[i % width / size] * static_cast<float>(from[i]);
  }
  ConvertInto(wide, rows);
}

// Positions begin, begin + 1, ... times `sign`.
std::vector<int32_t> Positions(int64_t begin, int64_t count, int sign) {
  std::vector<int32_t> positions(count);
  for (int64_t i = 0; i < count; ++i) positions[i] = static_cast<int32_t>(sign * (begin + i));
  return positions;
}

}  // namespace

StreamMemory::StreamMemory(const MemoryOptions& options, const KvGeometry& geometry,
                           ConstTensorView frequencies, int64_t pinned)
    : options_(options),
      geometry_(geometry),
      pinned_(pinned),
      frequencies_(frequencies),
      store_(options.recall_blocks > 0 ? options.store : BlockStoreOptions()) {
  const auto check = [](const char* what, int64_t least, int64_t got) {
    if (got >= least) return;
    throw InputError(std::string("[memory] ") + what + " must be at least " +
                     std::to_string(least) + ", got " + std::to_string(got));
  };
  check("the window's tokens", 1, options.window_tokens);
  check("frames to recall", 0, options.recall_blocks);
  check("frames ranked together", 1, options.recall_chunk);
  check("tokens of the dialogue", 0, options.dialogue_tokens);
  if (options.recall_blocks > 0)
    check("bytes of host memory for recall", 1, options.store.host_bytes);
}

void StreamMemory::Arrived(ExecContext& ctx, const KvCache& cache, const VisualTokens& tokens,
                           int64_t first) {
  if (options_.recall_blocks == 0 || tokens.size() == 0) return;
  const TraceScope trace(&ctx.tracer(), "index", tokens.size());
  std::vector<Block> fresh;
  for (int64_t i = 0; i < tokens.size(); ++i) {
    const TokenOrigin& origin = tokens.origins[i];
    if (i == 0 || origin.frame != tokens.origins[i - 1].frame) {
      fresh.push_back({.number = next_number_ + static_cast<int64_t>(fresh.size()),
                       .begin = first + i,
                       .time = origin.time,
                       .index = std::vector<float>(geometry_.num_layers * width())});
    }
    ++fresh.back().tokens;
  }
  const Workspace::Scope scope(ctx.workspace());
  const Shape shape{tokens.size(), width()};
  const TensorView keys = ctx.workspace().Allocate(geometry_.dtype, shape);
  const TensorView values = ctx.workspace().Allocate(geometry_.dtype, shape);
  const TensorView wide = ctx.workspace().Allocate(DType::kF32, shape);
  const std::vector<int32_t> back = Positions(first, tokens.size(), -1);
  for (int layer = 0; layer < geometry_.num_layers; ++layer) {
    LoadKv(ctx, cache.layer(layer), first - cache.gone(), keys, values);
    Convert(ctx, keys, wide);
    Rope(ctx, wide, geometry_.head_dim, back, frequencies_);
    const Tensor on_host =
        geometry_.device == Device::kCpu ? Tensor() : TransferTo(ctx, wide, Device::kCpu);
    const ConstTensorView turned = on_host.empty() ? ConstTensorView(wide) : on_host;
    for (Block& block : fresh) {
      float* mean = block.index.data() + layer * width();
      for (int64_t i = block.begin - first; i < block.begin - first + block.tokens; ++i) {
        const float* row = turned.data<float>() + i * width();
        for (int64_t d = 0; d < width(); ++d) mean[d] += row[d];
      }
      for (int64_t d = 0; d < width(); ++d) mean[d] /= static_cast<float>(block.tokens);
    }
  }
  next_number_ += static_cast<int64_t>(fresh.size());
  std::move(fresh.begin(), fresh.end(), std::back_inserter(blocks_));
}

void StreamMemory::Trim(ExecContext& ctx, KvCache& cache) {
  const int64_t window = cache.length() - cache.gone() - pinned_;
  const int64_t leaving = (window - options_.window_tokens) / kKvBlockTokens;
  if (leaving < 1) return;
  const TraceScope trace(&ctx.tracer(), "trim", leaving * kKvBlockTokens);
  // First into the store: a frame may be in both.
  const int64_t window_begin = pinned_ + cache.gone() + leaving * kKvBlockTokens;
  std::set<int64_t> dropped;
  for (auto block = std::lower_bound(
           blocks_.begin(), blocks_.end(), pinned_ + cache.gone(),
           [](const Block&b, int64_t token) { return b.begin + b.tokens <= token; });
       block != blocks_.end() && block->begin < window_begin; ++block) {
    if (block->off_loaded) continue;
    const auto gone = store_.Add(block->number, Pack(ctx, cache, *block));
    block->off_loaded = true;
    dropped.insert(gone.begin(), gone.end());
  }
  if (!dropped.empty()) {
    std::erase_if(blocks_, [&](const Block& block) { return dropped.contains(block.number); });
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
  const auto gone = store_.Add(blocks_.back().number, bytes);
  std::erase_if(blocks_, [&](const Block& b) {
    return std::find(gone.begin(), gone.end(), b.number) != gone.end();
  });
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
  return now.host_bytes + now.index_bytes;
}

// A block off the cache is its layers, one after another: keys [tokens, kv_heads * D] as they were
// stored, then values likewise; as int8 behind the scales of both, [2, kv_heads] f32.
int64_t StreamMemory::LayerBytes(const Block& block) const {
  const int64_t elements = 2 * block.tokens * width();
  if (!options_.int8) return elements * static_cast<int64_t>(SizeOf(geometry_.dtype));
  return elements + 2 * geometry_.kv_heads * static_cast<int64_t>(sizeof(float));
}

std::vector<uint8_t> StreamMemory::Pack(ExecContext& ctx, const KvCache& cache,
                                        const Block& block) const {
  std::vector<uint8_t> bytes(geometry_.num_layers * LayerBytes(block));
  const Shape shape{2 * block.tokens, width()};
  const Tensor both(geometry_.dtype, shape);
  const ConstTensorView keys = both.view().Slice(0, block.tokens);
  const ConstTensorView values = both.view().Slice(block.tokens, 2 * block.tokens);
  const Workspace::Scope scope(ctx.workspace());
  const TensorView there = ctx.workspace().Allocate(geometry_.dtype, shape);
  for (int layer = 0; layer < geometry_.num_layers; ++layer) {
    uint8_t* to = bytes.data() + layer * LayerBytes(block);
    LoadKv(ctx, cache.layer(layer), block.begin - cache.gone(), there.Slice(0, block.tokens),
           there.Slice(block.tokens, 2 * block.tokens));
    Transfer(ctx, there, both);
    if (!options_.int8) {
      std::memcpy(to, both.view().raw(), both.SizeBytes());
      continue;
    }
    const int heads = geometry_.kv_heads;
    std::vector<float> scales(2 * heads);
    auto* rows = reinterpret_cast<int8_t*>(to + scales.size() * sizeof(float));
    Quantise(ConvertTo(keys, DType::kF32), heads, scales.data(), rows);
    Quantise(ConvertTo(values, DType::kF32), heads, scales.data() + heads,
             rows + block.tokens * width());
    std::memcpy(to, scales.data(), scales.size() * sizeof(float));
  }
  return bytes;
}

// Keys and values of one layer, keys rotated to the numbers of their tokens.
void StreamMemory::Load(ExecContext& ctx, const KvCache& cache, const Block& block, int layer,
                        TensorView keys, TensorView values) const {
  if (!block.off_loaded) {
    LoadKv(ctx, cache.layer(layer), block.begin - cache.gone(), keys, values);
    return;
  }
  if (geometry_.device != Device::kCpu) {
    const Tensor both(geometry_.dtype, {2 * block.tokens, width()});
    Fetch(block, layer, both.view().Slice(0, block.tokens),
          both.view().Slice(block.tokens, 2 * block.tokens));
    Transfer(ctx, both.view().Slice(0, block.tokens), keys);
    Transfer(ctx, both.view().Slice(block.tokens, 2 * block.tokens), values);
    return;
  }
  Fetch(block, layer, keys, values);
}

// The same of a block that was off-loaded, into host memory.
void StreamMemory::Fetch(const Block& block, int layer, TensorView keys, TensorView values) const {
  const int64_t size = LayerBytes(block);
  if (!options_.int8) {
    const size_t half = size / 2;
    store_.Read(block.number, layer * size, {static_cast<uint8_t*>(keys.raw()), half});
    store_.Read(block.number, layer * size + static_cast<int64_t>(half),
                {static_cast<uint8_t*>(values.raw()), half});
    return;
  }
  std::vector<uint8_t> bytes(size);
  store_.Read(block.number, layer * size, bytes);
  const int heads = geometry_.kv_heads;
  std::vector<float> scales(2 * heads);
  std::memcpy(scales.data(), bytes.data(), scales.size() * sizeof(float));
  const auto* rows = reinterpret_cast<const int8_t*>(bytes.data() + scales.size() * sizeof(float));
  Dequantise(scales.data(), rows, heads, keys);
  Dequantise(scales.data() + heads, rows + block.tokens * width(), heads, values);
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
  const StreamMemory& memory = memory_;
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
  std::vector<int32_t> tokens = Positions(0, pinned, 1), turns(pinned, 0);
  tokens.reserve(rows);
  turns.reserve(rows);
  for (const int32_t b : chosen) {
    const StreamMemory::Block& block = memory.blocks_[b];
    const auto at = static_cast<int64_t>(tokens.size());
    memory.Load(ctx, stream_, block, layer, keys.Slice(at, at + block.tokens),
                values.Slice(at, at + block.tokens));
    for (int64_t i = 0; i < block.tokens; ++i) {
      tokens.push_back(static_cast<int32_t>(block.begin + i));
    }
    turns.insert(turns.end(), block.tokens, static_cast<int32_t>(at - block.begin));
  }
  Convert(ctx, keys, wide);
  Rope(ctx, wide, geometry.head_dim, turns, memory.frequencies_);
  Convert(ctx, wide, keys);
  cache.ReserveRows(layer, tokens);
  StoreKv(ctx, keys, values, 0, cache.layer(layer));

  // How the question's last row attends to them.
  const TensorView query = ctx.workspace().Allocate(geometry.dtype, {1, queries.dim(1)});
  CopyRows(ctx, queries.Slice(queries.dim(0) - 1, queries.dim(0)), query);
  const auto position = static_cast<int32_t>(rows + step_rows - 1);
  Rope(ctx, query, geometry.head_dim, {&position, 1}, memory.frequencies_);
  std::vector<float> weights(rows);
  MeanAttentionRow(ctx, query, static_cast<int>(queries.dim(1) / geometry.head_dim),
                   1.0f / std::sqrt(static_cast<float>(geometry.head_dim)), cache.layer(layer),
                   Positions(0, rows, 1), keys.Slice(0, 0), weights);
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
  return evidence;
}

}  // namespace sluice
