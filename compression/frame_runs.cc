#include "compression/frame_runs.h"

#include <algorithm>
#include <cmath>

#include "runtime/error.h"
#include "runtime/ops/rows.h"

namespace sluice {

int64_t KeptOf(double keep, int64_t tokens) {
  if (keep >= 1) return std::min(tokens, static_cast<int64_t>(keep));
  return std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(tokens) * keep));
}

void CheckKeep(const std::string& method, double keep) {
  const bool share = keep > 0 && keep < 1;
  const bool count = keep >= 1 && keep <= 1e6 && keep == std::floor(keep);
  if (share || count) return;
  throw InputError("[" + method +
                   "] expected a share of a frame's tokens in (0, 1) or a whole number of them, "
                   "got " +
                   std::to_string(keep));
}

int64_t CheckedKeptOf(const std::string& method, double keep, int64_t tokens) {
  if (keep >= 1 && static_cast<int64_t>(keep) > tokens) {
    throw InputError("[" + method + "] cannot keep " + std::to_string(static_cast<int64_t>(keep)) +
                     " of the " + std::to_string(tokens) +
                     " tokens of a frame; give so many at most, or a share below 1");
  }
  return KeptOf(keep, tokens);
}

std::vector<FrameRun> FrameRuns(const VisualTokens& tokens) {
  std::vector<FrameRun> runs;
  for (int64_t i = 0; i < tokens.size(); ++i) {
    if (i == 0 || tokens.origins[i].frame != tokens.origins[i - 1].frame) runs.push_back({i, i});
    runs.back().end = i + 1;
  }
  return runs;
}

std::vector<FrameGroup> FrameGroups(const VisualTokens& tokens) {
  std::vector<FrameGroup> groups;
  for (const FrameRun& run : FrameRuns(tokens)) {
    if (groups.empty() || groups.back().length() != run.end - run.begin) {
      groups.push_back({run.begin, run.begin, 0});
    }
    groups.back().end = run.end;
    ++groups.back().frames;
  }
  return groups;
}

VisualTokens KeepTokens(ExecContext& ctx, const VisualTokens& tokens,
                        std::span<const int64_t> kept) {
  VisualTokens out;
  out.grid_rows = tokens.grid_rows;
  out.grid_cols = tokens.grid_cols;
  out.features = Tensor(DType::kF32, {static_cast<int64_t>(kept.size()), tokens.features.dim(1)},
                        tokens.features.device());
  for (const int64_t token : kept) {
    out.origins.push_back(tokens.origins[token]);
    if (!tokens.scores.empty()) out.scores.push_back(tokens.scores[token]);
  }
  const std::vector<int32_t> rows(kept.begin(), kept.end());
  const Workspace::Scope scope(ctx.workspace());
  GatherRows(ctx, tokens.features, ListRows(ctx, rows, 1), out.features);
  return out;
}

}  // namespace sluice
