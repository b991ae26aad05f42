// Products on the GPU with weights in bf16 and in 8 bits, against products in double precision.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "runtime/ops/cuda/linear_few.h"
#include "runtime/ops/linear.h"
#include "runtime/ops/quantise.h"
#include "tests/support/gpu_testing.h"
#include "tests/support/tensor_testing.h"

namespace sluice {
namespace {

using ::sluice::testing::At;
using ::sluice::testing::ExpectClose;
using ::sluice::testing::GpuTest;
using ::sluice::testing::RandomTensor;
using ::sluice::testing::Values;

constexpr WeightFormat kFormats[] = {WeightFormat::kFp8, WeightFormat::kInt8};
constexpr Activation kActivations[] = {Activation::kNone, Activation::kGeluTanh,
                                       Activation::kGeluErf, Activation::kQuickGelu,
                                       Activation::kSiluMul};

TEST(GpuLinearTest, FewRowsGoToTheKernelThatReadsTheWeightOnce) {
  const auto choose = [](int64_t m, int64_t k, WeightFormat format, bool aligned = true,
                         Activation activation = Activation::kNone) {
    return std::string(Name(ChooseGpuLinear(m, 896, k, aligned, DType::kBF16, format, activation)));
  };
  EXPECT_EQ(choose(1, 896, WeightFormat::kPlain), "few_rows");
  EXPECT_EQ(choose(1, 896, WeightFormat::kFp8), "few_rows");
  EXPECT_EQ(choose(4, 896, WeightFormat::kInt8, true, Activation::kSiluMul), "few_rows");
  EXPECT_EQ(choose(16, 896, WeightFormat::kPlain), "few_rows");
  EXPECT_EQ(choose(17, 896, WeightFormat::kPlain), "cublas");
  EXPECT_EQ(choose(2, 18944, WeightFormat::kPlain), "few_rows");
  EXPECT_EQ(choose(3, 18944, WeightFormat::kPlain), "cublas");
  EXPECT_EQ(choose(3, 18944, WeightFormat::kFp8), "few_rows");
  EXPECT_EQ(choose(196, 896, WeightFormat::kPlain), "cublas");
  EXPECT_EQ(choose(196, 896, WeightFormat::kFp8), "cublas_fp8");
  EXPECT_EQ(choose(196, 896, WeightFormat::kInt8), "cublas_int8");
  // What it does not take.
  EXPECT_EQ(choose(1, 900, WeightFormat::kPlain), "cublas");
  EXPECT_EQ(choose(1, 904, WeightFormat::kPlain), "few_rows");
  EXPECT_EQ(choose(1, 904, WeightFormat::kFp8), "cublas_fp8");
  EXPECT_EQ(choose(1, 896, WeightFormat::kInt8, false), "cublas_int8");
  EXPECT_EQ(choose(1, 896, WeightFormat::kInt8, true, Activation::kGeluErf), "cublas_int8");
  EXPECT_STREQ(Name(ChooseGpuLinear(1, 896, 896, true, DType::kF32, WeightFormat::kPlain,
                                    Activation::kNone)),
               "cublas");
}

TEST(GpuLinearTest, LargeWeightsAreCutByOutputsAndSmallOnesByInputsToo) {
  const auto choose = [](int64_t n, int64_t k, WeightFormat format, bool silu_mul) {
    const cuda::FewRowsLaunch launch = cuda::ChooseFewRows(n, k, format, silu_mul);
    return std::pair(launch.outputs, launch.splits);
  };
  using Cut = std::pair<int, int>;  // outputs of a warp, warps that share them
  EXPECT_EQ(choose(151936, 896, WeightFormat::kPlain, false), Cut(4, 1));
  EXPECT_EQ(choose(37888, 3584, WeightFormat::kFp8, true), Cut(4, 1));
  EXPECT_EQ(choose(3584, 18944, WeightFormat::kFp8, false), Cut(4, 2));
  EXPECT_EQ(choose(4608, 3584, WeightFormat::kPlain, false), Cut(2, 1));
  EXPECT_EQ(choose(896, 4864, WeightFormat::kInt8, false), Cut(1, 2));
  EXPECT_EQ(choose(896, 4864, WeightFormat::kPlain, false), Cut(1, 4));
  EXPECT_EQ(choose(896, 896, WeightFormat::kPlain, false), Cut(1, 1));
  EXPECT_EQ(choose(16, 64, WeightFormat::kInt8, false), Cut(1, 1));
  EXPECT_EQ(choose(16, 64, WeightFormat::kInt8, true), Cut(2, 1));
}

class CudaLinearTest : public GpuTest {
 protected:
  static bool Runs(WeightFormat format) {
    return format != WeightFormat::kFp8 || cuda::ComputeCapability() >= 89;
  }
  static SharedMatrix Share(Tensor tensor) {
    const auto keeper = std::make_shared<Tensor>(std::move(tensor));
    return {*keeper, keeper, nullptr};
  }

