#include "runtime/ops/attention.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "runtime/error.h"
#include "runtime/ops/cpu/amx.h"
#include "runtime/ops/cpu/attention.h"
#include "tests/support/tensor_testing.h"

namespace sluice {
namespace {

using ::sluice::testing::At;
using ::sluice::testing::RandomTensor;
using ::sluice::testing::RotaryFrequencies;

// Scores of random unit normals are about N(0, 1) after scaling. In f32 the error of a score is a
// few ulps (1e-7), and sums of S terms carry up to sqrt(S) of them: 90 at 8000 keys.
constexpr double kF32Tolerance = 5e-6;
// In bf16 both the result and the probabilities are rounded to 8 bits: at most 2^-8 = 4e-3 of each
// value (2^-9 for most); their root mean squares (1.6e-3 each) add up to 2.3e-3 of the whole.
constexpr double kBF16Tolerance = 4e-3;

double ToleranceOf(DType dtype) { return dtype == DType::kF32 ? kF32Tolerance : kBF16Tolerance; }

void Set(TensorView x, int64_t row, int64_t column, float value) {
  const int64_t i = row * x.stride0() + column;
  if (x.dtype() == DType::kF32) {
    x.data<float>()[i] = value;
  } else {
    x.data<BFloat16>()[i] = BFloat16::From(value);
  }
}

// Rows [first, first + count) of one head, whose columns begin at `column`: [count, head_dim].
std::vector<double> Head(ConstTensorView x, int64_t first, int64_t count, int64_t column,
                         int64_t head_dim) {
  std::vector<double> head(count * head_dim);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < head_dim; ++d) head[i * head_dim + d] = At(x, first + i, column + d);
  }
  return head;
}

// o = softmax(q k^T * scale) v of one query, in double. keys, values: as Head, the first `num_keys`
// rows count.
std::vector<double> Expected(const std::vector<double>& q, int64_t num_keys,
                             const std::vector<double>& keys, const std::vector<double>& values,
                             const std::function<double(int64_t)>& bias = nullptr) {
  const int64_t head_dim = q.size();
  const double scale = 1 / std::sqrt(static_cast<double>(head_dim));
  std::vector<double> p(num_keys), o(head_dim);
  double max = -std::numeric_limits<double>::infinity(), sum = 0;
  for (int64_t t = 0; t < num_keys; ++t) {
    const double* key = keys.data() + t * head_dim;
    p[t] = std::inner_product(q.begin(), q.end(), key, 0.0) * scale + (bias ? bias(t) : 0);
    max = std::max(max, p[t]);
  }
  for (double& x : p) sum += x = std::exp(x - max);
  for (int64_t t = 0; t < num_keys; ++t) {
    const double share = p[t] / sum;
    const double* value = values.data() + t * head_dim;
    for (int64_t d = 0; d < head_dim; ++d) o[d] += share * value[d];
  }
  return o;
}

// Relative L2 distance of rows `rows` of `got`; names the worst element.
void ExpectClose(ConstTensorView got, ConstTensorView want, double tolerance,
                 const std::string& what) {
  double error = 0, norm = 0, worst = -1;
  std::string where;
  for (int64_t i = 0; i < want.dim(0); ++i) {
    for (int64_t j = 0; j < want.dim(1); ++j) {
      const double a = At(got, i, j), b = At(want, i, j);
      ASSERT_TRUE(std::isfinite(a)) << what << ": element [" << i << ", " << j << "] is " << a;
      error += (a - b) * (a - b);
      norm += b * b;
      if (std::abs(a - b) > worst) {
        worst = std::abs(a - b);
        where = "[" + std::to_string(i) + ", " + std::to_string(j) + "] is " + std::to_string(a) +
                ", expected " + std::to_string(b);
      }
    }
  }
  EXPECT_LE(std::sqrt(error / norm), tolerance) << what << ": element " << where;
}

// The reference and every kernel that exists for the dtype on this machine.
std::vector<AttentionKernel> KernelsOf(DType dtype) {
  std::vector<AttentionKernel> kernels = {AttentionKernel::kReference, AttentionKernel::kSimd};
  if (dtype == DType::kBF16 && cpu::AmxAllowed()) kernels.push_back(AttentionKernel::kAmx);
  return kernels;
}

