#include "llm/families/llama_decoder.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "runtime/error.h"
#include "runtime/ops/attention.h"
#include "runtime/ops/embedding.h"
#include "runtime/ops/norm.h"
#include "runtime/ops/rope.h"
#include "runtime/ops/rows.h"
#include "runtime/ops/traced_linear.h"
#include "runtime/transfer.h"

namespace sluice {
namespace {

// Long prefills run in chunks of at most so many rows: enough to keep the products at full speed,
// few enough to bound the scratch memory whatever the prompt's length.
constexpr int64_t kMaxRowsAtOnce = 1024;
constexpr int64_t kRowMultiple = 16;  // of a matrix unit's tile

struct LlamaLayer {
  AttentionPrecision attention = AttentionPrecision::kExact;
  Tensor attention_norm, mlp_norm;  // [E] f32
  LinearWeight qkv;                 // [(H + 2K) D, E]
  LinearWeight out;                 // [E, H D]
  LinearWeight gate_up;             // [2I, E]
  LinearWeight down;                // [E, I]
};

// Consecutive rows of one sequence inside a chunk.
struct Segment {
  const SequenceStep* step;
  int64_t offset;    // of the first row in step->embeddings
  int64_t from_end;  // so many of the step's rows stand in every layer's cache from the first on
  int64_t row;       // of the first row in the chunk
  int64_t rows;
  int64_t wanted;  // so many of the last rows have their logits read

  // Where the first row stands in a layer's cache.
  int64_t CacheRow(int layer) const { return step->cache->rows(layer) - from_end; }
};

// Forgets the rows whose logits nobody reads.
void KeepWanted(std::vector<Segment>& segments) {
  for (Segment& segment : segments) {
    const int64_t dropped = segment.rows - segment.wanted;
    segment.offset += dropped;
    segment.from_end -= dropped;
    segment.row += dropped;
    segment.rows = segment.wanted;
  }
}

// Those of `segments` that have rows, as ops want them.
std::vector<KvSegment> KvSegments(std::span<const Segment> segments, int layer) {
  std::vector<KvSegment> result;
  for (const Segment& segment : segments) {
    if (segment.rows == 0) continue;
    result.push_back({.row = segment.row,
                      .rows = segment.rows,
                      .begin = segment.CacheRow(layer),
                      .kv = segment.step->cache->layer(layer)});
  }
  return result;
}

// Where the keys of their rows are rotated to.
std::vector<int32_t> Positions(std::span<const Segment> segments, int layer) {
  std::vector<int32_t> positions;
  for (const Segment& segment : segments) {
    const int64_t first = segment.CacheRow(layer);
    for (int64_t i = 0; i < segment.rows; ++i) {
      positions.push_back(segment.step->cache->PositionOf(layer, first + i));
    }
  }
  return positions;
}

int64_t CountRows(std::span<const Segment> segments) {
  int64_t rows = 0;
  for (const Segment& segment : segments) rows += segment.rows;
  return rows;
}

// Moves rows of `x` to its front; the others are lost. rows: ascending.
TensorView KeepRowsOf(ExecContext& ctx, TensorView x, std::span<const int32_t> rows) {
  const auto count = static_cast<int64_t>(rows.size());
  if (count > 0 && rows.back() >= count) {  // else all of them stand there already
    const Workspace::Scope scope(ctx.workspace());
    const TensorView moved = ctx.workspace().Allocate(x.dtype(), {count, x.dim(1)});
    GatherRows(ctx, x, ListRows(ctx, rows, 1), moved);
    CopyRows(ctx, moved, x.Slice(0, count));
  }
  return x.Slice(0, count);
}

// Moves the rows that `segments` still name to the front of `hidden`, the chunk's rows.
TensorView Compact(ExecContext& ctx, std::span<const Segment> segments, TensorView hidden) {
  std::vector<int32_t> rows;
  for (const Segment& segment : segments) {
    for (int64_t i = 0; i < segment.rows; ++i) {
      rows.push_back(static_cast<int32_t>(segment.row + i));
    }
  }
  return KeepRowsOf(ctx, hidden, rows);
}

// to = from, which may lie on the host.
void Bring(ExecContext& ctx, ConstTensorView from, TensorView to) {
  if (from.device() == to.device()) return Convert(ctx, from, to);
  if (from.dtype() == to.dtype()) return Transfer(ctx, from, to);
  Convert(ctx, TransferTo(ctx, from, to.device()), to);
}

// How many rows run at once, of `total`: equal chunks.
int64_t ChunkRows(int64_t total, bool single_chunk) {
  if (single_chunk || total <= kMaxRowsAtOnce) return total;
  const int64_t chunks = (total + kMaxRowsAtOnce - 1) / kMaxRowsAtOnce;
  const int64_t rows = (total + chunks - 1) / chunks;
  return (rows + kRowMultiple - 1) / kRowMultiple * kRowMultiple;
}

// Whether a sequence runs on its own, layer by layer.
bool IsStaged(const SequenceStep& step) { return step.policy || step.recall; }

// How the rows of a step's other sequences are cut.
std::vector<std::vector<Segment>> CutIntoChunks(std::span<const SequenceStep> sequences,
                                                bool single_chunk) {
  int64_t total = 0;
  for (const SequenceStep& step : sequences) total += IsStaged(step) ? 0 : step.embeddings.dim(0);
  const int64_t chunk_rows = ChunkRows(total, single_chunk);
  std::vector<std::vector<Segment>> chunks;
  int64_t room = 0;
  for (const SequenceStep& step : sequences) {
    if (IsStaged(step)) continue;
    const int64_t length = step.embeddings.dim(0);
    for (int64_t offset = 0; offset < length;) {
      if (room == 0) {
        chunks.emplace_back();
        room = chunk_rows;
      }
      const int64_t rows = std::min(room, length - offset);
      int64_t wanted = 0;
      if (!step.logits.empty()) {
        wanted = step.logits.dim(0) == length ? rows : offset + rows == length ? 1 : 0;
      }
      chunks.back().push_back({&step, offset, length - offset, chunk_rows - room, rows, wanted});
      offset += rows;
      room -= rows;
    }
  }
  return chunks;
}

// A sequence that loses rows on its way through the layers.
struct StagedRows final : StepInPieces::State {
  const SequenceStep* step = nullptr;
  TensorView hidden;           // [rows, E] f32
  std::vector<int32_t> fresh;  // the tokens of these rows
  // The tokens of earlier steps that are still seen, once some are not.
  std::optional<std::vector<int32_t>> cached;
  int64_t length = 0;  // of the step

