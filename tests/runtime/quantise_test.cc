#include "runtime/ops/quantise.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "runtime/error.h"
#include "tests/support/tensor_testing.h"

namespace sluice {
namespace {

using ::sluice::testing::At;
using ::sluice::testing::RandomTensor;
using ::testing::HasSubstr;

constexpr WeightFormat kFormats[] = {WeightFormat::kFp8, WeightFormat::kInt8};

TEST(E4m3Test, ReadsTheNumbersOfTheFormat) {
  EXPECT_EQ(E4m3{0x00}.ToFloat(), 0);
  EXPECT_EQ(E4m3{0x01}.ToFloat(), std::ldexp(1.0f, -9));  // the smallest
  EXPECT_EQ(E4m3{0x08}.ToFloat(), std::ldexp(1.0f, -6));  // the smallest normal one
  EXPECT_EQ(E4m3{0x38}.ToFloat(), 1);
  EXPECT_EQ(E4m3{0x7e}.ToFloat(), 448);
  EXPECT_EQ(E4m3{0xfe}.ToFloat(), -448);
  EXPECT_TRUE(std::isnan(E4m3{0x7f}.ToFloat()));
}

TEST(E4m3Test, RoundsToTheNearestAndTiesToEven) {
  for (int code = 0; code < 0x7e; ++code) {
    const auto bits = static_cast<uint8_t>(code), next = static_cast<uint8_t>(code + 1);
    const float low = E4m3{bits}.ToFloat(), high = E4m3{next}.ToFloat();
    const float middle = (low + high) / 2;  // exact
    SCOPED_TRACE(low);
    EXPECT_EQ(E4m3::From(low).bits, bits);
    EXPECT_EQ(E4m3::From(middle).bits, bits % 2 == 0 ? bits : next);
    EXPECT_EQ(E4m3::From(std::nextafter(middle, 0.0f)).bits, bits);
    EXPECT_EQ(E4m3::From(std::nextafter(middle, 1e3f)).bits, next);
    EXPECT_EQ(E4m3::From(-std::nextafter(middle, 1e3f)).bits, next | 0x80);
  }
}

TEST(E4m3Test, StaysFinite) {
  for (const float large : {448.5f, 464.0f, 1e30f, INFINITY}) {
    EXPECT_EQ(E4m3::From(large).ToFloat(), 448);
    EXPECT_EQ(E4m3::From(-large).ToFloat(), -448);
  }
  EXPECT_TRUE(std::isnan(E4m3::From(std::nanf("")).ToFloat()));
}

TEST(QuantiseTest, KeepsEveryValueWithinHalfAStep) {
  ExecContext ctx({});
  constexpr int64_t kRows = 5, kColumns = 131;
  const Tensor x = RandomTensor(DType::kBF16, {kRows, kColumns + 3}, 1);
  for (const WeightFormat format : kFormats) {
    const Tensor q(StorageOf(format), {kRows, kColumns + 13}), factors(DType::kF32, {kRows});
    QuantiseRows(ctx, x.view().Columns(0, kColumns), format, q, factors);
    const auto* const bytes = static_cast<const uint8_t*>(q.view().raw());
    for (int64_t m = 0; m < kRows; ++m) {
      double amax = 0;
      for (int64_t i = 0; i < kColumns; ++i) amax = std::max(amax, std::abs(At(x, m, i)));
      const double factor = factors.data<float>()[m];
      EXPECT_NEAR(factor, amax / LargestOf(format), 1e-7 * amax);
      for (int64_t i = 0; i < q.dim(1); ++i) {
        const uint8_t bits = bytes[m * q.dim(1) + i];
        const double value =
            format == WeightFormat::kFp8 ? E4m3{bits}.ToFloat() : static_cast<int8_t>(bits);
        const double want = i < kColumns ? At(x, m, i) : 0;
        // Three bits of mantissa: half a step is 2^-4 of the value, or of the smallest normal one.
        const double step = format == WeightFormat::kFp8
                                ? std::max(std::abs(want) / 8, factor * std::ldexp(1.0, -9))
                                : factor;
        EXPECT_NEAR(value * factor, want, 0.5001 * step) << m << ", " << i;
      }
    }
  }
}

TEST(QuantiseTest, TakesRowsOfZerosAndRefusesWhatDoesNotFit) {
  ExecContext ctx({});
  const Tensor x(DType::kBF16, {1, 4}), q(DType::kU8, {1, 4}), factors(DType::kF32, {1});
  for (int i = 0; i < 4; ++i) x.data<BFloat16>()[i] = BFloat16::From(0);
  QuantiseRows(ctx, x, WeightFormat::kFp8, q, factors);
  EXPECT_GT(factors.data<float>()[0], 0);
  EXPECT_EQ(q.data<uint8_t>()[3], 0);

  const auto refused = [&](ConstTensorView from, WeightFormat format, TensorView to) {
    try {
      QuantiseRows(ctx, from, format, to, factors);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_THAT(refused(x, WeightFormat::kPlain, q), HasSubstr("got plain"));
  EXPECT_THAT(refused(x, WeightFormat::kInt8, q), HasSubstr("i8, got [1, 4] u8"));
  EXPECT_THAT(refused(Tensor(DType::kF32, {1, 4}), WeightFormat::kFp8, q), HasSubstr("bf16, got"));
  EXPECT_THAT(refused(x, WeightFormat::kFp8, Tensor(DType::kU8, {1, 3})), HasSubstr("at least 4"));
}

}  // namespace
}  // namespace sluice
