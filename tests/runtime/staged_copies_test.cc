#include "runtime/staged_copies.h"

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "runtime/transfer.h"
#include "tests/support/gpu_testing.h"

namespace sluice {
namespace {

using ::sluice::testing::SkippedWithout;

class StagedCopiesTest : public ::testing::TestWithParam<Device> {
 protected:
  void SetUp() override {
    if (SkippedWithout(GetParam())) return;
    ctx_ = std::make_unique<ExecContext>(ExecOptions{.device = GetParam()});
  }
  // Piece `i`: so many numbers from 1000 i on.
  static int64_t Length(int i) { return 1 + 7919 * i % 30'000; }
  static std::vector<int32_t> Piece(int i) {
    std::vector<int32_t> numbers(Length(i));
    std::iota(numbers.begin(), numbers.end(), 1000 * i);
    return numbers;
  }
  void Send(StagedCopies& copies, int i, std::vector<int>& arrived) {
    const int64_t bytes = Length(i) * static_cast<int64_t>(sizeof(int32_t));
    copies.Send(
        *ctx_, bytes,
        [&](TensorView there) {
          const std::vector<int32_t> numbers = Piece(i);
          Transfer(*ctx_, ConstTensorView(numbers.data(), DType::kU8, {bytes}), there);
        },
        [&arrived, i](std::span<const uint8_t> got) {
          const std::vector<int32_t> want = Piece(i);
          ASSERT_EQ(got.size(), want.size() * sizeof(int32_t));
          EXPECT_EQ(std::memcmp(got.data(), want.data(), got.size()), 0) << i;
          arrived.push_back(i);
        });
  }
  std::unique_ptr<ExecContext> ctx_;
};

TEST_P(StagedCopiesTest, EveryPieceArrivesOnceAndInOrder) {
  // Many times around a ring, which at first grows.
  for (const int64_t most : {int64_t{1} << 17, int64_t{3} << 20}) {
    StagedCopies copies(GetParam(), most);
    std::vector<int> arrived, want(300);
    std::iota(want.begin(), want.end(), 0);
    for (const int i : want) {
      Send(copies, i, arrived);
      if (i % 70 == 0) copies.Collect();
    }
    copies.Settle();
    EXPECT_EQ(arrived, want);
    EXPECT_LE(copies.SizeBytes(), GetParam() == Device::kCpu ? 0 : most);
  }
}

TEST_P(StagedCopiesTest, APieceLargerThanTheRingMakesItLarger) {
  StagedCopies copies(GetParam(), 1000);
  std::vector<int> arrived;
  for (const int i : {3, 2, 1}) Send(copies, i, arrived);
  copies.Settle();
  EXPECT_EQ(arrived, (std::vector<int>{3, 2, 1}));
}

TEST_P(StagedCopiesTest, WhatIsBroughtIsThereForWhatIsQueuedNext) {
  StagedCopies copies(GetParam(), 1 << 17);
  std::vector<Tensor> results;
  std::vector<int> arrived;
  for (int i = 0; i < 100; ++i) {
    const std::vector<int32_t> numbers = Piece(i);
    const int64_t bytes = Length(i) * static_cast<int64_t>(sizeof(int32_t));
    results.emplace_back(DType::kU8, Shape{bytes}, GetParam());
    copies.Bring(
        *ctx_, bytes,
        [&](std::span<uint8_t> here) { std::memcpy(here.data(), numbers.data(), bytes); },
        [&](ConstTensorView there) { Transfer(*ctx_, there, results.back()); });
    if (i % 9 == 0) Send(copies, i, arrived);
  }
  for (int i = 0; i < 100; ++i) {
    const Tensor got = TransferTo(*ctx_, results[i], Device::kCpu);
    EXPECT_EQ(std::memcmp(got.data<uint8_t>(), Piece(i).data(), got.SizeBytes()), 0) << i;
  }
  copies.Settle();
  EXPECT_EQ(arrived.size(), 12u);
}

TEST_P(StagedCopiesTest, AnEndWithPiecesOnTheirWayIsNoTrouble) {
  std::vector<int> arrived;
  for (int round = 0; round < 5; ++round) {
    StagedCopies copies(GetParam(), 1 << 20);
    for (int i = 0; i < 20; ++i) Send(copies, i, arrived);
  }
  ctx_->Synchronize();
  StagedCopies idle(GetParam(), 1 << 20);
  idle.Collect();
  idle.Settle();
  EXPECT_EQ(idle.SizeBytes(), 0);
}

INSTANTIATE_TEST_SUITE_P(Devices, StagedCopiesTest, ::testing::Values(Device::kCpu, Device::kCuda),
                         [](const auto& info) { return Name(info.param); });

}  // namespace
}  // namespace sluice
