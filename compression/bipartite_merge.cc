#include "compression/bipartite_merge.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "runtime/ops/similarity.h"
#include "vision/token_merge.h"

namespace sluice {

void CutAt95thPercentile(std::span<float> values) {
  std::vector<float> sorted(values.begin(), values.end());
  const auto at = static_cast<int64_t>(0.95 * static_cast<double>(values.size() - 1));
  std::nth_element(sorted.begin(), sorted.begin() + at, sorted.end());
  for (float& value : values) value = std::min(value, sorted[at]);
}

void ScaleToMean(std::span<float> values, double mean) {
  const double total = std::accumulate(values.begin(), values.end(), 0.0);
  const double scale = mean * static_cast<double>(values.size()) / std::max(total, 1e-12);
  for (float& value : values) value = static_cast<float>(value * scale);
}

void MatchTokens(const ExecContext& ctx, ConstTensorView metric, std::span<const float> values,
                 int64_t spared, int64_t remove, std::span<int32_t> places) {
  const int64_t count = metric.dim(0), width = metric.dim(1);
  const int64_t evens = (count + 1) / 2, odds = count / 2;
  // A, then B.
  std::vector<float> unit(count * width);
  for (int64_t i = 0; i < count; ++i) {
    const float* from = metric.data<float>() + i * metric.stride0();
    float* to = unit.data() + (i % 2 * evens + i / 2) * width;
    const float norm = std::sqrt(std::inner_product(from, from + width, from, 0.0f));
    for (int64_t d = 0; d < width; ++d) to[d] = from[d] / std::max(norm, 1e-12f);
  }
  std::vector<int32_t> partners(evens);
  std::vector<float> priorities(evens);
  if (remove > 0) {
    NearestRows(ctx, {unit.data(), DType::kF32, {evens, width}},
                {unit.data() + evens * width, DType::kF32, {odds, width}}, partners, priorities);
  }
  std::vector<int32_t> sources;
  for (auto a = static_cast<int32_t>(spared > 0); a < evens; ++a) {
    if (!values.empty()) priorities[a] -= values[2 * a];
    sources.push_back(a);
  }
  std::stable_sort(sources.begin(), sources.end(),
                   [&](int32_t x, int32_t y) { return priorities[x] > priorities[y]; });
  std::vector<bool> leaves(evens);
  for (int64_t i = 0; i < remove; ++i) leaves[sources[i]] = true;
  int32_t next = 0;
  for (int64_t a = 0; a < evens; ++a) {
    if (!leaves[a]) places[2 * a] = next++;
  }
  for (int64_t b = 0; b < odds; ++b) places[2 * b + 1] = next++;
  for (int64_t a = 0; a < evens; ++a) {
    if (leaves[a]) places[2 * a] = places[2 * partners[a] + 1];
  }
}

void MergeStep(const ExecContext& ctx, MergeState& state, int64_t remove) {
  const int64_t count = state.count(), width = state.width;
  remove = std::min(remove, count / 2);
  if (remove <= 0) return;
  const ConstTensorView features(state.features.data(), DType::kF32, {count, width});
  std::vector<int32_t> places(count);
  MatchTokens(ctx, features, state.values, 0, remove, places);

  const int64_t left = count - remove;
  MergeState merged;
  merged.width = width;
  merged.features.resize(left * width);
  merged.sizes.resize(left);
  merged.values.resize(left);
  merged.places.resize(left);
  MergeRows(features, state.sizes, places, {merged.features.data(), DType::kF32, {left, width}},
            merged.sizes);
  MergeRows({state.values.data(), DType::kF32, {count, 1}}, state.sizes, places,
            {merged.values.data(), DType::kF32, {left, 1}}, merged.sizes);
  // Partners are the odd ones: their places go over those of what joins them.
  for (const int64_t first : {0, 1}) {
    for (int64_t i = first; i < count; i += 2) merged.places[places[i]] = state.places[i];
  }
  state = std::move(merged);
}

void MergeTo(const ExecContext& ctx, MergeState& state, int64_t keep) {
  while (state.count() > std::max<int64_t>(keep, 1)) {
    MergeStep(ctx, state, state.count() - std::max<int64_t>(keep, 1));
  }
  std::vector<int64_t> order(state.count());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return state.places[a] < state.places[b]; });
  MergeState sorted;
  sorted.width = state.width;
  for (const int64_t i : order) {
    const auto row = state.features.begin() + i * state.width;
    sorted.features.insert(sorted.features.end(), row, row + state.width);
    sorted.sizes.push_back(state.sizes[i]);
    sorted.values.push_back(state.values[i]);
    sorted.places.push_back(state.places[i]);
  }
  state = std::move(sorted);
}

}  // namespace sluice