struct EncoderCase {
  int64_t batch, length;
  int heads, head_dim;
  float deviation = 1;
  int64_t queries = 0;  // 0: as many as keys
  bool biased = false;  // keys that count as several
};

// Queries, keys and values as columns of one product, or each on its own where their numbers
// differ.
struct EncoderInputs {
  EncoderInputs(DType dtype, const EncoderCase& c)
      : width(int64_t{c.heads} * c.head_dim),
        qkv(RandomTensor(dtype, {c.batch * c.length, 3 * width}, 17 + c.length, c.deviation)),
        own_q(RandomTensor(dtype, {c.batch * std::max<int64_t>(c.queries, 1), width}, 5 + c.queries,
                           c.deviation)),
        q(c.queries ? own_q.view() : qkv.view().Columns(0, width)),
        k(qkv.view().Columns(width, 2 * width)),
        v(qkv.view().Columns(2 * width, 3 * width)) {
    if (!c.biased) return;
    bias_storage = RandomTensor(DType::kF32, {1, c.batch * c.length}, 3);
    key_bias = {bias_storage.data<float>(), DType::kF32, {c.batch * c.length}};
  }
  double Bias(int64_t key) const { return key_bias.empty() ? 0 : key_bias.data<float>()[key]; }

  int64_t width;
  Tensor qkv, own_q, bias_storage;
  ConstTensorView key_bias;
  ConstTensorView q, k, v;
};

void RunEncoder(AttentionKernel kernel, ExecContext& ctx, const EncoderInputs& x,
                const EncoderCase& c, TensorView out) {
  const float scale = 1 / std::sqrt(static_cast<float>(c.head_dim));
  switch (kernel) {
    case AttentionKernel::kReference:
      return cpu::EncoderAttentionReference(ctx, x.q, x.k, x.v, c.batch, c.heads, c.head_dim, scale,
                                            out, x.key_bias);
    case AttentionKernel::kSimd:
      return cpu::EncoderAttentionSimd(ctx, x.q, x.k, x.v, c.batch, c.heads, c.head_dim, scale, out,
                                       x.key_bias);
    case AttentionKernel::kAmx:
      return cpu::EncoderAttentionAmx(ctx, x.q, x.k, x.v, c.batch, c.heads, c.head_dim, scale, out,
                                      x.key_bias);
    default:
      FAIL() << "no exact kernel: " << Name(kernel);
  }
}

void CheckEncoder(const EncoderCase& c, DType dtype, int num_threads, double tolerance) {
  ExecContext ctx({.num_threads = num_threads});
  const EncoderInputs x(dtype, c);
  const int64_t width = x.width, rows = x.q.dim(0), queries = rows / c.batch;
  Tensor want(DType::kF32, {rows, width});
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t column = 0; column < width; column += c.head_dim) {
      const int64_t first = b * c.length;
      const std::vector<double> keys = Head(x.k, first, c.length, column, c.head_dim);
      const std::vector<double> values = Head(x.v, first, c.length, column, c.head_dim);
      for (int64_t i = b * queries; i < (b + 1) * queries; ++i) {
        const auto o = Expected(Head(x.q, i, 1, column, c.head_dim), c.length, keys, values,
                                [&](int64_t t) { return x.Bias(first + t); });
        for (int d = 0; d < c.head_dim; ++d) Set(want, i, column + d, o[d]);
      }
    }
  }
  for (AttentionKernel kernel : KernelsOf(dtype)) {
    Tensor out(dtype, {rows, width});
    RunEncoder(kernel, ctx, x, c, out);
    ExpectClose(out, want, tolerance,
                std::string(Name(kernel)) + " " + Name(dtype) + " batch " +
                    std::to_string(c.batch) + " S " + std::to_string(c.length) + " heads " +
                    std::to_string(c.heads) + " D " + std::to_string(c.head_dim));
  }
}

TEST(EncoderAttentionTest, EqualsTheEquationOverAwkwardLengthsAndHeadSizes) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    for (int head_dim : {1, 8, 24, 64, 72, 128}) {
      for (int64_t length : {1, 2, 15, 16, 17, 33, 63, 64, 65, 129, 197}) {
        CheckEncoder(
            {.batch = length < 20 ? 3 : 1, .length = length, .heads = 2, .head_dim = head_dim},
            dtype, 1 + length % 3, ToleranceOf(dtype));
      }
    }
  }
}

