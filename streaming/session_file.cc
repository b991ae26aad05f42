#include "streaming/session_file.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "runtime/archive.h"
#include "runtime/error.h"
#include "runtime/ops/attention.h"
#include "runtime/transfer.h"

namespace sluice {
namespace {

constexpr int32_t kVersion = 2;
// Of lists whose items are fields of their own: far more than there are, few enough to hold.
constexpr uint64_t kMost = 1 << 20;

template <typename T, typename Body>
void Optional(Archive& archive, const char* field, std::optional<T>& value, const Body& body) {
  bool there = value.has_value();
  archive.Flag(field, there);
  if (archive.loading() && there) value.emplace();
  if (there) body(*value);
}

void Persist(Archive& archive, MediaTime& time) {
  int64_t ns = time.nanoseconds();
  archive.Number("time", ns);
  time = MediaTime::FromNanoseconds(ns);
}

void Persist(Archive& archive, const char* field, std::vector<std::string>& list) {
  archive.Resize(field, list, kMost);
  for (std::string& item : list) archive.Text("item", item);
}

void Persist(Archive& archive, StcCacherOptions& options) {
  archive.Number("interval", options.interval);
  archive.Number("ratio", options.ratio);
  archive.Flag("shared_selection", options.shared_selection);
  archive.Number("refresh_below", options.refresh_below);
}

void Persist(Archive& archive, TurboOptions& options) {
  archive.Number("remove", options.remove);
  archive.Number("lambda", options.lambda);
  archive.Number("min_tokens", options.min_tokens);
  archive.Flag("proportional_attention", options.proportional_attention);
}

void Persist(Archive& archive, PyramidOptions& options) {
  archive.Enum("mode", options.mode, PyramidMode::kProbe);
  archive.Number("stages", options.stages);
  archive.Number("lambda", options.lambda);
  archive.Array("shares", options.shares);
  archive.Array("boundaries", options.boundaries);
  Optional(archive, "quota", options.quota,
           [&](PyramidQuota& quota) { archive.Enum("quota", quota, PyramidQuota::kHybrid); });
  archive.Number("frame_share", options.frame_share);
  Optional(archive, "rank", options.rank,
           [&](PyramidRank& rank) { archive.Enum("rank", rank, PyramidRank::kMean); });
  Optional(archive, "positions", options.positions, [&](KvPositions& positions) {
    archive.Enum("positions", positions, KvPositions::kRows);
  });
  archive.Number("replay_frames", options.replay_frames);
  archive.Text("instruction", options.instruction);
}

void Persist(Archive& archive, MemoryOptions& options) {
  archive.Number("window_tokens", options.window_tokens);
  archive.Number("recall_blocks", options.recall_blocks);
  archive.Number("recall_chunk", options.recall_chunk);
  archive.Number("host_bytes", options.store.host_bytes);
  archive.Number("disk_bytes", options.store.disk_bytes);
  archive.Enum("when_full", options.store.when_full, WhenFull::kThin);
  archive.Flag("int8", options.int8);
  archive.Number("dialogue_tokens", options.dialogue_tokens);
}

void Persist(Archive& archive, SessionOptions& options) {
  archive.Text("system_prompt", options.system_prompt);
  archive.Flag("keep_dialogue", options.keep_dialogue);
  archive.Number("frames_per_batch", options.frames_per_batch);
  Optional(archive, "duplicate_filter", options.duplicate_threshold,
           [&](double& value) { archive.Number("duplicate_threshold", value); });
  archive.Number("max_context_tokens", options.max_context_tokens);
  const auto each = [&](auto& value) { Persist(archive, value); };
  Optional(archive, "cacher", options.cacher, each);
  Optional(archive, "turbo", options.turbo, each);
  Persist(archive, "compressors", options.compressors);
  Persist(archive, options.pyramid);
  Optional(archive, "memory", options.memory, each);
  Persist(archive, options.generate);
}

void Persist(Archive& archive, Turn& turn) {
  archive.Text("question", turn.question);
  archive.Text("answer", turn.answer);
  Persist(archive, turn.time);
  archive.Array("question_ids", turn.question_ids);
  archive.Array("answer_ids", turn.answer_ids);
}

// width: of an embedding.
void Persist(Archive& archive, VisualTokens& tokens, int64_t width) {
  archive.Value("features", tokens.features);
  std::vector<int32_t> places;  // frame, row and column of each
  std::vector<int64_t> times;
  for (const TokenOrigin& origin : tokens.origins) {
    places.insert(places.end(), {origin.frame, origin.row, origin.col});
    times.push_back(origin.time.nanoseconds());
  }
  archive.Array("places", places);
  archive.Array("times", times);
  archive.Number("grid_rows", tokens.grid_rows, 0);
  archive.Number("grid_cols", tokens.grid_cols, 0);
  archive.Array("scores", tokens.scores);
  if (!archive.loading()) return;
  const auto count = static_cast<int64_t>(times.size());
  if (places.size() != 3 * times.size() ||
      (!tokens.scores.empty() && tokens.scores.size() != times.size()) ||
      tokens.features.dtype() != DType::kF32 || tokens.features.shape() != Shape{count, width}) {
    archive.Refuse("features", Shape{count, width}.ToString() + " f32 with places and scores",
                   tokens.features.shape().ToString());
  }
  tokens.origins.resize(times.size());
  for (size_t i = 0; i < times.size(); ++i) {
    tokens.origins[i].frame = places[3 * i];
    tokens.origins[i].row = static_cast<int16_t>(places[3 * i + 1]);
    tokens.origins[i].col = static_cast<int16_t>(places[3 * i + 2]);
    tokens.origins[i].time = MediaTime::FromNanoseconds(times[i]);
  }
}

// Keys and values of every layer, and which tokens they are of.
void Persist(ExecContext& ctx, Archive& archive, KvCache& cache) {
  const KvGeometry& geometry = cache.pool()->geometry();
  const int64_t width = int64_t{geometry.kv_heads} * geometry.head_dim;
  constexpr int64_t kMostTokens = std::numeric_limits<int32_t>::max();
  int64_t length = cache.length(), gone = cache.gone();
  archive.Number("length", length, int64_t{0}, kMostTokens);
  archive.Number("gone", gone, int64_t{0}, length);
  std::vector<Tensor> pinned_keys(
      gone > 0 && (archive.loading() || cache.pinned() > 0) ? geometry.num_layers : 0);
  bool pinned = !pinned_keys.empty();
  archive.Flag("pinned", pinned);
  if (!pinned) pinned_keys.clear();
  for (size_t i = 0; i < pinned_keys.size(); ++i) {
    if (!archive.loading()) {
      pinned_keys[i] = TransferTo(ctx, cache.PinnedKeys(static_cast<int>(i)), Device::kCpu);
    }
    archive.Value("pinned_keys", pinned_keys[i]);
  }
  // Whether each layer has a row for every token that is not gone.
  bool whole = true;
  for (int i = 0; i < geometry.num_layers; ++i) whole = whole && cache.rows(i) == length - gone;
  archive.Flag("whole", whole);
  if (archive.loading() && whole) {
    archive.CheckRoom("length", length - gone,
                      2 * geometry.num_layers * width * SizeOf(geometry.dtype));
    cache.Restore(ctx, length, gone, pinned_keys);
  }
  for (int layer = 0; layer < geometry.num_layers; ++layer) {
    std::vector<int32_t> tokens;
    if (!whole) {
      for (int64_t row = 0; row < cache.rows(layer); ++row) {
        tokens.push_back(cache.TokenOf(layer, row));
      }
      archive.Array("tokens", tokens);
      const bool ascending =
          std::adjacent_find(tokens.begin(), tokens.end(), std::greater_equal<>()) == tokens.end();
      if (!ascending || (!tokens.empty() && (tokens.front() < 0 || tokens.back() >= length)) ||
          gone > 0) {
        archive.Refuse("tokens", "ascending numbers below " + std::to_string(length), "others");
      }
    }
    const int64_t rows = whole ? length - gone : static_cast<int64_t>(tokens.size());
    const Shape shape{rows, width};
    Tensor keys, values;
    if (!archive.loading()) {
      keys = Tensor(geometry.dtype, shape);
      values = Tensor(geometry.dtype, shape);
      const Workspace::Scope scope(ctx.workspace());
      const TensorView k = ctx.workspace().Allocate(geometry.dtype, shape);
      const TensorView v = ctx.workspace().Allocate(geometry.dtype, shape);
      LoadKv(ctx, cache.layer(layer), 0, k, v);
      Transfer(ctx, k, keys);
      Transfer(ctx, v, values);
    }
    archive.Value("keys", keys);
    archive.Value("values", values);
    if (!archive.loading()) continue;
    for (const Tensor* part : {&keys, &values}) {
      if (part->shape() == shape && part->dtype() == geometry.dtype) continue;
      archive.Refuse("keys", shape.ToString() + " " + Name(geometry.dtype),
                     part->shape().ToString() + " " + Name(part->dtype()));
    }
    if (!whole) cache.ReserveRows(ctx, layer, tokens);
    keys = Placed(std::move(keys), geometry.device);
    values = Placed(std::move(values), geometry.device);
    StoreKv(ctx, keys, values, 0, cache.layer(layer));
    ctx.Synchronize();  // before the tensors end
  }
  if (archive.loading() && !whole) cache.Advance(length);
}

void Persist(Archive& archive, const KvCache& cache, StreamMemory& memory) {
  memory.Settle();
  std::vector<StreamMemory::Block> blocks(memory.blocks().begin(), memory.blocks().end());
  archive.Resize("blocks", blocks, kMost << 10);
  for (StreamMemory::Block& block : blocks) {
    archive.Number("number", block.number);
    archive.Number("begin", block.begin);
    archive.Number("tokens", block.tokens);
    Persist(archive, block.time);
    archive.Flag("off_loaded", block.off_loaded);
    archive.Array("index", block.index);
    std::vector<uint8_t> bytes;
    if (!archive.loading() && block.off_loaded) bytes = memory.OffLoaded(block);
    archive.Array("bytes", bytes);
    if (archive.loading()) memory.Restore(cache, std::move(block), bytes);
  }
}

void Persist(ExecContext& ctx, Archive& archive, Session& session) {
  const int64_t width = session.vlm->decoder().hidden_size();
  archive.Number("frames_seen", session.frames_seen, int64_t{0});
  archive.Number("visual_tokens", session.visual_tokens, int64_t{0});
  Persist(archive, session.last_time);
  archive.Resize("transcript", session.transcript, kMost);
  for (Turn& turn : session.transcript) Persist(archive, turn);
  archive.Resize("waiting", session.waiting, kMost);
  for (VisualTokens& tokens : session.waiting) Persist(archive, tokens, width);
  session.pyramid.Persist(archive, width);
  if (session.duplicates) session.duplicates->Persist(archive);
  if (session.reuse) session.reuse->Persist(archive);
  for (const auto& compressor : session.compressors) compressor->Persist(archive);
  Persist(ctx, archive, session.cache);
  if (session.cache.gone() > 0 &&
      session.cache.pinned() != static_cast<int64_t>(session.prefix_ids.size())) {
    archive.Refuse("pinned_keys", std::to_string(session.prefix_ids.size()) + " rows",
                   std::to_string(session.cache.pinned()));
  }
  if (session.memory) Persist(archive, session.cache, *session.memory);
}

// What the file is and for which model.
void PersistKind(Archive& archive, const Vlm& vlm) {
  std::string kind = "stream";
  archive.Text("kind", kind);
  if (kind != "stream") archive.Refuse("kind", "stream", kind);
  int32_t version = kVersion;
  archive.Number("version", version);
  if (version != kVersion) {
    archive.Refuse("version", std::to_string(kVersion), std::to_string(version));
  }
  std::string checkpoint = vlm.info().fingerprint, type = Name(vlm.info().compute_type);
  archive.Text("checkpoint", checkpoint);
  if (checkpoint != vlm.info().fingerprint) {
    archive.Refuse("checkpoint", vlm.info().fingerprint + " (that of " + vlm.info().name + ")",
                   checkpoint + ": it was saved with another model");
  }
  archive.Text("compute_type", type);
  if (type != Name(vlm.info().compute_type)) {
    archive.Refuse("compute_type", Name(vlm.info().compute_type), type);
  }
}

}  // namespace

void Persist(Archive& archive, GenerateOptions& options) {
  archive.Number("max_new_tokens", options.max_new_tokens);
  archive.Number("temperature", options.sampling.temperature);
  archive.Number("top_k", options.sampling.top_k);
  archive.Number("top_p", options.sampling.top_p);
  archive.Number("repetition_penalty", options.sampling.repetition_penalty);
  archive.Number("seed", options.sampling.seed);
  Persist(archive, "stop_strings", options.stop_strings);
}

void SaveSession(ExecContext& ctx, Session& session, const std::filesystem::path& file,
                 const PersistOwner& owner) {
  Archive archive = Archive::ToFile(file);
  PersistKind(archive, *session.vlm);
  if (owner) owner(archive);
  Persist(archive, session.options);
  Persist(ctx, archive, session);
  archive.Finish();
}

std::unique_ptr<Session> LoadSession(ExecContext& ctx, const Engine& engine,
                                     const std::filesystem::path& file,
                                     const BlockStoreOptions& most, const PersistOwner& owner) {
  Archive archive = Archive::FromFile(file);
  PersistKind(archive, *engine.vlm());
  if (owner) owner(archive);
  SessionOptions options;
  Persist(archive, options);
  if (options.memory) {
    BlockStoreOptions& store = options.memory->store;
    store.host_bytes = std::min(store.host_bytes, most.host_bytes);
    store.disk_bytes = std::min(store.disk_bytes, most.disk_bytes);
    store.disk_directory = most.disk_directory;
  }
  std::unique_ptr<Session> session = engine.NewSession(options);
  Persist(ctx, archive, *session);
  archive.Finish();
  return session;
}

}  // namespace sluice
