// Steps that recur on the GPU: what is replayed, and that it works on the numbers of each time.
#include <gtest/gtest.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime/ops/novelty.h"
#include "runtime/ops/rows.h"
#include "tests/support/gpu_testing.h"
#include "tests/support/tensor_testing.h"

namespace sluice {
namespace {

using ::sluice::testing::GpuTest;
using ::sluice::testing::RandomTensor;

class CudaRecorderTest : public GpuTest {
 protected:
  static constexpr int64_t kRows = 40, kWidth = 24;
  void SetUp() override {
    GpuTest::SetUp();
    if (IsSkipped()) return;
    x_ = RandomTensor(DType::kF32, {kRows, kWidth}, 1);
    there_ = There(x_);
  }
  // Gathers rows of x_ in a step of several ops.
  void Gather(const std::vector<int32_t>& rows, const Tensor& to) {
    gpu_->Recurring("gather", [&] {
      const Workspace::Scope scope(gpu_->workspace());
      const TensorView middle = gpu_->workspace().Allocate(DType::kF32, to.shape());
      GatherRows(*gpu_, there_, ListRows(*gpu_, rows, 1), middle);
      CopyRows(*gpu_, middle, to);
    });
  }
  void ExpectRows(const Tensor& got, const std::vector<int32_t>& rows) {
    const Tensor back = Here(got);
    for (size_t i = 0; i < rows.size(); ++i) {
      for (int64_t d = 0; d < kWidth; ++d) {
        ASSERT_EQ(back.data<float>()[i * kWidth + d], x_.data<float>()[rows[i] * kWidth + d])
            << "row " << i;
      }
    }
  }
  // From a frame as deep as it likes, so that what lies on the stack lies elsewhere.
  void GatherFromDeep(int depth, const std::vector<int32_t>& rows, const Tensor& to) {
    volatile char frame[256];
    frame[depth % 256] = 1;
    depth == 0 ? Gather(rows, to) : GatherFromDeep(depth - 1, rows, to);
    frame[0] = frame[depth % 256];
  }