TEST(EncoderAttentionTest, EqualsTheEquationOverNumbersOfHeadsAndFrames) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    for (int heads : {1, 3, 4, 12, 16}) {
      for (int64_t batch : {1, 2, 5}) {
        CheckEncoder({.batch = batch, .length = 49, .heads = heads, .head_dim = 24}, dtype,
                     1 + heads % 4, ToleranceOf(dtype));
      }
    }
  }
}

TEST(EncoderAttentionTest, EqualsTheEquationForFewerOrMoreQueriesThanKeys) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    for (int64_t queries : {1, 7, 32, 49, 70}) {
      for (int64_t length : {1, 33, 65, 196}) {
        CheckEncoder({.batch = 3, .length = length, .heads = 2, .head_dim = 24, .queries = queries},
                     dtype, 1 + queries % 3, ToleranceOf(dtype));
      }
    }
  }
}

TEST(EncoderAttentionTest, EqualsTheEquationWithABiasOnTheKeys) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const int64_t length : {1, 31, 64, 97, 196, 300}) {
      for (const int head_dim : {16, 24, 64, 72}) {
        CheckEncoder({2, length, 3, head_dim, 1, length > 50 ? 33 : 0, true}, dtype, 2,
                     ToleranceOf(dtype));
      }
    }
  }
}

// f32 sums of D products, exponentials of relative error 1e-7, means over heads and queries.
TEST(AttentionReceivedTest, EqualsTheColumnSumsOfTheProbabilities) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const auto& [length, queries, head_dim] :
         {std::tuple{1, 1, 8}, {37, 1, 16}, {49, 5, 24}, {196, 64, 64}, {130, 33, 72}}) {
      for (const bool biased : {false, true}) {
        const EncoderCase c = {2, length, 3, head_dim, 1, queries, biased};
        const EncoderInputs x(dtype, c);
        for (const KernelChoice kernels : {KernelChoice::kFast, KernelChoice::kReference}) {
          ExecContext ctx({.num_threads = 2, .kernels = kernels});
          const Tensor received(DType::kF32, {2, length});
          const double scale = 1 / std::sqrt(double(head_dim));
          AttentionReceived(ctx, x.q, x.k, 2, 3, head_dim, static_cast<float>(scale), x.key_bias,
                            received);
          for (int64_t b = 0; b < 2; ++b) {
            std::vector<double> want(length);
            for (int64_t i = b * queries; i < (b + 1) * queries; ++i) {
              for (int64_t column = 0; column < 3 * head_dim; column += head_dim) {
                std::vector<double> p(length);
                double sum = 0;
                for (int64_t t = 0; t < length; ++t) {
                  double dot = 0;
                  for (int64_t d = column; d < column + head_dim; ++d) {
                    dot += At(x.q, i, d) * At(x.k, b * length + t, d);
                  }
                  sum += p[t] = std::exp(dot * scale + x.Bias(b * length + t));
                }
                for (int64_t t = 0; t < length; ++t) want[t] += p[t] / sum / 3 / queries;
              }
            }
            for (int64_t t = 0; t < length; ++t) {
              ASSERT_NEAR(received.data<float>()[b * length + t], want[t], 1e-5 * want[t] + 1e-8)
                  << "S " << length << " Q " << queries << " D " << head_dim << " key " << t;
            }
          }
        }
      }
    }
  }
}

TEST(EncoderAttentionTest, EqualsTheEquationAtTheShapeOfSiglipSo400m) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    CheckEncoder({.batch = 1, .length = 729, .heads = 1, .head_dim = 72}, dtype, 2,
                 ToleranceOf(dtype));
  }
}

TEST(EncoderAttentionTest, TakesMoreQueryTilesThanOneGroupHolds) {
  const EncoderCase many = {.batch = 1, .length = 660, .heads = 1, .head_dim = 128};
  CheckEncoder(many, DType::kBF16, 1, kBF16Tolerance);
  CheckEncoder(many, DType::kF32, 1, kF32Tolerance);
}

