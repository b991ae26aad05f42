// Attention on a GPU and the equation in double, for tests of its kernels.
#ifndef SLUICE_TESTS_SUPPORT_ATTENTION_PROBLEM_H_
#define SLUICE_TESTS_SUPPORT_ATTENTION_PROBLEM_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "runtime/dtype.h"
#include "runtime/error.h"
#include "runtime/ops/cuda/attention.h"
#include "tests/support/device_buffer.h"

namespace sluice::testing {

struct AttentionCase {
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

// What is asked for besides the sizes.
struct AttentionWay {
  cuda::AttentionPrecision precision = cuda::AttentionPrecision::kBF16;
  cuda::AttentionFamily family = cuda::AttentionFamily::kByChip;
  cuda::ScaleGroups groups = cuda::ScaleGroups::kByChip;
};

// Whether there is no GPU, or one that refuses this; says so on stderr.
inline bool LacksAttention(const AttentionWay& way) {
  cuda::AttentionArgs args;
  args.precision = way.precision;
  args.family = way.family;
  args.groups = way.groups;
  try {
    if (cuda::DeviceCount() == 0) throw Error("needs a GPU and a build with -DSLUICE_CUDA=ON");
    cuda::ChooseAttentionVariant(cuda::ComputeCapability(), args);
    return false;
  } catch (const Error& refusal) {
    std::fprintf(stderr, "not tested here: %s\n", refusal.what());
    return true;
  }
}

inline std::vector<BFloat16> Normal(int64_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0, 1);
  std::vector<BFloat16> x(count);
  for (BFloat16& value : x) value = BFloat16::From(normal(generator));
  return x;
}

// Operands on the host and on the device.
struct AttentionProblem {
  explicit AttentionProblem(const AttentionCase& c)
      : sizes(c),
        q_stride(int64_t{c.heads} * c.head_dim + c.gap),
        kv_stride(int64_t{c.kv_heads} * c.head_dim + c.gap),
        q(Normal(c.batch * c.q_len * q_stride, 1)),
        k(Normal(c.batch * c.kv_len * kv_stride, 2)),
        v(Normal(c.batch * c.kv_len * kv_stride, 3)),
        out(q.size()) {}

  cuda::AttentionArgs Args(const AttentionWay& way) const {
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
            .precision = way.precision,
            .family = way.family,
            .groups = way.groups};
  }

  void Run(const AttentionWay& way) {
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
    const cuda::AttentionArgs args = Args(way);
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

  AttentionCase sizes;
  int64_t q_stride, kv_stride;
  std::vector<BFloat16> q, k, v, out;
  DeviceBuffer device_q, device_k, device_v, device_out, workspace;
  // What Expected gave for the rows that Compare looks at: operands must not change after it.
  mutable std::vector<std::vector<double>> expected;
};

// How far the outputs are from the equation, over some 600 rows spread over sequences and heads.
struct AttentionDistance {
  double l2 = 0, l1 = 0, cosine = 0;  // relative, relative, similarity
  std::string worst;
};

inline AttentionDistance Compare(const AttentionProblem& x) {
  const AttentionCase& c = x.sizes;
  double error2 = 0, norm2 = 0, error1 = 0, norm1 = 0, dot = 0, got2 = 0, worst = -1;
  AttentionDistance distance;
  const bool first = x.expected.empty();
  size_t seen = 0;
  const int64_t rows = c.batch * c.heads * c.q_len, step = std::max<int64_t>(1, rows / 600) | 1;
  for (int64_t row = rows - 1; row >= 0; row -= step) {
    const int64_t b = row / c.q_len / c.heads, i = row % c.q_len;
    const int h = static_cast<int>(row / c.q_len % c.heads);
    if (first) x.expected.push_back(x.Expected(b, i, h));
    const std::vector<double>& want = x.expected[seen++];
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
inline std::vector<AttentionCase> AttentionCases(int head_dim) {
  const int d = head_dim;
  return {
      {1, 1, 1, 1, 1, d, false},        {1, 17, 63, 2, 1, d, false},
      {2, 64, 64, 2, 2, d, false},      {1, 65, 129, 7, 1, d, false, 8},
      {3, 127, 127, 2, 2, d, false},    {1, 192, 128, 2, 2, d, false},
      {2, 193, 257, 4, 2, d, false},    {1, 729, 729, 2, 2, d, false, 3 * 8},
      {40, 130, 300, 4, 4, d, false},   {1, 257, 200, 40, 4, d, false},
      {1, 400, 200, 44, 44, d, false},  {1, 1, 1, 1, 1, d, true},
      {1, 64, 64, 2, 1, d, true},       {1, 128, 128, 1, 1, d, true},
      {2, 129, 129, 2, 2, d, true},     {1, 17, 1000, 7, 1, d, true},
      {1, 100, 130, 2, 2, d, true, 16}, {1, 1000, 1000, 2, 1, d, true},
      {2, 333, 777, 4, 2, d, true},     {1, 1, 500, 14, 2, d, true},
      {9, 600, 640, 16, 8, d, true},
  };
}

// Adds `size` times a random sign to a sixteenth of the channels, the same for all tokens.
inline void Bias(std::vector<BFloat16>& x, int64_t stride, float size, uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<float> bias(stride, 0);
  for (int64_t i = seed % 16; i < stride; i += 16) bias[i] = generator() % 2 ? size : -size;
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = BFloat16::From(x[i].ToFloat() + bias[i % stride]);
  }
}

// The value of an e4m3 number.
inline float FromFp8(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                   : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return bits & 0x80 ? -size : size;
}

}  // namespace sluice::testing

#endif  // SLUICE_TESTS_SUPPORT_ATTENTION_PROBLEM_H_
