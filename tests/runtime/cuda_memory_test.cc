// Memory of the GPU that is freed while streams still use it.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "runtime/transfer.h"
#include "tests/support/gpu_testing.h"

namespace sluice {
namespace {

using ::sluice::testing::SkippedWithout;

constexpr int64_t kMany = int64_t{1} << 27;  // values: a copy takes about a third of a millisecond
constexpr int kCopies = 100;

class CudaMemoryTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (SkippedWithout(Device::kCuda)) return;
    busy_ = std::make_unique<ExecContext>(ExecOptions{.device = Device::kCuda});
    other_ = std::make_unique<ExecContext>(ExecOptions{.device = Device::kCuda});
  }
  // Queues some tens of milliseconds of work.
  void KeepBusy(ExecContext& ctx, const Tensor& from, const Tensor& to) {
    for (int i = 0; i < kCopies; ++i) Transfer(ctx, from, to);
  }
  static Tensor Filled(ExecContext& ctx, int64_t count, int32_t value) {
    const Tensor values(DType::kI32, {count});
    std::fill_n(values.data<int32_t>(), count, value);
    return TransferTo(ctx, values, Device::kCuda);
  }

  std::unique_ptr<ExecContext> busy_, other_;
};

TEST_F(CudaMemoryTest, WhatIsFreedServesAgainOnlyWhenEveryStreamIsDoneWithIt) {
  const Tensor from = Filled(*busy_, kMany, 1), to(DType::kI32, {kMany}, Device::kCuda);
  for (const int64_t count : {int64_t{100}, int64_t{1} << 16, int64_t{1} << 22}) {
    const Tensor late(DType::kI32, {count}, Device::kCuda);
    {
      const Tensor block = Filled(*busy_, count, 7);
      KeepBusy(*busy_, from, to);
      Transfer(*busy_, block, late);
    }  // freed long before that copy begins
    std::vector<Tensor> blocks;
    for (int i = 0; i < 8; ++i) blocks.push_back(Filled(*other_, count, -1));
    other_->Synchronize();
    busy_->Synchronize();
    const Tensor got = TransferTo(*busy_, late, Device::kCpu);
    for (int64_t i = 0; i < count; ++i)
      ASSERT_EQ(got.data<int32_t>()[i], 7) << i << " of " << count;
  }
}

TEST_F(CudaMemoryTest, NeitherTakingNorGivingBackWaitsForWhatRuns) {
  const Tensor from = Filled(*busy_, kMany, 1), to(DType::kI32, {kMany}, Device::kCuda);
  using Clock = std::chrono::steady_clock;
  { const Tensor first(DType::kF32, {1 << 20}, Device::kCuda); }
  busy_->Synchronize();
  KeepBusy(*busy_, from, to);
  const Clock::time_point begin = Clock::now();
  for (int i = 0; i < 8; ++i) const Tensor block(DType::kF32, {1 << 20}, Device::kCuda);
  const Clock::time_point taken = Clock::now();
  busy_->Synchronize();
  const auto waited = Clock::now() - taken;
  EXPECT_LT(taken - begin, waited);
  // What it costs when nothing runs, for whoever reads the log.
  constexpr int kTimes = 1000;
  const Clock::time_point idle = Clock::now();
  for (int i = 0; i < kTimes; ++i) const Tensor block(DType::kF32, {1 << 20}, Device::kCuda);
  const std::chrono::duration<double, std::micro> each = (Clock::now() - idle) / kTimes;
  RecordProperty("microseconds", std::to_string(each.count()));
}

TEST_F(CudaMemoryTest, WhatIsFreedWhileAStepIsCapturedIsLeftAloneUntilItRan) {
  const Tensor in = Filled(*busy_, 1000, 5);
  const Tensor out(DType::kI32, {1000}, Device::kCuda);
  for (int run = 0; run < 4; ++run) {
    Transfer(*busy_, Filled(*busy_, 1000, 0), out);
    busy_->Recurring("copy", [&] {
      { const Tensor block(DType::kI32, {1000}, Device::kCuda); }
      Transfer(*busy_, in, out);
    });
    const Tensor got = TransferTo(*busy_, out, Device::kCpu);
    EXPECT_EQ(got.data<int32_t>()[999], 5) << "run " << run;
  }
}

TEST_F(CudaMemoryTest, MoreThanThereIsIsRefusedAndWhatIsFreeServesWhateverAsks) {
  EXPECT_THROW(Tensor(DType::kU8, {int64_t{1} << 39}, Device::kCuda), ResourceExhausted);
  // Each takes more than a third of any GPU up to 96 GB, if the one before is really given back.
  for (int i = 0; i < 4; ++i) {
    const Tensor large(DType::kU8, {int64_t{30} << 30}, Device::kCuda);
  }
  cuda::GrowingMemory memory(0);
  EXPECT_TRUE(memory.GrowTo(size_t{60} << 30));
}

TEST_F(CudaMemoryTest, AStreamMayEndBeforeWhatItUsed) {
  const Tensor from = Filled(*busy_, kMany, 1), to(DType::kI32, {kMany}, Device::kCuda);
  const Tensor late(DType::kI32, {1000}, Device::kCuda);
  {
    const Tensor block = Filled(*busy_, 1000, 7);
    KeepBusy(*busy_, from, to);
    Transfer(*busy_, block, late);
    busy_.reset();
  }
  for (int i = 0; i < 4; ++i) const Tensor block = Filled(*other_, 1000, -1);
  EXPECT_EQ(Placed(late.view(), Device::kCpu).data<int32_t>()[500], 7);
}

}  // namespace
}  // namespace sluice
