#include "runtime/ops/rows.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "runtime/error.h"
#include "runtime/ops/similarity.h"
#include "tests/support/tensor_testing.h"

namespace sluice {
namespace {

using ::sluice::testing::At;
using ::sluice::testing::RandomTensor;
using ::sluice::testing::Strided;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

class RowsTest : public ::testing::TestWithParam<std::tuple<DType, KernelChoice>> {
 protected:
  DType dtype() const { return std::get<0>(GetParam()); }
  ExecContext ctx_{{.num_threads = 3, .kernels = std::get<1>(GetParam())}};
};

TEST_P(RowsTest, GatheredRowsComeBackToTheirPlacesWhenScattered) {
  constexpr int64_t kGroups = 3, kLength = 50, kWidth = 37;
  const std::vector<int32_t> indices = {0, 7, 49, 3, 4, 48, 1, 2, 25};
  const Tensor storage = RandomTensor(dtype(), {kGroups * kLength, kWidth + 5}, 1);
  const TensorView x = Strided(storage, kGroups * kLength, kWidth, 5);
  Tensor gathered(dtype(), {9, kWidth}), back(dtype(), {kGroups * kLength, kWidth});
  GatherRows(ctx_, x, indices, kGroups, gathered);
  CopyRows(ctx_, RandomTensor(dtype(), {kGroups * kLength, kWidth}, 2), back);
  const Tensor before = back.Clone();
  ScatterRows(ctx_, gathered, indices, kGroups, back);
  for (int64_t i = 0; i < 9; ++i) {
    const int64_t row = i / 3 * kLength + indices[i];
    for (int64_t d = 0; d < kWidth; ++d) {
      ASSERT_EQ(At(gathered, i, d), At(x, row, d)) << i;
      ASSERT_EQ(At(back, row, d), At(x, row, d)) << i;
    }
  }
  int64_t changed = 0;
  for (int64_t row = 0; row < kGroups * kLength; ++row) {
    changed += At(back, row, 0) != At(before, row, 0);
  }
  EXPECT_EQ(changed, 9);
}

TEST_P(RowsTest, SumsAndDifferencesAreRoundedOnce) {
  for (const int64_t width : {1, 16, 31, 256, 72}) {
    const Tensor a = RandomTensor(DType::kF32, {133, width}, 3);
    const Tensor b = RandomTensor(DType::kF32, {133, width}, 4);
    Tensor difference(dtype(), {133, width});
    Subtract(ctx_, a, b, difference);
    const Tensor sum = a.Clone();
    Add(ctx_, sum, difference, sum);
    for (int64_t i = 0; i < 133 * width; ++i) {
      const float want = a.data<float>()[i] - b.data<float>()[i];
      const float rounded = dtype() == DType::kF32 ? want : BFloat16::From(want).ToFloat();
      ASSERT_EQ(At(difference, i / width, i % width), rounded);
      ASSERT_EQ(sum.data<float>()[i], a.data<float>()[i] + rounded);
    }
  }
}

TEST(RowsDifferenceTest, ListedRowsAreTakenAndNoOthers) {
  ExecContext ctx({.num_threads = 2});
  const std::vector<int32_t> indices = {4, 0, 9};
  const Tensor a = RandomTensor(DType::kF32, {3, 21}, 8),
               b = RandomTensor(DType::kF32, {12, 21}, 9);
  const Tensor y = RandomTensor(DType::kF32, {12, 21}, 10), before = y.Clone();
  SubtractListed(ctx, a, b, indices, y);
  for (int32_t row = 0; row < 12; ++row) {
    const auto at = std::find(indices.begin(), indices.end(), row) - indices.begin();
    for (int64_t d = 0; d < 21; ++d) {
      const double want = at == 3 ? At(before, row, d) : At(a, at, d) - At(b, row, d);
      ASSERT_FLOAT_EQ(At(y, row, d), want) << row;
    }
  }
  const Tensor sums(DType::kF32, {3, 21});
  AddListed(ctx, before, b, indices, sums);
  for (int64_t i = 0; i < 3 * 21; ++i) {
    const int64_t row = indices[i / 21], d = i % 21;
    ASSERT_FLOAT_EQ(sums.data<float>()[i], At(before, row, d) + At(b, row, d));
  }
}

// Sums of D products of N(0, 1) values in f32: relative error about sqrt(D) 6e-8 of the norms.
TEST_P(RowsTest, CosinesAgreeWithDoublePrecision) {
  for (const int64_t width : {1, 15, 64, 72, 1152}) {
    const Tensor storage = RandomTensor(dtype(), {197, width + 3}, 5);
    const TensorView a = Strided(storage, 197, width, 3);
    const Tensor b = RandomTensor(dtype(), {197, width}, 6);
    Tensor cosines(DType::kF32, {197});
    RowCosines(ctx_, a, b, cosines);
    for (int64_t i = 0; i < 197; ++i) {
      double ab = 0, aa = 0, bb = 0;
      for (int64_t d = 0; d < width; ++d) {
        ab += At(a, i, d) * At(b, i, d);
        aa += At(a, i, d) * At(a, i, d);
        bb += At(b, i, d) * At(b, i, d);
      }
      ASSERT_NEAR(cosines.data<float>()[i], ab / std::sqrt(aa * bb), 5e-6) << "width " << width;
    }
  }
}

// Rows far from the origin: rounding of the center and of the rows less it, about 1e-7 of both.
TEST_P(RowsTest, CosinesAroundACenterAgreeWithDoublePrecision) {
  for (const int64_t width : {1, 15, 72, 1152}) {
    const Tensor storage = RandomTensor(dtype(), {49, width + 3}, 8);
    const TensorView a = Strided(storage, 49, width, 3);
    const Tensor b = RandomTensor(dtype(), {49, width}, 9);
    std::vector<float> center(width);
    MeanRow(ctx_, b, center);
    std::vector<double> middle(width);
    for (int64_t d = 0; d < width; ++d) {
      for (int64_t i = 0; i < 49; ++i) middle[d] += At(b, i, d) / 49;
      ASSERT_NEAR(center[d], middle[d], 1e-6) << "width " << width;
    }
    Tensor cosines(DType::kF32, {49});
    RowCosines(ctx_, a, b, cosines, center);
    for (int64_t i = 0; i < 49; ++i) {
      double ab = 0, aa = 0, bb = 0;
      for (int64_t d = 0; d < width; ++d) {
        const double x = At(a, i, d) - middle[d], y = At(b, i, d) - middle[d];
        ab += x * y;
        aa += x * x;
        bb += y * y;
      }
      // With one value a row the cosine is a sign, and there may be next to nothing of it.
      if (std::sqrt(aa * bb) < 1e-3) continue;
      ASSERT_NEAR(cosines.data<float>()[i], ab / std::sqrt(aa * bb), 1e-4) << "width " << width;
    }
  }
}

TEST_P(RowsTest, ACosineWithNothingIsNothing) {
  Tensor none(dtype(), {2, 8}), cosines(DType::kF32, {2});
  std::memset(none.view().raw(), 0, none.SizeBytes());
  RowCosines(ctx_, none, RandomTensor(dtype(), {2, 8}, 7), cosines);
  EXPECT_EQ(cosines.data<float>()[0], 0);
}

TEST_P(RowsTest, TheNearestRowIsTheFirstOfTheMostAlike) {
  if (dtype() != DType::kF32) return;
  for (const int64_t width : {1, 13, 64}) {
    for (const int64_t count : {1, 2, 17, 98}) {
      const Tensor a = RandomTensor(DType::kF32, {99, width}, 11);
      const Tensor b = RandomTensor(DType::kF32, {count, width}, 12);
      // Ties: the last row of b repeats the first.
      std::copy_n(b.data<float>(), width, b.data<float>() + (count - 1) * width);
      std::vector<int32_t> nearest(99);
      std::vector<float> cosines(99);
      NearestRows(ctx_, a, b, nearest, cosines);
      for (int64_t i = 0; i < 99; ++i) {
        double best = -1e9;
        for (int64_t j = 0; j < count; ++j) {
          double dot = 0;
          for (int64_t d = 0; d < width; ++d) dot += At(a, i, d) * At(b, j, d);
          best = std::max(best, dot);
          if (j == nearest[i]) {
            ASSERT_NEAR(cosines[i], dot, 1e-4);
          }
        }
        ASSERT_NEAR(cosines[i], best, 1e-4);
        ASSERT_TRUE(count == 1 || nearest[i] < count - 1);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(AllKernels, RowsTest,
                         ::testing::Combine(::testing::Values(DType::kF32, DType::kBF16),
                                            ::testing::Values(KernelChoice::kFast,
                                                              KernelChoice::kReference)));

TEST(RowsCheckTest, NamesWhatDoesNotFit) {
  ExecContext ctx({});
  const Tensor x = RandomTensor(DType::kF32, {4, 8}, 1), narrow(DType::kBF16, {4, 8});
  const Tensor two(DType::kF32, {2, 8});
  const std::vector<int32_t> far = {0, 4}, three = {0, 1, 2};
  EXPECT_THAT([&] { CopyRows(ctx, x, narrow); },
              ThrowsMessage<Error>(HasSubstr("y must be [4, 8] f32, got [4, 8] bf16")));
  EXPECT_THAT([&] { GatherRows(ctx, x, far, 1, two); },
              ThrowsMessage<Error>(HasSubstr("indices must lie in [0, 4), got 4")));
  EXPECT_THAT([&] { GatherRows(ctx, x, three, 2, two); },
              ThrowsMessage<Error>(HasSubstr("multiples of 2 groups")));
  EXPECT_THAT([&] { Subtract(ctx, x, two, x); }, ThrowsMessage<Error>(HasSubstr("b must be")));
  EXPECT_THAT([&] { Add(ctx, x, x, two); }, ThrowsMessage<Error>(HasSubstr("y must be")));
  std::vector<float> short_row(1);
  EXPECT_THAT([&] { MeanRow(ctx, x, short_row); },
              ThrowsMessage<Error>(HasSubstr("[mean_row] mean must hold")));
  EXPECT_THAT([&] { RowCosines(ctx, x, x, two); },
              ThrowsMessage<Error>(HasSubstr("cosines must be [4] f32")));
}

}  // namespace
}  // namespace sluice
