#include "runtime/ops/cpu/attention_sage.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "runtime/ops/attention.h"
#include "tests/support/instruction_sets.h"
#include "tests/support/tensor_testing.h"

namespace sluice {
namespace {

using cpu::SageGroupOfKey;
using cpu::SageGroupOfQuery;
using cpu::SageGroups;
using cpu::SageProblem;
using cpu::SageReference;
using cpu::SageSums;
using cpu::SageVariant;
using ::sluice::testing::At;
using ::sluice::testing::OnEveryInstructionSet;
using ::sluice::testing::RandomTensor;

struct Distance {
  double cosine = 0, l1 = 0;  // similarity; relative
};

Distance Compare(const std::vector<double>& got, const std::vector<double>& want) {
  double dot = 0, got2 = 0, want2 = 0, error = 0, size = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    dot += got[i] * want[i];
    got2 += got[i] * got[i];
    want2 += want[i] * want[i];
    error += std::abs(got[i] - want[i]);
    size += std::abs(want[i]);
  }
  return {dot / std::sqrt(got2 * want2), error / size};
}

std::vector<double> Values(ConstTensorView x) {
  std::vector<double> values;
  for (int64_t i = 0; i < x.dim(0); ++i) {
    for (int64_t j = 0; j < x.dim(1); ++j) values.push_back(At(x, i, j));
  }
  return values;
}

// One head with bf16 numbers, as kernels get them.
struct Head {
  Head(int64_t queries, int64_t keys, int head_dim, bool causal = false)
      : queries(queries), keys(keys), head_dim(head_dim), causal(causal) {
    q = RoundedNormal(queries, 1);
    k = RoundedNormal(keys, 2);
    v = RoundedNormal(keys, 3);
  }
  std::vector<float> RoundedNormal(int64_t rows, uint32_t seed) const {
    const Tensor x = ConvertTo(RandomTensor(DType::kBF16, {rows, head_dim}, seed), DType::kF32);
    return {x.data<float>(), x.data<float>() + rows * head_dim};
  }
  // The same number of either sign in a sixteenth of the channels of all rows.
  void Offset(std::vector<float>& rows, float size, int every = 16) const {
    for (size_t i = 0; i < rows.size(); ++i) {
      const int channel = static_cast<int>(i % head_dim);
      if (channel % every == 3) rows[i] += channel / every % 2 ? size : -size;
    }
  }
  SageProblem Problem() const {
    return {.q = q.data(),
            .k = k.data(),
            .v = v.data(),
            .queries = queries,
            .keys = keys,
            .head_dim = head_dim,
            .scale = 1 / std::sqrt(static_cast<float>(head_dim)),
            .causal = causal};
  }
  std::vector<double> Run(const SageVariant& variant,
                          std::vector<float>* log_sums = nullptr) const {
    std::vector<float> out(q.size());
    if (log_sums) log_sums->resize(queries);
    SageReference(Problem(), variant, out.data(), log_sums ? log_sums->data() : nullptr);
    return {out.begin(), out.end()};
  }
  // The equation in double.
  std::vector<double> Expected() const {
    std::vector<double> out;
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t seen = causal ? i + 1 + keys - queries : keys;
      std::vector<double> p(seen), o(head_dim);
      double max = -std::numeric_limits<double>::infinity(), sum = 0;
      for (int64_t t = 0; t < seen; ++t) {
        for (int d = 0; d < head_dim; ++d) {
          p[t] += double{q[i * head_dim + d]} * k[t * head_dim + d];
        }
        p[t] /= std::sqrt(static_cast<double>(head_dim));
        max = std::max(max, p[t]);
      }
      for (double& x : p) sum += x = std::exp(x - max);
      for (int64_t t = 0; t < seen; ++t) {
        for (int d = 0; d < head_dim; ++d) o[d] += p[t] / sum * v[t * head_dim + d];
      }
      out.insert(out.end(), o.begin(), o.end());
    }
    return out;
  }

  int64_t queries, keys;
  int head_dim;
  bool causal;
  std::vector<float> q, k, v;
};