  // [M, K] doubles.
  using Matrix = std::vector<double>;
  // What is left of x in a format.
  Matrix Quantised(ConstTensorView x, WeightFormat format) {
    if (format == WeightFormat::kPlain) return Values(x);
    const Tensor q(StorageOf(format), x.shape()), factors(DType::kF32, {x.dim(0)});
    QuantiseRows(reference_, x, format, q, factors);
    Matrix values;
    const auto* const bytes = static_cast<const uint8_t*>(q.view().raw());
    for (int64_t i = 0; i < x.dim(0); ++i) {
      for (int64_t j = 0; j < x.dim(1); ++j) {
        const uint8_t bits = bytes[i * x.dim(1) + j];
        values.push_back(double{factors.data<float>()[i]} * (format == WeightFormat::kFp8
                                                                 ? E4m3{bits}.ToFloat()
                                                                 : static_cast<int8_t>(bits)));
      }
    }
    return values;
  }
  static double Activated(Activation activation, double x) {
    switch (activation) {
      case Activation::kGeluTanh:
        return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
      case Activation::kGeluErf:
        return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
      case Activation::kQuickGelu:
        return x / (1 + std::exp(-1.702 * x));
      case Activation::kSiluMul:
        return x / (1 + std::exp(-x));
      case Activation::kNone:
        break;
    }
    return x;
  }
  // act(x w^T + bias) + before; bias and before may be empty.
  static Matrix Product(const Matrix& x, const Matrix& w, int64_t k, const Tensor& bias,
                        Activation activation, const Matrix& before) {
    const auto m = static_cast<int64_t>(x.size()) / k, n = static_cast<int64_t>(w.size()) / k;
    const bool paired = activation == Activation::kSiluMul;
    const int64_t outputs = paired ? n / 2 : n;
    const auto dot = [&](int64_t row, int64_t output) {
      double sum = bias.empty() ? 0 : bias.data<float>()[output];
      for (int64_t i = 0; i < k; ++i) sum += x[row * k + i] * w[output * k + i];
      return sum;
    };
    Matrix y;
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t output = 0; output < outputs; ++output) {
        double value = Activated(activation, dot(row, output));
        if (paired) value *= dot(row, outputs + output);
        y.push_back(value + (before.empty() ? 0 : before[row * outputs + output]));
      }
    }
    return y;
  }
};

TEST_F(CudaLinearTest, QuantisersEqualTheReferenceBitForBit) {
  for (const auto& [m, k] : {std::pair<int64_t, int64_t>{1, 1},
                             {3, 7},
                             {2, 37},
                             {5, 48},
                             {196, 896},
                             {33, 1152},
                             {7, 4304},
                             {2, 18944},
                             {3, 4099}}) {
    for (const int64_t gap : {0, 3, 8}) {
      for (const float deviation : {1.0f, 1e-30f, 1e25f}) {
        const Tensor x =
            RandomTensor(DType::kBF16, {m, k + gap}, static_cast<uint32_t>(k + gap), deviation);
        // A row of zeros, of both signs; halves of steps; one large value among small ones.
        BFloat16* const values = x.data<BFloat16>();
        for (int64_t i = 0; i < k && m > 1; ++i) values[i] = BFloat16::From(i % 2 ? 0.f : -0.f);
        for (int64_t i = 0; i < k && m > 2; ++i) {
          values[(m - 1) * (k + gap) + i] =
              BFloat16::From(deviation * (i == 0 ? 448.f : static_cast<float>(i % 96 - 48) / 4));
        }
        const Tensor gx = There(x);
        for (const WeightFormat format : kFormats) {
          for (const int64_t width : {k, (k + 15) / 16 * 16}) {
            const Tensor want(StorageOf(format), {m, width}), want_factors(DType::kF32, {m});
            const Tensor got(StorageOf(format), {m, width}, Device::kCuda);
            const Tensor got_factors(DType::kF32, {m}, Device::kCuda);
            QuantiseRows(reference_, x.view().Columns(0, k), format, want, want_factors);
            QuantiseRows(*gpu_, gx.view().Columns(0, k), format, got, got_factors);
            const Tensor back = Here(got), back_factors = Here(got_factors);
            const auto bytes = [](const Tensor& t) {
              const auto* const first = static_cast<const uint8_t*>(t.view().raw());
              return std::vector<uint8_t>(first, first + t.SizeBytes());
            };
            const std::vector<uint8_t> a = bytes(back), b = bytes(want);
            for (size_t i = 0; i < a.size(); ++i) {
              ASSERT_EQ(int{a[i]}, int{b[i]})
                  << Name(format) << " " << m << " x " << k << " gap " << gap << " deviation "
                  << deviation << " at " << i / width << ", " << i % width << " of "
                  << At(x, static_cast<int64_t>(i) / width, static_cast<int64_t>(i) % width);
            }
            ASSERT_EQ(bytes(back_factors), bytes(want_factors)) << Name(format) << " " << k;
          }
        }
      }
    }
  }
}

