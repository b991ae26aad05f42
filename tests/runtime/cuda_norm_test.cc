#include <gtest/gtest.h>

#include "runtime/ops/cuda/norm.h"

namespace sluice {
namespace {

TEST(ChooseRmsNormTest, FollowsItsTable) {
  struct Row {
    int64_t d;
    bool aligned;
    int threads, vector, kept;
  };
  const Row rows[] = {
      {1, false, 32, 1, 1},     {37, true, 64, 1, 1},     {896, true, 224, 4, 1},
      {896, false, 448, 1, 2},  {3584, true, 448, 4, 2},  {8192, true, 512, 4, 4},
      {16384, true, 512, 4, 8}, {20000, true, 512, 4, 0}, {16381, true, 512, 1, 0},
  };
  for (const Row& row : rows) {
    const cuda::NormLaunch launch = cuda::ChooseRmsNorm(row.d, row.aligned);
    EXPECT_EQ(launch.threads, row.threads) << row.d;
    EXPECT_EQ(launch.vector, row.vector) << row.d;
    EXPECT_EQ(launch.kept_vectors, row.kept) << row.d;
    // Whatever is chosen covers the row.
    if (launch.kept_vectors > 0) {
      EXPECT_GE(int64_t{launch.threads} * launch.vector * launch.kept_vectors, row.d);
    }
  }
}

TEST(ChooseLayerNormTest, FollowsItsTable) {
  struct Row {
    int64_t d;
    bool aligned;
    int threads, vector, kept;
  };
  const Row rows[] = {
      {1, false, 32, 1, 1},     {37, true, 32, 1, 2},     {320, true, 32, 4, 3},
      {1024, true, 64, 4, 4},   {1152, true, 96, 4, 3},   {1152, false, 288, 1, 4},
      {8192, true, 512, 4, 4},  {16384, true, 512, 4, 8}, {20000, true, 512, 4, 0},
      {16381, true, 512, 1, 0},
  };
  for (const Row& row : rows) {
    const cuda::NormLaunch launch = cuda::ChooseLayerNorm(row.d, row.aligned);
    EXPECT_EQ(launch.threads, row.threads) << row.d;
    EXPECT_EQ(launch.vector, row.vector) << row.d;
    EXPECT_EQ(launch.kept_vectors, row.kept) << row.d;
    if (launch.kept_vectors > 0) {
      EXPECT_GE(int64_t{launch.threads} * launch.vector * launch.kept_vectors, row.d);
    }
  }
}

}  // namespace
}  // namespace sluice