// Scores of deviation 900 reach several thousand: e^score overflows f32 at 89. One key takes nearly
// all weight, so what is left is the error of the difference of two such scores: 5000 * 2^-24 in
// f32 times a few roundings, and the same with exact inputs in bf16.
TEST(EncoderAttentionTest, LargeScoresNeitherOverflowNorLosePrecision) {
  const EncoderCase large = {
      .batch = 1, .length = 197, .heads = 2, .head_dim = 64, .deviation = 30};
  CheckEncoder(large, DType::kF32, 2, 1e-3);
  CheckEncoder(large, DType::kBF16, 2, kBF16Tolerance);
}

// The maximum of a row rises over the whole length, so that sums are rescaled again and again.
TEST(EncoderAttentionTest, ScoresThatRiseWithTheKeysAreRescaled) {
  constexpr int64_t kLength = 700;
  constexpr int kHeadDim = 32;
  ExecContext ctx({.num_threads = 2});
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    const EncoderCase c = {.batch = 1, .length = kLength, .heads = 1, .head_dim = kHeadDim};
    EncoderInputs x(dtype, c);
    for (int64_t i = 0; i < kLength; ++i) {
      Set(x.qkv, i, 0, 4);
      Set(x.qkv, i, kHeadDim, static_cast<float>(i) * 0.25f);
    }
    Tensor want(dtype, {kLength, kHeadDim});
    RunEncoder(AttentionKernel::kReference, ctx, x, c, want);
    for (AttentionKernel kernel : KernelsOf(dtype)) {
      Tensor out(dtype, {kLength, kHeadDim});
      RunEncoder(kernel, ctx, x, c, out);
      // f32 scores of up to 125 carry 125 * 2^-24 = 7e-6.
      ExpectClose(out, want, dtype == DType::kF32 ? 2e-5 : kBF16Tolerance, Name(kernel));
    }
  }
}

TEST(EncoderAttentionTest, ResultsDoNotDependOnTheNumberOfThreads) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    const Tensor qkv = RandomTensor(dtype, {2 * 197, 3 * 3 * 72}, 5);
    std::vector<Tensor> outs;
    for (int threads : {1, 2, 5}) {
      ExecContext ctx({.num_threads = threads});
      outs.emplace_back(dtype, Shape{2 * 197, 3 * 72});
      EncoderAttention(ctx, qkv.view().Columns(0, 216), qkv.view().Columns(216, 432),
                       qkv.view().Columns(432, 648), 2, 3, 72, 0.1f, outs.back());
      EXPECT_EQ(std::memcmp(outs[0].view().raw(), outs.back().view().raw(), outs[0].SizeBytes()), 0)
          << Name(dtype) << " with " << threads << " threads";
    }
  }
}