TEST_F(CudaLinearTest, ProductsEqualThoseOfWhatQuantisingLeaves) {
  struct Size {
    int64_t m, n, k;
  };
  // Rows on both sides of every bound, odd and prime sizes, widths that are padded, more outputs
  // than one wave of blocks takes, sizes of models.
  const Size sizes[] = {{1, 896, 896},   {1, 40, 4864},  {2, 34, 48},     {3, 130, 1600},
                        {4, 72, 320},    {8, 38, 896},   {9, 256, 64},    {65, 64, 896},
                        {16, 50, 4864},  {17, 40, 48},   {5, 38, 37},     {3, 6, 1},
                        {33, 34, 37},    {49, 320, 320}, {100, 66, 1152}, {64, 128, 4304},
                        {12, 200, 1600}, {16, 2200, 64}, {7, 2, 16},      {2, 20006, 64}};
  for (const auto& [m, n, k] : sizes) {
    // Products of about 1, so that activations bend.
    const Tensor x = RandomTensor(DType::kBF16, {m, k + 8}, 1), gx = There(x);
    const ConstTensorView rows = x.view().Columns(0, k), grows = gx.view().Columns(0, k);
    const Tensor w = RandomTensor(DType::kBF16, {n, k}, 2, 1 / std::sqrt(static_cast<float>(k)));
    for (const WeightFormat format :
         {WeightFormat::kPlain, WeightFormat::kFp8, WeightFormat::kInt8}) {
      if (!Runs(format)) continue;
      for (const bool biased : {false, true}) {
        const auto bias = [&, n = n] {
          return biased ? RandomTensor(DType::kF32, {n}, 3) : Tensor();
        };
        const LinearWeight weight(Share(w.Clone()), bias(), {Device::kCuda, format});
        for (const Activation activation : kActivations) {
          const bool few = ChooseGpuLinear(m, n, k, true, DType::kBF16, format, activation) ==
                           GpuLinearKernel::kFewRows;
          const Matrix left = Quantised(rows, few ? WeightFormat::kPlain : format);
          const Matrix right = Quantised(w, format);
          const bool paired = activation == Activation::kSiluMul;
          for (const DType out : {DType::kF32, DType::kBF16}) {
            for (const bool accumulate : {false, true}) {
              if (accumulate && (activation != Activation::kNone || out != DType::kF32)) continue;
              const Tensor before = RandomTensor(out, {m, paired ? n / 2 : n}, 4);
              const Tensor got = There(before);
              Linear(*gpu_, grows, weight, got,
                     {.activation = activation, .accumulate = accumulate});
              const Matrix want = Product(left, right, k, bias(), activation,
                                          accumulate ? Values(before) : Matrix());
              // Sums in f32 of exact products in another order. Those of e4m3 through cuBLASLt are
              // measured to lose 2.2e-4, and their bias, up to 4, is rounded by 2^-9. Results in
              // bf16 are rounded likewise, and so are gate | up there.
              const bool in_fp8 = format == WeightFormat::kFp8 && !few;
              double tolerance = in_fp8 ? (biased ? 1e-2 : 1e-3) : 2e-5;
              if (out == DType::kBF16) tolerance += 1e-2;
              if (paired && !few && format != WeightFormat::kInt8) tolerance += 1.6e-2;
              const std::string what =
                  std::string(Name(format)) + " " + std::to_string(m) + " x " + std::to_string(n) +
                  " x " + std::to_string(k) + " activation " +
                  std::to_string(static_cast<int>(activation)) + " to " + Name(out) +
                  (biased ? " biased" : "") + (accumulate ? " accumulating" : "");
              ExpectClose(Here(got), want, tolerance, tolerance, what);
            }
          }
        }
      }
    }
  }
}

