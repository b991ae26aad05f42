#include "runtime/tensor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "runtime/convert.h"
#include "runtime/error.h"
#include "tests/support/tensor_testing.h"

namespace sluice {
namespace {

using ::sluice::testing::RandomTensor;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

TEST(ShapeTest, CountsElementsAndPrints) {
  EXPECT_EQ(Shape({2, 3, 5}).NumElements(), 30);
  EXPECT_EQ(Shape().NumElements(), 1);
  EXPECT_EQ(Shape({4, 0}).NumElements(), 0);
  EXPECT_EQ(Shape({196, 256}).ToString(), "[196, 256]");
  EXPECT_EQ(Shape().ToString(), "[]");
}

TEST(ShapeTest, RefusesRankFiveNegativeAndOverflowingSizes) {
  EXPECT_THAT([] { Shape({1, 2, 3, 4, 5}); }, ThrowsMessage<InputError>(HasSubstr("got 5")));
  EXPECT_THAT([] { Shape({2, -3}); }, ThrowsMessage<InputError>(HasSubstr("got -3")));
  EXPECT_THROW(Shape({int64_t{1} << 40, int64_t{1} << 40}), InputError);
}

TEST(TensorTest, OwnsAlignedMemoryAndMovesIt) {
  Tensor a(DType::kF32, {3, 7});
  EXPECT_EQ(reinterpret_cast<uintptr_t>(a.data<float>()) % 64, 0u);
  EXPECT_EQ(a.SizeBytes(), 84u);
  const float* memory = a.data<float>();
  const Tensor b = std::move(a);
  EXPECT_EQ(b.data<float>(), memory);
  EXPECT_TRUE(a.empty());  // NOLINT(bugprone-use-after-move): a moved tensor is empty
  EXPECT_EQ(a.SizeBytes(), 0u);
}

TEST(TensorTest, HoldsNothingInZeroElements) {
  const Tensor a(DType::kBF16, {0, 7});
  EXPECT_FALSE(a.empty());
  EXPECT_EQ(a.SizeBytes(), 0u);
}

TEST(TensorTest, SaysWhenThereIsNoMemory) {
  EXPECT_THAT([] { Tensor(DType::kF32, {int64_t{1} << 60}); },
              ThrowsMessage<ResourceExhausted>(HasSubstr("[1152921504606846976] f32")));
}

TEST(TensorTest, ClonesItsElements) {
  const Tensor a = RandomTensor(DType::kF32, {5, 3}, 1);
  const Tensor b = a.Clone();
  EXPECT_NE(a.data<float>(), b.data<float>());
  EXPECT_EQ(std::memcmp(a.data<float>(), b.data<float>(), a.SizeBytes()), 0);
  EXPECT_TRUE(Tensor().Clone().empty());
}

TEST(TensorViewTest, RefusesAnotherElementType) {
  const Tensor a(DType::kBF16, {2});
  EXPECT_THAT([&] { a.data<float>(); }, ThrowsMessage<Error>(HasSubstr("read as bf16, got f32")));
}

TEST(TensorViewTest, SlicesRowsAndColumnsOfStridedRows) {
  Tensor storage(DType::kF32, {4 * 6});
  for (int i = 0; i < 24; ++i) storage.data<float>()[i] = static_cast<float>(i);
  const TensorView x(storage.data<float>(), DType::kF32, {4, 5}, 6);
  EXPECT_FALSE(x.contiguous());
  const TensorView rows = x.Slice(1, 3);
  EXPECT_EQ(rows.shape(), Shape({2, 5}));
  EXPECT_EQ(rows.data<float>()[0], 6);
  const TensorView part = rows.Columns(2, 4);
  EXPECT_EQ(part.shape(), Shape({2, 2}));
  EXPECT_EQ(part.stride0(), 6);
  EXPECT_EQ(part.data<float>()[part.stride0()], 14);
  EXPECT_TRUE(x.Slice(2, 3).contiguous());
  EXPECT_EQ(x.Slice(4, 4).dim(0), 0);
}

TEST(TensorViewTest, RefusesRangesOutside) {
  const Tensor a(DType::kF32, {4, 5});
  EXPECT_THAT([&] { a.view().Slice(2, 5); },
              ThrowsMessage<Error>(HasSubstr("axis 0 of [4, 5], got [2, 5)")));
  EXPECT_THROW(a.view().Slice(-1, 2), Error);
  EXPECT_THROW(a.view().Slice(3, 2), Error);
  EXPECT_THROW(a.view().Columns(0, 6), Error);
  EXPECT_THROW(Tensor(DType::kF32, {4}).view().Columns(0, 1), Error);
}

TEST(BFloat16Test, RoundsToNearestEvenAndKeepsNaN) {
  EXPECT_EQ(BFloat16::From(1.0f).bits, 0x3f80);
  EXPECT_EQ(BFloat16::From(1.00390625f).bits, 0x3f80);  // 1 + 2^-8, halfway: to even, down
  EXPECT_EQ(BFloat16::From(1.01171875f).bits, 0x3f82);  // 1 + 3 * 2^-8, halfway: to even, up
  EXPECT_TRUE(std::isnan(BFloat16::From(std::numeric_limits<float>::quiet_NaN()).ToFloat()));
  EXPECT_TRUE(std::isnan(BFloat16::From(std::bit_cast<float>(0x7f800001u)).ToFloat()));
  EXPECT_EQ(BFloat16::From(std::numeric_limits<float>::max()).bits, 0x7f80);  // to infinity
}

// Values that are hard to round, and enough of them for whole vectors and a rest.
std::vector<float> AwkwardValues() {
  std::vector<float> values = {0.f,      -0.f,      1.f,         1.00390625f, 1.01171875f, 65504.f,
                               65520.f,  1e30f,     -1e-30f,     6e-8f,       5.96e-8f,    3e-8f,
                               1e-40f,   0.1f,      -2.7182817f, 3.1415927f,  0.33333334f, 1e5f,
                               INFINITY, -INFINITY, NAN};
  const Tensor random = RandomTensor(DType::kF32, {50}, 5, 100);
  values.insert(values.end(), random.data<float>(), random.data<float>() + 50);
  return values;
}

template <typename From, typename To>
void CheckConversion(DType from_dtype, DType to_dtype, const std::vector<From>& from,
                     const std::vector<To>& want) {
  // Every length, so that every rest of a vector occurs; at an odd address, as in mapped files.
  for (size_t count = 1; count <= from.size(); ++count) {
    std::vector<char> source(count * sizeof(From) + 1), target(count * sizeof(To) + 2, 0x5a);
    std::memcpy(source.data() + 1, from.data(), count * sizeof(From));
    ConvertElements(source.data() + 1, from_dtype, target.data() + 1, to_dtype, count);
    EXPECT_EQ(target[0], 0x5a);
    EXPECT_EQ(target[count * sizeof(To) + 1], 0x5a) << "writes behind " << count;
    for (size_t i = 0; i < count; ++i) {
      To got;
      std::memcpy(&got, target.data() + 1 + i * sizeof(To), sizeof(To));
      if constexpr (std::is_same_v<To, float>) {
        if (std::isnan(want[i]) && std::isnan(got)) continue;
        ASSERT_EQ(std::bit_cast<uint32_t>(got), std::bit_cast<uint32_t>(want[i])) << i;
      } else {
        if (std::isnan(want[i].ToFloat()) && std::isnan(got.ToFloat())) continue;
        ASSERT_EQ(got.bits, want[i].bits) << "element " << i << " of " << count;
      }
    }
  }
}

TEST(ConvertTest, AgreesWithScalarConversionBetweenAllFloatTypes) {
  const std::vector<float> values = AwkwardValues();
  std::vector<BFloat16> bf16;
  std::vector<Float16> f16, f16_of_bf16;
  std::vector<float> of_bf16, of_f16;
  std::vector<BFloat16> bf16_of_f16;
  for (float v : values) {
    bf16.push_back(BFloat16::From(v));
    f16.push_back(Float16::From(v));
    of_bf16.push_back(bf16.back().ToFloat());
    of_f16.push_back(f16.back().ToFloat());
    f16_of_bf16.push_back(Float16::From(of_bf16.back()));
    bf16_of_f16.push_back(BFloat16::From(of_f16.back()));
  }
  CheckConversion(DType::kF32, DType::kBF16, values, bf16);
  CheckConversion(DType::kF32, DType::kF16, values, f16);
  CheckConversion(DType::kBF16, DType::kF32, bf16, of_bf16);
  CheckConversion(DType::kF16, DType::kF32, f16, of_f16);
  CheckConversion(DType::kBF16, DType::kF16, bf16, f16_of_bf16);
  CheckConversion(DType::kF16, DType::kBF16, f16, bf16_of_f16);
}

TEST(ConvertTest, CopiesStridedRowsOfAnyRank) {
  const Tensor storage = RandomTensor(DType::kF32, {3 * 20}, 9);
  const ConstTensorView from(storage.data<float>(), DType::kF32, {3, 2, 4}, 20);
  const Tensor to = ConvertTo(from, DType::kBF16);
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 8; ++j) {
      EXPECT_EQ(to.data<BFloat16>()[i * 8 + j].bits,
                BFloat16::From(storage.data<float>()[i * 20 + j]).bits);
    }
  }
}

TEST(ConvertTest, RefusesIntegersAndOtherShapes) {
  const Tensor bytes(DType::kU8, {4}), floats(DType::kF32, {4}), more(DType::kF32, {5});
  EXPECT_THAT([&] { ConvertInto(bytes, floats); }, ThrowsMessage<Error>(HasSubstr("u8")));
  EXPECT_THAT([&] { ConvertInto(floats, more); }, ThrowsMessage<Error>(HasSubstr("[4] and [5]")));
}

}  // namespace
}  // namespace sluice