TEST(EncoderAttentionTest, WrongShapesAreNamed) {
  ExecContext ctx({.num_threads = 1});
  const Tensor x = RandomTensor(DType::kF32, {6, 8}, 1), few = RandomTensor(DType::kF32, {4, 8}, 1);
  Tensor out(DType::kF32, {6, 8});
  const auto message = [&](auto&& call) {
    try {
      call();
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("nothing was thrown");
  };
  EXPECT_THAT(message([&] { EncoderAttention(ctx, x, x, x, 4, 2, 4, 0.5f, out); }),
              ::testing::HasSubstr("batch 4"));
  EXPECT_THAT(message([&] { EncoderAttention(ctx, x, x, x, 2, 2, 4, 0.5f, out, out); }),
              ::testing::HasSubstr("key_bias must be"));
  EXPECT_THAT(message([&] { EncoderAttention(ctx, x, x, x, 2, 2, 5, 0.5f, out); }),
              ::testing::HasSubstr("q must be [6, 10] f32, got [6, 8] f32"));
  EXPECT_THAT(message([&] { EncoderAttention(ctx, x, x, x, 2, 2, 4, -1.0f, out); }),
              ::testing::HasSubstr("scale must be positive"));
  Tensor narrow(DType::kBF16, {6, 8});
  EXPECT_THAT(message([&] { EncoderAttention(ctx, x, x, x, 2, 2, 4, 0.5f, narrow); }),
              ::testing::HasSubstr("out must be [6, 8] f32, got [6, 8] bf16"));
}

// A cache of one layer whose unwritten places hold NaN.
class Cache {
 public:
  Cache(DType dtype, int kv_heads, int head_dim, int64_t positions)
      : dtype_(dtype), kv_heads_(kv_heads), head_dim_(head_dim) {
    for (int64_t begin = 0; begin < positions; begin += kKvBlockTokens) {
      const auto elements =
          static_cast<int64_t>(KvBlockBytes(kv_heads, head_dim, dtype) / SizeOf(dtype));
      storage_.emplace_back(dtype, Shape{1, elements});
      for (int64_t i = 0; i < elements; ++i) Set(storage_.back(), 0, i, NAN);
      blocks_.push_back(storage_.back().view().raw());
    }
  }
  KvLayerView view() const { return {blocks_, kv_heads_, head_dim_, dtype_}; }

 private:
  DType dtype_;
  int kv_heads_, head_dim_;
  std::vector<Tensor> storage_;
  std::vector<void*> blocks_;
};

struct CausalCase {
  int64_t begin, length;
  int heads, kv_heads, head_dim;
  float deviation = 1;
  std::string ToString() const {
    return "begin " + std::to_string(begin) + " S " + std::to_string(length) + " heads " +
           std::to_string(heads) + "/" + std::to_string(kv_heads) + " D " +
           std::to_string(head_dim);
  }
};

void RunCausal(AttentionKernel kernel, ExecContext& ctx, ConstTensorView q, const CausalCase& c,
               const KvLayerView& kv, TensorView out) {
  const float scale = 1 / std::sqrt(static_cast<float>(c.head_dim));
  switch (kernel) {
    case AttentionKernel::kReference:
      return cpu::CausalAttentionReference(ctx, q, c.begin, c.heads, scale, kv, out);
    case AttentionKernel::kSimd:
      return cpu::CausalAttentionSimd(ctx, q, c.begin, c.heads, scale, kv, out);
    case AttentionKernel::kAmx:
      return cpu::CausalAttentionAmx(ctx, q, c.begin, c.heads, scale, kv, out);
    default:
      FAIL() << "no exact kernel: " << Name(kernel);
  }
}

// Stores keys and values in two steps, then compares every kernel with the equation on some rows
// spread over the queries (the equation in double is slow).
void CheckCausal(const CausalCase& c, DType dtype, int num_threads, double tolerance) {
  ExecContext ctx({.num_threads = num_threads});
  const int64_t width = int64_t{c.heads} * c.head_dim, kv_width = int64_t{c.kv_heads} * c.head_dim;
  const int64_t keys = c.begin + c.length;
  const Tensor k = RandomTensor(dtype, {keys, kv_width}, 101, c.deviation);
  const Tensor v = RandomTensor(dtype, {keys, kv_width}, 102);
  // The queries are columns of something wider, as behind a stacked projection.
  const Tensor wide = RandomTensor(dtype, {c.length, width + 2 * kv_width}, 103, c.deviation);
  const ConstTensorView q = ConstTensorView(wide).Columns(0, width);
  Cache cache(dtype, c.kv_heads, c.head_dim, keys);
  StoreKv(ctx, ConstTensorView(k).Slice(0, c.begin), ConstTensorView(v).Slice(0, c.begin), 0,
          cache.view());
  StoreKv(ctx, ConstTensorView(k).Slice(c.begin, keys), ConstTensorView(v).Slice(c.begin, keys),
          c.begin, cache.view());

  std::vector<int64_t> rows;
  const int64_t most = keys > 200 ? 6 : 16;
  for (int64_t i = 0; i < c.length; i += std::max<int64_t>(1, c.length / most)) rows.push_back(i);
  if (rows.back() != c.length - 1) rows.push_back(c.length - 1);
  Tensor want(DType::kF32, {static_cast<int64_t>(rows.size()), width});
  for (int head = 0; head < c.heads; ++head) {
    const int64_t column = int64_t{head} * c.head_dim;
    const int64_t kv_column = head / (c.heads / c.kv_heads) * c.head_dim;
    const std::vector<double> key_rows = Head(k, 0, keys, kv_column, c.head_dim);
    const std::vector<double> values = Head(v, 0, keys, kv_column, c.head_dim);
    for (size_t r = 0; r < rows.size(); ++r) {
      const auto o = Expected(Head(q, rows[r], 1, column, c.head_dim), c.begin + rows[r] + 1,
                              key_rows, values);
      for (int d = 0; d < c.head_dim; ++d) Set(want, r, column + d, o[d]);
    }
  }
  for (AttentionKernel kernel : KernelsOf(dtype)) {
    Tensor out(dtype, {c.length, width});
    RunCausal(kernel, ctx, q, c, cache.view(), out);
    Tensor picked(DType::kF32, want.shape());
    for (size_t r = 0; r < rows.size(); ++r) {
      for (int64_t j = 0; j < width; ++j) Set(picked, r, j, At(out.view(), rows[r], j));
    }
    ExpectClose(picked, want, tolerance,
                std::string(Name(kernel)) + " " + Name(dtype) + " " + c.ToString() + " threads " +
                    std::to_string(num_threads));
  }
}

TEST(CausalAttentionTest, EqualsTheEquationOverAwkwardLengthsAndBeginnings) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    for (int64_t begin : {0, 1, 63, 64, 65, 500}) {
      for (int64_t length : {1, 2, 15, 16, 17, 63, 64, 65, 196, 197}) {
        CheckCausal({.begin = begin, .length = length, .heads = 4, .kv_heads = 2, .head_dim = 64},
                    dtype, 1 + (begin + length) % 3, ToleranceOf(dtype));
      }
    }
  }
}