TEST_F(CudaLinearTest, ProductsOfRowsThatAreNormalisedFirstEqualThoseAfterANorm) {
  struct Size {
    int64_t m, n, k;
  };
  // Rows and widths that the kernels take and some that they do not; with parts of K that share
  // outputs, and warps that K leaves nothing to read; more outputs than one wave of blocks takes,
  // with such parts and without.
  for (const auto& [m, n, k] :
       {Size{1, 40, 896}, Size{1, 896, 4864}, Size{2, 34, 48}, Size{3, 130, 1600},
        Size{4, 72, 3584}, Size{4, 16, 4864}, Size{1, 6, 904}, Size{2, 50, 37}, Size{9, 64, 896},
        Size{1, 7906, 2048}, Size{2, 20006, 48}, Size{16, 2214, 496}, Size{8, 4306, 112},
        Size{8, 64, 896}, Size{16, 42, 512}, Size{16, 42, 528}, Size{17, 42, 64}}) {
    const Tensor x = RandomTensor(DType::kF32, {m, k + 4}, 1, 30), gx = There(x);
    const Tensor norm = RandomTensor(DType::kF32, {k}, 5), gnorm = There(norm);
    const Tensor w = RandomTensor(DType::kBF16, {n, k}, 2, 1 / std::sqrt(static_cast<float>(k)));
    constexpr double kEps = 1e-3;
    Matrix rows = Values(x.view().Columns(0, k));
    for (int64_t row = 0; row < m; ++row) {
      double squares = 0;
      for (int64_t i = 0; i < k; ++i) squares += rows[row * k + i] * rows[row * k + i];
      const double factor = 1 / std::sqrt(squares / static_cast<double>(k) + kEps);
      for (int64_t i = 0; i < k; ++i) rows[row * k + i] *= factor * norm.data<float>()[i];
    }
    for (const WeightFormat format :
         {WeightFormat::kPlain, WeightFormat::kFp8, WeightFormat::kInt8}) {
      if (!Runs(format)) continue;
      const Tensor bias = RandomTensor(DType::kF32, {n}, 3);
      const LinearWeight weight(Share(w.Clone()), bias.Clone(), {Device::kCuda, format});
      for (const Activation activation : {Activation::kNone, Activation::kSiluMul}) {
        const Tensor got(DType::kF32, {m, activation == Activation::kNone ? n : n / 2},
                         Device::kCuda);
        Linear(*gpu_, gx.view().Columns(0, k), weight, got,
               {.activation = activation, .rms_norm = gnorm, .rms_eps = kEps});
        const Matrix want = Product(rows, Quantised(w, format), k, bias, activation, {});
        // Each of K products of about 1 / sqrt(K) is off by its row's rounding, 2^-9 at most and
        // 2^-9 / sqrt(3) in the mean: the sum by as much, five times that for the worst of all, and
        // three times again where gates and ups meet. Rows in 8 bits are off by up to 8 and in the
        // mean 2.6 %, and biases by 2^-9.
        const bool few = ChooseGpuLinear(m, n, k, true, DType::kBF16, format, activation) ==
                         GpuLinearKernel::kFewRows;
        const bool quantised = !few && format != WeightFormat::kPlain;
        const bool paired = activation == Activation::kSiluMul;
        const double tolerance = (quantised ? 0.15 : few ? 6e-3 : 2e-2) * (paired ? 3 : 1);
        ExpectClose(Here(got), want, tolerance, tolerance,
                    std::string(Name(format)) + " " + std::to_string(m) + " x " +
                        std::to_string(n) + " x " + std::to_string(k) + " activation " +
                        std::to_string(static_cast<int>(activation)));
      }
    }
  }
}

