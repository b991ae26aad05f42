#include "compression/stc_pruner.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "runtime/error.h"

namespace sluice {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::ThrowsMessage;

constexpr int kTokens = 12, kWidth = 10;

VisualTokens Frames(int first, int count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.3f, 1);
  VisualTokens tokens;
  tokens.grid_rows = 3;
  tokens.grid_cols = 4;
  for (int f = first; f < first + count; ++f) {
    for (int16_t t = 0; t < kTokens; ++t) {
      tokens.origins.push_back({f, static_cast<int16_t>(t / 4), static_cast<int16_t>(t % 4),
                                MediaTime::FromSeconds(0.5 * f)});
    }
  }
  tokens.features = Tensor(DType::kF32, {tokens.size(), kWidth});
  for (int64_t i = 0; i < tokens.size() * kWidth; ++i) {
    tokens.features.data<float>()[i] = normal(random);
  }
  return tokens;
}

VisualTokens Copy(const VisualTokens& tokens) {
  return {tokens.features.Clone(), tokens.origins, tokens.grid_rows, tokens.grid_cols,
          tokens.scores};
}

std::vector<int> Places(const VisualTokens& tokens) {
  std::vector<int> places;
  for (const TokenOrigin& o : tokens.origins) {
    places.push_back(o.frame * 100 + o.row * tokens.grid_cols + o.col);
  }
  return places;
}

// The equations in double precision with a list for a history, one frame a call; the Gaussians of
// the distances themselves rather than of dot products.
class DoublePruner {
 public:
  DoublePruner(int keep, StcPruner::Score score, StcPruner::History history)
      : keep_(keep), score_(score), history_(history) {}

  std::vector<int> Choose(const float* x) {
    std::vector<double> mean(kWidth), variance(kWidth);
    for (int c = 0; c < kWidth; ++c) {
      for (int t = 0; t < kTokens; ++t) mean[c] += x[t * kWidth + c] / double(kTokens);
      for (int t = 0; t < kTokens; ++t) {
        variance[c] += std::pow(x[t * kWidth + c] - mean[c], 2) / kTokens;
      }
    }
    std::vector<int> channels(kWidth);
    std::iota(channels.begin(), channels.end(), 0);
    std::sort(channels.begin(), channels.end(),
              [&](int a, int b) { return variance[a] < variance[b]; });
    channels.resize(kWidth / 2);
    std::vector<double> seen;
    if (history_ == StcPruner::History::kCompat) {
      for (int c : channels) seen.push_back(mean[c]);
    } else {
      seen = mean;
    }
    past_.push_back(seen);
    std::vector<double> temporal(kWidth / 2);
    for (const auto& earlier : past_) {
      for (int c = 0; c < kWidth / 2; ++c) {
        temporal[c] += earlier[history_ == StcPruner::History::kCompat ? c : channels[c]] /
                       static_cast<double>(past_.size());
      }
    }
    std::vector<std::vector<double>> y(kTokens);
    std::vector<double> spatial(kWidth / 2);
    for (int t = 0; t < kTokens; ++t) {
      for (int c : channels) y[t].push_back(x[t * kWidth + c]);
      Normalise(y[t]);
      for (int c = 0; c < kWidth / 2; ++c) spatial[c] += y[t][c] / kTokens;
    }
    Normalise(temporal);
    if (score_ == StcPruner::Score::kDualAnchor) Normalise(spatial);
    std::vector<double> redundancy;
    for (const auto& row : y) redundancy.push_back(Like(row, temporal) + Like(row, spatial));
    std::vector<int> order(kTokens);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return redundancy[a] < redundancy[b]; });
    order.resize(keep_);
    std::sort(order.begin(), order.end());
    return order;
  }

 private:
  static void Normalise(std::vector<double>& v) {
    const double norm = std::sqrt(std::inner_product(v.begin(), v.end(), v.begin(), 0.0));
    for (double& x : v) x /= norm;
  }
  double Like(const std::vector<double>& y, const std::vector<double>& anchor) const {
    if (score_ == StcPruner::Score::kDualAnchor) {
      return std::inner_product(y.begin(), y.end(), anchor.begin(), 0.0);
    }
    double distance = 0, sum = 0;
    for (size_t i = 0; i < y.size(); ++i) distance += std::pow(y[i] - anchor[i], 2);
    for (int j = -3; j <= 1; ++j) sum += std::exp(-distance / (2 * std::pow(2.0, j)));
    return sum;
  }
  const int keep_;
  const StcPruner::Score score_;
  const StcPruner::History history_;
  std::vector<std::vector<double>> past_;
};

TEST(StcPrunerTest, ChoosesWhatTheEquationsChooseInDoublePrecision) {
  ExecContext ctx({});
  for (const auto score : {StcPruner::Score::kGaussian, StcPruner::Score::kDualAnchor}) {
    for (const auto history : {StcPruner::History::kFixed, StcPruner::History::kCompat}) {
      for (const int keep : {1, 4, 11}) {
        StcPruner pruner({.keep = double(keep), .score = score, .history = history});
        DoublePruner reference(keep, score, history);
        for (int f = 0; f < 6; ++f) {
          const VisualTokens in = Frames(f, 1, 10 * keep + f);
          std::vector<int> want = reference.Choose(in.features.data<float>());
          for (int& place : want) place += 100 * f;
          ASSERT_EQ(Places(pruner.Compress(ctx, Copy(in))), want) << "frame " << f;
        }
      }
    }
  }
}

