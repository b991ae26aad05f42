// Norms, activations and rope against plain loops in f64.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "runtime/ops/activation.h"
#include "runtime/ops/norm.h"
#include "runtime/ops/rope.h"
#include "tests/support/tensor_testing.h"

namespace sluice {
namespace {

using ::sluice::testing::At;
using ::sluice::testing::ExpectClose;
using ::sluice::testing::RandomTensor;
using ::sluice::testing::RotaryFrequencies;
using ::sluice::testing::Strided;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

// Rows and widths: one, odd, prime, below and above a vector, and those of real models.
const std::pair<int64_t, int64_t> kSizes[] = {{1, 1},    {1, 7},    {3, 16},    {2, 17},
                                              {5, 37},   {1, 896},  {49, 320},  {4, 1152},
                                              {2, 4304}, {729, 33}, {196, 256}, {7, 3584}};

// In f32 a handful of operations round to 6e-8 each, and a sum of D squares to some 1e-7 of itself.
// In bf16 the result is rounded once: at most 2^-8 = 4e-3 of an element (bits are compared after
// the f32 value, so an element may fall to the other side of a tie).
double Relative(DType y) { return y == DType::kF32 ? 1e-6 : 4e-3; }
double PerElement(DType y) { return y == DType::kF32 ? 2e-6 : 4.1e-3; }

std::string Print(int64_t m, int64_t d, DType dtype) {
  return Shape{m, d}.ToString() + " " + Name(dtype);
}

class ElementwiseTest : public ::testing::TestWithParam<std::tuple<DType, KernelChoice>> {
 protected:
  DType dtype() const { return std::get<0>(GetParam()); }
  ExecContext context_{{.num_threads = 2, .kernels = std::get<1>(GetParam())}};
};

INSTANTIATE_TEST_SUITE_P(AllKernels, ElementwiseTest,
                         ::testing::Combine(::testing::Values(DType::kF32, DType::kBF16),
                                            ::testing::Values(KernelChoice::kFast,
                                                              KernelChoice::kReference)),
                         [](const auto& info) {
                           const bool fast = std::get<1>(info.param) == KernelChoice::kFast;
                           return std::string(Name(std::get<0>(info.param))) +
                                  (fast ? "_fast" : "_reference");
                         });

std::vector<double> ExpectedNorm(ConstTensorView x, ConstTensorView weight, const Tensor& bias,
                                 double eps) {
  std::vector<double> y;
  const int64_t d = x.dim(1);
  for (int64_t m = 0; m < x.dim(0); ++m) {
    double mean = 0, square = 0;
    for (int64_t i = 0; i < d && !bias.empty(); ++i) mean += At(x, m, i) / d;
    for (int64_t i = 0; i < d; ++i) square += std::pow(At(x, m, i) - mean, 2) / d;
    for (int64_t i = 0; i < d; ++i) {
      y.push_back((At(x, m, i) - mean) / std::sqrt(square + eps) * At(weight, 0, i) +
                  (bias.empty() ? 0 : At(bias, 0, i)));
    }
  }
  return y;
}

TEST_P(ElementwiseTest, RmsNormAgreesWithAPlainLoop) {
  for (const auto& [m, d] : kSizes) {
    const Tensor x = RandomTensor(DType::kF32, {m, d}, 1, 4);
    const Tensor weight = RandomTensor(DType::kF32, {d}, 2), y(dtype(), {m, d});
    RmsNorm(context_, x, weight, 1e-6f, y);
    ExpectClose(y, ExpectedNorm(x, weight, Tensor(), 1e-6), Relative(dtype()), PerElement(dtype()),
                Print(m, d, dtype()));
  }
}

TEST_P(ElementwiseTest, LayerNormOfASumIsThatOfTheSummedRows) {
  for (const int64_t width : {7, 64, 72, 1152}) {
    const Tensor x = RandomTensor(DType::kF32, {9, width}, 1);
    const Tensor more = RandomTensor(DType::kF32, {9, width}, 2);
    const Tensor weight = RandomTensor(DType::kF32, {width}, 3);
    const Tensor bias = RandomTensor(DType::kF32, {width}, 4);
    const Tensor sum(DType::kF32, x.shape()), want(DType::kBF16, x.shape()),
        got(DType::kBF16, x.shape());
    for (int64_t i = 0; i < 9 * width; ++i) {
      sum.data<float>()[i] = x.data<float>()[i] + more.data<float>()[i];
    }
    LayerNorm(context_, sum, weight, bias, 1e-6f, want);
    LayerNorm(context_, x, weight, bias, 1e-6f, got, more);
    EXPECT_EQ(std::memcmp(got.view().raw(), want.view().raw(), got.SizeBytes()), 0) << width;
  }
}

TEST_P(ElementwiseTest, LayerNormAgreesWithAPlainLoopFarFromZero) {
  for (const auto& [m, d] : kSizes) {
    // A mean of ten deviations would cost a one-pass variance two digits.
    const Tensor x = RandomTensor(DType::kF32, {m, d}, 1);
    for (int64_t i = 0; i < m * d; ++i) x.data<float>()[i] += 10;
    const Tensor weight = RandomTensor(DType::kF32, {d}, 2),
                 bias = RandomTensor(DType::kF32, {d}, 3);
    const Tensor y(dtype(), {m, d});
    LayerNorm(context_, x, weight, bias, 1e-6f, y);
    // x - mean keeps the rounding of mean: 10 * 6e-8 against deviations of one.
    const double more = dtype() == DType::kF32 ? 3 : 1;
    ExpectClose(y, ExpectedNorm(x, weight, bias, 1e-6), more * Relative(dtype()),
                more * PerElement(dtype()), Print(m, d, dtype()));
  }
}

TEST_P(ElementwiseTest, NormsReadAndWriteRowsThatLieApart) {
  const Tensor from = RandomTensor(DType::kF32, {5, 50}, 4), to = RandomTensor(dtype(), {5, 60}, 5);
  const Tensor before = to.Clone();
  const Tensor weight = RandomTensor(DType::kF32, {40}, 6);
  const TensorView x = Strided(from, 5, 40, 10), y = Strided(to, 5, 40, 20);
  RmsNorm(context_, x, weight, 1e-5f, y);
  ExpectClose(y, ExpectedNorm(x, weight, Tensor(), 1e-5), Relative(dtype()), PerElement(dtype()),
              "strided");
  for (int64_t m = 0; m < 5; ++m) {
    for (int64_t i = 40; i < 60; ++i) EXPECT_EQ(At(to, m, i), At(before, m, i));
  }
}

TEST_P(ElementwiseTest, NormOfZerosIsFinite) {
  Tensor x(DType::kF32, {1, 20});
  for (int i = 0; i < 20; ++i) x.data<float>()[i] = 0;
  const Tensor weight = RandomTensor(DType::kF32, {20}, 1), y(dtype(), {1, 20});
  RmsNorm(context_, x, weight, 1e-6f, y);
  for (int i = 0; i < 20; ++i) EXPECT_EQ(At(y, 0, i), 0);
}

TEST_P(ElementwiseTest, SiluMulAgreesWithAPlainLoop) {
  for (const auto& [m, d] : kSizes) {
    // Gates beyond +-88 are where e^x leaves f32.
    const Tensor gate_up = RandomTensor(dtype(), {m, 2 * d}, 1, 40);
    std::vector<double> want;
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < d; ++j) {
        const double gate = At(gate_up, i, j);
        want.push_back(gate / (1 + std::exp(-gate)) * At(gate_up, i, d + j));
      }
    }
    for (DType y_dtype : {DType::kF32, DType::kBF16}) {
      const Tensor y(y_dtype, {m, d});
      SiluMul(context_, gate_up, y);
      ExpectClose(y, want, Relative(y_dtype), PerElement(y_dtype), Print(m, d, dtype()));
    }
  }
}

