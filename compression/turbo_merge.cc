#include "compression/turbo_merge.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "compression/bipartite_merge.h"
#include "compression/frame_runs.h"
#include "runtime/error.h"

namespace sluice {

TurboMerge::TurboMerge(const Options& options) : options_(options) {
  CheckKeep("turbo-merge", options.keep);
  if (!(options.lambda >= 0 && options.lambda <= 1e3)) {
    throw InputError("[turbo-merge] lambda must not be negative, got " +
                     std::to_string(options.lambda));
  }
}

std::vector<float> TurboMerge::Values(ConstTensorView x) {
  const int64_t size = x.dim(0), width = x.dim(1);
  sum_.resize(width);
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t d = 0; d < width; ++d) sum_[d] += x.data<float>()[i * x.stride0() + d];
  }
  const double sum_norm =
      std::sqrt(std::inner_product(sum_.begin(), sum_.end(), sum_.begin(), 0.0));
  std::vector<float> values(size);
  for (int64_t i = 0; i < size; ++i) {
    const float* row = x.data<float>() + i * x.stride0();
    double dot = 0, norm = 0;
    for (int64_t d = 0; d < width; ++d) {
      dot += row[d] * sum_[d];
      norm += double{row[d]} * row[d];
    }
    values[i] = static_cast<float>(1 - dot / std::max(std::sqrt(norm) * sum_norm, 1e-12));
  }
  CutAt95thPercentile(values);
  ScaleToMean(values, options_.lambda);
  return values;
}

VisualTokens TurboMerge::Compress(ExecContext& ctx, VisualTokens tokens) {
  before_compress_ = sum_;
  if (tokens.size() == 0) return tokens;
  std::vector<int64_t> kept;
  std::vector<float> features;
  const int64_t width = tokens.features.dim(1);
  for (const FrameRun& run : FrameRuns(tokens)) {
    const ConstTensorView frame = tokens.features.view().Slice(run.begin, run.end);
    MergeState state;
    state.width = width;
    state.features.assign(frame.data<float>(), frame.data<float>() + frame.dim(0) * width);
    state.sizes.assign(frame.dim(0), 1);
    state.values = Values(frame);
    state.places.resize(frame.dim(0));
    std::iota(state.places.begin(), state.places.end(), run.begin);
    MergeTo(ctx, state, KeptOf(options_.keep, frame.dim(0)));
    kept.insert(kept.end(), state.places.begin(), state.places.end());
    features.insert(features.end(), state.features.begin(), state.features.end());
  }
  if (static_cast<int64_t>(kept.size()) == tokens.size()) return tokens;
  VisualTokens merged = KeepTokens(tokens, kept);
  std::copy(features.begin(), features.end(), merged.features.data<float>());
  return merged;
}

}  // namespace sluice
