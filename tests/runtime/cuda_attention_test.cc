#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "runtime/dtype.h"
#include "runtime/error.h"
#include "runtime/ops/cuda/attention.h"
#include "tests/support/device_buffer.h"

namespace sluice {
namespace {

using cuda::AttentionArgs;
using cuda::AttentionPrecision;
using ::sluice::testing::DeviceBuffer;

struct Case {
  int64_t batch, q_len, kv_len;
  int heads, kv_heads, head_dim;
  bool causal;
  int64_t gap = 0;  // elements between tokens beyond those of the heads

  std::string ToString() const {
    return "batch " + std::to_string(batch) + ", " + std::to_string(q_len) + " queries, " +
           std::to_string(kv_len) + " keys, heads " + std::to_string(heads) + "/" +
           std::to_string(kv_heads) + ", head_dim " + std::to_string(head_dim) +
           (causal ? ", causal" : "") + ", gap " + std::to_string(gap);
  }
};

std::vector<BFloat16> Normal(int64_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0, 1);
  std::vector<BFloat16> x(count);
  for (BFloat16& value : x) value = BFloat16::From(normal(generator));
  return x;
}

// Operands on the host and on the device.
struct Problem {
  explicit Problem(const Case& c)
      : sizes(c),
        q_stride(int64_t{c.heads} * c.head_dim + c.gap),
        kv_stride(int64_t{c.kv_heads} * c.head_dim + c.gap),
        q(Normal(c.batch * c.q_len * q_stride, 1)),
        k(Normal(c.batch * c.kv_len * kv_stride, 2)),
        v(Normal(c.batch * c.kv_len * kv_stride, 3)),
        out(q.size()) {}

  AttentionArgs Args(AttentionPrecision precision) const {
    return {.q = device_q.data(),
            .k = device_k.data(),
            .v = device_v.data(),
            .out = device_out.data(),
            .q_stride = q_stride,
            .k_stride = kv_stride,
            .v_stride = kv_stride,
            .out_stride = q_stride,
            .batch = sizes.batch,
            .q_len = sizes.q_len,
            .kv_len = sizes.kv_len,
            .heads = sizes.heads,
            .kv_heads = sizes.kv_heads,
            .head_dim = sizes.head_dim,
            .scale = 1 / std::sqrt(static_cast<float>(sizes.head_dim)),
            .causal = sizes.causal,
            .precision = precision};
  }

  void Run(AttentionPrecision precision) {
    const auto upload = [](const std::vector<BFloat16>& x) {
      DeviceBuffer buffer(x.size() * sizeof(BFloat16));
      buffer.CopyFrom(x.data(), buffer.bytes());
      return buffer;
    };
    device_q = upload(q);
    device_k = upload(k);
    device_v = upload(v);
    // NaN everywhere: what the kernel does not write, or reads without having written it, shows.
    std::fill(out.begin(), out.end(), BFloat16{0x7fff});
    device_out = upload(out);
    const AttentionArgs args = Args(precision);
    const std::vector<uint8_t> poison(cuda::AttentionWorkspaceBytes(args), 0xff);
    workspace = DeviceBuffer(poison.size());
    workspace.CopyFrom(poison.data(), poison.size());
    cuda::Attention(args, workspace.data(), workspace.bytes(), nullptr);
    cuda::Synchronize(nullptr);
    device_out.CopyTo(out.data(), device_out.bytes());
  }

  // The equation in double for one query and head.
  std::vector<double> Expected(int64_t batch, int64_t query, int head) const {
    const int d = sizes.head_dim, kv_head = head / (sizes.heads / sizes.kv_heads);
    const int64_t seen = sizes.causal ? query + sizes.kv_len - sizes.q_len + 1 : sizes.kv_len;
    const BFloat16* row = &q[(batch * sizes.q_len + query) * q_stride + head * d];
    const int64_t first = batch * sizes.kv_len * kv_stride + kv_head * d;
    std::vector<double> p(seen), o(d);
    double max = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int64_t t = 0; t < seen; ++t) {
      for (int i = 0; i < d; ++i) {
        p[t] += double{row[i].ToFloat()} * k[first + t * kv_stride + i].ToFloat();
      }
      p[t] /= std::sqrt(static_cast<double>(d));
      max = std::max(max, p[t]);
    }
    for (double& x : p) sum += x = std::exp(x - max);
    for (int64_t t = 0; t < seen; ++t) {
      for (int i = 0; i < d; ++i) o[i] += p[t] / sum * v[first + t * kv_stride + i].ToFloat();
    }
    return o;
  }