TEST(SageGroupsTest, AThreadsScoresShareOneScaleOfQueriesAndOneOfKeys) {
  // A lane of mma m16n8 holds rows lane / 4 and 8 more, columns 2 (lane % 4) and one more, of every
  // 16 rows of its warp's and of every 8 columns of a tile.
  for (const SageVariant& variant : {SageVariant::Hopper(), SageVariant::Int8F16()}) {
    for (int lane = 0; lane < 32; ++lane) {
      std::set<int64_t> queries, keys;
      for (int row = 0; row < variant.warp_queries; row += 8) {
        queries.insert(SageGroupOfQuery(variant, row + lane / 4));
      }
      for (int column = 0; column < variant.tile_keys; column += 8) {
        for (int odd : {0, 1}) keys.insert(SageGroupOfKey(variant, column + 2 * (lane % 4) + odd));
      }
      EXPECT_EQ(queries, std::set<int64_t>{lane / 4});
      EXPECT_EQ(keys, std::set<int64_t>{lane % 4});
    }
    EXPECT_EQ(SageGroupOfQuery(variant, variant.warp_queries), 8);
    EXPECT_EQ(SageGroupOfKey(variant, variant.tile_keys), 4);
  }
  SageVariant block;
  block.groups = SageGroups::kBlock;
  EXPECT_EQ(SageGroupOfQuery(block, 127), 0);
  EXPECT_EQ(SageGroupOfQuery(block, 128), 1);
  EXPECT_EQ(SageGroupOfKey(block, 64), 1);
}

TEST(RoundToFp8Test, IsTheNearestOfTheNumbersThereAre) {
  for (int bits = 0; bits < 0x7f; ++bits) {
    const int exponent = bits >> 3, mantissa = bits & 7;
    const float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                      : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
    EXPECT_EQ(cpu::RoundToFp8(value), value);
    EXPECT_EQ(cpu::RoundToFp8(-value), -value);
    EXPECT_EQ(cpu::RoundToFp8(value * 1.02f), std::min(value, 448.0f));
  }
  EXPECT_EQ(cpu::RoundToFp8(1e6f), 448);
  EXPECT_EQ(cpu::RoundToFp8(17), 16);  // a tie goes to the even one
  EXPECT_EQ(cpu::RoundToFp8(19), 20);
}

// Gates of the method against exact attention, with Gaussian inputs and with channels that stand
// out in queries and keys.
TEST(SageReferenceTest, EveryVariantStaysWithinItsGates) {
  struct Gate {
    const char* name;
    SageVariant variant;
    double cosine, l1;
  };
  for (const Gate& gate : {Gate{"cpu", SageVariant::Cpu(), 0.9997, 0.025},
                           Gate{"int8 + f16", SageVariant::Int8F16(), 0.9995, 0.035},
                           Gate{"hopper", SageVariant::Hopper(), 0.999, 0.05},
                           Gate{"int4 + fp8", SageVariant::Int4Fp8(), 0.975, 0.24}}) {
    for (const bool outliers : {false, true}) {
      Head head(64, 1024, 128);
      if (outliers) {
        head.Offset(head.k, 10);
        head.Offset(head.q, 6);
      }
      const Distance distance = Compare(head.Run(gate.variant), head.Expected());
      EXPECT_GE(distance.cosine, gate.cosine) << gate.name << (outliers ? ", outliers" : "");
      EXPECT_LE(distance.l1, gate.l1) << gate.name << (outliers ? ", outliers" : "");
    }
  }
}

TEST(SageReferenceTest, SmoothingHelpsWhereChannelsStandOut) {
  Head head(64, 1024, 128);
  head.Offset(head.k, 10);
  head.Offset(head.q, 6);
  const std::vector<double> want = head.Expected();
  SageVariant int8 = SageVariant::Int8F16();
  int8.groups = SageGroups::kBlock;
  const double smooth = Compare(head.Run(int8), want).l1;
  int8.smooth_keys = false;
  EXPECT_GE(Compare(head.Run(int8), want).l1, 1.8 * smooth);
  // With 4 bits queries need it as well.
  SageVariant int4 = SageVariant::Int4Fp8();
  const double both = Compare(head.Run(int4), want).l1;
  int4.smooth_queries = false;
  EXPECT_GE(Compare(head.Run(int4), want).l1, 1.5 * both);

  // Values far from zero: sums that keep 13 bits lose what a second accumulator or a mean saves.
  Head values(16, 2048, 64);
  values.Offset(values.v, 8.5f, 4);
  const std::vector<double> wanted = values.Expected();
  SageVariant fp8 = SageVariant::Hopper();
  EXPECT_LE(Compare(values.Run(fp8), wanted).l1, 0.02);
  fp8.smooth_values = true;
  EXPECT_LE(Compare(values.Run(fp8), wanted).l1, 0.01);
}

