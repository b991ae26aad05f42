// The ops behind the choice of tokens on the GPU against their references on the CPU.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "runtime/ops/novelty.h"
#include "tests/support/gpu_testing.h"
#include "tests/support/tensor_testing.h"

namespace sluice {
namespace {

using ::sluice::testing::GpuTest;
using ::sluice::testing::RandomTensor;

struct Frames {
  int64_t frames, rows, width;
};
// One of everything, odd, a warp and one more, of real models, more rows than threads choose at
// once.
constexpr Frames kFrames[] = {{1, 1, 1},      {2, 3, 2},      {3, 5, 37},   {1, 33, 65},
                              {8, 196, 896},  {2, 196, 3584}, {5, 64, 256}, {1, 729, 1152},
                              {2, 1500, 130}, {16, 49, 64}};

class CudaNoveltyTest : public GpuTest {
 protected:
  // Largest difference of f32 values.
  double Difference(const Tensor& there, const Tensor& want) {
    const Tensor got = Here(there);
    double most = 0;
    for (int64_t i = 0; i < want.shape().NumElements(); ++i) {
      const double error = std::abs(double{got.data<float>()[i]} - want.data<float>()[i]);
      most = error <= most ? most : error;  // so that NaN is more than all
    }
    return most;
  }
};

TEST_F(CudaNoveltyTest, NoveltyEqualsTheReference) {
  for (const auto& [frames, rows, width] : kFrames) {
    for (const auto score : {NoveltyScore::kGaussian, NoveltyScore::kDualAnchor}) {
      for (const bool by_rank : {false, true}) {
        for (const int64_t gap : {0, 3}) {
          const std::string what = Shape{frames, rows, width + gap}.ToString() +
                                   (by_rank ? " by rank" : "") +
                                   (score == NoveltyScore::kGaussian ? "" : " dual");
          const Tensor all = RandomTensor(DType::kF32, {frames * rows, width + gap}, 3);
          // A mean, so that anchors have a direction; some channels alike in every bit.
          for (int64_t i = 0; i < all.shape().NumElements(); ++i) {
            float& value = all.data<float>()[i];
            value += 0.5f;
            if (i % (width + gap) % 7 == 3) value = all.data<float>()[i - 1];
          }
          const Tensor all_there = There(all);
          const int64_t entries = by_rank ? CalmChannels(width) : width;
          const Tensor want(DType::kF32, {frames * rows}), history(DType::kF32, {entries});
          const Tensor got(DType::kF32, want.shape(), Device::kCuda);
          const Tensor history_there(DType::kF32, {entries}, Device::kCuda);
          for (const bool first : {true, false}) {
            NoveltyArgs args{.x = all.view().Columns(0, width),
                             .frames = frames,
                             .history = first ? ConstTensorView() : history.view(),
                             .new_history = history,
                             .novelty = want,
                             .score = score,
                             .by_rank = by_rank};
            Novelty(reference_, args);
            args.x = all_there.view().Columns(0, width);
            args.history = first ? ConstTensorView() : history_there.view();
            args.new_history = history_there;
            args.novelty = got;
            Novelty(*gpu_, args);
            // Cosines of sums of up to 1792 terms in f32 in another order, then sums of five
            // exponentials whose slope is at most 8.
            EXPECT_LE(Difference(got, want), 2e-5) << what << (first ? "" : " again");
            EXPECT_LE(Difference(history_there, history), 1e-5) << what;
          }
        }
      }
    }
  }
}

TEST_F(CudaNoveltyTest, CosinesToAllThatWasSeenEqualTheReference) {
  for (const auto& [frames, rows, width] : kFrames) {
    const Tensor x = RandomTensor(DType::kF32, {frames * rows, width + 1}, 4);
    const Tensor x_there = There(x);
    const Tensor want(DType::kF32, {frames * rows}), history(DType::kI32, {2 * width});
    const Tensor got(DType::kF32, want.shape(), Device::kCuda);
    const Tensor history_there(DType::kI32, history.shape(), Device::kCuda);
    for (const bool first : {true, false}) {
      const auto view = [&](const Tensor& t) { return t.view().Columns(0, width); };
      HistoryCosines(reference_, view(x), frames, first ? ConstTensorView() : history.view(),
                     history, want);
      HistoryCosines(*gpu_, view(x_there), frames, first ? ConstTensorView() : history_there.view(),
                     history_there, got);
      // In double, rounded once.
      EXPECT_LE(Difference(got, want), 2e-7) << Shape{frames, rows, width}.ToString();
    }
  }
}

TEST_F(CudaNoveltyTest, TheLargestAreTheSameWithTiesAndWithoutNumbers) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const auto& [frames, rows, width] : kFrames) {
    for (const int64_t kept : {int64_t{1}, rows / 3 + 1, rows}) {
      const Tensor values = RandomTensor(DType::kF32, {frames * rows}, 5);
      for (int64_t i = 0; i < frames * rows; ++i) {
        float& value = values.data<float>()[i];
        value = i % 11 == 5 ? -inf : i % 13 == 4 ? -0.0f : std::round(value * 4) / 4;
      }
      const Tensor values_there = There(values);
      const Tensor want(DType::kI32, {frames * kept}),
          got(DType::kI32, {frames * kept}, Device::kCuda);
      LargestOfGroups(reference_, values, frames, want);
      LargestOfGroups(*gpu_, values_there, frames, got);
      const Tensor here = Here(got);
      for (int64_t i = 0; i < frames * kept; ++i) {
        ASSERT_EQ(here.data<int32_t>()[i], want.data<int32_t>()[i]) << rows << " " << kept;
      }
      // What is no number is somewhere in the order, and every place comes once.
      values.data<float>()[rows / 2] = std::nanf("");
      values.data<float>()[0] = std::nanf("");
      LargestOfGroups(*gpu_, There(values), frames, got);
      const Tensor odd = Here(got);
      for (int64_t i = 0; i < frames * kept; ++i) {
        const int32_t place = odd.data<int32_t>()[i];
        ASSERT_TRUE(place >= 0 && place < rows);
        if (i % kept > 0) {
          ASSERT_GT(place, odd.data<int32_t>()[i - 1]);
        }
      }
    }
  }
}