TEST(CausalAttentionTest, EqualsTheEquationOverHeadSizesAndGroups) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    for (int head_dim : {1, 8, 24, 64, 72, 128}) {
      for (int group : {1, 2, 5, 7}) {
        for (int64_t length : {1, 19}) {
          CheckCausal({.begin = 130,
                       .length = length,
                       .heads = 2 * group,
                       .kv_heads = 2,
                       .head_dim = head_dim},
                      dtype, 2, ToleranceOf(dtype));
        }
      }
    }
  }
}

TEST(CausalAttentionTest, EqualsTheEquationOverALongContext) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    CheckCausal({.begin = 8000, .length = 17, .heads = 4, .kv_heads = 2, .head_dim = 64}, dtype, 2,
                ToleranceOf(dtype));
    // Few heads and one query: the keys are cut into ranges, and the last one is not full.
    for (int threads : {1, 2, 7}) {
      CheckCausal({.begin = 8001, .length = 1, .heads = 5, .kv_heads = 1, .head_dim = 64}, dtype,
                  threads, ToleranceOf(dtype));
    }
    // Rows of the first ranges end before the last range begins.
    CheckCausal({.begin = 3, .length = 1100, .heads = 1, .kv_heads = 1, .head_dim = 24}, dtype, 16,
                ToleranceOf(dtype));
  }
}

TEST(CausalAttentionTest, LargeScoresNeitherOverflowNorLosePrecision) {
  const CausalCase large = {
      .begin = 600, .length = 40, .heads = 4, .kv_heads = 2, .head_dim = 64, .deviation = 30};
  CheckCausal(large, DType::kF32, 2, 1e-3);
  CheckCausal(large, DType::kBF16, 2, kBF16Tolerance);
}

TEST(CausalAttentionTest, ChunksGiveWhatTheWholePrefillGives) {
  constexpr int kHeads = 6, kKvHeads = 2, kHeadDim = 64;
  constexpr int64_t kLength = 333;
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    ExecContext ctx({.num_threads = 2});
    const Tensor k = RandomTensor(dtype, {kLength, kKvHeads * kHeadDim}, 7);
    const Tensor v = RandomTensor(dtype, {kLength, kKvHeads * kHeadDim}, 8);
    const Tensor q = RandomTensor(dtype, {kLength, kHeads * kHeadDim}, 9);
    Tensor whole(dtype, {kLength, kHeads * kHeadDim}), chunked(dtype, whole.shape());
    Cache whole_cache(dtype, kKvHeads, kHeadDim, kLength);
    StoreKv(ctx, k, v, 0, whole_cache.view());
    CausalAttention(ctx, q, 0, kHeads, 0.125f, whole_cache.view(), whole);
    Cache cache(dtype, kKvHeads, kHeadDim, kLength);
    for (int64_t begin = 0, size = 1; begin < kLength; begin += size, size = size * 2 + 1) {
      const int64_t end = std::min(kLength, begin + size);
      StoreKv(ctx, ConstTensorView(k).Slice(begin, end), ConstTensorView(v).Slice(begin, end),
              begin, cache.view());
      CausalAttention(ctx, ConstTensorView(q).Slice(begin, end), begin, kHeads, 0.125f,
                      cache.view(), chunked.view().Slice(begin, end));
    }
    // The order of sums differs by tile: f32 rounding, and then an occasional flip of a bf16 bit.
    ExpectClose(chunked, whole, dtype == DType::kF32 ? 1e-6 : 1.5e-3, Name(dtype));
  }
}

