// The kernels of mma.sync. A chip without some of their products emulates them or skips their
// tests.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "runtime/dtype.h"
#include "runtime/error.h"
#include "runtime/ops/attention.h"
#include "runtime/ops/cuda/attention.h"
#include "tests/support/attention_problem.h"
#include "tests/support/device_buffer.h"

namespace sluice {
namespace {

using cuda::AttentionArgs;
using cuda::AttentionFamily;
using cuda::AttentionPrecision;
using cuda::MmaKvLayout;
using cuda::ScaleGroups;
using ::sluice::testing::AttentionCase;
using ::sluice::testing::AttentionCases;
using ::sluice::testing::AttentionDistance;
using ::sluice::testing::AttentionProblem;
using ::sluice::testing::AttentionWay;
using ::sluice::testing::Bias;
using ::sluice::testing::DeviceBuffer;
using ::sluice::testing::FromFp8;
using ::sluice::testing::LacksAttention;

// How far results may be from exact ones: similarity and relative L1 distance, as the method's
// authors and an emulation in f32 give them, with room for the smallest problems; and the distance
// where values have a bias that makes most of their size. Rounding values and probabilities to 3
// bits makes 0.04 of the distance, scores of int4 make 0.2.
struct Gates {
  double cosine, l1, biased_l1;
};
constexpr Gates kFp8 = {0.999, 0.05, 0.02}, kFp16 = {0.9995, 0.035, 0.005};
constexpr Gates kInt4 = {0.97, 0.25, 0.04};

struct Variant {
  const char* name;
  AttentionWay way;
  int int_bits, value_bits;  // of scores' operands and of values
  Gates gates;
};

AttentionWay Mma(AttentionPrecision precision, ScaleGroups groups = ScaleGroups::kThread) {
  return {precision, AttentionFamily::kMma, groups};
}

const AttentionWay kExact = Mma(AttentionPrecision::kBF16);

// Those that the chip has or emulates.
std::vector<Variant> QuantizedVariants() {
  using Precision = AttentionPrecision;
  const std::vector<Variant> all = {
      {"int8, fp8", Mma(Precision::kInt8Fp8), 8, 8, kFp8},
      {"int8, fp8, by warp", Mma(Precision::kInt8Fp8, ScaleGroups::kWarp), 8, 8, kFp8},
      {"int8, fp8, half sums", Mma(Precision::kInt8Fp8HalfSums), 8, 8, kFp8},
      {"int8, f16", Mma(Precision::kInt8Fp16), 8, 16, kFp16},
      {"int8, f16, by warp", Mma(Precision::kInt8Fp16, ScaleGroups::kWarp), 8, 16, kFp16},
      {"int4, fp8", Mma(Precision::kInt4Fp8), 4, 8, kInt4},
      {"int4, f16", Mma(Precision::kInt4Fp16), 4, 16, kInt4},
  };
  std::vector<Variant> some;
  if (LacksAttention(kExact)) return some;
  for (const Variant& v : all) {
    if (!LacksAttention(v.way)) some.push_back(v);
  }
  return some;
}

TEST(CudaMmaAttentionTest, AgreesWithTheEquationOverAwkwardShapes) {
  if (LacksAttention(kExact)) GTEST_SKIP();
  const std::vector<Variant> variants = QuantizedVariants();
  for (int head_dim : {64, 72, 80, 128}) {
    std::vector<AttentionCase> cases = AttentionCases(head_dim);
    cases.push_back({1, 63, 65, 8, 1, head_dim, true, 8});
    cases.push_back({2, 129, 17, 8, 8, head_dim, false});
    cases.push_back({1, 65, 4096, 2, 2, head_dim, true});
    for (const AttentionCase& c : cases) {
      AttentionProblem x(c);
      x.Run(kExact);
      const AttentionDistance exact = Compare(x);
      // As of the kernel for Hopper: two roundings to bf16.
      EXPECT_LE(exact.l2, 4e-3) << c.ToString() << ": " << exact.worst;
      for (const Variant& v : variants) {
        x.Run(v.way);
        const AttentionDistance distance = Compare(x);
        EXPECT_GE(distance.cosine, v.gates.cosine)
            << v.name << ", " << c.ToString() << ": " << distance.worst;
        EXPECT_LE(distance.l1, v.gates.l1)
            << v.name << ", " << c.ToString() << ": " << distance.worst;
      }
    }
  }
}

TEST(CudaMmaAttentionTest, StaysWithinItsErrorOnBiasedInputs) {
  const std::vector<Variant> variants = QuantizedVariants();
  if (variants.empty()) GTEST_SKIP();
  for (const AttentionCase& c :
       {AttentionCase{1, 128, 4096, 2, 2, 128, false}, AttentionCase{1, 128, 4096, 2, 1, 64, false},
        AttentionCase{2, 700, 700, 2, 1, 128, true}}) {
    AttentionProblem keys(c), queries(c), both(c), values(c);
    Bias(keys.k, keys.kv_stride, 10, 3);
    Bias(queries.q, queries.q_stride, 6, 3);
    Bias(both.q, both.q_stride, 6, 3);
    Bias(both.k, both.kv_stride, 10, 3);  // as seen in models: outliers in the same channels
    Bias(values.v, values.kv_stride, 8.5f, 5);
    for (const Variant& v : variants) {
      const auto check = [&](AttentionProblem& x, const char* biased) {
        x.Run(v.way);
        const AttentionDistance distance = Compare(x);
        const std::string what = std::string(v.name) + ", biased " + biased + ", " + c.ToString();
        EXPECT_GE(distance.cosine, v.gates.cosine) << what << ": " << distance.worst;
        EXPECT_LE(distance.l1, v.gates.l1) << what << ": " << distance.worst;
      };
      check(keys, "keys");
      check(queries, "queries");
      check(both, "keys and queries");
      values.Run(v.way);
      // Here similarity tells nothing; sums that lose bits in the tensor cores show in the
      // distance.
      EXPECT_LE(Compare(values).l1, v.gates.biased_l1)
          << v.name << ", biased values, " << c.ToString();
    }
  }
}

// Rounds to `bits` bits of mantissa after the first, of numbers from 2^least on; finer ones are
// multiples of the smallest step.
float Round(float x, int bits, int least) {
  if (x == 0) return 0;
  const float step = std::ldexp(1.0f, std::max(std::ilogb(x), least) - bits);
  return std::nearbyint(x / step) * step;
}
float ToFp8(float x) { return std::min(448.0f, Round(x, 3, -6)); }
float ToFp16(float x) { return Round(x, 10, -14); }
float FromFp16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                   : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  return bits & 0x8000 ? -size : size;
}

// What the kernels before the last one have left in the workspace, as numbers.
struct Quantized {
  Quantized(const AttentionProblem& x, const Variant& v)
      : problem(x), variant(v), layout(cuda::LayOutMmaKv(x.Args(v.way))), raw(layout.bytes) {
    x.workspace.CopyTo(raw.data(), raw.size());
    tiles = layout.padded_len / layout.kTileKeys;
  }
  const float* Floats(size_t at) const { return reinterpret_cast<const float*>(&raw[at]); }
  const float* KeyMean(int64_t head) const {
    return Floats(layout.key_mean) + head * problem.sizes.head_dim;
  }
  const float* Channels(int64_t head) const {
    return Floats(layout.value_channels) + head * problem.sizes.head_dim;
  }
  float KeyScale(int64_t head, int64_t t) const {
    return Floats(layout.key_scales)[(head * tiles + t / 64) * layout.kKeyScales + t % 8 / 2];
  }
  float ValueScale(int64_t head, int64_t t) const {
    return variant.value_bits == 8 ? Floats(layout.value_scales)[head * tiles + t / 64] : 1;
  }
  int Key(int64_t head, int64_t t, int d) const {
    const uint8_t* row = &raw[layout.keys + (head * layout.padded_len + t) * layout.key_pitch];
    if (variant.int_bits == 8) return static_cast<int8_t>(row[d]);
    return static_cast<int8_t>((row[d / 2] >> d % 2 * 4 & 15) << 4) / 16;
  }
  float Value(int64_t head, int64_t t, int d) const {
    const int64_t first = head * layout.padded_len * layout.channels;
    if (variant.value_bits == 16) {
      return FromFp16(
          reinterpret_cast<const uint16_t*>(&raw[layout.values])[first + t * layout.channels + d]);
    }
    constexpr int kOrder[16] = {0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15};
    const int64_t position = std::find(kOrder, kOrder + 16, t % 16) - kOrder + t % 64 / 16 * 16;
    return FromFp8(raw[layout.values + first + t / 64 * 64 * layout.channels + d * 64 + position]);
  }
  const float* QueryMean(int64_t item, int64_t row) const {
    return Floats(layout.query_means) +
           (item * layout.q_tiles + row / layout.kTileQueries) * problem.sizes.head_dim;
  }
  float MeanScore(int64_t item, int64_t row, int64_t t) const {
    return Floats(layout.mean_scores)[(item * layout.q_tiles + row / layout.kTileQueries) *
                                          layout.padded_len +
                                      t];
  }

