// Steps that recur on the GPU: what is replayed, and that it works on the numbers of each time.
#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <vector>

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