TEST(CausalAttentionTest, PositionsOutsideTheCacheAreNamed) {
  ExecContext ctx({.num_threads = 1});
  Cache cache(DType::kF32, 1, 8, 64);
  const Tensor k = RandomTensor(DType::kF32, {2, 8}, 1), q = RandomTensor(DType::kF32, {2, 16}, 2);
  Tensor out(DType::kF32, {2, 16});
  EXPECT_THROW(StoreKv(ctx, k, k, 63, cache.view()), Error);
  EXPECT_THROW(StoreKv(ctx, k, k, -1, cache.view()), Error);
  EXPECT_THROW(CausalAttention(ctx, q, 63, 2, 1.0f, cache.view(), out), Error);
  EXPECT_THROW(CausalAttention(ctx, q, 0, 3, 1.0f, cache.view(), out), Error);
  EXPECT_NO_THROW(StoreKv(ctx, k, k, 62, cache.view()));
}

TEST(CausalAttentionTest, SequencesOfDifferentHeadsAreRefused) {
  ExecContext ctx({.num_threads = 1});
  Cache one(DType::kF32, 1, 8, 64), two(DType::kF32, 2, 8, 64), narrow(DType::kF32, 1, 4, 64);
  const Tensor q = RandomTensor(DType::kF32, {2, 16}, 2);
  const Tensor out(DType::kF32, {2, 16});
  const auto attend = [&](Cache& second) {
    const KvSegment segments[] = {{.row = 0, .rows = 1, .begin = 0, .kv = one.view()},
                                  {.row = 1, .rows = 1, .begin = 0, .kv = second.view()}};
    CausalAttention(ctx, q, segments, 2, 1.0f, out);
  };
  EXPECT_NO_THROW(attend(one));
  EXPECT_THROW(attend(two), Error);
  EXPECT_THROW(attend(narrow), Error);
}

TEST(RotateStoreAndAttendTest, DoesOneAfterTheOther) {
  constexpr int kHeads = 4, kKvHeads = 2, kHeadDim = 16;
  constexpr int64_t kWidth = (kHeads + 2 * kKvHeads) * kHeadDim, kKvWidth = kKvHeads * kHeadDim;
  ExecContext ctx({.num_threads = 1});
  const Tensor frequencies = RotaryFrequencies(kHeadDim, 1e4);
  const std::vector<int32_t> positions = {70, 9};
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const Tensor qkv = RandomTensor(dtype, {2, kWidth}, 1);
    const auto run = [&](bool together) {
      Cache first(dtype, kKvHeads, kHeadDim, 128), second(dtype, kKvHeads, kHeadDim, 64);
      for (const auto& [cache, count] : {std::pair(&first, 70), std::pair(&second, 9)}) {
        const Tensor rows = RandomTensor(dtype, {count, kKvWidth}, count);
        StoreKv(ctx, rows, rows, 0, cache->view());
      }
      const KvSegment segments[] = {{.row = 0, .rows = 1, .begin = 70, .kv = first.view()},
                                    {.row = 1, .rows = 1, .begin = 9, .kv = second.view()}};
      const Tensor rows = qkv.Clone(), out(dtype, {2, kHeads * kHeadDim});
      if (together) {
        RotateStoreAndAttend(ctx, rows, kHeads, positions, frequencies, segments, 0.25f, out);
      } else {
        RotateAndStore(ctx, rows, kHeads, positions, frequencies, segments);
        CausalAttention(ctx, rows.view().Columns(0, kHeads * kHeadDim), segments, kHeads, 0.25f,
                        out);
      }
      return out.Clone();
    };
    const Tensor got = run(true), want = run(false);
    EXPECT_EQ(std::memcmp(got.view().raw(), want.view().raw(), want.SizeBytes()), 0) << Name(dtype);
    const KvSegment behind{.row = 1, .rows = 1, .begin = 0, .kv = {}};
    const Tensor out(dtype, {2, kHeads * kHeadDim});
    EXPECT_THROW(RotateStoreAndAttend(ctx, qkv.Clone(), kHeads, positions, frequencies,
                                      {&behind, 1}, 0.25f, out),
                 Error);
  }
}

