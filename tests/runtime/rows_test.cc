#include "runtime/ops/rows.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
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

TEST_P(RowsTest, GatheredRowsComeBackToTheirPlaces) {
  constexpr int64_t kGroups = 3, kLength = 50, kWidth = 37;
  for (const int64_t ahead : {0, 1, 2}) {
    const std::vector<int32_t> indices = {0, 7, 47, 3, 4, 46, 1, 2, 25};
    const Workspace::Scope scope(ctx_.workspace());
    RowLists lists = ListRows(ctx_, indices, kGroups);
    lists.ahead = ahead;
    const int64_t each = 3 + ahead;
    ASSERT_EQ(lists.each(), each);
    const Tensor storage = RandomTensor(dtype(), {kGroups * kLength, kWidth + 5}, 1);
    const TensorView x = Strided(storage, kGroups * kLength, kWidth, 5);
    const Tensor gathered(dtype(), {kGroups * each, kWidth}),
        back(dtype(), {kGroups * kLength, kWidth});
    GatherRows(ctx_, x, lists, gathered);
    // The others come from matrices that lie apart.
    std::vector<Tensor> rest;
    for (uint32_t g = 0; g < kGroups; ++g) {
      rest.push_back(RandomTensor(dtype(), {kLength, kWidth}, 2 + g));
    }
    const std::vector<ConstTensorView> views(rest.begin(), rest.end());
    OverlayRows(ctx_, views, gathered, lists, back);
    for (int64_t g = 0; g < kGroups; ++g) {
      for (int64_t row = 0; row < kLength; ++row) {
        int64_t at = row < ahead ? row : -1;
        for (int64_t i = 0; i < 3; ++i) {
          if (row == ahead + indices[g * 3 + i]) at = ahead + i;
        }
        for (int64_t d = 0; d < kWidth; ++d) {
          const double want = At(x, g * kLength + row, d);
          if (at >= 0) {
            ASSERT_EQ(At(gathered, g * each + at, d), want);
          }
          ASSERT_EQ(At(back, g * kLength + row, d), at >= 0 ? want : At(rest[g], row, d));
        }
      }
    }
  }
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
  const std::vector<int32_t> indices = {3, 0, 8, 1, 5, 2};
  RowLists lists = ListRows(ctx, indices, 2);
  lists.ahead = 1;
  constexpr int64_t kRows = 12, kEach = 4;
  const Tensor a = RandomTensor(DType::kF32, {2 * kEach, 21}, 8);
  const Tensor b0 = RandomTensor(DType::kF32, {kRows, 21}, 9),
               b1 = RandomTensor(DType::kF32, {kRows, 21}, 19);
  const std::vector<ConstTensorView> b = {b0, b1};
  const Tensor y = RandomTensor(DType::kF32, {2 * kRows, 21}, 10), before = y.Clone();
  SubtractListed(ctx, a, b, lists, y);
  const Tensor sums(DType::kF32, {2 * kEach, 21});
  AddListed(ctx, b, before, lists, sums);
  for (int64_t g = 0; g < 2; ++g) {
    for (int64_t row = 0; row < kRows; ++row) {
      int64_t at = row == 0 ? 0 : -1;
      for (int64_t i = 0; i < 3; ++i) {
        if (row == 1 + indices[g * 3 + i]) at = 1 + i;
      }
      for (int64_t d = 0; d < 21; ++d) {
        const double was = At(before, g * kRows + row, d);
        const double want = at < 0 ? was : At(a, g * kEach + at, d) - At(b[g], row, d);
        ASSERT_FLOAT_EQ(At(y, g * kRows + row, d), want) << row;
        if (at < 0) continue;
        ASSERT_FLOAT_EQ(At(sums, g * kEach + at, d), was + At(b[g], row, d));
      }
    }
  }
  ZeroRows(ctx, y);
  for (int64_t i = 0; i < y.shape().NumElements(); ++i) ASSERT_EQ(y.data<float>()[i], 0);
}