  // Where it stands: the next layer, of whose rows those before `begin` have run, and the next
  // boundary.
  int layer = 0;
  int64_t begin = 0;
  size_t stage = 0;
  // What outlives a step, where it takes several: the memory of `hidden`, and this layer's keys, if
  // they are there already.
  Tensor memory, keys;
};

// Which rows of a layer's cache are still seen.
std::vector<int32_t> CachedRows(const StagedRows& staged, int layer) {
  const KvCache& cache = *staged.step->cache;
  std::vector<int32_t> rows;
  size_t next = 0;
  for (int64_t row = 0; row < cache.rows(layer); ++row) {
    if (staged.cached) {
      const int32_t token = cache.TokenOf(layer, row);
      while (next < staged.cached->size() && (*staged.cached)[next] < token) ++next;
      if (next == staged.cached->size()) break;
      if ((*staged.cached)[next] != token) continue;
    }
    rows.push_back(static_cast<int32_t>(row));
  }
  return rows;
}

class LlamaDecoder : public Decoder {
 public:
  LlamaDecoder(WeightStore& weights, const LlamaConfig& config);

  void Step(ExecContext& ctx, std::span<SequenceStep> sequences,
            const DecoderProbe& probe) const override;
  void Embed(ExecContext& ctx, std::span<const int32_t> ids, TensorView out) const override;
  KvGeometry kv_geometry() const override {
    return {config_.num_layers, config_.num_kv_heads, config_.head_dim, dtype_, device_};
  }
  int num_heads() const override { return config_.num_heads; }
  int64_t hidden_size() const override { return config_.hidden_size; }
  int64_t vocab_size() const override { return config_.vocab_size; }
  int64_t max_positions() const override { return config_.max_positions; }
  ConstTensorView rotary_frequencies() const override { return inv_freq_; }
  double FlopsPerToken(int64_t context) const override;
  double LmHeadFlops() const override { return 2.0 * config_.hidden_size * config_.vocab_size; }
  int64_t WeightBytesPerToken() const override;

 private:
  void Check(std::span<const SequenceStep> sequences) const;
  void CheckReach(int64_t needed) const;
  void RunChunk(ExecContext& ctx, std::vector<Segment> segments, const DecoderProbe& probe) const;
  void RunDecoding(ExecContext& ctx, std::span<const Segment> segments, TensorView hidden) const;
  void RunDecodingLayer(ExecContext& ctx, int layer, std::span<const Segment> segments,
                        TensorView hidden) const;
  void RunStaged(ExecContext& ctx, const SequenceStep& step, const DecoderProbe& probe) const;
  TensorView EnterLayer(ExecContext& ctx, StagedRows& staged, bool single_chunk) const;
  void Recall(ExecContext& ctx, int layer, const StagedRows& staged) const;
  TensorView PassBoundary(ExecContext& ctx, int layer, bool single_chunk, StagedRows& staged) const;
  std::vector<float> Attention(ExecContext& ctx, int layer, const StagedRows& staged,
                               std::span<const int32_t> cached_rows, ConstTensorView keys,
                               ConstTensorView queries) const;
  TensorView RunLayer(ExecContext& ctx, int layer, std::vector<Segment>& segments,
                      TensorView hidden, ConstTensorView keys, const DecoderProbe& probe) const;
  void Project(ExecContext& ctx, int layer, ConstTensorView hidden, const LinearWeight& weight,
               TensorView y) const;
  void ProjectAround(ExecContext& ctx, int layer, ConstTensorView hidden, ConstTensorView keys,
                     TensorView qkv) const;
  void RotateAndStore(ExecContext& ctx, int layer, std::span<const Segment> segments,
                      TensorView qkv) const;
  void AddAttention(int layer, std::span<const Segment> segments, TraceScope& trace) const;
  void Attend(ExecContext& ctx, int layer, std::span<const Segment> segments, ConstTensorView qkv,
              TensorView hidden) const;
  void RunMlp(ExecContext& ctx, const LlamaLayer& layer, TensorView hidden) const;
  void WriteLogits(ExecContext& ctx, std::span<const Segment> segments, ConstTensorView hidden,
                   const DecoderProbe& probe) const;
  // A product with rows that are normalised first.
  LinearOptions After(const Tensor& norm, Activation activation = Activation::kNone) const {
    return {.activation = activation, .rms_norm = norm, .rms_eps = config_.rms_norm_eps};
  }

