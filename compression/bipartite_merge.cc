#include "compression/bipartite_merge.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

namespace sluice {
namespace {

// Keeps the listed tokens, in that order.
void Take(MergeState& state, const std::vector<int64_t>& order) {
  MergeState taken;
  taken.width = state.width;
  for (const int64_t i : order) {
    const auto row = state.features.begin() + i * state.width;
    taken.features.insert(taken.features.end(), row, row + state.width);
    taken.sizes.push_back(state.sizes[i]);
    taken.values.push_back(state.values[i]);
    taken.places.push_back(state.places[i]);
  }
  state = std::move(taken);
}

}  // namespace

void MergeStep(MergeState& state, int64_t remove) {
  const int64_t count = state.count(), width = state.width;
  remove = std::min(remove, count / 2);
  if (remove <= 0) return;
  std::vector<float> unit(state.features);
  for (int64_t i = 0; i < count; ++i) {
    float* row = unit.data() + i * width;
    const float norm = std::sqrt(std::inner_product(row, row + width, row, 0.0f));
    for (int64_t d = 0; d < width; ++d) row[d] /= std::max(norm, 1e-12f);
  }
  struct Source {
    int64_t token, partner;
    float priority;
  };
  std::vector<Source> sources;
  for (int64_t a = 0; a < count; a += 2) {
    Source source = {a, -1, 0};
    float best = 0;
    for (int64_t b = 1; b < count; b += 2) {
      const float* row = unit.data() + a * width;
      const float cosine = std::inner_product(row, row + width, unit.data() + b * width, 0.0f);
      if (source.partner < 0 || cosine > best) {
        source.partner = b;
        best = cosine;
      }
    }
    source.priority = best - state.values[a];
    sources.push_back(source);
  }
  std::stable_sort(sources.begin(), sources.end(),
                   [](const Source& x, const Source& y) { return x.priority > y.priority; });

  std::vector<double> sums(state.features.begin(), state.features.end());
  std::vector<double> values(state.values.begin(), state.values.end());
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < width; ++d) sums[i * width + d] *= state.sizes[i];
    values[i] *= state.sizes[i];
  }
  for (int64_t i = 0; i < remove; ++i) {
    const auto [from, to, priority] = sources[i];
    for (int64_t d = 0; d < width; ++d) sums[to * width + d] += sums[from * width + d];
    values[to] += values[from];
    state.sizes[to] += state.sizes[from];
  }
  for (int64_t b = 1; b < count; b += 2) {
    for (int64_t d = 0; d < width; ++d) {
      state.features[b * width + d] = static_cast<float>(sums[b * width + d] / state.sizes[b]);
    }
    state.values[b] = static_cast<float>(values[b] / state.sizes[b]);
  }
  std::vector<int64_t> order;
  for (size_t i = remove; i < sources.size(); ++i) order.push_back(sources[i].token);
  std::sort(order.begin(), order.end());
  for (int64_t b = 1; b < count; b += 2) order.push_back(b);
  Take(state, order);
}

void MergeTo(MergeState& state, int64_t keep) {
  while (state.count() > std::max<int64_t>(keep, 1)) {
    MergeStep(state, state.count() - std::max<int64_t>(keep, 1));
  }
  std::vector<int64_t> order(state.count());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return state.places[a] < state.places[b]; });
  Take(state, order);
}

}  // namespace sluice
