#include "vision/visual_tokens.h"

#include <gtest/gtest.h>

namespace sluice {
namespace {

// `count` tokens of one frame; features and scores count on from `first`.
VisualTokens Batch(int32_t frame, int count, float first, bool scored) {
  VisualTokens tokens;
  tokens.grid_rows = tokens.grid_cols = 7;
  tokens.features = Tensor(DType::kF32, {count, 3});
  for (int i = 0; i < 3 * count; ++i) tokens.features.data<float>()[i] = first + i;
  for (int i = 0; i < count; ++i) {
    TokenOrigin& origin = tokens.origins.emplace_back();
    origin.frame = frame;
    origin.row = static_cast<int16_t>(i);
    if (scored) tokens.scores.push_back(first - i);
  }
  return tokens;
}

TEST(VisualTokensTest, JoinedBatchesFollowEachOther) {
  ExecContext ctx({});
  const VisualTokens batches[] = {Batch(4, 2, 10, true), Batch(5, 0, 0, true),
                                  Batch(6, 1, 30, true)};
  const VisualTokens all = Joined(ctx, batches);
  ASSERT_EQ(all.size(), 3);
  EXPECT_EQ(all.grid_rows, 7);
  EXPECT_EQ(all.features.shape(), (Shape{3, 3}));
  const float expected[] = {10, 11, 12, 13, 14, 15, 30, 31, 32};
  for (int i = 0; i < 9; ++i) EXPECT_EQ(all.features.data<float>()[i], expected[i]) << i;
  EXPECT_EQ(all.origins[1].frame, 4);
  EXPECT_EQ(all.origins[1].row, 1);
  EXPECT_EQ(all.origins[2].frame, 6);
  EXPECT_EQ(all.scores, (std::vector<float>{10, 9, 30}));
}

TEST(VisualTokensTest, ScoresOfSomeBatchesOnlyAreLeftOut) {
  ExecContext ctx({});
  const VisualTokens batches[] = {Batch(1, 2, 10, true), Batch(2, 2, 20, false)};
  EXPECT_TRUE(Joined(ctx, batches).scores.empty());
  EXPECT_EQ(Joined(ctx, batches).size(), 4);
}

}  // namespace
}  // namespace sluice
