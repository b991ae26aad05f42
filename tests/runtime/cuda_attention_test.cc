#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "runtime/ops/cuda/attention.h"
#include "tests/support/attention_problem.h"

namespace sluice {
namespace {

using cuda::AttentionArgs;
using cuda::AttentionFamily;
using cuda::AttentionPrecision;
using ::sluice::testing::AttentionCase;
using ::sluice::testing::AttentionDistance;
using ::sluice::testing::AttentionProblem;
using ::sluice::testing::AttentionWay;
using ::sluice::testing::Bias;
using ::sluice::testing::FromFp8;
using ::sluice::testing::LacksAttention;

TEST(CudaAttentionTest, AgreesWithTheEquationOverAwkwardShapes) {
  if (LacksAttention({})) GTEST_SKIP();
  for (int head_dim : {64, 72, 80, 128}) {
    for (const AttentionCase& c : ::sluice::testing::AttentionCases(head_dim)) {
      AttentionProblem x(c);
      x.Run({AttentionPrecision::kBF16});
      const AttentionDistance distance = Compare(x);
      // Probabilities and results are rounded to bf16: root mean squares of 1.6e-3 each make
      // 2.3e-3; one key alone makes the first exact.
      EXPECT_LE(distance.l2, 4e-3) << c.ToString() << ": " << distance.worst;
    }
  }
}

// Products in 8 bits against exact attention: similarity and relative L1 distance that the method
// is held to. The rounding of probabilities and values to 3 bits makes most of it, some 0.04.
void ExpectWithinGates(const AttentionProblem& x, const std::string& what) {
  const AttentionDistance distance = Compare(x);
  EXPECT_GE(distance.cosine, 0.999) << what << ": " << distance.worst;
  EXPECT_LE(distance.l1, 0.05) << what << ": " << distance.worst;
}

TEST(CudaSageAttentionTest, StaysWithinItsErrorOverAwkwardShapes) {
  if (LacksAttention({AttentionPrecision::kInt8Fp8})) GTEST_SKIP();
  for (int head_dim : {64, 72, 80, 128}) {
    for (const AttentionCase& c : ::sluice::testing::AttentionCases(head_dim)) {
      AttentionProblem x(c);
      x.Run({AttentionPrecision::kInt8Fp8});
      ExpectWithinGates(x, c.ToString());
    }
  }
}

TEST(CudaSageAttentionTest, StaysWithinItsErrorOnBiasedInputs) {
  if (LacksAttention({AttentionPrecision::kInt8Fp8})) GTEST_SKIP();
  for (const AttentionCase& c :
       {AttentionCase{1, 128, 4096, 2, 2, 128, false}, AttentionCase{1, 128, 4096, 2, 1, 64, false},
        AttentionCase{2, 700, 700, 2, 1, 128, true}}) {
    AttentionProblem keys(c);
    Bias(keys.q, keys.q_stride, 6, 3);
    Bias(keys.k, keys.kv_stride, 10, 3);  // as seen in models: outliers in the same channels
    keys.Run({AttentionPrecision::kInt8Fp8});
    ExpectWithinGates(keys, "biased keys and queries, " + c.ToString());

    AttentionProblem values(c);
    Bias(values.v, values.kv_stride, 8.5f, 5);
    values.Run({AttentionPrecision::kInt8Fp8});
    // Here similarity tells nothing; sums that lose bits in the tensor cores show in the distance.
    EXPECT_LE(Compare(values).l1, 0.02) << "biased values, " << c.ToString();
  }
}

TEST(CudaSageAttentionTest, WritesTheKeysAndValuesThatItsFormulasGive) {
  const AttentionWay hopper = {AttentionPrecision::kInt8Fp8, AttentionFamily::kHopper};
  if (LacksAttention(hopper)) GTEST_SKIP();
  constexpr int kOrder[16] = {0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15};
  for (const AttentionCase& c :
       {AttentionCase{2, 1, 300, 2, 2, 128, false}, AttentionCase{1, 1, 1111, 2, 1, 64, false, 8},
        AttentionCase{1, 1, 130, 4, 2, 72, false}, AttentionCase{1, 1, 129, 2, 2, 80, false}}) {
    AttentionProblem x(c);
    x.Run(hopper);
    const auto layout = cuda::LayOutQuantizedKv(x.Args(hopper));
    std::vector<uint8_t> raw(x.workspace.bytes());
    x.workspace.CopyTo(raw.data(), raw.size());
    const auto floats = [&](size_t at) { return reinterpret_cast<const float*>(&raw[at]); };
    const int64_t tiles = layout.padded_len / layout.kTileKeys;
    for (int64_t head = 0; head < c.batch * c.kv_heads; ++head) {
      const int64_t first =
          head / c.kv_heads * c.kv_len * x.kv_stride + head % c.kv_heads * c.head_dim;
      const float* mean = floats(layout.key_mean) + head * c.head_dim;
      const float* channels = floats(layout.value_channels) + head * c.head_dim;
      if (c.kv_len <= 512) {  // then the sample is everything
        for (int d = 0; d < c.head_dim; ++d) {
          double sum = 0;
          for (int64_t t = 0; t < c.kv_len; ++t) sum += x.k[first + t * x.kv_stride + d].ToFloat();
          ASSERT_NEAR(mean[d], sum / c.kv_len, 1e-5) << c.ToString() << " channel " << d;
        }
      }
      for (int64_t t = 0; t < c.kv_len; ++t) {
        const int64_t tile = t / layout.kTileKeys;
        const float key_scale =
            floats(layout.key_scales)[(head * tiles + tile) * layout.kKeyScales + t % 8 / 2];
        const float value_scale = floats(layout.value_scales)[head * tiles + tile];
        const int64_t position = std::find(kOrder, kOrder + 16, t % 16) - kOrder + t / 16 * 16;
        for (int d = 0; d < c.head_dim; ++d) {
          const float key = x.k[first + t * x.kv_stride + d].ToFloat() - mean[d];
          const int stored = static_cast<int8_t>(
              raw[layout.keys + (head * layout.padded_len + t) * layout.key_pitch + d]);
          // Half a step, and what the order of two roundings moves.
          ASSERT_NEAR(stored * key_scale, key, 0.501 * key_scale)
              << c.ToString() << " head " << head << " key " << t << " channel " << d;
          const float value = x.v[first + t * x.kv_stride + d].ToFloat();
          const float unit = value_scale * channels[d];
          const float got =
              FromFp8(raw[layout.values + (head * c.head_dim + d) * layout.padded_len + position]) *
              unit;
          // Half of the last of three bits, or of the smallest number there is.
          ASSERT_NEAR(got, value, std::max(std::abs(value) / 15.99f, unit / 1023))
              << c.ToString() << " head " << head << " value " << t << " channel " << d;
        }
      }
    }
  }
}

TEST(CudaAttentionTest, RefusesWhatItCannotCompute) {
  AttentionArgs args;
  args.q_len = args.kv_len = 10;
  args.heads = args.kv_heads = 1;
  args.head_dim = 64;
  args.q_stride = args.k_stride = args.v_stride = args.out_stride = 64;
  args.scale = 0.125f;
  alignas(16) char memory[16];
  args.q = args.k = args.v = memory;
  args.out = memory;
  EXPECT_NO_THROW(cuda::CheckAttention(args));
  const auto refused = [&](auto change) {
    AttentionArgs changed = args;
    change(changed);
    EXPECT_THROW(cuda::CheckAttention(changed), Error);
  };
  refused([](AttentionArgs& a) { a.head_dim = 96; });
  refused([](AttentionArgs& a) { a.heads = 3, a.kv_heads = 2; });
  refused([](AttentionArgs& a) { a.kv_len = 9, a.causal = true; });
  refused([](AttentionArgs& a) { a.scale = 0; });
  refused([](AttentionArgs& a) { a.scale = std::nanf(""); });
  refused([](AttentionArgs& a) { a.k_stride = 63; });
  refused([](AttentionArgs& a) { a.q = static_cast<const char*>(a.q) + 2; });
  refused([](AttentionArgs& a) { a.q_len = 0; });
  refused([](AttentionArgs& a) { a.batch = int64_t{1} << 40; });
}

TEST(FastestAttentionTest, QuantisesLongAndWideProblemsOnly) {
  AttentionArgs args = {.q_len = 16384, .kv_len = 16384, .heads = 32, .kv_heads = 32};
  args.head_dim = 128;
  args.causal = true;
  EXPECT_EQ(cuda::FastestAttention(args), AttentionPrecision::kInt8Fp8);
  args.q_len = 4096;
  EXPECT_EQ(cuda::FastestAttention(args), AttentionPrecision::kBF16);
  args.heads = 28;  // of which 7 share their keys
  args.kv_heads = 4;
  EXPECT_EQ(cuda::FastestAttention(args), AttentionPrecision::kInt8Fp8);
  args.q_len = 784;
  EXPECT_EQ(cuda::FastestAttention(args), AttentionPrecision::kBF16);
  args.q_len = 16384;
  args.head_dim = 64;
  EXPECT_EQ(cuda::FastestAttention(args), AttentionPrecision::kBF16);
}

TEST(PlanGroupsTest, TakesSmallerTilesWhereLargeOnesLeaveTheDeviceIdle) {
  const auto groups = [](int64_t frames, int64_t rows) {
    return cuda::PlanGroups({.batch = frames, .q_len = rows, .heads = 16}, 132);
  };
  EXPECT_EQ(groups(1, 243), 1);  // 64 tiles of 64
  EXPECT_EQ(groups(1, 729), 2);  // 96 of 128
  EXPECT_EQ(groups(2, 729), 3);  // 128 of 192
  EXPECT_EQ(groups(8, 729), 3);
}

TEST(PagedPlanTest, CutsKeysIntoPartsOnlyWhereThatFillsTheDevice) {
  const auto parts = [](int64_t rows, int heads, int kv_heads) {
    return cuda::PlanPaged({.q_len = rows, .heads = heads, .kv_heads = kv_heads, .head_dim = 128})
        .parts;
  };
  EXPECT_EQ(parts(196, 28, 4), 3);    // 44 tiles of heads together
  EXPECT_EQ(parts(588, 28, 4), 1);    // 132
  EXPECT_EQ(parts(1568, 32, 32), 1);  // 416: joining parts takes longer than the last round waits
}

}  // namespace
}  // namespace sluice