TEST_F(CudaLinearTest, EightBitsLoseOfRandomProductsWhatTheirMantissaTells) {
  // Of normal numbers e4m3 loses a step's uniform error, 2^-3 / sqrt(12) of a number's power of
  // two: 2.6 % of the number in the mean; int8 loses 1 / sqrt(12) of a step of amax / 127, amax
  // about 3.5 deviations: 0.8 %. Products of K numbers lose as much of their size as the numbers,
  // and if both sides are quantised sqrt(2) times that. A quarter more for chance.
  constexpr int64_t kOutputs = 512, kInputs = 1600;
  const Tensor w = RandomTensor(DType::kBF16, {kOutputs, kInputs}, 1);
  const LinearWeight plain(Share(w.Clone()), Tensor(), Device::kCuda);
  for (const WeightFormat format : kFormats) {
    if (!Runs(format)) continue;
    const LinearWeight narrow(Share(w.Clone()), Tensor(), {Device::kCuda, format});
    for (const int64_t m : {int64_t{1}, int64_t{4}, int64_t{200}}) {
      const Tensor x = There(RandomTensor(DType::kBF16, {m, kInputs}, 2));
      const Tensor want(DType::kF32, {m, kOutputs}, Device::kCuda);
      const Tensor got(DType::kF32, {m, kOutputs}, Device::kCuda);
      Linear(*gpu_, x, plain, want);
      Linear(*gpu_, x, narrow, got);
      const Matrix a = Values(Here(got)), b = Values(Here(want));
      double error = 0, norm = 0;
      for (size_t i = 0; i < a.size(); ++i) {
        error += (a[i] - b[i]) * (a[i] - b[i]);
        norm += b[i] * b[i];
      }
      const double of_one = format == WeightFormat::kFp8 ? 0.026 : 0.008;
      const double relative = std::sqrt(error / norm);
      EXPECT_LE(relative, 1.25 * of_one * (m > 16 ? std::sqrt(2.0) : 1))
          << Name(format) << " " << m;
      EXPECT_GE(relative, of_one / 2) << Name(format) << " " << m;
    }
  }
}

TEST_F(CudaLinearTest, PartsOfAWeightGiveThePartsOfItsProduct) {
  constexpr int64_t kOutputs = 150, kInputs = 72;
  const Tensor w = RandomTensor(DType::kBF16, {kOutputs, kInputs}, 1);
  for (const WeightFormat format : kFormats) {
    if (!Runs(format)) continue;
    const LinearWeight weight(Share(w.Clone()), RandomTensor(DType::kF32, {kOutputs}, 2),
                              {Device::kCuda, format});
    EXPECT_EQ(weight.SizeBytes(), size_t{kOutputs * 80 + kOutputs * 4 + kOutputs * (4 + 2)});
    for (const int64_t m : {3, 40}) {
      const Tensor x = There(RandomTensor(DType::kBF16, {m, kInputs}, 3));
      const Tensor whole(DType::kF32, {m, kOutputs}, Device::kCuda);
      Linear(*gpu_, x, weight, whole);
      for (const auto& [begin, end] :
           {std::pair<int64_t, int64_t>{0, 64}, {64, 150}, {7, 40}, {149, 150}}) {
        const LinearWeight part = weight.Outputs(begin, end);
        EXPECT_EQ(part.format(), format);
        const Tensor y(DType::kF32, {m, end - begin}, Device::kCuda);
        Linear(*gpu_, x, part, y);
        // fp8 may be summed in another order where the library takes another tile.
        ExpectClose(Here(y), Values(Here(whole.view()).view().Columns(begin, end)), 1e-3, 1e-3,
                    std::string(Name(format)) + " " + std::to_string(begin));
      }
    }
  }
}

TEST_F(CudaLinearTest, StackedWeightsAreQuantisedAsApart) {
  constexpr int64_t kInputs = 64;
  const Tensor a = RandomTensor(DType::kBF16, {24, kInputs}, 1);
  const Tensor b = RandomTensor(DType::kBF16, {40, kInputs}, 2, 100);
  const Tensor x = There(RandomTensor(DType::kBF16, {2, kInputs}, 3));
  for (const WeightFormat format : kFormats) {
    if (!Runs(format)) continue;
    const WeightPlace place(Device::kCuda, format);
    const LinearWeight both = LinearWeight::Stack({Share(a.Clone()), Share(b.Clone())}, {}, place);
    const LinearWeight second(Share(b.Clone()), Tensor(), place);
    const Tensor together(DType::kF32, {2, 64}, Device::kCuda);
    const Tensor apart(DType::kF32, {2, 40}, Device::kCuda);
    Linear(*gpu_, x, both, together);
    Linear(*gpu_, x, second, apart);
    EXPECT_EQ(Values(Here(together).view().Columns(24, 64)), Values(Here(apart)));
  }
}

}  // namespace
}  // namespace sluice