  Tensor x_, there_;
};

TEST_F(CudaRecorderTest, AStepThatRecursIsReplayedWithTheNumbersOfEachTime) {
  const Tensor to(DType::kF32, {3, kWidth}, Device::kCuda);
  for (int32_t i = 0; i < 20; ++i) {
    const std::vector<int32_t> rows = {i, 39 - i, 2 * i};
    GatherFromDeep(i % 7, rows, to);
    ExpectRows(to, rows);
  }
  EXPECT_EQ(gpu_->recorder()->counts().direct, 1);
  EXPECT_EQ(gpu_->recorder()->counts().captured, 1);
  EXPECT_EQ(gpu_->recorder()->counts().replayed, 18);
}

TEST_F(CudaRecorderTest, TensorsThatTakeTurnsEachHaveAGraph) {
  std::vector<Tensor> places;
  for (int i = 0; i < 3; ++i) places.emplace_back(DType::kF32, Shape{2, kWidth}, Device::kCuda);
  for (int32_t i = 0; i < 30; ++i) {
    const std::vector<int32_t> rows = {i, 39 - i};
    Gather(rows, places[i % 3]);
    ExpectRows(places[i % 3], rows);
  }
  EXPECT_EQ(gpu_->recorder()->counts().captured, 3);
  EXPECT_EQ(gpu_->recorder()->counts().replayed, 26);
}

TEST_F(CudaRecorderTest, AStepThatIsNeverTheSameIsNotCapturedForEver) {
  std::vector<Tensor> places;
  for (int i = 0; i < 100; ++i) places.emplace_back(DType::kF32, Shape{2, kWidth}, Device::kCuda);
  for (int32_t i = 0; i < 100; ++i) {
    const std::vector<int32_t> rows = {i % 40, 7};
    Gather(rows, places[i]);
    ExpectRows(places[i], rows);
  }
  EXPECT_LT(gpu_->recorder()->counts().captured, 50);
  EXPECT_GT(gpu_->recorder()->counts().direct, 50);
}

// In turns with one scalar and with another, of which the tensors tell nothing.
TEST_F(CudaRecorderTest, AnOpIsReplayedWithTheScalarsItIsGiven) {
  using Op = std::function<void(ExecContext & ctx, ConstTensorView x, TensorView more, bool other,
                                TensorView y)>;
  const auto numbers = [](const Tensor& x) {
    std::vector<double> all;
    for (int64_t i = 0; i < x.shape().NumElements(); ++i) {
      all.push_back(x.dtype() == DType::kI32 ? x.data<int32_t>()[i] : x.data<float>()[i]);
    }
    return all;
  };
  int ops = 0;
  const auto check = [&](const std::string& name, const Tensor& x, const Tensor& more,
                         const Tensor& y, const Op& op) {
    const Tensor x_there = There(x), more_there = There(more), y_there = There(y);
    std::vector<double> want[2];
    for (int run = 0; run < 8; ++run) {
      const bool other = run % 2 == 1;
      op(reference_, x, more, other, y);
      want[other] = numbers(y);
      gpu_->Recurring(name, [&] { op(*gpu_, x_there, more_there, other, y_there); });
      const std::vector<double> got = numbers(Here(y_there));
      // Sums of a dozen terms in another order, then exponentials whose slope is at most 8.
      for (size_t i = 0; i < got.size(); ++i) {
        ASSERT_NEAR(got[i], want[other][i], 2e-5) << name << " run " << run << " at " << i;
      }
    }
    EXPECT_NE(want[0], want[1]) << name;
    EXPECT_EQ(gpu_->recorder()->counts().captured, 2 * ++ops) << name;
    EXPECT_EQ(gpu_->recorder()->counts().replayed, 5 * ops) << name;
  };
  const Tensor x = RandomTensor(DType::kF32, {12, 6}, 3),
               of_rows = RandomTensor(DType::kF32, {12}, 4);
  const Tensor anchor(DType::kF32, {6}), sums(DType::kI32, {12}), kept(DType::kI32, {4});
  for (int i = 0; i < 4; ++i) kept.data<int32_t>()[i] = i % 2 * 3;
  check("novelty", x, anchor, of_rows,
        [](ExecContext& ctx, ConstTensorView in, TensorView history, bool other, TensorView y) {
          Novelty(ctx, {.x = in,
                        .frames = 2,
                        .new_history = history,
                        .novelty = y,
                        .score = other ? NoveltyScore::kDualAnchor : NoveltyScore::kGaussian});
        });
  check("history_cosines", x, sums, of_rows,
        [](ExecContext& ctx, ConstTensorView in, TensorView history, bool other, TensorView y) {
          HistoryCosines(ctx, in, other ? 2 : 3, {}, history, y);
        });
  check("largest_of_groups", RandomTensor(DType::kF32, {12}, 5), kept, Tensor(DType::kI32, {6}),
        [](ExecContext& ctx, ConstTensorView in, TensorView, bool other, TensorView y) {
          LargestOfGroups(ctx, in, other ? 2 : 3, y);
        });
  check("join_rows", x, kept, Tensor(DType::kF32, {4, 6}),
        [](ExecContext& ctx, ConstTensorView in, TensorView places, bool other, TensorView y) {
          JoinRows(ctx, in, 2, places, other ? -1.0f : 0.9f, y);
        });
}

TEST_F(CudaRecorderTest, AStepThatThrowsLeavesTheContextUsable) {
  const Tensor to(DType::kF32, {1, kWidth}, Device::kCuda);
  for (int i = 0; i < 4; ++i) {
    EXPECT_THROW(gpu_->Recurring("fails",
                                 [&] {
                                   const std::vector<int32_t> row = {1};
                                   GatherRows(*gpu_, there_, ListRows(*gpu_, row, 1), to);
                                   throw std::runtime_error("no");
                                 }),
                 std::runtime_error);
  }
  Gather({5}, to);
  ExpectRows(to, {5});
}

}  // namespace
}  // namespace sluice
