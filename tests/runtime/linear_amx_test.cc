// The AMX product against the reference over shapes that do not fill tiles, chunks or parts of K.
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "runtime/ops/cpu/amx.h"
#include "runtime/ops/cpu/linear.h"

namespace sluice {
namespace {

struct Case {
  int64_t m, n, k;
  DType y = DType::kBF16;
  LinearOptions options = {};
  bool bias = true;
  int threads = 2;
};

Tensor Random(DType dtype, Shape shape, uint32_t seed, float deviation) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0, deviation);
  Tensor x(DType::kF32, shape);
  for (int64_t i = 0; i < shape.NumElements(); ++i) x.data<float>()[i] = normal(generator);
  return ConvertTo(x, dtype);
}

float At(const Tensor& x, int64_t i) {
  return x.dtype() == DType::kF32 ? x.data<float>()[i] : x.data<BFloat16>()[i].ToFloat();
}

void Check(const Case& c) {
  const Tensor weight = Random(DType::kBF16, {c.n, c.k}, 1, 1 / std::sqrt(float(c.k)));
  const int64_t blocks = (c.n + kPackedOutputs - 1) / kPackedOutputs;
  const int64_t padded_k = (c.k + kPackedInputs - 1) / kPackedInputs * kPackedInputs;
  Tensor packed(DType::kBF16, {blocks * kPackedOutputs * padded_k});
  std::fill_n(packed.data<BFloat16>(), packed.shape().NumElements(), BFloat16{0});
  PackRows(weight.view().raw(), 0, c.n, c.k, packed.data<BFloat16>());

  const Tensor x = Random(DType::kBF16, {c.m, c.k}, 2, 1);
  const Tensor bias = Random(DType::kF32, {c.n}, 3, 1);
  const Tensor before = Random(c.y, {c.m, c.n}, 4, 1);
  const Tensor got = before.Clone(), want = before.Clone();
  LinearArgs args{.m = c.m,
                  .n = c.n,
                  .k = c.k,
                  .x = x,
                  .weight = packed.view().raw(),
                  .dtype = DType::kBF16,
                  .bias = c.bias ? bias.data<float>() : nullptr,
                  .y = got,
                  .options = c.options};
  ExecContext ctx({.num_threads = c.threads});
  LinearAmx(ctx, args);
  args.y = want;
  LinearReference(args);

  double error = 0, norm = 0, worst = 0;
  int64_t where = 0;
  for (int64_t i = 0; i < c.m * c.n; ++i) {
    const double a = At(got, i), b = At(want, i);
    error += (a - b) * (a - b);
    norm += b * b;
    if (!(std::abs(a - b) <= worst)) {
      worst = std::abs(a - b);
      where = i;
    }
  }
  // Products of bf16 are exact in f32, so only the order of additions differs: some ulps of f32,
  // and in bf16 the few results (or, behind an activation good to 8e-5, one in 50) that round to
  // the other side.
  const double tolerance = c.y == DType::kF32 ? 4e-6 : 1.5e-3;
  EXPECT_LE(std::sqrt(error / norm), tolerance)
      << c.m << " x " << c.n << " x " << c.k << " " << Name(c.y) << " activation "
      << static_cast<int>(c.options.activation) << " accumulate " << c.options.accumulate
      << ": element [" << where / c.n << ", " << where % c.n << "] is " << At(got, where)
      << ", expected " << At(want, where);
}

class LinearAmxTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!cpu::AmxAllowed()) GTEST_SKIP() << "no AMX here";
  }
};

TEST_F(LinearAmxTest, EqualsTheReferenceOverRowsThatDoNotFillTiles) {
  for (int64_t m : {1, 5, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 129, 196}) {
    Check({.m = m, .n = 96, .k = 64});
    Check({.m = m, .n = 96, .k = 70, .y = DType::kF32, .options = {.accumulate = true}});
  }
}

TEST_F(LinearAmxTest, EqualsTheReferenceOverOutputsAndInputsThatDoNotFillTiles) {
  for (int64_t n : {1, 15, 16, 31, 33, 63, 64, 65, 130}) {
    for (int64_t k : {1, 2, 31, 32, 33, 48, 100}) {
      Check({.m = 40, .n = n, .k = k, .threads = 3});
      Check({.m = 7, .n = n, .k = k, .y = DType::kF32, .bias = false});
    }
  }
}

TEST_F(LinearAmxTest, EqualsTheReferenceWithEveryActivationAndResult) {
  for (DType y : {DType::kF32, DType::kBF16}) {
    for (Activation activation :
         {Activation::kNone, Activation::kGeluTanh, Activation::kGeluErf, Activation::kQuickGelu}) {
      for (bool bias : {false, true}) {
        Check({.m = 50,
               .n = 80,
               .k = 90,
               .y = y,
               .options = {.activation = activation},
               .bias = bias});
      }
    }
  }
}

// Deep enough for several blocks of K, and (in f32) for several parts.
TEST_F(LinearAmxTest, EqualsTheReferenceAtDepthsThatAreCut) {
  for (int64_t k : {1152, 1153, 2064, 4304}) {
    Check({.m = 70, .n = 72, .k = k});
    Check({.m = 70, .n = 72, .k = k, .y = DType::kF32});
    Check({.m = 150, .n = 72, .k = k, .y = DType::kF32, .options = {.accumulate = true}});
  }
}

// Several chunks of outputs for a thread, whose boundaries do not fall on blocks of 64.
TEST_F(LinearAmxTest, EqualsTheReferenceOverManyOutputs) {
  Check({.m = 140, .n = 1000, .k = 256, .threads = 1});
  Check({.m = 33, .n = 1000, .k = 100, .threads = 3});
}

// Against the product, rounded to bf16, and SiLU of that: two more roundings of 2^-9.
TEST_F(LinearAmxTest, GatesAsTheProductAndSiluMulDo) {
  for (int64_t inner : {16, 48, 64, 960, 20}) {
    for (int64_t m : {2, 16, 70}) {
      for (DType y : {DType::kBF16, DType::kF32}) {
        SharedMatrix matrix;
        auto keeper = std::make_shared<Tensor>(Random(DType::kBF16, {2 * inner, 200}, 1, 0.1f));
        matrix.view = *keeper;
        matrix.keeper = keeper;
        const LinearWeight weight(matrix, Random(DType::kF32, {2 * inner}, 3, 1));
        const Tensor x = Random(DType::kBF16, {m, 200}, 2, 1);
        const Tensor got(y, {m, inner}), want(y, {m, inner});
        ExecContext ctx({.num_threads = 2});
        ExecContext reference({.num_threads = 1, .kernels = KernelChoice::kReference});
        Linear(ctx, x, weight, got, {.activation = Activation::kSiluMul});
        Linear(reference, x, weight, want, {.activation = Activation::kSiluMul});
        double error = 0, norm = 0;
        for (int64_t i = 0; i < m * inner; ++i) {
          error += std::pow(double(At(got, i)) - At(want, i), 2);
          norm += std::pow(double(At(want, i)), 2);
        }
        EXPECT_LE(std::sqrt(error / norm), 5e-3) << m << " x " << inner << " " << Name(y);
      }
    }
  }
}

TEST_F(LinearAmxTest, ResultsDoNotDependOnTheNumberOfThreads) {
  for (int threads : {1, 2, 7, 64}) Check({.m = 100, .n = 160, .k = 300, .threads = threads});
}

}  // namespace
}  // namespace sluice