TEST_P(ElementwiseTest, RopeAgreesWithAPlainLoop) {
  for (int head_dim : {2, 6, 64, 72, 128}) {
    const int64_t half = head_dim / 2, heads = 3, rows = 9;
    const Tensor inv_freq = RotaryFrequencies(head_dim, 1e6);
    // Small, at the end of a long context, and beyond where the vector path is exact.
    const std::vector<int32_t> positions = {0, 1, 2, 1000, 4097, 32767, 38999, 39001, 65535};
    const Tensor storage = RandomTensor(dtype(), {rows, heads * head_dim + 5}, 3);
    const TensorView x = Strided(storage, rows, heads * head_dim, 5);
    std::vector<double> want;
    for (int64_t s = 0; s < rows; ++s) {
      for (int64_t c = 0; c < heads * head_dim; ++c) {
        const int64_t i = c % head_dim % half;
        const bool first = c % head_dim < half;
        // The angle is a product in f32, by definition of the models.
        const double angle = static_cast<float>(positions[s]) * inv_freq.data<float>()[i];
        const double other = first ? -At(x, s, c + half) : At(x, s, c - half);
        want.push_back(At(x, s, c) * std::cos(angle) + other * std::sin(angle));
      }
    }
    Rope(context_, x, head_dim, positions, inv_freq);
    ExpectClose(x, want, Relative(dtype()), PerElement(dtype()), std::to_string(head_dim));
  }
}

