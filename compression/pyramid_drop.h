// PyramidDrop (Xing et al. 2024, arXiv 2410.17247): shallow layers need every visual token, deep
// layers few. The decoder's layers form stages; between two stages only a share of the visual rows
// goes on, those to which the question attends most. Text is never dropped.
// Training-free. Deep layers then compute, cache and read less.
//
// The paper knows the question before the frames. A stream does not, so there are four ways:
//
//   question    Frames are prefilled whole. A question looks through a view: from each boundary on
//               it sees only the rows it ranks highest. Nothing is lost for the next question.
//               Saves time in answering, none in prefill.
//   replay      The embeddings of the last frames are kept, and prefilled together with each
//               question, as in the paper. Costs a prefill of the window a question.
//   query-free  Rows leave when they arrive, ranked without a question: by the scores a compressor
//               gave them, else by novelty. Saves prefill and memory; what left cannot be seen by
//               deep layers any more.
//   probe       The same, ranked by a standing instruction: the queries that its last token has in
//               the ranking layers when nothing but the instruction was read.
//
// Where this differs from the released code: all rows of a question rank in mode replay instead of
// the prompt's last (PyramidRank), shallow models have boundaries of their own, rows of several
// frames have quotas (PyramidQuota), no stage keeps less than one row, ties go to the earlier row,
// grouped queries are supported, and positions may stay those of the tokens.
#ifndef SLUICE_COMPRESSION_PYRAMID_DROP_H_
#define SLUICE_COMPRESSION_PYRAMID_DROP_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "llm/decoder.h"
#include "llm/kv_cache.h"
#include "llm/layer_policy.h"
#include "vision/visual_tokens.h"

namespace sluice {

enum class PyramidMode { kOff, kQuestion, kReplay, kQueryFree, kProbe };
const char* Name(PyramidMode mode);  // "off", "question", "replay", "query-free", "probe"

// Among which rows those that go on are chosen.
enum class PyramidQuota {
  kGlobal,  // the best of all frames: floor(n0 rho), as the paper
  kFrame,   // of each frame's k rows the best max(1, floor(k rho))
  kHybrid,  // of each frame's k rows the best max(1, floor(k rho frame_share)), then the best of
            // all
};
const char* Name(PyramidQuota quota);  // "global", "frame", "hybrid"

// Whose attention ranks rows when a question comes.
enum class PyramidRank {
  kLast,  // of the prompt's last token, as the paper
  kMean,  // of the question's tokens and what its template puts around them, in the mean
};
const char* Name(PyramidRank rank);  // "last", "mean"

struct PyramidOptions {
  PyramidMode mode = PyramidMode::kOff;
  int stages = 4;
  double lambda = 0.5;  // the share of a stage's rows that enters the next, in (0, 1]
  // Instead of lambda's powers: the share of all rows in the second stage, the third and so on.
  std::vector<double> shares;
  // The first layer of the second stage, the third and so on. Default: s * floor(L / stages), as
  // the paper; in models of fewer than 16 layers the second and the last ones, 1, L - 2, L - 1
  // (ours): for about the same work halving the rows early and then leaving the middle layers alone
  // costs fewer right answers than thinning them step by step (docs/RESULTS.md). Not so in mode
  // probe, whose single query says little in the second layer.
  std::vector<int> boundaries;
  // Default: hybrid where a question ranks. Where rows leave on arrival it can only be frame: what
  // stays must not depend on which frames came together.
  std::optional<PyramidQuota> quota;
  double frame_share = 0.5;  // of a hybrid quota, in [0, 1]
  // Only where a question ranks. Default: last, but mean for replay, which answers better by it.
  std::optional<PyramidRank> rank;
  // Default: those of rows (the paper's, "compact") where rows leave, those of tokens ("preserve")
  // for mode question, which knows no other: its keys were rotated when the frames came.
  std::optional<KvPositions> positions;
  int replay_frames = 64;
  std::string instruction;  // what probe ranks by
  bool operator==(const PyramidOptions&) const = default;
};

// "MODE" or "MODE=LAMBDA", as in "question=0.6". Throws InputError telling the modes.
PyramidOptions ParsePyramid(std::string_view spec);

// The options for one model, checked.
struct PyramidPlan {
  std::vector<int> boundaries;  // [stages - 1], ascending
  std::vector<double> shares;   // [stages - 1], of all visual rows, not increasing
  PyramidQuota quota = PyramidQuota::kGlobal;
  double frame_share = 0.5;

  // Throws InputError in one line on what does not fit the model or each other.
  static PyramidPlan Make(const PyramidOptions& options, int num_layers);
  // Rows in each stage out of `total` without quotas: total, then max(1, floor(total * share)).
  std::vector<int64_t> StageSizes(int64_t total) const;
  // Rows in each layer, given those of each stage.
  std::vector<int64_t> LayerRows(std::span<const int64_t> stage_sizes, int num_layers) const;
};

// Multiply-adds of the visual rows of a prefill as the paper counts them: in each layer
// n (2 d^2 + 2 d dkv + 3 d m) + 2 n^2 d. Double them for operations.
struct PyramidCost {
  double per_row = 0;   // 2 d^2 + 2 d dkv + 3 d m
  double per_pair = 0;  // 2 d
  static PyramidCost Of(const Decoder& decoder);
  double MultiplyAdds(std::span<const int64_t> rows_of_layers) const;
};

// Which of `scores.size()` candidates go on: ascending indices. frames[i]: the frame of candidate
// i; frame_totals(f), by frame: rows that frame f had before anything left; total: of all frames.
struct PyramidFrameTotal {
  int32_t frame;
  int64_t rows;
};
std::vector<int32_t> ChoosePyramidRows(const PyramidPlan& plan, double share,
                                       std::span<const float> scores,
                                       std::span<const int32_t> frames,
                                       std::span<const PyramidFrameTotal> totals);

// One step's policy. Views given to it must outlive it. For one thread, for one step.
class PyramidDrop final : public LayerPolicy {
 public:
  static constexpr int32_t kText = -1;

