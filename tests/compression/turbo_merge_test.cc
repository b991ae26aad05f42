#include "compression/turbo_merge.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <random>
#include <set>

#include "compression/bipartite_merge.h"
#include "runtime/error.h"

namespace sluice {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

MergeState RandomState(int64_t count, int64_t width, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  MergeState state;
  state.features = Tensor(DType::kF32, {count, width});
  for (int64_t i = 0; i < count * width; ++i) state.features.data<float>()[i] = normal(random);
  state.sizes.assign(count, 1);
  state.values.assign(count, 0);
  state.places.resize(count);
  std::iota(state.places.begin(), state.places.end(), 0);
  return state;
}

float* Row(const MergeState& s, int64_t i) {
  return s.features.data<float>() + i * s.features.dim(1);
}

std::vector<float> Features(const MergeState& s) { return {Row(s, 0), Row(s, s.features.dim(0))}; }

double Cosine(const MergeState& s, int64_t a, int64_t b) {
  double ab = 0, aa = 0, bb = 0;
  for (int64_t d = 0; d < s.features.dim(1); ++d) {
    const double x = Row(s, a)[d], y = Row(s, b)[d];
    ab += x * y;
    aa += x * x;
    bb += y * y;
  }
  return ab / std::sqrt(aa * bb);
}

// What one step must leave, in double precision: place -> features and size.
std::map<int64_t, std::pair<std::vector<double>, double>> OneStep(const MergeState& s,
                                                                  int64_t remove) {
  std::map<int64_t, std::pair<std::vector<double>, double>> left;
  for (int64_t i = 0; i < s.count(); ++i) {
    auto& [sum, size] = left[s.places[i]];
    for (int64_t d = 0; d < s.features.dim(1); ++d) sum.push_back(Row(s, i)[d] * s.sizes[i]);
    size = s.sizes[i];
  }
  std::vector<std::pair<double, std::pair<int64_t, int64_t>>> edges;  // -priority, (from, to)
  for (int64_t a = 0; a < s.count(); a += 2) {
    int64_t best = 1;
    for (int64_t b = 1; b < s.count(); b += 2) {
      if (Cosine(s, a, b) > Cosine(s, a, best)) best = b;
    }
    edges.push_back({s.values[a] - Cosine(s, a, best), {a, best}});
  }
  std::sort(edges.begin(), edges.end());
  for (int64_t i = 0; i < remove; ++i) {
    const auto [from, to] = edges[i].second;
    auto& [sum, size] = left[s.places[to]];
    const auto& gone = left[s.places[from]];
    for (int64_t d = 0; d < s.features.dim(1); ++d) sum[d] += gone.first[d];
    size += gone.second;
    left.erase(s.places[from]);
  }
  for (auto& [place, token] : left) {
    for (double& x : token.first) x /= token.second;
  }
  return left;
}

TEST(BipartiteMergeTest, AStepEqualsTheEquationsInDoublePrecision) {
  ExecContext ctx({});
  for (const int64_t count : {2, 3, 9, 49, 50}) {
    for (const int64_t remove : {int64_t{0}, int64_t{1}, count / 4, count / 2}) {
      MergeState state = RandomState(count, 7, 3 * count + remove);
      std::mt19937 random(count);
      for (int64_t i = 0; i < count; ++i) {
        state.sizes[i] = 1 + static_cast<float>(random() % 3);
        state.values[i] = static_cast<float>(random() % 100) / 100;
      }
      const auto want = OneStep(state, remove);
      MergeStep(ctx, state, remove);
      ASSERT_EQ(state.count(), count - remove);
      for (int64_t i = 0; i < state.count(); ++i) {
        const auto found = want.find(state.places[i]);
        ASSERT_NE(found, want.end()) << "place " << state.places[i];
        EXPECT_EQ(state.sizes[i], found->second.second);
        for (int64_t d = 0; d < state.features.dim(1); ++d) {
          EXPECT_NEAR(Row(state, i)[d], found->second.first[d], 1e-6);
        }
      }
    }
  }
}

TEST(BipartiteMergeTest, NothingIsLostAndAtMostHalfGoesInAStep) {
  ExecContext ctx({});
  MergeState state = RandomState(49, 5, 1);
  MergeStep(ctx, state, 1000);
  EXPECT_EQ(state.count(), 25);
  MergeTo(ctx, state, 3);
  EXPECT_EQ(state.count(), 3);
  EXPECT_EQ(std::accumulate(state.sizes.begin(), state.sizes.end(), 0.0f), 49);
  EXPECT_TRUE(std::is_sorted(state.places.begin(), state.places.end()));
  MergeTo(ctx, state, 0);
  EXPECT_EQ(state.count(), 1);
  MergeState untouched = RandomState(9, 4, 2);
  const std::vector<float> before = Features(untouched);
  MergeTo(ctx, untouched, 9);
  EXPECT_EQ(Features(untouched), before);
}

TEST(BipartiteMergeTest, EqualTokensMergeFirstAndStayWhatTheyAre) {
  ExecContext ctx({});
  MergeState state = RandomState(10, 6, 3);
  std::copy_n(Row(state, 4), 6, Row(state, 7));
  const std::vector<float> twin(Row(state, 7), Row(state, 8));
  MergeTo(ctx, state, 9);
  const auto at = std::find(state.places.begin(), state.places.end(), 7) - state.places.begin();
  EXPECT_EQ(state.sizes[at], 2);
  EXPECT_TRUE(std::equal(twin.begin(), twin.end(), Row(state, at)));
}

TEST(BipartiteMergeTest, LargeValuesDecideWhoGoesButNotWhereTo) {
  ExecContext ctx({});
  MergeState valued = RandomState(20, 6, 4);
  for (int64_t i = 0; i < 20; ++i) valued.values[i] = 100.0f * static_cast<float>((i * 7) % 20);
  const std::vector<float> values = valued.values;
  MergeStep(ctx, valued, 3);
  const std::set<int64_t> left(valued.places.begin(), valued.places.end());
  std::vector<int64_t> even;
  for (int64_t i = 0; i < 20; i += 2) even.push_back(i);
  std::sort(even.begin(), even.end(), [&](int64_t a, int64_t b) { return values[a] < values[b]; });
  for (int i = 0; i < 3; ++i) EXPECT_FALSE(left.contains(even[i])) << even[i];
}

VisualTokens OneFrame(uint32_t seed) {
  const MergeState state = RandomState(12, 6, seed);
  VisualTokens tokens;
  tokens.grid_rows = 3;
  tokens.grid_cols = 4;
  for (int16_t t = 0; t < 12; ++t) {
    tokens.origins.push_back({5, static_cast<int16_t>(t / 4), static_cast<int16_t>(t % 4), {}});
  }
  tokens.features = Tensor(DType::kF32, {12, 6});
  std::copy_n(Row(state, 0), 12 * 6, tokens.features.data<float>());
  return tokens;
}

TEST(TurboMergeTest, NovelTokensAreSparedAndLambdaZeroIsPlainMerging) {
  ExecContext ctx({});
  // All alike but one, which is at an even place and so could go.
  VisualTokens in = OneFrame(1);
  for (int t = 0; t < 12; ++t) {
    for (int d = 0; d < 6; ++d) {
      float& x = in.features.data<float>()[t * 6 + d];
      x = (t == 6 && d == 0 ? 3.0f : 1.0f) + 0.01f * x;
    }
  }
  TurboMerge turbo({.keep = 7, .lambda = 1});
  const VisualTokens out = turbo.Compress(ctx, std::move(in));
  ASSERT_EQ(out.size(), 7);
  std::vector<int> places;
  for (const TokenOrigin& o : out.origins) places.push_back(o.row * 4 + o.col);
  EXPECT_THAT(places, testing::Contains(6));

  TurboMerge tome({.keep = 5, .lambda = 0});
  const VisualTokens merged = tome.Compress(ctx, OneFrame(2));
  MergeState state = RandomState(12, 6, 2);
  MergeTo(ctx, state, 5);
  EXPECT_TRUE(std::equal(Row(state, 0), Row(state, 5), merged.features.data<float>()));
}

TEST(TurboMergeTest, AsManyAsThereAreIsEverything) {
  ExecContext ctx({});
  TurboMerge turbo({.keep = 12});
  const VisualTokens want = OneFrame(3), out = turbo.Compress(ctx, OneFrame(3));
  EXPECT_TRUE(std::equal(want.features.data<float>(), want.features.data<float>() + 72,
                         out.features.data<float>()));
}

TEST(TurboMergeTest, SettingsOutOfRangeAreRefused) {
  EXPECT_THAT([] { TurboMerge turbo({.keep = 1.5}); },
              ThrowsMessage<InputError>(HasSubstr("[turbo-merge] expected a share")));
  EXPECT_THAT([] { TurboMerge turbo({.lambda = -1}); },
              ThrowsMessage<InputError>(HasSubstr("lambda must not be negative")));
}

}  // namespace
}  // namespace sluice