  // What errors begin with: the family whose checkpoint this is.
  std::string Place() const { return std::string("[") + config_.family + "] "; }
  float AttentionScale() const { return 1.0f / std::sqrt(static_cast<float>(config_.head_dim)); }
  int64_t q_width() const { return int64_t{config_.num_heads} * config_.head_dim; }
  int64_t kv_width() const { return int64_t{config_.num_kv_heads} * config_.head_dim; }

  LlamaConfig config_;
  DType dtype_;             // of weights, product inputs and the KV cache
  Device device_;           // where all of it lies
  SharedMatrix embedding_;  // [V, E]; empty where tied: then rows are read from lm_head_
  LinearWeight lm_head_;    // [V, E]
  Tensor final_norm_;       // [E] f32
  Tensor inv_freq_;         // [D / 2] f32
  std::vector<LlamaLayer> layers_;
};

LlamaDecoder::LlamaDecoder(WeightStore& weights, const LlamaConfig& config)
    : config_(config),
      dtype_(weights.compute_type()),
      device_(weights.device()),
      inv_freq_(Placed(InverseFrequencies(config), device_)) {
  const int64_t width = config.hidden_size, inner = config.intermediate_size;
  const int64_t q_rows = q_width(), kv_rows = kv_width();
  SharedMatrix embedding =
      weights.TakeMatrix("language_model.embed_tokens.weight", {config.vocab_size, width});
  if (weights.Has("lm_head.weight")) {
    embedding_ = std::move(embedding);
    if (weights.device() == Device::kCuda) {
      const auto copy = std::make_shared<Tensor>(Placed(embedding_.view, weights.device()));
      embedding_ = {*copy, copy, nullptr};
    }
    lm_head_ = weights.TakeProjection("lm_head", config.vocab_size, width, false);
  } else if (config.tie_word_embeddings) {
    lm_head_ = LinearWeight(std::move(embedding), Tensor(), weights.device());
  } else {
    throw InputError(
        Place() +
        "lm_head.weight is missing and tie_word_embeddings is false in both config.json and its "
        "text_config: the checkpoint is incomplete");
  }
  final_norm_ = weights.TakePlaced("language_model.norm.weight", {width});
  for (int i = 0; i < config.num_layers; ++i) {
    const std::string prefix = "language_model.layers." + std::to_string(i) + ".";
    const std::string attention = prefix + "self_attn.", mlp = prefix + "mlp.";
    LlamaLayer layer;
    if (!config.attention.empty()) layer.attention = config.attention.at(i);
    layer.attention_norm = weights.TakePlaced(prefix + "input_layernorm.weight", {width});
    layer.mlp_norm = weights.TakePlaced(prefix + "post_attention_layernorm.weight", {width});
    layer.qkv = weights.TakeProjections(
        attention, {{"q_proj", q_rows}, {"k_proj", kv_rows}, {"v_proj", kv_rows}}, width,
        config.qkv_bias);
    layer.out = weights.TakeProjection(attention + "o_proj", width, q_rows, false);
    layer.gate_up = weights.TakeProjections(mlp, {{"gate_proj", inner}, {"up_proj", inner}}, width,
                                            /*with_bias=*/false);
    layer.down = weights.TakeProjection(mlp + "down_proj", width, inner, false);
    layers_.push_back(std::move(layer));
  }
}

void LlamaDecoder::Check(std::span<const SequenceStep> sequences) const {
  for (const SequenceStep& step : sequences) {
    if (step.pieces && step.pieces->under_way()) continue;
    const ConstTensorView& x = step.embeddings;
    if (x.shape().rank() != 2 || x.dim(0) < 1 || x.dim(1) != config_.hidden_size ||
        x.dtype() != DType::kF32) {
      throw Error(Place() + "embeddings must be [S >= 1, " + std::to_string(config_.hidden_size) +
                  "] f32, got " + x.shape().ToString() + " " + Name(x.dtype()));
    }
    const TensorView& y = step.logits;
    if (!y.empty() &&
        (y.shape().rank() != 2 || (y.dim(0) != 1 && y.dim(0) != x.dim(0)) ||
         y.dim(1) != config_.vocab_size || y.dtype() != DType::kF32 || !y.contiguous())) {
      throw Error(Place() + "logits must be contiguous [1 or " + std::to_string(x.dim(0)) + ", " +
                  std::to_string(config_.vocab_size) + "] f32, got " + y.shape().ToString() + " " +
                  Name(y.dtype()));
    }
    if (IsStaged(step) && !y.empty() && y.dim(0) != 1) {
      throw Error(Place() + "a step with a policy has logits of its last row only, got " +
                  y.shape().ToString());
    }
    if (step.recall &&
        (step.cache->RowsOfAllLayers() > 0 || step.cache->positions() != KvPositions::kRows ||
         step.recall->question_rows() < 1 || step.recall->question_rows() > x.dim(0))) {
      throw Error(Place() +
                  "a step that recalls needs an empty cache with positions of rows and a "
                  "question of 1 to " +
                  std::to_string(x.dim(0)) + " rows, got " +
                  std::to_string(step.cache->RowsOfAllLayers()) + " rows and a question of " +
                  std::to_string(step.recall->question_rows()));
    }
    CheckReach(step.cache->Reach() + x.dim(0));
  }
}

void LlamaDecoder::CheckReach(int64_t needed) const {
  if (needed <= config_.max_positions) return;
  throw InputError(Place() + "the model's context is " + std::to_string(config_.max_positions) +
                   " positions, this step needs " + std::to_string(needed) +
                   ": use fewer frames or fewer tokens a frame");
}

void LlamaDecoder::Step(ExecContext& ctx, std::span<SequenceStep> sequences,
                        const DecoderProbe& probe) const {
  Check(sequences);
  std::vector<int64_t> begins;
  begins.reserve(sequences.size());
  try {
    for (const SequenceStep& step : sequences) {
      begins.push_back(step.cache->length());
      if (!IsStaged(step)) step.cache->Reserve(ctx, step.embeddings.dim(0));
    }
    // A probe is promised whole results.
    for (std::vector<Segment>& chunk : CutIntoChunks(sequences, probe != nullptr)) {
      RunChunk(ctx, std::move(chunk), probe);
    }
    for (const SequenceStep& step : sequences) {
      if (IsStaged(step)) RunStaged(ctx, step, probe);
    }
  } catch (...) {
    for (size_t s = begins.size(); s-- > 0;) {
      sequences[s].cache->RewindTo({begins[s]});
      if (sequences[s].pieces) sequences[s].pieces->state.reset();
    }
    throw;
  }
}

void LlamaDecoder::Embed(ExecContext& ctx, std::span<const int32_t> ids, TensorView out) const {
  if (!embedding_.view.empty()) {
    sluice::Embed(ctx, embedding_.view, ids, out);
  } else {
    sluice::Embed(ctx, lm_head_, ids, out);
  }
}

void LlamaDecoder::RunChunk(ExecContext& ctx, std::vector<Segment> segments,
                            const DecoderProbe& probe) const {
  Workspace& workspace = ctx.workspace();
  Workspace::Scope scope(workspace);
  TensorView hidden = workspace.Allocate(DType::kF32, {CountRows(segments), config_.hidden_size});
  for (const Segment& segment : segments) {
    Bring(ctx, segment.step->embeddings.Slice(segment.offset, segment.offset + segment.rows),
          hidden.Slice(segment.row, segment.row + segment.rows));
  }
  const bool decodes = std::all_of(segments.begin(), segments.end(), [](const Segment& segment) {
    return segment.rows == 1 && segment.wanted == 1;
  });
  if (decodes && !probe && device_ != Device::kCpu) return RunDecoding(ctx, segments, hidden);
  const auto run_layers = [&] {
    std::vector<Segment> left = segments;
    TensorView rows = hidden;
    for (int i = 0; i < config_.num_layers && rows.dim(0) > 0; ++i) {
      rows = RunLayer(ctx, i, left, rows, {}, probe);
    }
    return std::pair(std::move(left), rows);
  };
  const bool only_stores = std::all_of(segments.begin(), segments.end(),
                                       [](const Segment& segment) { return segment.wanted == 0; });
  if (only_stores && !probe) {
    // Frames arrive in equal batches: on a GPU a step that recurs.
    std::string sizes;
    for (const Segment& segment : segments) sizes += " " + std::to_string(segment.rows);
    return ctx.Recurring("prefill" + sizes, run_layers);
  }
  std::tie(segments, hidden) = run_layers();
  if (hidden.dim(0) == 0) return;
  if (probe) {
    KeepWanted(segments);
    hidden = Compact(ctx, segments, hidden);
    if (hidden.dim(0) == 0) return;
  }
  WriteLogits(ctx, segments, hidden, probe);
}

// A row of each of some sequences, on a GPU: a step that recurs.
void LlamaDecoder::RunDecoding(ExecContext& ctx, std::span<const Segment> segments,
                               TensorView hidden) const {
  const int64_t rows = hidden.dim(0);
  const TensorView logits = ctx.workspace().Allocate(DType::kF32, {rows, config_.vocab_size});
  ctx.Recurring("decode " + std::to_string(rows), [&] {
    for (int i = 0; i < config_.num_layers; ++i) RunDecodingLayer(ctx, i, segments, hidden);
    TracedLinear(ctx, "decoder/lm_head", hidden, lm_head_, logits, After(final_norm_));
  });
  for (const Segment& segment : segments) {
    const int64_t to = segment.step->logits.dim(0) == 1 ? 0 : segment.offset;
    CopyRows(ctx, logits.Slice(segment.row, segment.row + 1),
             segment.step->logits.Slice(to, to + 1));
  }
}

void LlamaDecoder::RunDecodingLayer(ExecContext& ctx, int layer, std::span<const Segment> segments,
                                    TensorView hidden) const {
  const Workspace::Scope scope(ctx.workspace());
  const int64_t rows = hidden.dim(0);
  const TensorView qkv = ctx.workspace().Allocate(dtype_, {rows, q_width() + 2 * kv_width()});
  const TensorView mixed = ctx.workspace().Allocate(dtype_, {rows, q_width()});
  Project(ctx, layer, hidden, layers_[layer].qkv, qkv);
  {
    TraceScope trace(&ctx.tracer(), "decoder/attention", rows);
    AddAttention(layer, segments, trace);
    RotateStoreAndAttend(ctx, qkv, config_.num_heads, Positions(segments, layer), inv_freq_,
                         KvSegments(segments, layer), AttentionScale(), mixed,
                         layers_[layer].attention);
  }
  TracedLinear(ctx, "decoder/out", mixed, layers_[layer].out, hidden, {.accumulate = true});
  RunMlp(ctx, layers_[layer], hidden);
}

// Layer by layer over all rows, in chunks inside a layer: what leaves before a layer may depend on
// the last row. In pieces it stops after any chunk, and goes on there.
void LlamaDecoder::RunStaged(ExecContext& ctx, const SequenceStep& step,
                             const DecoderProbe& probe) const {
  Workspace& workspace = ctx.workspace();
  Workspace::Scope scope(workspace);
  KvCache& cache = *step.cache;
  StagedRows in_one_step;
  if (step.pieces && !step.pieces->under_way()) {
    step.pieces->state = std::make_unique<StagedRows>();
  }
  StagedRows& staged = step.pieces ? static_cast<StagedRows&>(*step.pieces->state) : in_one_step;
  staged.step = &step;
  if (staged.fresh.empty()) {
    staged.length = step.embeddings.dim(0);
    const Shape shape{staged.length, config_.hidden_size};
    if (step.pieces) staged.memory = Tensor(DType::kF32, shape, device_);
    staged.hidden = step.pieces ? staged.memory.view() : workspace.Allocate(DType::kF32, shape);
    Bring(ctx, step.embeddings, staged.hidden);
    staged.fresh.resize(staged.length);
    std::iota(staged.fresh.begin(), staged.fresh.end(), static_cast<int32_t>(cache.length()));
  }
  int64_t left = step.pieces ? std::max<int64_t>(step.pieces->rows, 1) * config_.num_layers
                             : std::numeric_limits<int64_t>::max();  // rows of a layer
  std::vector<Segment> segments;
  TensorView last;  // the rows of the last chunk after the last layer
  for (; staged.layer < config_.num_layers; ++staged.layer, staged.begin = 0) {
    const int i = staged.layer;
    Workspace::Scope layer_scope(workspace);
    TensorView keys = staged.keys.view();
    if (staged.begin == 0) keys = EnterLayer(ctx, staged, probe != nullptr);
    const auto rows = static_cast<int64_t>(staged.fresh.size());
    const int64_t chunk_rows = ChunkRows(rows, probe != nullptr);
    while (staged.begin < rows) {
      const int64_t begin = staged.begin, end = std::min(begin + chunk_rows, rows);
      const int64_t wanted = end == rows && !step.logits.empty() ? 1 : 0;
      segments = {{&step, 0, rows - begin, 0, end - begin, wanted}};
      last = RunLayer(ctx, i, segments, staged.hidden.Slice(begin, end),
                      keys.empty() ? ConstTensorView() : keys.Slice(begin, end), probe);
      staged.begin = end;
      left -= end - begin;
      if (left > 0 || (end == rows && i + 1 == config_.num_layers)) continue;
      if (end == rows) {
        ++staged.layer;
        staged.begin = 0;
        staged.keys = Tensor();
      } else if (!keys.empty() && staged.keys.empty()) {
        staged.keys = TransferTo(ctx, keys, device_);
      }
      return;
    }
    staged.keys = Tensor();
  }
  cache.Advance(staged.length);
  if (probe) {
    KeepWanted(segments);
    last = Compact(ctx, segments, last);
  }
  if (last.dim(0) > 0) WriteLogits(ctx, segments, last, probe);
  if (step.pieces) step.pieces->state.reset();
}

// What comes before the rows of a layer run. Returns their keys if ranking needed them.
TensorView LlamaDecoder::EnterLayer(ExecContext& ctx, StagedRows& staged, bool single_chunk) const {
  const SequenceStep& step = *staged.step;
  KvCache& cache = *step.cache;
  const int layer = staged.layer;
  const std::span<const int> boundaries =
      step.policy ? step.policy->boundaries() : std::span<const int>();
  if (step.recall) Recall(ctx, layer, staged);
  TensorView keys;
  if (staged.stage < boundaries.size() && boundaries[staged.stage] == layer) {
    ++staged.stage;
    keys = PassBoundary(ctx, layer, single_chunk, staged);
  }
  if (staged.cached) {
    const std::vector<int32_t> seen = CachedRows(staged, layer);
    TraceScope trace(&ctx.tracer(), "decoder/view", static_cast<int64_t>(seen.size()));
    trace.AddWork(0, 4.0 * SizeOf(dtype_) * kv_width() * static_cast<double>(seen.size()));
    cache.KeepRows(ctx, layer, seen);
  }
  cache.ReserveRows(ctx, layer, staged.fresh);
  return keys;
}

// Lets the policy put rows in front of the step's.
void LlamaDecoder::Recall(ExecContext& ctx, int layer, const StagedRows& staged) const {
  const SequenceStep& step = *staged.step;
  Workspace::Scope scope(ctx.workspace());
  const auto rows = static_cast<int64_t>(staged.fresh.size());
  const int64_t asked = std::min(step.recall->question_rows(), rows);
  const TensorView queries = ctx.workspace().Allocate(dtype_, {asked, q_width()});
  Project(ctx, layer, staged.hidden.Slice(rows - asked, rows),
          layers_[layer].qkv.Outputs(0, q_width()), queries);
  const TraceScope trace(&ctx.tracer(), "decoder/recall", asked);
  step.recall->Recall(ctx, layer, queries, rows, *step.cache);
  CheckReach(step.cache->rows(layer) + rows);
}

// Asks the policy before `layer` and lets the rows go that it does not keep. Returns the keys of
// the others, not yet rotated, if ranking needed them: of rows that leave nothing else is
// projected.
TensorView LlamaDecoder::PassBoundary(ExecContext& ctx, int layer, bool single_chunk,
                                      StagedRows& staged) const {
  Workspace& workspace = ctx.workspace();
  const SequenceStep& step = *staged.step;
  const LinearWeight& qkv = layers_[layer].qkv;
  const auto rows = static_cast<int64_t>(staged.fresh.size());
  const std::vector<int32_t> cached_rows = CachedRows(staged, layer);
  const auto cached = static_cast<int64_t>(cached_rows.size());
  std::vector<int32_t> tokens;
  tokens.reserve(cached + rows);
  for (const int32_t row : cached_rows) tokens.push_back(step.cache->TokenOf(layer, row));
  tokens.insert(tokens.end(), staged.fresh.begin(), staged.fresh.end());

  TensorView keys;
  const auto project_keys = [&] {
    if (!keys.empty()) return;
    keys = workspace.Allocate(dtype_, {rows, kv_width()});
    const LinearWeight weight = qkv.Outputs(q_width(), q_width() + kv_width());
    const int64_t chunk_rows = ChunkRows(rows, single_chunk);
    for (int64_t begin = 0; begin < rows; begin += chunk_rows) {
      const int64_t end = std::min(begin + chunk_rows, rows);
      Project(ctx, layer, staged.hidden.Slice(begin, end), weight, keys.Slice(begin, end));
    }
  };
  const auto last_queries = [&](TensorView y) {
    Project(ctx, layer, staged.hidden.Slice(rows - y.dim(0), rows), qkv.Outputs(0, q_width()), y);
  };
  LayerBoundary boundary;
  boundary.layer = layer;
  boundary.tokens = tokens;
  boundary.cached = cached;
  boundary.last_query = [&] {
    Workspace::Scope scope(workspace);
    const TensorView query = workspace.Allocate(dtype_, {1, q_width()});
    last_queries(query);
    const Tensor wide = ConvertTo(TransferTo(ctx, query, Device::kCpu), DType::kF32);
    return std::vector<float>(wide.data<float>(), wide.data<float>() + q_width());
  };
  boundary.attention = [&](int64_t queries) {
    if (queries < 1 || queries > rows) {
      throw Error(Place() + "a layer policy may ask how 1 to " + std::to_string(rows) +
                  " rows attend, got " + std::to_string(queries));
    }
    project_keys();
    Workspace::Scope scope(workspace);
    const TensorView q = workspace.Allocate(dtype_, {queries, q_width()});
    last_queries(q);
    return Attention(ctx, layer, staged, cached_rows, keys, q);
  };
  boundary.attention_of = [&](std::span<const float> query) {
    if (static_cast<int64_t>(query.size()) != q_width()) {
      throw Error(Place() + "a query must have " + std::to_string(q_width()) + " values, got " +
                  std::to_string(query.size()));
    }
    project_keys();
    return Attention(ctx, layer, staged, cached_rows, keys,
                     ConstTensorView(query.data(), DType::kF32, {1, q_width()}));
  };
  const std::optional<std::vector<int32_t>> kept = step.policy->Keep(boundary);
  if (!kept) return keys;

  std::vector<int32_t> kept_cached, kept_fresh;  // tokens; rows of the step
  for (size_t i = 0; i < kept->size(); ++i) {
    const int32_t index = (*kept)[i];
    if (index < 0 || index >= cached + rows || (i > 0 && index <= (*kept)[i - 1])) {
      throw Error(Place() + "a layer policy must keep ascending indices below " +
                  std::to_string(cached + rows) + ", got " + std::to_string(index));
    }
    if (index < cached) {
      kept_cached.push_back(tokens[index]);
    } else {
      kept_fresh.push_back(index - static_cast<int32_t>(cached));
    }
  }
  if (kept_fresh.empty() || (!step.logits.empty() && kept_fresh.back() != rows - 1)) {
    throw Error(Place() +
                "a layer policy must keep a row of the step, the last if its logits count");
  }
  if (static_cast<int64_t>(kept_cached.size()) < cached) staged.cached = std::move(kept_cached);
  if (static_cast<int64_t>(kept_fresh.size()) == rows) return keys;
  staged.hidden = KeepRowsOf(ctx, staged.hidden, kept_fresh);
  for (size_t i = 0; i < kept_fresh.size(); ++i) staged.fresh[i] = staged.fresh[kept_fresh[i]];
  staged.fresh.resize(kept_fresh.size());
  return keys.empty() ? keys : KeepRowsOf(ctx, keys, kept_fresh);
}

// How `queries`, not yet rotated, attend, in the mean: they stand where the last rows of the step
// do.
std::vector<float> LlamaDecoder::Attention(ExecContext& ctx, int layer, const StagedRows& staged,
                                           std::span<const int32_t> cached_rows,
                                           ConstTensorView keys, ConstTensorView queries) const {
  Workspace& workspace = ctx.workspace();
  Workspace::Scope scope(workspace);
  const int64_t rows = keys.dim(0), count = queries.dim(0);
  const auto cached = static_cast<int64_t>(cached_rows.size());
  // As they stand in this layer before anything leaves.
  const bool by_rows = staged.step->cache->positions() == KvPositions::kRows;
  std::vector<int32_t> positions = staged.fresh;
  if (by_rows) std::iota(positions.begin(), positions.end(), static_cast<int32_t>(cached));
  const TensorView q = workspace.Allocate(dtype_, {count, q_width()});
  const TensorView k = workspace.Allocate(dtype_, {rows, kv_width()});
  Bring(ctx, queries, q);
  CopyRows(ctx, keys, k);
  Rope(ctx, q, config_.head_dim, std::span(positions).last(count), inv_freq_);
  Rope(ctx, k, config_.head_dim, positions, inv_freq_);
  TraceScope trace(&ctx.tracer(), "decoder/rank", count);
  std::vector<float> mean(cached + rows, 0), weights;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t seen = rows - count + i + 1;
    weights.resize(cached + seen);
    MeanAttentionRow(ctx, q.Slice(i, i + 1), config_.num_heads, AttentionScale(),
                     staged.step->cache->layer(layer), cached_rows, k.Slice(0, seen), weights);
    for (size_t j = 0; j < weights.size(); ++j) mean[j] += weights[j] / static_cast<float>(count);
    trace.AddWork(2.0 * (cached + seen) * q_width(),
                  static_cast<double>((cached + seen) * kv_width() * SizeOf(dtype_)));
  }
  return mean;
}

// Runs one layer over a chunk's rows and returns those that are left of `hidden`. keys: of these
// rows, not yet rotated, if they are there already.
TensorView LlamaDecoder::RunLayer(ExecContext& ctx, int layer, std::vector<Segment>& segments,
                                  TensorView hidden, ConstTensorView keys,
                                  const DecoderProbe& probe) const {
  Workspace::Scope scope(ctx.workspace());
  const std::string name = "layer." + std::to_string(layer);
  const TensorView qkv =
      ctx.workspace().Allocate(dtype_, {hidden.dim(0), q_width() + 2 * kv_width()});
  if (keys.empty()) {
    Project(ctx, layer, hidden, layers_[layer].qkv, qkv);
  } else {
    ProjectAround(ctx, layer, hidden, keys, qkv);
  }
  RotateAndStore(ctx, layer, segments, qkv);
  ShowOnHost(ctx, probe, name + ".query", qkv.Columns(0, q_width()));
  ShowOnHost(ctx, probe, name + ".key", qkv.Columns(q_width(), q_width() + kv_width()));
  if (!probe && layer + 1 == config_.num_layers) {
    // Once the last layer's keys and values are stored, only rows whose logits are read matter: a
    // prefill without logits saves most of that layer.
    KeepWanted(segments);
    hidden = Compact(ctx, segments, hidden);
    if (hidden.dim(0) == 0) return hidden;
  }
  Attend(ctx, layer, segments, qkv, hidden);
  RunMlp(ctx, layers_[layer], hidden);
  ShowOnHost(ctx, probe, name, hidden);
  return hidden;
}

// weight: of a layer's qkv, all or some of its outputs.
void LlamaDecoder::Project(ExecContext& ctx, int layer, ConstTensorView hidden,
                           const LinearWeight& weight, TensorView y) const {
  TracedLinear(ctx, "decoder/qkv", hidden, weight, y, After(layers_[layer].attention_norm));
}

// Queries and values on both sides of `keys`.
void LlamaDecoder::ProjectAround(ExecContext& ctx, int layer, ConstTensorView hidden,
                                 ConstTensorView keys, TensorView qkv) const {
  const int64_t values = q_width() + kv_width();
  CopyRows(ctx, keys, qkv.Columns(q_width(), values));
  for (const auto& [begin, end] :
       {std::pair(int64_t{0}, q_width()), std::pair(values, qkv.dim(1))}) {
    Workspace::Scope scope(ctx.workspace());
    const TensorView part = ctx.workspace().Allocate(dtype_, {hidden.dim(0), end - begin});
    Project(ctx, layer, hidden, layers_[layer].qkv.Outputs(begin, end), part);
    CopyRows(ctx, part, qkv.Columns(begin, end));
  }
}

void LlamaDecoder::RotateAndStore(ExecContext& ctx, int layer, std::span<const Segment> segments,
                                  TensorView qkv) const {
  TraceScope trace(&ctx.tracer(), "decoder/rotate_store", qkv.dim(0));
  sluice::RotateAndStore(ctx, qkv, config_.num_heads, Positions(segments, layer), inv_freq_,
                         KvSegments(segments, layer));
}

void LlamaDecoder::AddAttention(int layer, std::span<const Segment> segments,
                                TraceScope& trace) const {
  for (const Segment& segment : segments) {
    if (segment.rows == 0) continue;
    const int64_t first = segment.CacheRow(layer);
    const double seen = first + 0.5 * (segment.rows + 1);  // in the mean
    trace.AddWork(
        4.0 * segment.rows * seen * q_width(),
        2.0 * SizeOf(dtype_) * (segment.rows * q_width() + (first + segment.rows) * kv_width()));
  }
}

void LlamaDecoder::Attend(ExecContext& ctx, int layer, std::span<const Segment> segments,
                          ConstTensorView qkv, TensorView hidden) const {
  Workspace::Scope scope(ctx.workspace());
  const TensorView mixed = ctx.workspace().Allocate(dtype_, {hidden.dim(0), q_width()});
  {
    TraceScope trace(&ctx.tracer(), "decoder/attention", hidden.dim(0));
    AddAttention(layer, segments, trace);
    CausalAttention(ctx, qkv.Columns(0, q_width()), KvSegments(segments, layer), config_.num_heads,
                    AttentionScale(), mixed, layers_[layer].attention);
  }
  TracedLinear(ctx, "decoder/out", mixed, layers_[layer].out, hidden, {.accumulate = true});
}

void LlamaDecoder::RunMlp(ExecContext& ctx, const LlamaLayer& layer, TensorView hidden) const {
  Workspace& workspace = ctx.workspace();
  Workspace::Scope scope(workspace);
  const int64_t rows = hidden.dim(0), inner = config_.intermediate_size;
  const TensorView gated = workspace.Allocate(dtype_, {rows, inner});
  TracedLinear(ctx, "decoder/mlp", hidden, layer.gate_up, gated,
               After(layer.mlp_norm, Activation::kSiluMul));
  TracedLinear(ctx, "decoder/mlp", gated, layer.down, hidden, {.accumulate = true});
}

void LlamaDecoder::WriteLogits(ExecContext& ctx, std::span<const Segment> segments,
                               ConstTensorView hidden, const DecoderProbe& probe) const {
  Workspace& workspace = ctx.workspace();
  Workspace::Scope scope(workspace);
  if (probe) {
    const TensorView narrow = workspace.Allocate(dtype_, hidden.shape());
    RmsNorm(ctx, hidden, final_norm_, config_.rms_norm_eps, narrow);
    probe("norm", ConvertTo(TransferTo(ctx, narrow, Device::kCpu), DType::kF32));
  }
  const int64_t rows = hidden.dim(0);
  if (rows > 1 && rows == std::count_if(segments.begin(), segments.end(),
                                        [](const Segment& s) { return s.rows == 1; })) {
    // Several sequences that decode: the weight is read once for all of them.
    const TensorView together = workspace.Allocate(DType::kF32, {rows, config_.vocab_size});
    TracedLinear(ctx, "decoder/lm_head", hidden, lm_head_, together, After(final_norm_));
    int64_t row = 0;
    for (const Segment& segment : segments) {
      if (segment.rows == 0) continue;
      const int64_t to = segment.step->logits.dim(0) == 1 ? 0 : segment.offset;
      CopyRows(ctx, together.Slice(row, row + 1), segment.step->logits.Slice(to, to + 1));
      ++row;
    }
    ShowOnHost(ctx, probe, "logits", together);
    return;
  }
  int64_t row = 0;
  for (const Segment& segment : segments) {
    if (segment.rows == 0) continue;
    const int64_t to = segment.step->logits.dim(0) == 1 ? 0 : segment.offset;
    const TensorView logits = segment.step->logits.Slice(to, to + segment.rows);
    TracedLinear(ctx, "decoder/lm_head", hidden.Slice(row, row + segment.rows), lm_head_, logits,
                 After(final_norm_));
    ShowOnHost(ctx, probe, "logits", logits);
    row += segment.rows;
  }
}

double LlamaDecoder::FlopsPerToken(int64_t context) const {
  const double width = config_.hidden_size, inner = config_.intermediate_size;
  const double products = width * (2.0 * q_width() + 2.0 * kv_width()) + 3 * width * inner;
  return config_.num_layers * (2 * products + 4.0 * context * q_width());
}

int64_t LlamaDecoder::WeightBytesPerToken() const {
  int64_t bytes = lm_head_.SizeBytes() + final_norm_.SizeBytes();
  for (const LlamaLayer& layer : layers_) {
    bytes += layer.qkv.SizeBytes() + layer.out.SizeBytes() + layer.gate_up.SizeBytes() +
             layer.down.SizeBytes() + layer.attention_norm.SizeBytes() + layer.mlp_norm.SizeBytes();
  }
  return bytes;
}

// One frequency of Llama 3.1's scaling, step by step in f32 as the reference.
float ScaleLlama3(float frequency, const RopeScaling& scaling) {
  const auto factor = static_cast<float>(scaling.factor);
  const auto low = static_cast<float>(scaling.low_frequency);
  const auto high = static_cast<float>(scaling.high_frequency);
  const auto positions = static_cast<float>(scaling.original_positions);
  const float wavelength = static_cast<float>(2 * M_PI) / frequency;
  if (wavelength > positions / low) return frequency / factor;
  if (wavelength < positions / high) return frequency;
  const float share = (positions / wavelength - low) / (high - low);
  return (1 - share) * frequency / factor + share * frequency;
}

}  // namespace

Tensor InverseFrequencies(const LlamaConfig& config) {
  Tensor frequencies(DType::kF32, {config.head_dim / 2});
  for (int i = 0; i < config.head_dim / 2; ++i) {
    // In f32 with a correctly rounded power, as the reference: at position 32768 one unit in the
    // last place is already an angle of 0.002.
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(config.head_dim);
    float frequency = 1.0f / static_cast<float>(std::pow(config.rope_theta, exponent));
    switch (config.rope_scaling.kind) {
      case RopeScaling::Kind::kNone:
        break;
      case RopeScaling::Kind::kLinear:
        frequency /= static_cast<float>(config.rope_scaling.factor);
        break;
      case RopeScaling::Kind::kLlama3:
        frequency = ScaleLlama3(frequency, config.rope_scaling);
        break;
    }
    frequencies.data<float>()[i] = frequency;
  }
  return frequencies;
}

std::unique_ptr<Decoder> LoadLlamaDecoder(WeightStore& weights, const LlamaConfig& config) {
  return std::make_unique<LlamaDecoder>(weights, config);
}

}  // namespace sluice
