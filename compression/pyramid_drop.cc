#include "compression/pyramid_drop.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numeric>
#include <utility>

#include "runtime/error.h"

namespace sluice {
namespace {

constexpr PyramidMode kModes[] = {PyramidMode::kOff, PyramidMode::kQuestion, PyramidMode::kReplay,
                                  PyramidMode::kQueryFree, PyramidMode::kProbe};

// Shares are products of decimals: 100 * 0.7 * 0.7 is 49, whatever the last bit says.
int64_t Floor(double value) { return static_cast<int64_t>(std::floor(value + 1e-9)); }

int64_t AtLeastOne(double value) { return std::max<int64_t>(1, Floor(value)); }

double Dot(const float* a, const float* b, int64_t size) {
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += double{a[i]} * b[i];
  return sum;
}

// Of vectors without a direction: 0, neither like nor unlike.
double Cosine(const float* a, const float* b, int64_t size) {
  const double norms = Dot(a, a, size) * Dot(b, b, size);
  return norms > 0 ? Dot(a, b, size) / std::sqrt(norms) : 0;
}

std::string List(std::span<const int> values) {
  std::string text;
  for (const int value : values) text += (text.empty() ? "" : ", ") + std::to_string(value);
  return "[" + text + "]";
}

void CheckBoundaries(std::span<const int> boundaries, int num_layers) {
  for (size_t i = 0; i < boundaries.size(); ++i) {
    if (boundaries[i] >= (i == 0 ? 1 : boundaries[i - 1] + 1) && boundaries[i] < num_layers) {
      continue;
    }
    throw InputError("[pyramid-drop] boundaries must ascend within 1.." +
                     std::to_string(num_layers - 1) + ", the model's layers, got " +
                     List(boundaries) + ": leave them out for an even split");
  }
}

void CheckShares(std::span<const double> shares) {
  for (size_t i = 0; i < shares.size(); ++i) {
    if (shares[i] > 0 && shares[i] <= (i == 0 ? 1.0 : shares[i - 1])) continue;
    throw InputError("[pyramid-drop] shares must lie in (0, 1] and not increase, got " +
                     std::to_string(shares[i]) + " at place " + std::to_string(i) +
                     ": for example 0.5, 0.25, 0.125");
  }
}

bool DropsOnArrival(PyramidMode mode) {
  return mode == PyramidMode::kQueryFree || mode == PyramidMode::kProbe;
}

// From so many layers on the published split is the default.
constexpr int kDeep = 16;

std::vector<int> DefaultBoundaries(PyramidMode mode, int stages, int num_layers) {
  const bool even = num_layers >= kDeep || mode == PyramidMode::kProbe;
  std::vector<int> boundaries;
  for (int s = 1; s < stages; ++s) {
    const int at_ends = s == 1 ? 1 : num_layers - stages + s;
    boundaries.push_back(even ? s * (num_layers / stages) : at_ends);
  }
  return boundaries;
}

// That the options are ones the mode can follow.
void CheckMode(const PyramidOptions& options) {
  const PyramidMode mode = options.mode;
  const std::string place = std::string("[pyramid-drop] mode ") + Name(mode);
  if (mode == PyramidMode::kQuestion && options.positions == KvPositions::kRows) {
    throw InputError(place +
                     " looks at keys that stay where they are, got compact positions: leave them "
                     "out, or use mode replay, query-free or probe");
  }
  if (DropsOnArrival(mode) &&
      options.quota.value_or(PyramidQuota::kFrame) != PyramidQuota::kFrame) {
    throw InputError(place + " chooses among the rows of each frame as it comes, got quota " +
                     Name(*options.quota) +
                     ": leave the quota out, or use mode question or replay");
  }
  if (DropsOnArrival(mode) && options.rank) {
    throw InputError(place + " chooses before there is a question, got rank " +
                     Name(*options.rank) + ": leave the rank out, or use mode question or replay");
  }
  const bool instructed = options.instruction.find_first_not_of(" \t\r\n") != std::string::npos;
  if (mode == PyramidMode::kProbe && !instructed) {
    throw InputError(place +
                     " ranks by a standing instruction, got none: give one, or use mode "
                     "query-free");
  }
  if (mode != PyramidMode::kProbe && instructed) {
    throw InputError(place +
                     " knows no standing instruction, got one: leave it out, or use mode probe");
  }
}

}  // namespace

const char* Name(PyramidMode mode) {
  switch (mode) {
    case PyramidMode::kOff:
      return "off";
    case PyramidMode::kQuestion:
      return "question";
    case PyramidMode::kReplay:
      return "replay";
    case PyramidMode::kQueryFree:
      return "query-free";
    case PyramidMode::kProbe:
      return "probe";
  }
  return "?";
}

const char* Name(PyramidQuota quota) {
  switch (quota) {
    case PyramidQuota::kGlobal:
      return "global";
    case PyramidQuota::kFrame:
      return "frame";
    case PyramidQuota::kHybrid:
      return "hybrid";
  }
  return "?";
}

const char* Name(PyramidRank rank) { return rank == PyramidRank::kLast ? "last" : "mean"; }

PyramidOptions ParsePyramid(std::string_view spec) {
  PyramidOptions options;
  const size_t equals = spec.find('=');
  std::string known;
  bool found = false;
  for (const PyramidMode mode : kModes) {
    known += (known.empty() ? "" : ", ") + std::string(Name(mode));
    if (spec.substr(0, equals) != Name(mode)) continue;
    options.mode = mode;
    found = true;
  }
  if (!found) {
    throw InputError("[pyramid-drop] expected MODE or MODE=LAMBDA with a mode of " + known +
                     "; got '" + std::string(spec) + "'");
  }
  if (equals != std::string_view::npos) {
    const std::string_view number = spec.substr(equals + 1);
    const auto [end, error] =
        std::from_chars(number.data(), number.data() + number.size(), options.lambda);
    if (error != std::errc() || end != number.data() + number.size()) {
      throw InputError("[pyramid-drop] expected MODE=LAMBDA with a number in (0, 1], got '" +
                       std::string(spec) + "'");
    }
  }
  return options;
}

PyramidPlan PyramidPlan::Make(const PyramidOptions& options, int num_layers) {
  if (options.stages < 1 || options.stages > num_layers) {
    throw InputError("[pyramid-drop] the model has " + std::to_string(num_layers) +
                     " layers, got " + std::to_string(options.stages) +
                     " stages: use 1 to as many as there are layers");
  }
  if (!(options.lambda > 0 && options.lambda <= 1)) {
    throw InputError("[pyramid-drop] lambda must lie in (0, 1], got " +
                     std::to_string(options.lambda) + ": 0.5 halves the rows at each boundary");
  }
  if (!(options.frame_share >= 0 && options.frame_share <= 1)) {
    throw InputError("[pyramid-drop] frame_share must lie in [0, 1], got " +
                     std::to_string(options.frame_share));
  }
  PyramidPlan plan;
  plan.boundaries = options.boundaries;
  plan.shares = options.shares;
  plan.frame_share = options.frame_share;
  plan.quota = options.quota.value_or(DropsOnArrival(options.mode) ? PyramidQuota::kFrame
                                                                   : PyramidQuota::kHybrid);
  const auto count = static_cast<size_t>(options.stages - 1);
  if (plan.boundaries.empty())
    plan.boundaries = DefaultBoundaries(options.mode, options.stages, num_layers);
  if (plan.shares.empty()) {
    double share = 1;
    for (size_t s = 0; s < count; ++s) plan.shares.push_back(share *= options.lambda);
  }
  if (plan.boundaries.size() != count || plan.shares.size() != count) {
    throw InputError("[pyramid-drop] " + std::to_string(options.stages) + " stages need " +
                     std::to_string(count) + " boundaries and shares, got " +
                     std::to_string(plan.boundaries.size()) + " and " +
                     std::to_string(plan.shares.size()));
  }
  CheckBoundaries(plan.boundaries, num_layers);
  CheckShares(plan.shares);
  return plan;
}

std::vector<int64_t> PyramidPlan::StageSizes(int64_t total) const {
  std::vector<int64_t> sizes = {total};
  for (const double share : shares) {
    sizes.push_back(total == 0 ? 0 : AtLeastOne(static_cast<double>(total) * share));
  }
  return sizes;
}

std::vector<int64_t> PyramidPlan::LayerRows(std::span<const int64_t> stage_sizes,
                                            int num_layers) const {
  std::vector<int64_t> rows;
  for (int layer = 0; layer < num_layers; ++layer) {
    const auto stage = std::upper_bound(boundaries.begin(), boundaries.end(), layer);
    rows.push_back(stage_sizes[stage - boundaries.begin()]);
  }
  return rows;
}

PyramidCost PyramidCost::Of(const Decoder& decoder) {
  const double layers = 2.0 * decoder.kv_geometry().num_layers;  // two operations a multiply-add
  const double none = decoder.FlopsPerToken(0);
  return {none / layers, (decoder.FlopsPerToken(1) - none) / layers};
}

double PyramidCost::MultiplyAdds(std::span<const int64_t> rows_of_layers) const {
  double sum = 0;
  for (const int64_t rows : rows_of_layers) {
    const auto n = static_cast<double>(rows);
    sum += n * per_row + n * n * per_pair;
  }
  return sum;
}

std::vector<int32_t> ChoosePyramidRows(const PyramidPlan& plan, double share,
                                       std::span<const float> scores,
                                       std::span<const int32_t> frames,
                                       std::span<const PyramidFrameTotal> totals) {
  std::vector<int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  std::vector<bool> taken(scores.size(), false);
  int64_t count = 0, all = 0;
  const double sure = plan.quota == PyramidQuota::kFrame ? 1 : plan.frame_share;
  std::vector<int64_t> room;  // of each frame's quota
  for (const PyramidFrameTotal& total : totals) {
    all += total.rows;
    room.push_back(AtLeastOne(static_cast<double>(total.rows) * share * sure));
  }
  if (plan.quota != PyramidQuota::kGlobal) {
    for (const int32_t i : order) {
      const auto frame = std::lower_bound(
          totals.begin(), totals.end(), frames[i],
          [](const PyramidFrameTotal& total, int32_t f) { return total.frame < f; });
      int64_t& left = room[frame - totals.begin()];
      if (left == 0) continue;
      --left;
      taken[i] = true;
      ++count;
    }
  }
  if (plan.quota != PyramidQuota::kFrame) {
    const int64_t target = AtLeastOne(static_cast<double>(all) * share);
    for (const int32_t i : order) {
      if (count >= target) break;
      if (taken[i]) continue;
      taken[i] = true;
      ++count;
    }
  }
  std::vector<int32_t> chosen;
  chosen.reserve(count);
  for (size_t i = 0; i < taken.size(); ++i) {
    if (taken[i]) chosen.push_back(static_cast<int32_t>(i));
  }
  return chosen;
}

std::optional<std::vector<int32_t>> PyramidDrop::Keep(const LayerBoundary& boundary) {
  const size_t stage = std::find(plan_.boundaries.begin(), plan_.boundaries.end(), boundary.layer) -
                       plan_.boundaries.begin();
  std::vector<int32_t> candidates, frames;  // indices into boundary.tokens; their frames
  for (size_t i = 0; i < boundary.tokens.size(); ++i) {
    const auto token = static_cast<size_t>(boundary.tokens[i]);
    if (boundary.tokens[i] < first_ || token >= frames_.size() || frames_[token] == kText) continue;
    candidates.push_back(static_cast<int32_t>(i));
    frames.push_back(frames_[token]);
  }
  if (candidates.empty()) return std::nullopt;
  if (stage_sizes_.empty()) {
    stage_sizes_.push_back(static_cast<int64_t>(candidates.size()));
    std::vector<int32_t> sorted = frames;
    std::sort(sorted.begin(), sorted.end());
    for (const int32_t frame : sorted) {
      if (totals_.empty() || totals_.back().frame != frame) totals_.push_back({frame, 0});
      ++totals_.back().rows;
    }
  }
  if (plan_.shares[stage] == (stage == 0 ? 1.0 : plan_.shares[stage - 1])) {
    stage_sizes_.push_back(stage_sizes_.back());
    return std::nullopt;
  }
  const std::vector<int32_t> chosen = ChoosePyramidRows(
      plan_, plan_.shares[stage], Scores(boundary, candidates, stage), frames, totals_);
  stage_sizes_.push_back(static_cast<int64_t>(chosen.size()));
  std::vector<int32_t> kept;
  kept.reserve(boundary.tokens.size() - candidates.size() + chosen.size());
  size_t candidate = 0, next = 0;
  for (int32_t i = 0; i < static_cast<int32_t>(boundary.tokens.size()); ++i) {
    const bool ranked = candidate < candidates.size() && candidates[candidate] == i;
    if (ranked) {
      const bool stays = next < chosen.size() && chosen[next] == static_cast<int32_t>(candidate);
      ++candidate;
      if (!stays) continue;
      ++next;
    }
    kept.push_back(i);
  }
  return kept;
}

std::vector<float> PyramidDrop::Scores(const LayerBoundary& boundary,
                                       std::span<const int32_t> candidates, size_t stage) const {
  std::vector<float> scores;
  scores.reserve(candidates.size());
  if (!scores_.empty()) {
    for (const int32_t i : candidates) scores.push_back(scores_[boundary.tokens[i] - first_]);
    return scores;
  }
  const std::vector<float> weights =
      queries_.empty() ? boundary.attention(last_rows_) : boundary.attention_of(queries_[stage]);
  for (const int32_t i : candidates) scores.push_back(weights[i]);
  return scores;
}

PyramidStream::PyramidStream(const PyramidOptions& options, int num_layers, int tokens_per_frame,
                             int64_t context_limit)
    : options_(options) {
  if (options_.mode == PyramidMode::kOff) return;
  plan_ = PyramidPlan::Make(options_, num_layers);
  CheckMode(options_);
  if (options_.mode == PyramidMode::kReplay) {
    if (options_.replay_frames < 1) {
      throw InputError("[pyramid-drop] mode replay needs at least 1 frame, got " +
                       std::to_string(options_.replay_frames));
    }
    const int64_t most = (context_limit - 1) / tokens_per_frame;
    if (options_.replay_frames > most) {
      throw InputError("[pyramid-drop] replaying " + std::to_string(options_.replay_frames) +
                       " frames of " + std::to_string(tokens_per_frame) +
                       " tokens exceeds the context of " + std::to_string(context_limit) +
                       ": replay fewer than " + std::to_string(most) + " frames");
    }
  }
}

KvPositions PyramidStream::positions() const {
  const bool stay = options_.mode == PyramidMode::kOff || options_.mode == PyramidMode::kQuestion;
  return options_.positions.value_or(stay ? KvPositions::kTokens : KvPositions::kRows);
}

const std::string* PyramidStream::wanted_instruction() const {
  const bool wanted =
      options_.mode == PyramidMode::kProbe && queries_.empty() && !plan_.boundaries.empty();
  return wanted ? &options_.instruction : nullptr;
}

PyramidDrop* PyramidStream::ForFrames(const VisualTokens& tokens, int64_t first) {
  step_.reset();
  const bool by_query = options_.mode == PyramidMode::kProbe;
  if (!by_query && options_.mode != PyramidMode::kQueryFree) return nullptr;
  Label(tokens, first);
  step_.emplace(plan_, frames_, first);
  if (by_query) {
    step_->RankByQueries(queries_);
  } else {
    if (!tokens.scores.empty() && tokens.scores.size() != tokens.origins.size()) {
      throw Error("[pyramid-drop] a compressor left " + std::to_string(tokens.scores.size()) +
                  " scores for " + std::to_string(tokens.size()) + " tokens, expected one each");
    }
    scores_ = tokens.scores.empty() ? Novelty(tokens) : tokens.scores;
    step_->RankByScores(scores_);
  }
  return &*step_;
}

void PyramidStream::Arrived(const VisualTokens& tokens, int64_t first) {
  step_.reset();
  if (options_.mode == PyramidMode::kOff || tokens.size() == 0) return;
  if (replays()) return RememberForReplay(tokens);
  Label(tokens, first);
  if (options_.mode != PyramidMode::kQueryFree) return;
  const auto begin =
      std::find_if(tokens.origins.begin(), tokens.origins.end(),
                   [&](const TokenOrigin& o) { return o.frame == tokens.origins.back().frame; });
  last_origins_.assign(begin, tokens.origins.end());
  const int64_t width = tokens.features.dim(1);
  last_rows_.assign(tokens.features.data<float>() + (begin - tokens.origins.begin()) * width,
                    tokens.features.data<float>() + tokens.size() * width);
}

PyramidDrop* PyramidStream::ForQuestion(int64_t text, int64_t question) {
  step_.reset();
  if (replays()) {
    frames_.assign(text, PyramidDrop::kText);
    frames_.insert(frames_.end(), window_frames_.begin(), window_frames_.end());
  } else if (options_.mode != PyramidMode::kQuestion) {
    return nullptr;
  }
  step_.emplace(plan_, frames_, 0);
  if (rank() == PyramidRank::kMean) step_->RankByLastRows(question);
  return &*step_;
}

void PyramidStream::Persist(Archive& archive, int64_t width) {
  step_.reset();
  archive.Array("frames", frames_);
  archive.Resize("queries", queries_, plan_.boundaries.size());
  for (std::vector<float>& query : queries_) archive.Array("query", query);
  if (!queries_.empty() && queries_.size() != plan_.boundaries.size()) {
    archive.Refuse("queries", "one a boundary, " + std::to_string(plan_.boundaries.size()),
                   std::to_string(queries_.size()));
  }
  std::vector<int32_t> places;  // row and column in turn
  for (const TokenOrigin& origin : last_origins_) {
    places.push_back(origin.row);
    places.push_back(origin.col);
  }
  archive.Array("last_places", places);
  archive.Array("last_rows", last_rows_);
  archive.Array("window_frames", window_frames_);
  archive.Array("window_rows", window_rows_);
  const auto check = [&](const char* field, size_t rows, size_t values) {
    if (values == rows * width) return;
    archive.Refuse(field, std::to_string(rows) + " rows of " + std::to_string(width),
                   std::to_string(values) + " values");
  };
  check("last_rows", places.size() / 2, last_rows_.size());
  check("window_rows", window_frames_.size(), window_rows_.size());
  if (!archive.loading()) return;
  last_origins_.assign(places.size() / 2, {});
  for (size_t i = 0; i < last_origins_.size(); ++i) {
    last_origins_[i].row = static_cast<int16_t>(places[2 * i]);
    last_origins_[i].col = static_cast<int16_t>(places[2 * i + 1]);
  }
}

std::vector<int64_t> PyramidStream::QuestionStageSizes() const {
  return step_ ? step_->stage_sizes() : std::vector<int64_t>();
}

std::vector<float> PyramidStream::Novelty(const VisualTokens& tokens) const {
  std::vector<float> scores;
  if (tokens.size() == 0) return scores;
  scores.reserve(tokens.size());
  const int64_t width = tokens.features.dim(1);
  const float* rows = tokens.features.data<float>();
  std::span<const TokenOrigin> before = last_origins_;
  const float* before_rows = last_rows_.data();
  for (int64_t begin = 0, end = 0; begin < tokens.size(); begin = end) {
    while (end < tokens.size() && tokens.origins[end].frame == tokens.origins[begin].frame) ++end;
    std::vector<float> mean(width, 0);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t d = 0; d < width; ++d) mean[d] += rows[i * width + d];
    }
    for (int64_t i = begin; i < end; ++i) {
      const TokenOrigin& origin = tokens.origins[i];
      const float* row = rows + i * width;
      double score = 1 - Cosine(row, mean.data(), width);
      const auto same = std::find_if(before.begin(), before.end(), [&](const TokenOrigin& earlier) {
        return earlier.row == origin.row && earlier.col == origin.col;
      });
      // What had no token there before counts as all new.
      score += same == before.end()
                   ? 1
                   : 1 - Cosine(row, before_rows + (same - before.begin()) * width, width);
      scores.push_back(static_cast<float>(score));
    }
    before = std::span(tokens.origins).subspan(begin, end - begin);
    before_rows = rows + begin * width;
  }
  return scores;
}

void PyramidStream::Label(const VisualTokens& tokens, int64_t first) {
  frames_.resize(first, PyramidDrop::kText);
  for (const TokenOrigin& origin : tokens.origins) frames_.push_back(origin.frame);
}

void PyramidStream::RememberForReplay(const VisualTokens& tokens) {
  const int64_t width = tokens.features.dim(1);
  for (const TokenOrigin& origin : tokens.origins) window_frames_.push_back(origin.frame);
  const float* rows = tokens.features.data<float>();
  window_rows_.insert(window_rows_.end(), rows, rows + tokens.size() * width);
  // The beginning of the last `replay_frames` different frames.
  size_t begin = window_frames_.size();
  for (int frames = 0; begin > 0; --begin) {
    const bool new_frame =
        begin == window_frames_.size() || window_frames_[begin - 1] != window_frames_[begin];
    if (new_frame && ++frames > options_.replay_frames) break;
  }
  window_frames_.erase(window_frames_.begin(), window_frames_.begin() + begin);
  window_rows_.erase(window_rows_.begin(), window_rows_.begin() + begin * width);
}

}  // namespace sluice