// Days of video: the angles are those of exact arithmetic, and turning back gives what was there.
TEST_P(ElementwiseTest, RopeIsExactAtAnyPositionAndTurnsBack) {
  constexpr int kHeadDim = 16, kHalf = kHeadDim / 2;
  const std::vector<int32_t> positions = {65536, 100'000, 10'000'000, 2'000'000'000,
                                          -2'000'000'000};
  const auto rows = static_cast<int64_t>(positions.size());
  const Tensor inv_freq = RotaryFrequencies(kHeadDim, 1e4);
  const Tensor x = RandomTensor(dtype(), {rows, kHeadDim}, 3);
  std::vector<double> want, before;
  for (int64_t s = 0; s < rows; ++s) {
    for (int64_t c = 0; c < kHeadDim; ++c) {
      const long double angle =
          std::fmod(static_cast<long double>(positions[s]) * inv_freq.data<float>()[c % kHalf],
                    2 * 3.141592653589793238462643383279502884L);
      const double other = c < kHalf ? -At(x, s, c + kHalf) : At(x, s, c - kHalf);
      want.push_back(static_cast<double>(At(x, s, c) * std::cos(angle) + other * std::sin(angle)));
      before.push_back(At(x, s, c));
    }
  }
  Rope(context_, x, kHeadDim, positions, inv_freq);
  // The product of 31 and 24 bits in double: off by 2.4e-7 at most.
  ExpectClose(x, want, Relative(dtype()) + 1e-6, PerElement(dtype()) + 1e-6, "there");
  std::vector<int32_t> back;
  for (const int32_t position : positions) back.push_back(-position);
  Rope(context_, x, kHeadDim, back, inv_freq);
  ExpectClose(x, before, 2 * Relative(dtype()), 2 * PerElement(dtype()), "back");
}

TEST(SoftmaxTest, AgreesWithAPlainLoopAndSumsToOne) {
  for (KernelChoice kernels : {KernelChoice::kFast, KernelChoice::kReference}) {
    ExecContext context({.num_threads = 2, .kernels = kernels});
    for (const auto& [m, d] : kSizes) {
      const Tensor x = RandomTensor(DType::kF32, {m, d}, 1, 30);
      std::vector<double> want;
      for (int64_t i = 0; i < m; ++i) {
        double sum = 0, top = -1e300;
        for (int64_t j = 0; j < d; ++j) top = std::max(top, At(x, i, j));
        for (int64_t j = 0; j < d; ++j) sum += std::exp(At(x, i, j) - top);
        for (int64_t j = 0; j < d; ++j) want.push_back(std::exp(At(x, i, j) - top) / sum);
      }
      Softmax(context, x);
      ExpectClose(x, want, 1e-6, 2e-6, Print(m, d, DType::kF32));
    }
  }
}

TEST(SoftmaxTest, GivesNothingToMinusInfinity) {
  ExecContext context({});
  Tensor x = RandomTensor(DType::kF32, {1, 19}, 1);
  x.data<float>()[0] = x.data<float>()[18] = -std::numeric_limits<float>::infinity();
  Softmax(context, x);
  EXPECT_EQ(At(x, 0, 0), 0);
  EXPECT_EQ(At(x, 0, 18), 0);
  double sum = 0;
  for (int i = 0; i < 19; ++i) sum += At(x, 0, i);
  EXPECT_NEAR(sum, 1, 1e-6);
}

TEST(ElementwiseErrorTest, NamesPlaceExpectedAndFound) {
  ExecContext context({});
  const Tensor x(DType::kF32, {2, 8}), y(DType::kBF16, {2, 8}), eight(DType::kF32, {8});
  const Tensor four(DType::kF32, {4}), half(DType::kBF16, {2, 8});
  EXPECT_THAT([&] { RmsNorm(context, x, four, 1e-6f, y); },
              ThrowsMessage<Error>("[rms_norm] weight must be [8] f32, got [4] f32"));
  EXPECT_THAT([&] { RmsNorm(context, half, eight, 1e-6f, y); },
              ThrowsMessage<Error>("[rms_norm] x must be [M, D] f32, got [2, 8] bf16"));
  EXPECT_THAT([&] { LayerNorm(context, x, eight, four, 1e-6f, y); },
              ThrowsMessage<Error>("[layer_norm] bias must be [8] f32, got [4] f32"));
  EXPECT_THAT(
      [&] {
        LayerNorm(context, x, eight, eight, 1e-6f, Tensor(DType::kF32, {2, 4}));
      },
      ThrowsMessage<Error>("[layer_norm] y must be [2, 8] f32 or bf16, got [2, 4] f32"));
  EXPECT_THAT(
      [&] {
        SiluMul(context, Tensor(DType::kF32, {2, 7}), x);
      },
      ThrowsMessage<Error>("[silu_mul] gate_up must be [M, 2I] f32 or bf16, got [2, 7] f32"));
  EXPECT_THAT([&] { SiluMul(context, x, y); },
              ThrowsMessage<Error>("[silu_mul] y must be [2, 4] f32 or bf16, got [2, 8] bf16"));
  EXPECT_THAT([&] { Softmax(context, y); },
              ThrowsMessage<Error>("[softmax] x must be [M, N] f32, got [2, 8] bf16"));
  const std::vector<int32_t> positions = {1, 2};
  EXPECT_THAT([&] { Rope(context, x, 3, positions, four); },
              ThrowsMessage<Error>(HasSubstr("got 3")));
  EXPECT_THAT([&] { Rope(context, x, 6, positions, four); },
              ThrowsMessage<Error>(HasSubstr("[S, heads * 6] f32 or bf16, got [2, 8] f32")));
  EXPECT_THAT(
      [&] {
        Rope(context, x, 8, {positions.data(), 1}, four);
      },
      ThrowsMessage<Error>(HasSubstr("one for each of 2 rows, got 1")));
  EXPECT_THAT([&] { Rope(context, x, 4, positions, four); },
              ThrowsMessage<Error>(HasSubstr("inv_freq must be [2] f32, got [4] f32")));
}

}  // namespace
}  // namespace sluice