TEST(SageReferenceTest, AVectorAddedToAllKeysChangesNothingButTheSums) {
  for (const SageVariant& variant : {SageVariant::Cpu(), SageVariant::Hopper()}) {
    Head head(33, 300, 64, /*causal=*/true);
    for (float& x : head.k) x = std::round(x * 16) / 16;  // so that f32 holds all sums exactly
    std::vector<float> log_sums, moved_sums;
    const std::vector<double> before = head.Run(variant, &log_sums), want = head.Expected();
    std::vector<float> shift(64);
    for (int d = 0; d < 64; ++d) shift[d] = static_cast<float>(d % 7 - 3);
    for (size_t i = 0; i < head.k.size(); ++i) head.k[i] += shift[i % 64];
    const std::vector<double> after = head.Run(variant, &moved_sums);
    EXPECT_LE(Compare(after, before).l1, 2e-3);
    EXPECT_GE(Compare(after, want).cosine, 0.999);
    for (int64_t i = 0; i < 33; ++i) {
      double with_shift = 0;
      for (int d = 0; d < 64; ++d) with_shift += head.q[i * 64 + d] * shift[d] / 8;
      EXPECT_NEAR(moved_sums[i] - log_sums[i], with_shift, 1e-3) << "query " << i;
    }
  }
}

TEST(SageReferenceTest, ChunksOfAPrefillGiveWhatTheWholeGives) {
  const Head whole(384, 384, 64, /*causal=*/true);
  const std::vector<double> at_once = whole.Run(SageVariant::Cpu()), want = whole.Expected();
  std::vector<float> mean(64);
  for (size_t i = 0; i < whole.k.size(); ++i) mean[i % 64] += whole.k[i] / 384;
  for (const bool frozen : {true, false}) {
    std::vector<double> chunked;
    for (int64_t begin = 0; begin < 384; begin += 128) {
      SageProblem problem = whole.Problem();
      problem.q += begin * 64;
      problem.queries = 128;
      problem.keys = begin + 128;
      problem.key_mean = frozen ? mean.data() : nullptr;
      std::vector<float> out(128 * 64);
      SageReference(problem, SageVariant::Cpu(), out.data());
      chunked.insert(chunked.end(), out.begin(), out.end());
    }
    EXPECT_LE(Compare(chunked, at_once).l1, frozen ? 1e-6 : 0.03);
    EXPECT_LE(Compare(chunked, want).l1, 0.035);
  }
}

// The fast path rounds as the reference does, but sums in another order: a number on the edge of
// two integers may fall to the other side, by half a step of a hundred or so. Then bf16 outputs.
constexpr double kSameF32 = 1e-3, kSameBF16 = 5e-3;

double SameAs(DType dtype) { return dtype == DType::kF32 ? kSameF32 : kSameBF16; }

class Blocks {
 public:
  Blocks(ExecContext& ctx, const Tensor& k, const Tensor& v, int kv_heads)
      : kv_heads_(kv_heads),
        head_dim_(static_cast<int>(k.dim(1)) / kv_heads),
        dtype_(k.view().dtype()) {
    const size_t bytes = KvBlockBytes(kv_heads_, head_dim_, dtype_);
    for (int64_t begin = 0; begin < k.dim(0); begin += kKvBlockTokens) {
      storage_.emplace_back(DType::kU8, Shape{static_cast<int64_t>(bytes)});
      std::memset(storage_.back().view().raw(), 0xff, bytes);  // NaN
      blocks_.push_back(storage_.back().view().raw());
    }
    StoreKv(ctx, k, v, 0, view());
  }
  KvLayerView view() const { return {blocks_, kv_heads_, head_dim_, dtype_}; }

 private:
  int kv_heads_, head_dim_;
  DType dtype_;
  std::vector<Tensor> storage_;
  std::vector<void*> blocks_;
};

