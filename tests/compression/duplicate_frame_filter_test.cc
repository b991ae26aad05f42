#include "compression/duplicate_frame_filter.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace sluice {
namespace {

// Frames of two tokens of width 2, each given by the angle of its features.
VisualTokens FromAngles(int first_frame, const std::vector<std::pair<double, double>>& frames) {
  VisualTokens tokens;
  tokens.grid_rows = 1;
  tokens.grid_cols = 2;
  const auto count = static_cast<int64_t>(frames.size());
  tokens.features = Tensor(DType::kF32, {2 * count, 2});
  float* out = tokens.features.data<float>();
  for (int64_t f = 0; f < count; ++f) {
    for (int16_t col = 0; col < 2; ++col) {
      const double angle = col == 0 ? frames[f].first : frames[f].second;
      tokens.origins.push_back({static_cast<int32_t>(first_frame + f), 0, col,
                                MediaTime::FromSeconds(static_cast<double>(first_frame + f))});
      *out++ = static_cast<float>(3 * std::cos(angle));
      *out++ = static_cast<float>(3 * std::sin(angle));
    }
  }
  return tokens;
}

std::vector<int> KeptFrames(const VisualTokens& tokens) {
  std::vector<int> frames;
  for (int64_t i = 0; i < tokens.size(); i += 2) frames.push_back(tokens.origins[i].frame);
  return frames;
}

const double kThreshold = std::cos(0.2);

TEST(DuplicateFrameFilterTest, DropsFramesLikeTheLastKeptOneWithinABatch) {
  ExecContext ctx({});
  DuplicateFrameFilter filter(kThreshold);
  const VisualTokens out = filter.Compress(
      ctx, FromAngles(0, {{0.0, 1.0}, {0.1, 1.0}, {0.0, 1.5}, {0.1, 1.4}, {0.0, 1.0}}));
  EXPECT_EQ(KeptFrames(out), (std::vector<int>{0, 2, 4}));
  // The features moved up with their origins.
  EXPECT_FLOAT_EQ(out.features.data<float>()[2 * 3], static_cast<float>(3 * std::cos(1.5)));
}

TEST(DuplicateFrameFilterTest, RemembersAcrossBatches) {
  ExecContext ctx({});
  DuplicateFrameFilter filter(kThreshold);
  EXPECT_EQ(filter.Compress(ctx, FromAngles(0, {{0, 0}})).size(), 2);
  EXPECT_EQ(filter.Compress(ctx, FromAngles(1, {{0.1, 0.1}})).size(), 0);
  EXPECT_EQ(filter.Compress(ctx, FromAngles(2, {{0.3, 0}})).size(), 2);
}

TEST(DuplicateFrameFilterTest, KeepsAFrameInWhichASingleTokenChanged) {
  ExecContext ctx({});
  DuplicateFrameFilter filter(kThreshold);
  EXPECT_EQ(KeptFrames(filter.Compress(ctx, FromAngles(0, {{0, 0}, {0, 0.3}}))),
            (std::vector<int>{0, 1}));
}

TEST(DuplicateFrameFilterTest, LetsSlowDriftAddUpUntilAFrameIsKept) {
  ExecContext ctx({});
  DuplicateFrameFilter filter(kThreshold);
  std::vector<std::pair<double, double>> drift;
  for (int i = 0; i < 10; ++i) drift.push_back({0.06 * i, 0});
  EXPECT_EQ(KeptFrames(filter.Compress(ctx, FromAngles(0, drift))), (std::vector<int>{0, 4, 8}));
}

TEST(DuplicateFrameFilterTest, NeverComparesFramesWhoseTokensSitElsewhere) {
  ExecContext ctx({});
  DuplicateFrameFilter filter(-1);
  filter.Compress(ctx, FromAngles(0, {{0, 0}}));
  VisualTokens moved = FromAngles(1, {{0, 0}});
  moved.origins[1].row = 1;
  EXPECT_EQ(filter.Compress(ctx, std::move(moved)).size(), 2);
}

TEST(DuplicateFrameFilterTest, FindsACopyEvenAtThresholdOne) {
  ExecContext ctx({});
  DuplicateFrameFilter filter(1);
  EXPECT_EQ(KeptFrames(filter.Compress(ctx, FromAngles(0, {{0.7, 2}, {0.7, 2}, {0.7, 2.01}}))),
            (std::vector<int>{0, 2}));
}

}  // namespace
}  // namespace sluice