  // frames: of each token of the sequence its frame, or kText, which tokens behind the end are as
  // well. Ranks visual rows from token `first` on; what stands before it always goes on.
  PyramidDrop(const PyramidPlan& plan, std::span<const int32_t> frames, int64_t first)
      : plan_(plan), frames_(frames), first_(first) {}
  // Ranks by the attention of the step's last so many rows, in the mean; 1 if not told.
  void RankByLastRows(int64_t rows) { last_rows_ = rows; }
  // Ranks by these instead: one a token from `first` on.
  void RankByScores(std::span<const float> scores) { scores_ = scores; }
  // Ranks by the attention of these instead: one query [H D] a boundary.
  void RankByQueries(std::span<const std::vector<float>> queries) { queries_ = queries; }

  std::span<const int> boundaries() const override { return plan_.boundaries; }
  std::optional<std::vector<int32_t>> Keep(const LayerBoundary& boundary) override;

  // Ranked rows in each stage of the step that ran; empty when it had none.
  const std::vector<int64_t>& stage_sizes() const { return stage_sizes_; }

 private:
  std::vector<float> Scores(const LayerBoundary& boundary, std::span<const int32_t> candidates,
                            size_t stage) const;

  const PyramidPlan& plan_;
  std::span<const int32_t> frames_;
  const int64_t first_;
  int64_t last_rows_ = 1;
  std::span<const float> scores_;
  std::span<const std::vector<float>> queries_;
  std::vector<PyramidFrameTotal> totals_;  // at the first boundary, ascending by frame
  std::vector<int64_t> stage_sizes_;
};

// Keeps everything and remembers the queries of the step's last row at each boundary.
class QueryRecorder final : public LayerPolicy {
 public:
  explicit QueryRecorder(const PyramidPlan& plan) : plan_(plan) {}
  std::span<const int> boundaries() const override { return plan_.boundaries; }
  std::optional<std::vector<int32_t>> Keep(const LayerBoundary& boundary) override {
    queries.push_back(boundary.last_query());
    return std::nullopt;
  }
  std::vector<std::vector<float>> queries;

 private:
  const PyramidPlan& plan_;
};

// A stream's side of the method: which tokens are whose, and what the modes remember.
// Used by one thread at a time.
class PyramidStream {
 public:
  // tokens_per_frame and context_limit bound what replay may ask for. Throws InputError as
  // PyramidPlan::Make, and on options that the mode cannot follow.
  PyramidStream(const PyramidOptions& options, int num_layers, int tokens_per_frame,
                int64_t context_limit);

  PyramidMode mode() const { return options_.mode; }
  bool replays() const { return options_.mode == PyramidMode::kReplay; }
  bool ranks_by_question() const { return replays() || options_.mode == PyramidMode::kQuestion; }
  const PyramidPlan& plan() const { return plan_; }
  KvPositions positions() const;
  PyramidRank rank() const {
    return options_.rank.value_or(replays() ? PyramidRank::kMean : PyramidRank::kLast);
  }

  // For mode probe: the instruction whose queries are wanted, until SetQueries.
  const std::string* wanted_instruction() const;
  void SetQueries(std::vector<std::vector<float>> queries) { queries_ = std::move(queries); }

  // What tokens that will stand at `first` of the cache go through on arrival; null where nothing
  // leaves then. Valid until the next call.
  PyramidDrop* ForFrames(const VisualTokens& tokens, int64_t first);
  // They have arrived.
  void Arrived(const VisualTokens& tokens, int64_t first);
  // What a question's prompt goes through; null where nothing leaves then. Its last `question` rows
  // are the question. In mode replay it begins with `text` rows of text, then ReplayRows. Valid
  // until the next call.
  PyramidDrop* ForQuestion(int64_t text, int64_t question);
  // The window's embeddings, [rows, E] values.
  std::span<const float> ReplayRows() const { return window_rows_; }

  // Visual rows in each stage of the latest question; empty where none left.
  std::vector<int64_t> QuestionStageSizes() const;

 private:
  // How new each token is: 1 - cosine to the mean of its frame, and 1 - cosine to what stood at its
  // place in the frame before.
  std::vector<float> Novelty(const VisualTokens& tokens) const;
  void Label(const VisualTokens& tokens, int64_t first);
  void RememberForReplay(const VisualTokens& tokens);

  const PyramidOptions options_;
  PyramidPlan plan_;
  std::vector<int32_t> frames_;  // of each token in the cache, or of a replayed prompt
  std::vector<float> scores_;
  std::vector<std::vector<float>> queries_;
  std::optional<PyramidDrop> step_;
  // The newest frame that had tokens (query-free).
  std::vector<TokenOrigin> last_origins_;
  std::vector<float> last_rows_;
  // The last frames that had tokens (replay).
  std::vector<int32_t> window_frames_;  // of each row
  std::vector<float> window_rows_;
};

}  // namespace sluice

#endif  // SLUICE_COMPRESSION_PYRAMID_DROP_H_
