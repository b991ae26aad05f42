#include "compression/bipartite_merge.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

#include "runtime/ops/cuda/merge.h"
#include "runtime/ops/note.h"
#include "runtime/ops/rows.h"
#include "runtime/ops/similarity.h"
#include "runtime/transfer.h"
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

namespace {

// Of each token of A its partner, counted among those of B, and their cosine.
struct Pairs {
  explicit Pairs(int64_t count) : partners(count), cosines(count) {}
  std::vector<int32_t> partners;
  std::vector<float> cosines;
};

int64_t Evens(int64_t count) { return (count + 1) / 2; }

// Of one group, in host memory.
void PairTokens(const ExecContext& ctx, ConstTensorView metric, std::span<int32_t> partners,
                std::span<float> cosines) {
  const int64_t count = metric.dim(0), width = metric.dim(1);
  const int64_t evens = Evens(count), odds = count / 2;
  // A, then B.
  std::vector<float> unit(count * width);
  for (int64_t i = 0; i < count; ++i) {
    const float* from = metric.data<float>() + i * metric.stride0();
    float* to = unit.data() + (i % 2 * evens + i / 2) * width;
    const float norm = std::sqrt(std::inner_product(from, from + width, from, 0.0f));
    for (int64_t d = 0; d < width; ++d) to[d] = from[d] / std::max(norm, 1e-12f);
  }
  NearestRows(ctx, {unit.data(), DType::kF32, {evens, width}},
              {unit.data() + evens * width, DType::kF32, {odds, width}}, partners, cosines);
}

// Of all groups, of at least two tokens each.
Pairs PairGroups(ExecContext& ctx, ConstTensorView x, int64_t groups) {
  const int64_t count = x.dim(0) / groups, evens = Evens(count);
  Pairs pairs(groups * evens);
  if (OnGpu("bipartite_merge", ctx, {x})) {
    const Workspace::Scope scope(ctx.workspace());
    const Shape shape{groups * evens};
    const TensorView both = ctx.workspace().Allocate(DType::kI32, {2 * groups * evens});
    const TensorView partners = both.Slice(0, groups * evens);
    const TensorView cosines(both.Slice(groups * evens, 2 * groups * evens).raw(), DType::kF32,
                             shape, -1, ctx.device());
    ctx.Queue(cuda::NearestOfPairs, x, groups, partners, cosines);
    std::vector<int32_t> copied(2 * groups * evens);
    Transfer(ctx, both, TensorView(copied.data(), DType::kI32, both.shape()));
    std::copy_n(copied.begin(), groups * evens, pairs.partners.begin());
    std::memcpy(pairs.cosines.data(), copied.data() + groups * evens,
                groups * evens * sizeof(float));
    return pairs;
  }
  for (int64_t g = 0; g < groups; ++g) {
    PairTokens(ctx, x.Slice(g * count, (g + 1) * count),
               std::span(pairs.partners).subspan(g * evens, evens),
               std::span(pairs.cosines).subspan(g * evens, evens));
  }
  return pairs;
}

// The second half of MatchTokens, given the pairs.
void ChoosePlaces(std::span<const int32_t> partners, std::span<const float> cosines,
                  std::span<const float> values, int64_t spared, int64_t remove,
                  std::span<int32_t> places) {
  const auto count = static_cast<int64_t>(places.size());
  const int64_t evens = Evens(count), odds = count / 2;
  std::vector<float> priorities(cosines.begin(), cosines.end());
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

// Features of all groups, merged where they lie.
Tensor MergeFeatures(ExecContext& ctx, const MergeState& state, std::span<const int32_t> places,
                     int64_t left) {
  const int64_t count = state.count();
  Tensor merged(DType::kF32, {state.groups * left, state.features.dim(1)}, ctx.device());
  if (OnGpu("bipartite_merge", ctx, {state.features, merged})) {
    const Workspace::Scope scope(ctx.workspace());
    // Places, then sizes: one copy.
    std::vector<int32_t> numbers(places.begin(), places.end());
    for (const float size : state.sizes) numbers.push_back(std::bit_cast<int32_t>(size));
    cuda::MergeRowsArgs args;
    args.x = state.features;
    args.groups = state.groups;
    args.to = Within(ctx, numbers);
    args.sizes = reinterpret_cast<const float*>(args.to + places.size());
    args.merged = merged;
    NoteScalars(ctx, args.groups);
    ctx.Queue(cuda::MergeRows, args);
    return merged;
  }
  std::vector<float> sizes(left);
  for (int64_t g = 0; g < state.groups; ++g) {
    MergeRows(state.features.view().Slice(g * count, (g + 1) * count),
              std::span(state.sizes).subspan(g * count, count), places.subspan(g * count, count),
              merged.view().Slice(g * left, (g + 1) * left), sizes);
  }
  return merged;
}

}  // namespace

void MatchTokens(const ExecContext& ctx, ConstTensorView metric, std::span<const float> values,
                 int64_t spared, int64_t remove, std::span<int32_t> places) {
  Pairs pairs(Evens(metric.dim(0)));
  if (remove > 0) PairTokens(ctx, metric, pairs.partners, pairs.cosines);
  ChoosePlaces(pairs.partners, pairs.cosines, values, spared, remove, places);
}

void MergeStep(ExecContext& ctx, MergeState& state, int64_t remove) {
  const int64_t groups = state.groups, count = state.count(), evens = Evens(count);
  remove = std::min(remove, count / 2);
  if (remove <= 0) return;
  const int64_t left = count - remove;
  const Pairs pairs = PairGroups(ctx, state.features, groups);
  std::vector<int32_t> places(groups * count);
  MergeState merged;
  merged.groups = groups;
  merged.sizes.resize(groups * left);
  merged.values.resize(groups * left);
  merged.places.resize(groups * left);
  for (int64_t g = 0; g < groups; ++g) {
    const std::span<const float> values = std::span(state.values).subspan(g * count, count);
    const std::span<int32_t> mine = std::span(places).subspan(g * count, count);
    ChoosePlaces(std::span(pairs.partners).subspan(g * evens, evens),
                 std::span(pairs.cosines).subspan(g * evens, evens), values, 0, remove, mine);
    MergeRows({values.data(), DType::kF32, {count, 1}},
              std::span(state.sizes).subspan(g * count, count), mine,
              {merged.values.data() + g * left, DType::kF32, {left, 1}},
              std::span(merged.sizes).subspan(g * left, left));
    // Partners are the odd ones: their places go over those of what joins them.
    for (const int64_t first : {0, 1}) {
      for (int64_t i = first; i < count; i += 2) {
        merged.places[g * left + mine[i]] = state.places[g * count + i];
      }
    }
  }
  merged.features = MergeFeatures(ctx, state, places, left);
  state = std::move(merged);
}

void MergeTo(ExecContext& ctx, MergeState& state, int64_t keep) {
  while (state.count() > std::max<int64_t>(keep, 1)) {
    MergeStep(ctx, state, state.count() - std::max<int64_t>(keep, 1));
  }
  const int64_t count = state.count();
  std::vector<int32_t> order(state.groups * count);
  MergeState sorted;
  sorted.groups = state.groups;
  for (int64_t g = 0; g < state.groups; ++g) {
    const std::span<int32_t> mine = std::span(order).subspan(g * count, count);
    const int64_t* const places = state.places.data() + g * count;
    std::iota(mine.begin(), mine.end(), 0);
    std::sort(mine.begin(), mine.end(),
              [&](int32_t a, int32_t b) { return places[a] < places[b]; });
    for (const int32_t i : mine) {
      sorted.sizes.push_back(state.sizes[g * count + i]);
      sorted.values.push_back(state.values[g * count + i]);
      sorted.places.push_back(places[i]);
    }
  }
  sorted.features = Tensor(DType::kF32, state.features.shape(), ctx.device());
  const Workspace::Scope scope(ctx.workspace());
  GatherRows(ctx, state.features, ListRows(ctx, order, state.groups), sorted.features);
  state = std::move(sorted);
}

}  // namespace sluice