TEST(LowestPlacesTest, ThePlacesOfTheLowestAscendAndTheFirstOfEqualsWins) {
  ExecContext ctx({.num_threads = 2});
  Tensor values(DType::kF32, {2, 6});
  const std::vector<float> numbers = {0.5f, 1, -2, 0.0f, -0.0f, 1, 3, 3, 3.5f, std::nanf(""), 3, 3};
  std::copy(numbers.begin(), numbers.end(), values.data<float>());
  const Tensor two(DType::kI32, {2, 2}), five(DType::kI32, {2, 5});
  LowestPlaces(ctx, values, two);
  EXPECT_EQ(std::vector<int32_t>(two.data<int32_t>(), two.data<int32_t>() + 4),
            (std::vector<int32_t>{2, 3, 0, 1}));
  LowestPlaces(ctx, values, five);
  EXPECT_EQ(std::vector<int32_t>(five.data<int32_t>(), five.data<int32_t>() + 10),
            (std::vector<int32_t>{0, 1, 2, 3, 4, 0, 1, 2, 4, 5}));
  EXPECT_THAT(
      [&] {
        LowestPlaces(ctx, values, Tensor(DType::kI32, {2, 7}));
      },
      ThrowsMessage<Error>(HasSubstr("between 1 and all of 6 values, got 7")));
}

// Sums of D products of N(0, 1) values in f32: relative error about sqrt(D) 6e-8 of the norms.
TEST_P(RowsTest, CosinesAgreeWithDoublePrecision) {
  for (const int64_t width : {1, 15, 64, 72, 1152}) {
    const Tensor storage = RandomTensor(dtype(), {197, width + 3}, 5);
    const TensorView a = Strided(storage, 197, width, 3);
    const Tensor b = RandomTensor(dtype(), {197, width}, 6);
    const Tensor cosines(DType::kF32, {2, 197});
    const RowPairs pairs[] = {{b, b, {}}, {a, b, {}}};
    RowCosines(ctx_, pairs, cosines);
    for (int64_t i = 0; i < 197; ++i) {
      double ab = 0, aa = 0, bb = 0;
      for (int64_t d = 0; d < width; ++d) {
        ab += At(a, i, d) * At(b, i, d);
        aa += At(a, i, d) * At(a, i, d);
        bb += At(b, i, d) * At(b, i, d);
      }
      ASSERT_NEAR(At(cosines, 0, i), 1, 5e-6) << "width " << width;
      ASSERT_NEAR(At(cosines, 1, i), ab / std::sqrt(aa * bb), 5e-6) << "width " << width;
    }
  }
}

// Rows far from the origin: rounding of the center and of the rows less it, about 1e-7 of both.
TEST_P(RowsTest, CosinesAroundACenterAgreeWithDoublePrecision) {
  for (const int64_t width : {1, 15, 72, 1152}) {
    const Tensor storage = RandomTensor(dtype(), {49, width + 3}, 8);
    const TensorView a = Strided(storage, 49, width, 3);
    const Tensor b = RandomTensor(dtype(), {49, width}, 9);
    const Tensor center(DType::kF32, {width});
    MeanRow(ctx_, b, center);
    std::vector<double> middle(width);
    for (int64_t d = 0; d < width; ++d) {
      for (int64_t i = 0; i < 49; ++i) middle[d] += At(b, i, d) / 49;
      ASSERT_NEAR(center.data<float>()[d], middle[d], 1e-6) << "width " << width;
    }
    const Tensor cosines(DType::kF32, {1, 49});
    const RowPairs pair = {a, b, center};
    RowCosines(ctx_, {&pair, 1}, cosines);
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
  const Tensor none(dtype(), {2, 8}), some = RandomTensor(dtype(), {2, 8}, 7);
  const Tensor cosines(DType::kF32, {1, 2});
  ZeroRows(ctx_, none);
  const RowPairs pair = {none, some, {}};
  RowCosines(ctx_, {&pair, 1}, cosines);
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
  EXPECT_THAT([&] { GatherRows(ctx, x, ListRows(ctx, far, 1), two); },
              ThrowsMessage<Error>(HasSubstr("indices must lie in [0, 4), got 4")));
  EXPECT_THAT([&] { GatherRows(ctx, x, ListRows(ctx, three, 2), two); },
              ThrowsMessage<Error>(HasSubstr("a multiple of 2 groups")));
  EXPECT_THAT([&] { Subtract(ctx, x, two, x); }, ThrowsMessage<Error>(HasSubstr("b must be")));
  EXPECT_THAT([&] { Add(ctx, x, x, two); }, ThrowsMessage<Error>(HasSubstr("y must be")));
  const Tensor short_row(DType::kF32, {1});
  EXPECT_THAT([&] { MeanRow(ctx, x, short_row); },
              ThrowsMessage<Error>(HasSubstr("[mean_row] mean must be [8] f32")));
  const RowPairs pair = {x, x, {}};
  EXPECT_THAT(
      [&] {
        RowCosines(ctx, {&pair, 1}, two);
      },
      ThrowsMessage<Error>(HasSubstr("cosines must be [1, 4] f32")));
}

}  // namespace
}  // namespace sluice