void CheckCausal(DType dtype, int64_t begin, int64_t length, int heads, int kv_heads, int head_dim,
                 int threads) {
  const std::string what = std::string(Name(dtype)) + " begin " + std::to_string(begin) + " S " +
                           std::to_string(length) + " heads " + std::to_string(heads) + "/" +
                           std::to_string(kv_heads) + " D " + std::to_string(head_dim);
  ExecContext ctx({.num_threads = threads});
  const float scale = 1 / std::sqrt(static_cast<float>(head_dim));
  const int64_t keys = begin + length, width = int64_t{heads} * head_dim;
  const Tensor k = RandomTensor(dtype, {keys, kv_heads * head_dim}, 1);
  const Tensor v = RandomTensor(dtype, {keys, kv_heads * head_dim}, 2);
  const Tensor wide = RandomTensor(dtype, {length, width + 8}, 3);
  const ConstTensorView q = wide.view().Columns(0, width);
  const Blocks blocks(ctx, k, v, kv_heads);
  const Tensor want(dtype, {length, width});
  cpu::CausalAttentionSageReference(ctx, q, begin, heads, scale, blocks.view(), want);
  OnEveryInstructionSet([&] {
    const Tensor got(dtype, want.shape());
    cpu::CausalAttentionSage(ctx, q, begin, heads, scale, blocks.view(), got);
    EXPECT_LE(Compare(Values(got), Values(want)).l1, SameAs(dtype)) << what;
  });
}

void CheckEncoder(DType dtype, int64_t batch, int64_t queries, int64_t keys, int heads,
                  int head_dim, bool biased, int threads) {
  const std::string what = std::string(Name(dtype)) + " batch " + std::to_string(batch) +
                           " queries " + std::to_string(queries) + " keys " + std::to_string(keys) +
                           " heads " + std::to_string(heads) + " D " + std::to_string(head_dim);
  ExecContext ctx({.num_threads = threads});
  const float scale = 1 / std::sqrt(static_cast<float>(head_dim));
  const int64_t width = int64_t{heads} * head_dim;
  const Tensor q = RandomTensor(dtype, {batch * queries, width}, 1);
  const Tensor kv = RandomTensor(dtype, {batch * keys, 2 * width}, 2);
  const ConstTensorView k = kv.view().Columns(0, width), v = kv.view().Columns(width, 2 * width);
  const Tensor numbers = RandomTensor(DType::kF32, {batch * keys}, 3);
  const ConstTensorView bias = biased ? ConstTensorView(numbers) : ConstTensorView();
  const Tensor want(dtype, q.shape());
  cpu::EncoderAttentionSageReference(ctx, q, k, v, batch, heads, head_dim, scale, want, bias);
  OnEveryInstructionSet([&] {
    const Tensor got(dtype, want.shape());
    cpu::EncoderAttentionSage(ctx, q, k, v, batch, heads, head_dim, scale, got, bias);
    EXPECT_LE(Compare(Values(got), Values(want)).l1, SameAs(dtype)) << what;
  });
}

TEST(SageAttentionTest, TheFastPathAgreesWithTheReferenceOverAwkwardShapes) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const int head_dim : {1, 7, 24, 32, 64, 72, 128}) {
      CheckCausal(dtype, 0, 1, 1, 1, head_dim, 1);
      CheckCausal(dtype, 63, 2, 4, 2, head_dim, 2);
      CheckCausal(dtype, 1000, 17, 7, 1, head_dim, 2);
      CheckCausal(dtype, 0, 129, 2, 2, head_dim, 1);
      CheckCausal(dtype, 127, 65, 8, 1, head_dim, 2);
      CheckEncoder(dtype, 1, 1, 1, 1, head_dim, false, 1);
      CheckEncoder(dtype, 2, 17, 63, 2, head_dim, false, 2);
      CheckEncoder(dtype, 3, 65, 64, 2, head_dim, true, 2);
      CheckEncoder(dtype, 1, 33, 197, 3, head_dim, false, 2);
    }
  }
}

TEST(SageAttentionTest, TheFastPathAgreesWithTheReferenceOverManyKeys) {
  CheckEncoder(DType::kF32, 1, 729, 729, 1, 72, false, 2);
  CheckCausal(DType::kF32, 3000, 1, 14, 2, 64, 2);
}