TEST(StoreKvTest, LaysKeysOutByRowAndValuesByColumn) {
  ExecContext ctx({.num_threads = 2});
  constexpr int kKvHeads = 3, kHeadDim = 5;
  constexpr int64_t kBegin = 60, kLength = 10;
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    Cache cache(dtype, kKvHeads, kHeadDim, 128);
    const Tensor wide = RandomTensor(dtype, {kLength, 2 * kKvHeads * kHeadDim}, 4);
    StoreKv(ctx, ConstTensorView(wide).Columns(0, kKvHeads * kHeadDim),
            ConstTensorView(wide).Columns(kKvHeads * kHeadDim, 2 * kKvHeads * kHeadDim), kBegin,
            cache.view());
    for (int64_t position = 0; position < 128; ++position) {
      const ConstTensorView block(cache.view().blocks[position / 64], dtype,
                                  {1, 2 * kKvHeads * 64 * kHeadDim});
      for (int head = 0; head < kKvHeads; ++head) {
        for (int d = 0; d < kHeadDim; ++d) {
          const int64_t t = position % 64, row = position - kBegin;
          const float key = At(block, 0, (head * 64 + t) * kHeadDim + d);
          const float value = At(block, 0, ((kKvHeads + head) * kHeadDim + d) * 64 + t);
          if (row < 0 || row >= kLength) {
            ASSERT_TRUE(std::isnan(key) && std::isnan(value)) << "position " << position;
          } else {
            ASSERT_EQ(key, At(wide.view(), row, head * kHeadDim + d)) << "position " << position;
            ASSERT_EQ(value, At(wide.view(), row, (kKvHeads + head) * kHeadDim + d))
                << "position " << position;
          }
        }
      }
    }
  }
}

TEST(LoadKvTest, GivesBackWhatWasStoredForAnyRange) {
  ExecContext ctx({.num_threads = 2});
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    for (const auto& [kv_heads, head_dim] : {std::pair(1, 8), std::pair(3, 5)}) {
      const int64_t width = kv_heads * head_dim;
      Cache cache(dtype, kv_heads, head_dim, 256);
      const Tensor k = RandomTensor(dtype, {250, width}, 4),
                   v = RandomTensor(dtype, {250, width}, 5);
      StoreKv(ctx, k, v, 0, cache.view());
      for (const auto& [begin, count] :
           {std::pair(0, 1), std::pair(63, 2), std::pair(64, 64), std::pair(10, 240)}) {
        const Tensor both(dtype, {count, 2 * width});
        const TensorView keys = both.view().Columns(0, width);
        const TensorView values = both.view().Columns(width, 2 * width);
        LoadKv(ctx, cache.view(), begin, keys, values);
        for (int64_t row = 0; row < count; ++row) {
          for (int64_t i = 0; i < width; ++i) {
            ASSERT_EQ(At(keys, row, i), At(k.view(), begin + row, i)) << begin << " + " << row;
            ASSERT_EQ(At(values, row, i), At(v.view(), begin + row, i)) << begin << " + " << row;
          }
        }
      }
      EXPECT_THROW(LoadKv(ctx, cache.view(), 10, Tensor(dtype, {250, width}), v), Error);
    }
  }
}

TEST(ChooseAttentionTest, ReferenceIsAlwaysObeyedAndTilesAreForBF16) {
  EXPECT_EQ(ChooseAttention(1, 1, 64, DType::kBF16, true, true), AttentionKernel::kReference);
  EXPECT_EQ(ChooseAttention(1, 100, 64, DType::kBF16, true, false), AttentionKernel::kAmx);
  EXPECT_EQ(ChooseAttention(729, 729, 72, DType::kBF16, false, false), AttentionKernel::kSimd);
  EXPECT_EQ(ChooseAttention(729, 729, 72, DType::kF32, true, false), AttentionKernel::kSimd);
  EXPECT_EQ(KvBlockBytes(2, 64, DType::kBF16), 2u * 2 * 64 * 64 * 2);
}

}  // namespace
}  // namespace sluice