  Case sizes;
  int64_t q_stride, kv_stride;
  std::vector<BFloat16> q, k, v, out;
  DeviceBuffer device_q, device_k, device_v, device_out, workspace;
};

// How far the outputs are from the equation, over some 600 rows spread over sequences and heads.
struct Distance {
  double l2 = 0, l1 = 0, cosine = 0;  // relative, relative, similarity
  std::string worst;
};

Distance Compare(const Problem& x) {
  const Case& c = x.sizes;
  double error2 = 0, norm2 = 0, error1 = 0, norm1 = 0, dot = 0, got2 = 0, worst = -1;
  Distance distance;
  const int64_t rows = c.batch * c.heads * c.q_len, step = std::max<int64_t>(1, rows / 600) | 1;
  for (int64_t row = rows - 1; row >= 0; row -= step) {
    const int64_t b = row / c.q_len / c.heads, i = row % c.q_len;
    const int h = static_cast<int>(row / c.q_len % c.heads);
    const std::vector<double> want = x.Expected(b, i, h);
    for (int d = 0; d < c.head_dim; ++d) {
      const double a = x.out[(b * c.q_len + i) * x.q_stride + h * c.head_dim + d].ToFloat();
      error2 += (a - want[d]) * (a - want[d]);
      error1 += std::abs(a - want[d]);
      norm2 += want[d] * want[d];
      norm1 += std::abs(want[d]);
      dot += a * want[d];
      got2 += a * a;
      if (!(std::abs(a - want[d]) <= worst)) {
        worst = std::abs(a - want[d]);
        distance.worst = "batch " + std::to_string(b) + " query " + std::to_string(i) + " head " +
                         std::to_string(h) + " channel " + std::to_string(d) + " is " +
                         std::to_string(a) + ", expected " + std::to_string(want[d]);
      }
    }
  }
  distance.l2 = std::sqrt(error2 / norm2);
  distance.l1 = error1 / norm1;
  distance.cosine = dot / std::sqrt(norm2 * got2);
  return distance;
}

// Lengths around the edges of tiles of 64, 96, 128 and 192, of real models, fewer queries than
// keys and the other way round; groups of 1, 2, 7; heads within wider rows.
std::vector<Case> Cases(int head_dim) {
  const int d = head_dim;
  return {
      {1, 1, 1, 1, 1, d, false},        {1, 17, 63, 2, 1, d, false},
      {2, 64, 64, 2, 2, d, false},      {1, 65, 129, 7, 1, d, false, 8},
      {3, 127, 127, 2, 2, d, false},    {1, 192, 128, 2, 2, d, false},
      {2, 193, 257, 4, 2, d, false},    {1, 729, 729, 2, 2, d, false, 3 * 8},
      {40, 130, 300, 4, 4, d, false},   {1, 1, 1, 1, 1, d, true},
      {1, 64, 64, 2, 1, d, true},       {1, 128, 128, 1, 1, d, true},
      {2, 129, 129, 2, 2, d, true},     {1, 17, 1000, 7, 1, d, true},
      {1, 100, 130, 2, 2, d, true, 16}, {1, 1000, 1000, 2, 1, d, true},
      {2, 333, 777, 4, 2, d, true},     {1, 1, 500, 14, 2, d, true},
      {9, 600, 640, 16, 8, d, true},
  };
}

bool NoDevice(const char* test) {
  if (cuda::DeviceCount() > 0) return false;
  std::fprintf(stderr, "%s needs a Hopper GPU and a build with -DSLUICE_CUDA=ON\n", test);
  return true;
}

TEST(CudaAttentionTest, AgreesWithTheEquationOverAwkwardShapes) {
  if (NoDevice("CudaAttentionTest.AgreesWithTheEquationOverAwkwardShapes")) GTEST_SKIP();
  for (int head_dim : {64, 72, 80, 128}) {
    for (const Case& c : Cases(head_dim)) {
      Problem x(c);
      x.Run(AttentionPrecision::kBF16);
      const Distance distance = Compare(x);
      // Probabilities and results are rounded to bf16: root mean squares of 1.6e-3 each make
      // 2.3e-3; one key alone makes the first exact.
      EXPECT_LE(distance.l2, 4e-3) << c.ToString() << ": " << distance.worst;
    }
  }
}

