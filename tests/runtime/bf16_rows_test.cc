// Products of bf16 on vectors: what many rows take where bf16 is not the faster type, and few rows
// everywhere.
#include "runtime/ops/bf16_rows.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "runtime/ops/cpu/amx.h"
#include "runtime/ops/cpu/linear.h"
#include "tests/support/instruction_sets.h"
#include "tests/support/tensor_testing.h"

namespace sluice {
namespace {

using ::sluice::testing::At;
using ::sluice::testing::ExpectClose;
using ::sluice::testing::OnEveryInstructionSet;
using ::sluice::testing::RandomTensor;
using ::sluice::testing::Values;

// A product of [M, K] rows with a [N, K] weight and a bias, all random.
struct Problem {
  Problem(int64_t m_rows, int64_t outputs, int64_t inputs)
      : m(m_rows), n(outputs), k(inputs), packed((n + 63) / 64 * 64 * ((k + 31) / 32 * 32)) {
    PackRows(weight.view().raw(), 0, n, k, packed.data());
  }

  // y = act(x W^T + b) of rows [begin, end).
  LinearArgs Args(int64_t begin, int64_t end, TensorView y,
                  const LinearOptions& options = {}) const {
    return {.m = end - begin,
            .n = n,
            .k = k,
            .x = x.view().Slice(begin, end),
            .weight = packed.data(),
            .dtype = DType::kBF16,
            .bias = bias.data<float>(),
            .y = y,
            .options = options};
  }

  std::string Print() const {
    return std::to_string(m) + " x " + std::to_string(n) + " x " + std::to_string(k);
  }

  int64_t m, n, k;
  Tensor weight = RandomTensor(DType::kBF16, {n, k}, 1), x = RandomTensor(DType::kBF16, {m, k}, 2);
  Tensor bias = RandomTensor(DType::kF32, {n}, 3);
  std::vector<BFloat16> packed;
};

bool SameBits(const Tensor& a, const Tensor& b) {
  return a.SizeBytes() == b.SizeBytes() &&
         std::memcmp(a.view().raw(), b.view().raw(), a.SizeBytes()) == 0;
}

// Every height of a tile; groups of tiles; blocks, strips and passes over inputs that are full, one
// short, one over; odd numbers of inputs.
const std::vector<Problem>& AwkwardProblems() {
  static const std::vector<Problem> problems = [] {
    std::vector<Problem> made;
    for (int64_t m = 1; m <= 13; ++m) made.emplace_back(m, 97, 2 * m + 1);
    for (const auto& [m, n, k] : {std::array<int64_t, 3>{1, 1, 1},
                                  {3, 31, 127},
                                  {6, 64, 128},
                                  {5, 65, 129},
                                  {2, 191, 257},
                                  {48, 33, 64},
                                  {49, 32, 66},
                                  {100, 130, 31},
                                  {7, 64, 300}}) {
      made.emplace_back(m, n, k);
    }
    return made;
  }();
  return problems;
}

TEST(Bf16RowsTest, EverySumIsThatOfAPlainLoopOnEveryInstructionSet) {
  ExecContext ctx({.num_threads = 2});
  for (const Problem& problem : AwkwardProblems()) {
    // A product of two bf16 numbers is exact in f32, so the order of sums decides every bit.
    const Tensor want(DType::kF32, {problem.m, problem.n});
    for (int64_t m = 0; m < problem.m; ++m) {
      for (int64_t n = 0; n < problem.n; ++n) {
        float sum = 0;
        for (int64_t k = 0; k < problem.k; ++k) {
          sum += static_cast<float>(At(problem.x, m, k) * At(problem.weight, n, k));
        }
        want.data<float>()[m * problem.n + n] = sum + problem.bias.data<float>()[n];
      }
    }
    OnEveryInstructionSet([&] {
      const Tensor y(DType::kF32, {problem.m, problem.n});
      LinearVector(ctx, problem.Args(0, problem.m, y));
      EXPECT_TRUE(SameBits(y, want)) << problem.Print();
    });
  }
}

TEST(Bf16RowsTest, FinishesAsTheReferenceDoes) {
  ExecContext ctx({.num_threads = 2});
  for (const Problem& problem : AwkwardProblems()) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      for (const LinearOptions& options :
           {LinearOptions{}, LinearOptions{.activation = Activation::kGeluTanh},
            LinearOptions{.activation = Activation::kGeluErf},
            LinearOptions{.activation = Activation::kQuickGelu},
            LinearOptions{.accumulate = true}}) {
        if (options.accumulate && dtype != DType::kF32) continue;
        const Tensor got = RandomTensor(dtype, {problem.m, problem.n}, 4), want = got.Clone();
        LinearVector(ctx, problem.Args(0, problem.m, got, options));
        LinearReference(problem.Args(0, problem.m, want, options));
        // Sums in another order; a result in bf16 may round to the other side, 2^-8 of it.
        const bool f32 = dtype == DType::kF32;
        ExpectClose(got, Values(want), f32 ? 2e-6 : 4e-3, f32 ? 1e-5 : 8e-3, problem.Print());
      }
    }
  }
}

TEST(Bf16RowsTest, AnyNumberOfThreadsAndAnyBatchGivesTheSameBits) {
  for (const auto& [m, n, k] :
       {std::array<int64_t, 3>{50, 200, 140}, {13, 330, 900}, {197, 70, 64}}) {
    const Problem problem(m, n, k);
    const LinearOptions options{.activation = Activation::kGeluTanh};
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      ExecContext single({.num_threads = 1});
      const Tensor want(dtype, {m, n});
      LinearVector(single, problem.Args(0, m, want, options));
      for (const int threads : {2, 3}) {
        ExecContext ctx({.num_threads = threads});
        const Tensor y(dtype, {m, n});
        LinearVector(ctx, problem.Args(0, m, y, options));
        EXPECT_TRUE(SameBits(y, want)) << problem.Print() << " on " << threads << " threads";
      }
      ExecContext ctx({.num_threads = 2});
      for (const int64_t batch : {1, 2, 5, 11}) {
        const Tensor y(dtype, {m, n});
        for (int64_t begin = 0; begin < m; begin += batch) {
          const int64_t end = std::min(begin + batch, m);
          LinearVector(ctx, problem.Args(begin, end, y.view().Slice(begin, end), options));
        }
        EXPECT_TRUE(SameBits(y, want)) << problem.Print() << " in batches of " << batch;
      }
    }
  }
}

TEST(Bf16RowsTest, NativeBf16MustBeClearlyFasterToBeTaken) {
  EXPECT_EQ(ChooseBf16Rows(1.0, 0.6), Bf16Rows::kWidened);
  EXPECT_EQ(ChooseBf16Rows(1.0, 1.0), Bf16Rows::kWidened);
  EXPECT_EQ(ChooseBf16Rows(1.0, 1.2), Bf16Rows::kWidened) << "a tie with noise";
  EXPECT_EQ(ChooseBf16Rows(1.0, 1.6), Bf16Rows::kNative);
}

TEST(Bf16RowsTest, TheChoiceIsMadeOnceAndFitsTheMachine) {
  const Bf16Rows rows = FastestBf16Rows();
  EXPECT_EQ(FastestBf16Rows(), rows);
  EXPECT_EQ(rows == Bf16Rows::kAmx, cpu::AmxAllowed());
  if (rows != Bf16Rows::kAmx) {
    EXPECT_EQ(rows == Bf16Rows::kPlain, !OneDnnHasBf16());
  }
  EXPECT_STRNE(Name(rows), "?");
}

}  // namespace
}  // namespace sluice