TEST_F(CudaNoveltyTest, RowsJoinTheNearestThatStays) {
  for (const auto& [frames, rows, width] : kFrames) {
    for (const float from : {-1.0f, 0.05f, 0.99f}) {
      const int64_t kept = rows / 3 + 1;
      const Tensor x = RandomTensor(DType::kF32, {frames * rows, width}, 6);
      const Tensor values = RandomTensor(DType::kF32, {frames * rows}, 7);
      const Tensor places(DType::kI32, {frames * kept});
      LargestOfGroups(reference_, values, frames, places);
      const Tensor want(DType::kF32, {frames * kept, width});
      const Tensor got(DType::kF32, want.shape(), Device::kCuda);
      JoinRows(reference_, x, frames, places, from, want);
      JoinRows(*gpu_, There(x), frames, There(places), from, got);
      // With one channel all cosines are 1 or -1 up to rounding, which decides: skip.
      if (width > 1) {
        EXPECT_LE(Difference(got, want), 1e-6) << rows << " x " << width << " " << from;
      }
    }
  }
}

TEST(NoveltyTest, ShapesThatDoNotFitAreRefused) {
  ExecContext ctx({});
  const Tensor x(DType::kF32, {6, 4}), four(DType::kF32, {4}), six(DType::kF32, {6});
  EXPECT_THROW(Novelty(ctx, {.x = x, .frames = 4, .new_history = four, .novelty = six}), Error);
  EXPECT_THROW(Novelty(ctx, {.x = x, .frames = 0, .new_history = four, .novelty = six}), Error);
  EXPECT_THROW(Novelty(ctx, {.x = x, .frames = 2, .new_history = six, .novelty = six}), Error);
  EXPECT_THROW(Novelty(ctx, {.x = x, .frames = 2, .new_history = four, .novelty = four}), Error);
  EXPECT_THROW(LargestOfGroups(ctx, six, 2, Tensor(DType::kI32, {8})), Error);
  EXPECT_THROW(LargestOfGroups(ctx, six, 2, Tensor(DType::kI32, {3})), Error);
  EXPECT_THROW(HistoryCosines(ctx, x, 2, {}, four, six), Error);
  EXPECT_THROW(JoinRows(ctx, x, 2, Tensor(DType::kI32, {3}), 0, Tensor(DType::kF32, {4, 4})),
               Error);
}

}  // namespace
}  // namespace sluice