// Products in 8 bits against exact attention: similarity and relative L1 distance that the method
// is held to. The rounding of probabilities and values to 3 bits makes most of it, some 0.04.
void ExpectWithinGates(const Problem& x, const std::string& what) {
  const Distance distance = Compare(x);
  EXPECT_GE(distance.cosine, 0.999) << what << ": " << distance.worst;
  EXPECT_LE(distance.l1, 0.05) << what << ": " << distance.worst;
}

TEST(CudaSageAttentionTest, StaysWithinItsErrorOverAwkwardShapes) {
  if (NoDevice("CudaSageAttentionTest.StaysWithinItsErrorOverAwkwardShapes")) GTEST_SKIP();
  for (int head_dim : {64, 72, 80, 128}) {
    for (const Case& c : Cases(head_dim)) {
      Problem x(c);
      x.Run(AttentionPrecision::kInt8Fp8);
      ExpectWithinGates(x, c.ToString());
    }
  }
}

// Adds `size` times a random sign to a sixteenth of the channels, the same for all tokens.
void Bias(std::vector<BFloat16>& x, int64_t stride, float size, uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<float> bias(stride, 0);
  for (int64_t i = seed % 16; i < stride; i += 16) bias[i] = generator() % 2 ? size : -size;
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = BFloat16::From(x[i].ToFloat() + bias[i % stride]);
  }
}

TEST(CudaSageAttentionTest, StaysWithinItsErrorOnBiasedInputs) {
  if (NoDevice("CudaSageAttentionTest.StaysWithinItsErrorOnBiasedInputs")) GTEST_SKIP();
  for (const Case& c : {Case{1, 128, 4096, 2, 2, 128, false}, Case{1, 128, 4096, 2, 1, 64, false},
                        Case{2, 700, 700, 2, 1, 128, true}}) {
    Problem keys(c);
    Bias(keys.q, keys.q_stride, 6, 3);
    Bias(keys.k, keys.kv_stride, 10, 3);  // as seen in models: outliers in the same channels
    keys.Run(AttentionPrecision::kInt8Fp8);
    ExpectWithinGates(keys, "biased keys and queries, " + c.ToString());

    Problem values(c);
    Bias(values.v, values.kv_stride, 8.5f, 5);
    values.Run(AttentionPrecision::kInt8Fp8);
    // Here similarity tells nothing; sums that lose bits in the tensor cores show in the distance.
    EXPECT_LE(Compare(values).l1, 0.02) << "biased values, " << c.ToString();
  }
}

// The value of an e4m3 number.
float FromFp8(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                   : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return bits & 0x80 ? -size : size;
}

TEST(CudaSageAttentionTest, WritesTheKeysAndValuesThatItsFormulasGive) {
  if (NoDevice("CudaSageAttentionTest.WritesTheKeysAndValuesThatItsFormulasGive")) GTEST_SKIP();
  constexpr int kOrder[16] = {0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15};
  for (const Case& c : {Case{2, 1, 300, 2, 2, 128, false}, Case{1, 1, 1111, 2, 1, 64, false, 8},
                        Case{1, 1, 130, 4, 2, 72, false}, Case{1, 1, 129, 2, 2, 80, false}}) {
    Problem x(c);
    x.Run(AttentionPrecision::kInt8Fp8);
    const auto layout = cuda::LayOutQuantizedKv(x.Args(AttentionPrecision::kInt8Fp8));
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
  AttentionArgs args = {.q_len = 4096, .kv_len = 4096, .heads = 32, .kv_heads = 32};
  args.head_dim = 128;
  args.causal = true;
  EXPECT_EQ(cuda::FastestAttention(args), AttentionPrecision::kInt8Fp8);
  args.q_len = 196;
  EXPECT_EQ(cuda::FastestAttention(args), AttentionPrecision::kBF16);
  args.q_len = 4096;
  args.head_dim = 64;
  EXPECT_EQ(cuda::FastestAttention(args), AttentionPrecision::kBF16);
}

}  // namespace
}  // namespace sluice
