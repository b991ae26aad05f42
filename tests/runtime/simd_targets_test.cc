// Every SIMD kernel on every instruction set this machine has: a laptop without AVX-512 must get
// the same answers, and nobody tests on all of them.
#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "runtime/convert.h"
#include "runtime/ops/activation.h"
#include "runtime/ops/cpu/linear.h"
#include "runtime/ops/norm.h"
#include "runtime/ops/rope.h"
#include "tests/support/instruction_sets.h"
#include "tests/support/tensor_testing.h"

namespace sluice {
namespace {

using ::sluice::testing::ExpectClose;
using ::sluice::testing::OnEveryInstructionSet;
using ::sluice::testing::RandomTensor;

std::vector<double> Values(const Tensor& tensor) {
  const Tensor wide = ConvertTo(tensor, DType::kF32);
  return {wide.data<float>(), wide.data<float>() + wide.shape().NumElements()};
}

class SimdTargetsTest : public ::testing::Test {
 protected:
  // Tolerances as in the tests of the ops: f32 by its own rounding, bf16 by one rounding to 8 bits.
  static double Tolerance(DType dtype) { return dtype == DType::kF32 ? 3e-6 : 4.1e-3; }

  ExecContext fast_{{.num_threads = 2}};
  ExecContext reference_{{.kernels = KernelChoice::kReference}};
};

TEST_F(SimdTargetsTest, MatrixVectorProductsAgreeWithTheReference) {
  OnEveryInstructionSet([&] {
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      for (int64_t m : {1, 2, 3, 4, 7}) {
        for (const auto& [n, k] : {std::pair<int64_t, int64_t>{1, 1}, {70, 45}, {200, 320}}) {
          const Tensor w = RandomTensor(dtype, {n, k}, 1), x = RandomTensor(dtype, {m, k}, 2);
          const Tensor bias = RandomTensor(DType::kF32, {n}, 3);
          std::vector<BFloat16> packed((n + 63) / 64 * 64 * ((k + 31) / 32 * 32));
          if (dtype == DType::kBF16) PackRows(w.view().raw(), 0, n, k, packed.data());
          const Tensor y(dtype, {m, n}), want(dtype, {m, n});
          LinearArgs args{.m = m,
                          .n = n,
                          .k = k,
                          .x = x,
                          .weight = dtype == DType::kF32 ? w.view().raw() : packed.data(),
                          .dtype = dtype,
                          .bias = bias.data<float>(),
                          .y = y,
                          .options = {.activation = Activation::kGeluTanh}};
          LinearVector(fast_, args);
          args.y = want;
          LinearReference(args);
          // The reference rounds as well: two values next to a tie may differ by one step.
          ExpectClose(y, Values(want), Tolerance(dtype), 2 * Tolerance(dtype), Name(dtype));
        }
      }
    }
  });
}

TEST_F(SimdTargetsTest, NormsAgreeWithTheReference) {
  OnEveryInstructionSet([&] {
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      for (int64_t d : {1, 37, 320}) {
        const Tensor x = RandomTensor(DType::kF32, {5, d}, 1);
        const Tensor weight = RandomTensor(DType::kF32, {d}, 2);
        const Tensor bias = RandomTensor(DType::kF32, {d}, 3), y(dtype, {5, d}),
                     want(dtype, {5, d});
        LayerNorm(fast_, x, weight, bias, 1e-5f, y);
        LayerNorm(reference_, x, weight, bias, 1e-5f, want);
        ExpectClose(y, Values(want), Tolerance(dtype), 2 * Tolerance(dtype), Name(dtype));
        RmsNorm(fast_, x, weight, 1e-5f, y);
        RmsNorm(reference_, x, weight, 1e-5f, want);
        ExpectClose(y, Values(want), Tolerance(dtype), 2 * Tolerance(dtype), Name(dtype));
      }
    }
  });
}

TEST_F(SimdTargetsTest, ActivationsAndRopeAgreeWithTheReference) {
  OnEveryInstructionSet([&] {
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      for (int64_t d : {2, 38, 320}) {
        const Tensor gate_up = RandomTensor(dtype, {3, 2 * d}, 1, 20);
        const Tensor y(dtype, {3, d}), want(dtype, {3, d});
        SiluMul(fast_, gate_up, y);
        SiluMul(reference_, gate_up, want);
        ExpectClose(y, Values(want), Tolerance(dtype), 2 * Tolerance(dtype), "silu");

        const Tensor p = RandomTensor(DType::kF32, {3, d}, 2, 10), q = p.Clone();
        Softmax(fast_, p);
        Softmax(reference_, q);
        ExpectClose(p, Values(q), 3e-6, 6e-6, "softmax");

        const Tensor a = RandomTensor(dtype, {3, 2 * d}, 3), b = a.Clone();
        const std::vector<int32_t> positions = {1, 700, 38000};
        Tensor inv_freq(DType::kF32, {d / 2});
        for (int64_t i = 0; i < d / 2; ++i) {
          inv_freq.data<float>()[i] = 1 / static_cast<float>(1 + i);
        }
        Rope(fast_, a, static_cast<int>(d), positions, inv_freq);
        Rope(reference_, b, static_cast<int>(d), positions, inv_freq);
        ExpectClose(a, Values(b), Tolerance(dtype), 2 * Tolerance(dtype), "rope");
      }
    }
  });
}

TEST_F(SimdTargetsTest, ConversionsRoundAlike) {
  const Tensor from = RandomTensor(DType::kF32, {999}, 1, 100);
  // Subnormal in f16.
  for (int i = 0; i < 200; ++i) from.data<float>()[i] *= 1e-7f;
  OnEveryInstructionSet([&] {
    const Tensor bf16 = ConvertTo(from, DType::kBF16), f16 = ConvertTo(from, DType::kF16);
    const Tensor back = ConvertTo(f16, DType::kF32);
    for (int i = 0; i < 999; ++i) {
      const float value = from.data<float>()[i];
      ASSERT_EQ(bf16.data<BFloat16>()[i].bits, BFloat16::From(value).bits);
      ASSERT_EQ(f16.data<Float16>()[i].bits, Float16::From(value).bits);
      ASSERT_EQ(back.data<float>()[i], Float16::From(value).ToFloat());
    }
  });
}

}  // namespace
}  // namespace sluice
