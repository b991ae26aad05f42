// Products of many rows of bf16 that are multiplied as f32.
#include "runtime/ops/bf16_rows.h"

#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <random>
#include <string>

#include "runtime/ops/cpu/linear.h"
#include "runtime/ops/linear.h"

namespace sluice {
namespace {

Tensor Random(std::mt19937& random, Shape shape, DType dtype) {
  std::normal_distribution<float> normal(0, 1);
  Tensor x(DType::kF32, shape);
  for (int64_t i = 0; i < shape.NumElements(); ++i) x.data<float>()[i] = normal(random);
  return ConvertTo(x, dtype);
}

TEST(Bf16RowsTest, WidenedProductsEqualTheReference) {
  std::mt19937 random(7);
  ExecContext plain({.num_threads = 1, .kernels = KernelChoice::kReference}),
      fast({.num_threads = 1});
  struct Case {
    int64_t m, n, k;
  };
  // Blocks and pairs that are full and that are not; more outputs than a strip holds.
  for (const Case& c :
       {Case{13, 64, 32}, Case{17, 100, 33}, Case{20, 321, 70}, Case{5, 330, 900}}) {
    const auto weight = std::make_shared<Tensor>(Random(random, {c.n, c.k}, DType::kBF16));
    const LinearWeight packed({*weight, weight, nullptr}, Random(random, {c.n}, DType::kF32),
                              Device::kCpu);
    const Tensor x = Random(random, {c.m, c.k}, DType::kBF16);
    for (const DType out : {DType::kF32, DType::kBF16}) {
      for (const LinearOptions& options :
           {LinearOptions{}, LinearOptions{.activation = Activation::kGeluTanh},
            LinearOptions{.accumulate = true}}) {
        if (options.accumulate && out != DType::kF32) continue;
        const Tensor before = Random(random, {c.m, c.n}, out);
        Tensor expected = ConvertTo(before, out), got = ConvertTo(before, out);
        Linear(plain, x, packed, expected, options);
        RunMany(fast, /*widened=*/true, x, packed, got, options);
        const Tensor a = ConvertTo(expected, DType::kF32), b = ConvertTo(got, DType::kF32);
        // Sums of K products in another order; bf16 results may round to the other side.
        const double tolerance = out == DType::kBF16 ? 0.01 : 1e-5;
        for (int64_t i = 0; i < c.m * c.n; ++i) {
          const float want = a.data<float>()[i];
          ASSERT_NEAR(b.data<float>()[i], want, tolerance * (std::abs(want) + std::sqrt(c.k)))
              << c.m << " x " << c.n << " x " << c.k << " at " << i;
        }
      }
    }
  }
}

TEST(Bf16RowsTest, OnlyManyRowsOfBf16AreWidenedAndOnlyWhereThatIsFaster) {
  for (const Bf16Rows rows : {Bf16Rows::kWidened, Bf16Rows::kPlain}) {
    EXPECT_TRUE(WidensRows(13, DType::kBF16, rows));
    EXPECT_TRUE(WidensRows(729, DType::kBF16, rows));
    EXPECT_FALSE(WidensRows(12, DType::kBF16, rows)) << "few rows wait for memory";
    EXPECT_FALSE(WidensRows(729, DType::kF32, rows));
  }
  EXPECT_FALSE(WidensRows(729, DType::kBF16, Bf16Rows::kAmx));
  EXPECT_FALSE(WidensRows(729, DType::kBF16, Bf16Rows::kNative));
}

TEST(Bf16RowsTest, TheChoiceIsMadeOnceAndFitsTheMachine) {
  const Bf16Rows rows = FastestBf16Rows();
  EXPECT_EQ(FastestBf16Rows(), rows);
  EXPECT_EQ(rows == Bf16Rows::kPlain, !OneDnnHasBf16());
  EXPECT_FALSE(std::string(Name(rows)).empty());
}

}  // namespace
}  // namespace sluice