  const AttentionProblem& problem;
  const Variant& variant;
  MmaKvLayout layout;
  std::vector<uint8_t> raw;
  int64_t tiles = 0;
};

float ScaleLog2(int head_dim) { return 1 / std::sqrt(static_cast<float>(head_dim)) * 1.44269504f; }

TEST(CudaMmaAttentionTest, WritesTheKeysAndValuesThatItsFormulasGive) {
  const std::vector<Variant> variants = QuantizedVariants();
  if (variants.empty()) GTEST_SKIP();
  for (const AttentionCase& c :
       {AttentionCase{2, 1, 300, 2, 2, 128, false}, AttentionCase{1, 200, 1111, 4, 2, 64, true, 8},
        AttentionCase{1, 1, 130, 4, 2, 72, false}, AttentionCase{1, 140, 129, 2, 2, 80, false}}) {
    for (const Variant& v : variants) {
      AttentionProblem x(c);
      x.Run(v.way);
      const Quantized got(x, v);
      const std::string what = std::string(v.name) + ", " + c.ToString();
      const float largest_int = v.int_bits == 8 ? 127 : 7;
      for (int64_t head = 0; head < c.batch * c.kv_heads; ++head) {
        const int64_t first =
            head / c.kv_heads * c.kv_len * x.kv_stride + head % c.kv_heads * c.head_dim;
        const float* mean = got.KeyMean(head);
        const auto key = [&](int64_t t, int d) {
          return x.k[first + t * x.kv_stride + d].ToFloat() - mean[d];
        };
        if (c.kv_len <= 512) {  // then the sample is everything
          for (int d = 0; d < c.head_dim; ++d) {
            double sum = 0;
            for (int64_t t = 0; t < c.kv_len; ++t) {
              sum += x.k[first + t * x.kv_stride + d].ToFloat();
            }
            ASSERT_NEAR(mean[d], sum / c.kv_len, 1e-5) << what << " channel " << d;
          }
        }
        for (int64_t tile = 0; tile < got.tiles; ++tile) {
          float most[4] = {1e-7f, 1e-7f, 1e-7f, 1e-7f};  // groups of zeros have a scale too
          for (int64_t t = 64 * tile; t < std::min(c.kv_len, 64 * tile + 64); ++t) {
            for (int d = 0; d < c.head_dim; ++d) {
              float& group = most[v.way.groups == ScaleGroups::kWarp ? 0 : t % 8 / 2];
              group = std::max(group, std::abs(key(t, d)));
            }
          }
          for (int group = 0; group < 4; ++group) {
            const float want = most[v.way.groups == ScaleGroups::kWarp ? 0 : group] / largest_int;
            ASSERT_NEAR(got.KeyScale(head, 64 * tile + 2 * group), want, 1e-6f * want)
                << what << " head " << head << " tile " << tile << " group " << group;
          }
        }
        for (int64_t t = 0; t < c.kv_len; ++t) {
          const float key_scale = got.KeyScale(head, t);
          for (int d = 0; d < c.head_dim; ++d) {
            // Half a step, and what the order of two roundings moves.
            ASSERT_NEAR(got.Key(head, t, d) * key_scale, key(t, d), 0.501 * key_scale)
                << what << " head " << head << " key " << t << " channel " << d;
            const float value = x.v[first + t * x.kv_stride + d].ToFloat();
            const float unit = got.ValueScale(head, t) * got.Channels(head)[d];
            // Half of the last bit of 3 or 10, or of the smallest number there is.
            const float within = v.value_bits == 8 ? std::max(std::abs(value) / 15.99f, unit / 1023)
                                                   : std::max(std::abs(value) / 2047, unit * 3e-8f);
            ASSERT_NEAR(got.Value(head, t, d) * unit, value, within)
                << what << " head " << head << " value " << t << " channel " << d;
          }
        }
      }
      if (v.int_bits != 4) continue;
      for (int64_t item = 0; item < c.batch * c.heads; ++item) {
        const int64_t head = item / (c.heads / c.kv_heads);
        for (int64_t row = 0; row < c.q_len; row += MmaKvLayout::kTileQueries) {
          const int64_t end = std::min(c.q_len, row + MmaKvLayout::kTileQueries);
          const float* mean = got.QueryMean(item, row);
          for (int d = 0; d < c.head_dim; ++d) {
            double sum = 0;
            for (int64_t i = row; i < end; ++i) {
              sum +=
                  x.q[(item / c.heads * c.q_len + i) * x.q_stride + item % c.heads * c.head_dim + d]
                      .ToFloat();
            }
            ASSERT_NEAR(mean[d], sum / (end - row), 1e-5) << what << " query mean, channel " << d;
          }
          const int64_t seen = c.causal ? end + c.kv_len - c.q_len : c.kv_len;
          for (int64_t t = 0; t < seen; ++t) {
            double want = 0;
            for (int d = 0; d < c.head_dim; ++d) {
              const int64_t at = head / c.kv_heads * c.kv_len * x.kv_stride +
                                 head % c.kv_heads * c.head_dim + t * x.kv_stride + d;
              want += double{mean[d]} * (x.k[at].ToFloat() - got.KeyMean(head)[d]);
            }
            ASSERT_NEAR(got.MeanScore(item, row, t), want * ScaleLog2(c.head_dim), 1e-4)
                << what << " mean score of head " << item << " row " << row << " key " << t;
          }
        }
      }
    }
  }
}

// The last kernel in f32 on the host, from what those before it have written: one row of one head.
std::vector<float> Emulated(const Quantized& from, int64_t batch, int64_t row, int head) {
  const AttentionProblem& x = from.problem;
  const AttentionCase& c = x.sizes;
  const int d = c.head_dim;
  const int64_t item = batch * c.heads + head, kv_item = item / (c.heads / c.kv_heads);
  const bool int4 = from.variant.int_bits == 4, fp8 = from.variant.value_bits == 8;
  const bool half_sums = from.variant.way.precision == AttentionPrecision::kInt8Fp8HalfSums;
  const float largest = int4 ? 7 : 127;
  const auto query = [&](int64_t i, int channel) {
    const float value = x.q[(batch * c.q_len + i) * x.q_stride + head * d + channel].ToFloat();
    return int4 ? value - from.QueryMean(item, i)[channel] : value;
  };
  const bool by_warp = from.variant.way.groups == ScaleGroups::kWarp;
  float most = 1e-7f;
  for (int64_t i = row / 32 * 32; i < std::min(c.q_len, row / 32 * 32 + 32); ++i) {
    if (!by_warp && i % 8 != row % 8) continue;
    for (int channel = 0; channel < d; ++channel) {
      most = std::max(most, std::abs(query(i, channel)));
    }
  }
  std::vector<int> q(d);
  for (int channel = 0; channel < d; ++channel) {
    q[channel] = static_cast<int>(std::nearbyint(query(row, channel) * (largest / most)));
  }
  const float q_factor = ScaleLog2(d) * (most / largest);
  const int64_t seen = c.causal ? row + c.kv_len - c.q_len + 1 : c.kv_len;
  float max = -std::numeric_limits<float>::infinity(), sum = 0, units = 1;
  std::vector<float> o(d);
  for (int64_t first = 0; first < seen; first += 64) {
    const int64_t count = std::min<int64_t>(64, seen - first);
    float z[64], now = max;
    for (int64_t j = 0; j < count; ++j) {
      int dot = 0;
      for (int channel = 0; channel < d; ++channel) {
        dot += q[channel] * from.Key(kv_item, first + j, channel);
      }
      z[j] = dot * (q_factor * from.KeyScale(kv_item, first + j));
      if (int4) z[j] += from.MeanScore(item, row, first + j);
      now = std::max(now, z[j] - (fp8 ? 8.807f : 0));
    }
    const float value_scale = from.ValueScale(kv_item, first);
    const float keep = std::exp2(max - now);
    max = now;
    sum *= keep;
    for (int64_t j = 0; j < count; ++j) {
      z[j] = std::exp2(z[j] - max);
      sum += z[j];
      z[j] = fp8 ? ToFp8(z[j]) : ToFp16(z[j]);
    }
    for (int channel = 0; channel < d; ++channel) {
      float r = 0;
      for (int64_t j = 0; j < count; ++j) {
        r += z[j] * from.Value(kv_item, first + j, channel);
        if (half_sums && (j % 32 == 31 || j + 1 == count)) r = ToFp16(r);
      }
      o[channel] = o[channel] * (keep * (units / value_scale)) + r;
    }
    units = value_scale;
  }
  for (int channel = 0; channel < d; ++channel) {
    o[channel] =
        BFloat16::From(o[channel] / sum * units * from.Channels(kv_item)[channel]).ToFloat();
  }
  return o;
}

TEST(CudaMmaAttentionTest, AgreesWithItsEmulation) {
  const std::vector<Variant> variants = QuantizedVariants();
  if (variants.empty()) GTEST_SKIP();
  for (const AttentionCase& c :
       {AttentionCase{1, 129, 729, 2, 1, 128, false}, AttentionCase{2, 200, 200, 4, 2, 64, true},
        AttentionCase{1, 63, 127, 7, 1, 72, true, 8}, AttentionCase{1, 140, 65, 2, 2, 80, false}}) {
    for (const Variant& v : variants) {
      AttentionProblem x(c);
      x.Run(v.way);
      const Quantized from(x, v);
      double error = 0, norm = 0;
      for (int64_t b = 0; b < c.batch; ++b) {
        for (int64_t i = 0; i < c.q_len; i += 7) {
          const int head = static_cast<int>(i % c.heads);
          const std::vector<float> want = Emulated(from, b, i, head);
          for (int d = 0; d < c.head_dim; ++d) {
            const float got =
                x.out[(b * c.q_len + i) * x.q_stride + head * c.head_dim + d].ToFloat();
            error += std::abs(got - want[d]);
            norm += std::abs(want[d]);
          }
        }
      }
      // Integers are the same; exponentials, and with them some roundings of probabilities, are
      // not, nor are sums of fp8 that tensor cores keep 13 bits of.
      EXPECT_LE(error / norm, 2e-3) << v.name << ", " << c.ToString();
    }
  }
}

// A query far larger than the others makes the step of its group coarse, and nobody else's: so the
// rows that change are those that share a scale with it.
TEST(CudaMmaAttentionTest, QueriesShareAScaleWithTheRowsOfTheirThreadOrWarp) {
  const AttentionCase c = {1, 256, 64, 1, 1, 64, false};
  const std::vector<Variant> variants = QuantizedVariants();
  if (variants.empty()) GTEST_SKIP();
  for (const Variant& v : variants) {
    if (v.int_bits == 4) continue;  // the mean of the tile moves with the query
    AttentionProblem plain(c);
    plain.Run(v.way);
    for (const int large : {0, 37, 138, 255}) {
      AttentionProblem x(c);
      for (int d = 0; d < c.head_dim; ++d) {
        BFloat16& value = x.q[large * x.q_stride + d];
        value = BFloat16::From(40 * value.ToFloat());
      }
      x.Run(v.way);
      for (int row = 0; row < c.q_len; ++row) {
        const bool shares =
            row / 32 == large / 32 && (v.way.groups == ScaleGroups::kWarp || row % 8 == large % 8);
        const auto begin = [&](const AttentionProblem& p) {
          return p.out.begin() + row * p.q_stride;
        };
        const bool same =
            std::equal(begin(x), begin(x) + c.head_dim, begin(plain),
                       [](BFloat16 a, BFloat16 b) { return a.ToFloat() == b.ToFloat(); });
        EXPECT_EQ(same, !shares) << v.name << ": row " << row << " beside a large row " << large;
      }
    }
  }
}

TEST(CudaMmaAttentionTest, DoesNotSeeAConstantAddedToAllKeys) {
  const AttentionCase c = {1, 130, 1000, 2, 1, 128, true};
  const std::vector<Variant> variants = QuantizedVariants();
  if (variants.empty()) GTEST_SKIP();
  for (const Variant& v : variants) {
    AttentionProblem plain(c), moved(c);
    // Multiples of 1/16 below 16 and their sums with such a constant are bf16 numbers.
    for (size_t i = 0; i < plain.k.size(); ++i) {
      const float key = std::nearbyint(plain.k[i].ToFloat() * 16) / 16;
      plain.k[i] = BFloat16::From(key);
      moved.k[i] = BFloat16::From(key + (i % moved.kv_stride % 3 == 0 ? 8.0f : -5.0f));
    }
    plain.Run(v.way);
    moved.Run(v.way);
    const AttentionDistance distance = Compare(moved);
    EXPECT_GE(distance.cosine, v.gates.cosine) << v.name << ": " << distance.worst;
    EXPECT_LE(distance.l1, v.gates.l1) << v.name << ": " << distance.worst;
    double error = 0, norm = 0;
    for (size_t i = 0; i < plain.out.size(); ++i) {
      error += std::abs(moved.out[i].ToFloat() - plain.out[i].ToFloat());
      norm += std::abs(plain.out[i].ToFloat());
    }
    // The mean of keys is rounded at another place: some keys go to the next integer.
    EXPECT_LE(error / norm, v.int_bits == 4 ? 1e-2 : 2e-3) << v.name;
  }
}

TEST(CudaMmaAttentionTest, LargestProbabilitiesAndValuesDoNotOverflow) {
  const AttentionCase c = {1, 33, 4096, 1, 1, 64, false};
  const std::vector<Variant> variants = QuantizedVariants();
  if (variants.empty()) GTEST_SKIP();
  for (const Variant& v : variants) {
    AttentionProblem x(c);
    std::fill(x.q.begin(), x.q.end(), BFloat16::From(0));  // then all probabilities are the same
    std::fill(x.v.begin(), x.v.end(), BFloat16::From(-300));
    x.Run(v.way);
    for (const BFloat16 value : x.out) {
      ASSERT_NEAR(value.ToFloat(), -300, 2) << v.name;  // a step of bf16
    }
  }
}

// Keys and values in blocks of a cache whose other rows hold NaN, in any order.
TEST(CudaMmaAttentionTest, ReadsBlocksAsItReadsRows) {
  if (LacksAttention(kExact)) GTEST_SKIP();
  constexpr int kBlock = 64;
  for (const AttentionCase& c :
       {AttentionCase{1, 1, 1, 1, 1, 64, true}, AttentionCase{1, 130, 257, 7, 1, 128, true},
        AttentionCase{1, 33, 1000, 4, 2, 72, true}, AttentionCase{1, 200, 256, 2, 2, 80, true}}) {
    AttentionProblem x(c);
    x.Run(kExact);
    const std::vector<BFloat16> rows = x.out;
    const int64_t d = c.head_dim, count = (c.kv_len + kBlock - 1) / kBlock;
    const int64_t block = int64_t{2} * c.kv_heads * kBlock * d;
    std::vector<BFloat16> cache(2 * count * block, BFloat16{0x7fff});
    std::vector<int32_t> table = {static_cast<int32_t>(c.kv_len)};
    for (int64_t b = 0; b < count; ++b) {
      table.push_back(static_cast<int32_t>(2 * (count - 1 - b) + 1));
      for (int64_t t = b * kBlock; t < std::min(c.kv_len, (b + 1) * kBlock); ++t) {
        for (int h = 0; h < c.kv_heads; ++h) {
          BFloat16* const key =
              &cache[table.back() * block + (int64_t{h} * kBlock + t % kBlock) * d];
          std::copy_n(&x.k[t * x.kv_stride + h * d], d, key);
          std::copy_n(&x.v[t * x.kv_stride + h * d], d, key + int64_t{c.kv_heads} * kBlock * d);
        }
      }
    }
    DeviceBuffer device_cache(cache.size() * sizeof(BFloat16));
    device_cache.CopyFrom(cache.data(), device_cache.bytes());
    DeviceBuffer device_table(table.size() * sizeof(int32_t));
    device_table.CopyFrom(table.data(), device_table.bytes());
    std::fill(x.out.begin(), x.out.end(), BFloat16{0x7fff});
    x.device_out.CopyFrom(x.out.data(), x.device_out.bytes());
    AttentionArgs args = x.Args(kExact);
    args.k = args.v = nullptr;
    args.kv_len = 0;
    args.blocks = device_cache.data();
    args.table = static_cast<const int32_t*>(device_table.data());
    cuda::Attention(args, x.workspace.data(), x.workspace.bytes(), nullptr);
    cuda::Synchronize(nullptr);
    x.device_out.CopyTo(x.out.data(), x.device_out.bytes());
    EXPECT_TRUE(std::equal(rows.begin(), rows.end(), x.out.begin(), [](BFloat16 a, BFloat16 b) {
      return std::memcmp(&a, &b, sizeof a) == 0;
    })) << c.ToString();
  }
}

TEST(ChooseAttentionVariantTest, TakesWhatTheChipHasAndRefusesWhatItHasNot) {
  using Family = AttentionFamily;
  using Precision = AttentionPrecision;
  constexpr Family kRefused = Family::kByChip;
  constexpr int kChips[] = {75, 80, 86, 89, 90, 100, 120, 121};
  constexpr Family kHopper = Family::kHopper, kMma = Family::kMma;
  const struct {
    Family asked;
    Precision precision;
    Family expected[std::size(kChips)];
  } kTable[] = {
      {Family::kByChip, Precision::kBF16, {kRefused, kMma, kMma, kMma, kHopper, kMma, kMma, kMma}},
      {Family::kByChip,
       Precision::kInt8Fp8,
       {kRefused, kRefused, kRefused, kMma, kHopper, kRefused, kMma, kMma}},
      {Family::kByChip,
       Precision::kInt8Fp8HalfSums,
       {kRefused, kRefused, kRefused, kMma, kRefused, kRefused, kMma, kMma}},
      {Family::kByChip, Precision::kInt8Fp16, {kRefused, kMma, kMma, kMma, kMma, kMma, kMma, kMma}},
      {Family::kByChip,
       Precision::kInt4Fp8,
       {kRefused, kRefused, kRefused, kMma, kRefused, kRefused, kRefused, kRefused}},
      {Family::kByChip,
       Precision::kInt4Fp16,
       {kRefused, kMma, kMma, kMma, kRefused, kRefused, kRefused, kRefused}},
      {kMma, Precision::kInt8Fp8, {kRefused, kRefused, kRefused, kMma, kMma, kMma, kMma, kMma}},
      {kMma,
       Precision::kInt4Fp16,
       {kRefused, kMma, kMma, kMma, kMma, kRefused, kRefused, kRefused}},
      {kHopper,
       Precision::kBF16,
       {kRefused, kRefused, kRefused, kRefused, kHopper, kRefused, kRefused, kRefused}},
      {kHopper,
       Precision::kInt8Fp16,
       {kRefused, kRefused, kRefused, kRefused, kRefused, kRefused, kRefused, kRefused}},
  };
  for (const auto& row : kTable) {
    AttentionArgs args;
    args.family = row.asked;
    args.precision = row.precision;
    for (size_t i = 0; i < std::size(kChips); ++i) {
      const int chip = kChips[i];
      SCOPED_TRACE("chip " + std::to_string(chip) + ", precision " +
                   std::to_string(static_cast<int>(row.precision)));
      if (row.expected[i] == kRefused) {
        EXPECT_THROW(cuda::ChooseAttentionVariant(chip, args), Error);
        continue;
      }
      const cuda::AttentionVariant variant = cuda::ChooseAttentionVariant(chip, args);
      EXPECT_EQ(variant.family, row.expected[i]);
      EXPECT_EQ(variant.groups, chip >= 120 ? ScaleGroups::kWarp : ScaleGroups::kThread);
    }
  }
  for (const int chip : {80, 86, 89, 90, 100, 120}) {
    AttentionArgs args;
    args.precision = cuda::QuantizedPrecision(chip);
    EXPECT_NO_THROW(cuda::ChooseAttentionVariant(chip, args)) << chip;
  }
}

TEST(ChooseGpuAttentionTest, TakesTheMatrixKernelsOfTheChip) {
  const auto choose = [](int capability, int head_dim, DType dtype, bool biased) {
    return ChooseGpuAttention(capability, 100, 2, 2, head_dim, dtype, /*causal=*/false, biased);
  };
  EXPECT_EQ(choose(75, 64, DType::kBF16, false), GpuAttention::kPlain);
  EXPECT_EQ(choose(90, 64, DType::kBF16, false), GpuAttention::kFlash);
  for (const int chip : {80, 86, 89, 100, 120}) {
    EXPECT_EQ(choose(chip, 72, DType::kBF16, false), GpuAttention::kFlashMma) << chip;
    EXPECT_EQ(choose(chip, 96, DType::kBF16, false), GpuAttention::kPlain) << chip;
    EXPECT_EQ(choose(chip, 64, DType::kF32, false), GpuAttention::kPlain) << chip;
    EXPECT_EQ(choose(chip, 64, DType::kBF16, true), GpuAttention::kPlain) << chip;
  }
}

}  // namespace
}  // namespace sluice