TEST(StcPrunerTest, KeepsRowsUnchangedAndInOrder) {
  ExecContext ctx({});
  StcPruner pruner({.keep = 0.4});
  const VisualTokens in = Frames(3, 4, 1), out = pruner.Compress(ctx, Copy(in));
  ASSERT_EQ(out.size(), 4 * 4);  // floor(0.4 * 12) of each frame
  const std::vector<int> all = Places(in), kept = Places(out);
  EXPECT_TRUE(std::is_sorted(kept.begin(), kept.end()));
  for (int64_t i = 0; i < out.size(); ++i) {
    const auto from = std::find(all.begin(), all.end(), kept[i]) - all.begin();
    EXPECT_TRUE(std::equal(out.features.data<float>() + i * kWidth,
                           out.features.data<float>() + (i + 1) * kWidth,
                           in.features.data<float>() + from * kWidth));
  }
}

TEST(StcPrunerTest, FramesTogetherOrOneByOneAreTheSame) {
  ExecContext ctx({});
  StcPruner together({.keep = 5}), apart({.keep = 5});
  const VisualTokens all = together.Compress(ctx, Frames(0, 3, 5));
  const VisualTokens in = Frames(0, 3, 5);
  std::vector<int> places;
  for (int f = 0; f < 3; ++f) {
    VisualTokens one = Frames(f, 1, 0);
    std::copy_n(in.features.data<float>() + f * kTokens * kWidth, kTokens * kWidth,
                one.features.data<float>());
    for (int place : Places(apart.Compress(ctx, std::move(one)))) places.push_back(place);
  }
  EXPECT_EQ(Places(all), places);
}

TEST(StcPrunerTest, AsManyAsThereAreIsEverything) {
  ExecContext ctx({});
  const VisualTokens in = Frames(0, 2, 2);
  for (const double keep : {12.0, 500.0}) {
    StcPruner pruner({.keep = keep});
    EXPECT_EQ(Places(pruner.Compress(ctx, Copy(in))), Places(in));
  }
}

TEST(StcPrunerTest, AnOutlierStaysAndWhatEqualsTheAnchorsGoesFirst) {
  ExecContext ctx({});
  VisualTokens in = Frames(0, 1, 3);
  // All tokens nearly alike, one turned round; channels vary equally little elsewhere.
  std::mt19937 random(1);
  std::normal_distribution<float> noise(0, 0.02f);
  for (int t = 0; t < kTokens; ++t) {
    for (int c = 0; c < kWidth; ++c) {
      in.features.data<float>()[t * kWidth + c] = (t == 7 ? -1.0f : 1.0f) + noise(random);
    }
  }
  StcPruner one({.keep = 1});
  EXPECT_THAT(Places(one.Compress(ctx, Copy(in))), ElementsAre(7));
}

TEST(StcPrunerTest, WhatWasSeenBeforeChangesWhatIsNovel) {
  ExecContext ctx({});
  const VisualTokens in = Frames(0, 1, 4);
  int different = 0;
  for (uint32_t seed = 0; seed < 8; ++seed) {
    StcPruner fresh({.keep = 4}), older({.keep = 4});
    older.Compress(ctx, Frames(0, 5, 50 + seed));
    different += Places(fresh.Compress(ctx, Copy(in))) != Places(older.Compress(ctx, Copy(in)));
  }
  EXPECT_GT(different, 0);
}

TEST(StcPrunerTest, WhatGoesMayJoinTheNearestThatStays) {
  ExecContext ctx({});
  const VisualTokens in = Frames(0, 3, 6);
  StcPruner plain({.keep = 4}), join({.keep = 4, .join_from = 0.2});
  const VisualTokens alone = plain.Compress(ctx, Copy(in)), joined = join.Compress(ctx, Copy(in));
  ASSERT_EQ(Places(joined), Places(alone));
  const auto row = [](const VisualTokens& t, int64_t i) {
    return std::vector<double>(t.features.data<float>() + i * kWidth,
                               t.features.data<float>() + (i + 1) * kWidth);
  };
  const auto cosine = [](const std::vector<double>& a, const std::vector<double>& b) {
    const auto dot = [](const auto& x, const auto& y) {
      return std::inner_product(x.begin(), x.end(), y.begin(), 0.0);
    };
    return dot(a, b) / std::sqrt(dot(a, a) * dot(b, b));
  };
  const std::vector<int> all = Places(in), kept = Places(alone);
  std::vector<std::vector<double>> sums(kept.size(), std::vector<double>(kWidth));
  std::vector<int> sizes(kept.size());
  int lost = 0;
  for (int64_t i = 0; i < in.size(); ++i) {
    int best = -1;
    for (int k = 0; k < static_cast<int>(kept.size()); ++k) {
      if (kept[k] / 100 != all[i] / 100) continue;
      if (kept[k] == all[i]) {
        best = k;
        break;
      }
      const double like = cosine(row(in, i), row(alone, k));
      if (like >= 0.2 && (best < 0 || like > cosine(row(in, i), row(alone, best)))) best = k;
    }
    if (best < 0) {
      ++lost;
      continue;
    }
    ++sizes[best];
    for (int d = 0; d < kWidth; ++d) sums[best][d] += row(in, i)[d];
  }
  EXPECT_GT(lost, 0);
  for (size_t k = 0; k < kept.size(); ++k) {
    for (int d = 0; d < kWidth; ++d) EXPECT_NEAR(row(joined, k)[d], sums[k][d] / sizes[k], 1e-6);
  }
}

TEST(StcPrunerTest, NumbersThatKeepNothingOrHalfATokenAreRefused) {
  for (const double keep : {0.0, -0.5, 1.5, std::nan(""), 1e9}) {
    EXPECT_THAT([&] { StcPruner pruner({.keep = keep}); },
                ThrowsMessage<InputError>(HasSubstr("[stc-pruner] expected a share")));
  }
}

}  // namespace
}  // namespace sluice