TEST(SageAttentionTest, OpsQuantiseWhatIsAskedForAndCountIt) {
  ExecContext ctx({.num_threads = 2});
  const Tensor x = RandomTensor(DType::kF32, {100, 64}, 1);
  const Tensor exact(DType::kF32, x.shape()), sage(DType::kF32, x.shape());
  EncoderAttention(ctx, x, x, x, 1, 2, 32, 0.2f, exact);
  EXPECT_TRUE(ctx.tracer().stages().empty());
  EncoderAttention(ctx, x, x, x, 1, 2, 32, 0.2f, sage, {}, AttentionPrecision::kSageAlways);
  EXPECT_EQ(ctx.tracer().stages().at("attention/sage").items, 100);
  const Distance distance = Compare(Values(sage), Values(exact));
  EXPECT_GE(distance.cosine, 0.9995);
  EXPECT_LE(distance.l1, 0.03);
  EXPECT_GT(distance.l1, 1e-5);

  // A single query is not worth quantising the keys for, and the trace says that it was not.
  const Blocks blocks(ctx, x, x, 2);
  const Tensor row(DType::kF32, {1, 64});
  CausalAttention(ctx, x.view().Slice(0, 1), 99, 2, 0.2f, blocks.view(), row,
                  AttentionPrecision::kSage);
  EXPECT_EQ(ctx.tracer().stages().at("attention/exact").items, 1);
}

TEST(ChooseAttentionTest, SageIsTakenWhereItIsFasterOrAlways) {
  const auto choose = [](int64_t queries, DType dtype, bool amx, AttentionPrecision precision,
                         bool int8_dot) {
    return ChooseAttention(queries, 1000, 64, dtype, amx, false, precision, int8_dot);
  };
  constexpr auto kSage = AttentionPrecision::kSage, kAlways = AttentionPrecision::kSageAlways;
  EXPECT_EQ(choose(196, DType::kF32, true, kSage, true), AttentionKernel::kSage);
  EXPECT_EQ(choose(196, DType::kBF16, false, kSage, true), AttentionKernel::kSage);
  EXPECT_EQ(choose(196, DType::kBF16, true, kSage, true), AttentionKernel::kAmx);
  EXPECT_EQ(choose(196, DType::kF32, true, kSage, false), AttentionKernel::kSimd);
  EXPECT_EQ(choose(1, DType::kF32, true, kSage, true), AttentionKernel::kSimd);
  EXPECT_EQ(choose(1, DType::kBF16, true, kAlways, false), AttentionKernel::kSage);
  EXPECT_EQ(ChooseAttention(1, 1, 64, DType::kF32, true, true, kSage),
            AttentionKernel::kSageReference);
}

TEST(ChooseGpuAttentionTest, SageIsTakenWhereItIsFasterOrAlwaysAndThereIsAKernel) {
  const auto choose = [](int capability, int64_t queries, int head_dim, bool biased,
                         AttentionPrecision precision) {
    return ChooseGpuAttention(capability, queries, 28, 4, head_dim, DType::kBF16, true, biased,
                              precision);
  };
  constexpr auto kSage = AttentionPrecision::kSage, kAlways = AttentionPrecision::kSageAlways;
  EXPECT_EQ(choose(90, 4096, 128, false, AttentionPrecision::kExact), GpuAttention::kFlash);
  EXPECT_EQ(choose(90, 4096, 128, false, kSage), GpuAttention::kSage);
  EXPECT_EQ(choose(90, 100, 128, false, kSage), GpuAttention::kFlash);
  EXPECT_EQ(choose(90, 4096, 64, false, kSage), GpuAttention::kFlash);
  EXPECT_EQ(choose(90, 4096, 64, false, kAlways), GpuAttention::kSage);
  EXPECT_EQ(choose(90, 1, 128, false, kAlways), GpuAttention::kDecode);
  EXPECT_EQ(choose(90, 4096, 96, false, kAlways), GpuAttention::kPlain);
  EXPECT_EQ(choose(80, 4096, 128, false, kAlways), GpuAttention::kSage);
  EXPECT_EQ(choose(80, 4096, 64, false, kSage), GpuAttention::kFlashMma);
  EXPECT_EQ(choose(75, 4096, 128, false, kAlways), GpuAttention::kPlain);
  EXPECT_EQ(choose(90, 4096, 128, true, kAlways), GpuAttention::kPlain);
}

}  // namespace
}  // namespace sluice
