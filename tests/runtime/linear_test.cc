#include "runtime/ops/linear.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "runtime/error.h"
#include "runtime/ops/cpu/linear.h"
#include "runtime/ops/cpu/product_cache.h"
#include "runtime/ops/embedding.h"
#include "runtime/ops/norm.h"
#include "tests/support/tensor_testing.h"

namespace sluice {
namespace {

using ::sluice::testing::At;
using ::sluice::testing::ExpectClose;
using ::sluice::testing::RandomTensor;
using ::sluice::testing::Strided;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

SharedMatrix Share(Tensor tensor) {
  auto keeper = std::make_shared<Tensor>(std::move(tensor));
  return {keeper->view(), keeper, nullptr};
}

double Activate(double v, Activation activation) {
  if (activation == Activation::kGeluTanh) {
    return 0.5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
  }
  if (activation == Activation::kGeluErf) return 0.5 * v * std::erfc(-v / std::sqrt(2.0));
  if (activation == Activation::kQuickGelu) return v / (1 + std::exp(-1.702 * v));
  return v;
}

// act(x W^T + b) in f64. bias may be empty.
std::vector<double> Expected(ConstTensorView x, ConstTensorView weight, const Tensor& bias,
                             Activation activation) {
  std::vector<double> y;
  for (int64_t m = 0; m < x.dim(0); ++m) {
    for (int64_t n = 0; n < weight.dim(0); ++n) {
      double sum = bias.empty() ? 0 : At(bias, 0, n);
      for (int64_t k = 0; k < x.dim(1); ++k) sum += At(x, m, k) * At(weight, n, k);
      y.push_back(Activate(sum, activation));
    }
  }
  return y;
}

// Sums of K products of N(0, 1) values, accumulated in f32: each of the K additions may lose half
// an ulp (6e-8) of a partial sum; they add up like a random walk, sqrt(K) * 6e-8 relative to a sum
// that itself grows with sqrt(K). 2e-6 leaves room for polynomial activations (oneDNN's erf is good
// to 1.5e-7 absolute). A result in bf16 is rounded to 8 bits: 2^-8 = 4e-3 of an element at most.
double Relative(DType y) { return y == DType::kF32 ? 2e-6 : 4e-3; }
double PerElement(DType y) { return y == DType::kF32 ? 1e-5 : 4.1e-3; }

struct LinearCase {
  int64_t m, n, k;
};

std::string Print(const LinearCase& c, DType dtype) {
  return std::to_string(c.m) + " x " + std::to_string(c.n) + " x " + std::to_string(c.k) + " " +
         Name(dtype);
}

class LinearTest : public ::testing::TestWithParam<std::tuple<DType, KernelChoice>> {
 protected:
  DType dtype() const { return std::get<0>(GetParam()); }
  ExecContext context_{{.num_threads = 2, .kernels = std::get<1>(GetParam())}};
};

TEST_P(LinearTest, AgreesWithAPlainLoopOverAwkwardShapes) {
  // Rows below and above the border of the matrix-vector product; N and K on both sides of blocks
  // of 64 outputs and 32 inputs, odd, prime, one, and the sizes of real towers and decoders.
  const LinearCase cases[] = {{1, 1, 1},      {1, 64, 32},    {2, 65, 33},     {3, 63, 31},
                              {4, 128, 72},   {5, 17, 13},    {7, 1, 97},      {16, 97, 1},
                              {33, 72, 72},   {1, 1000, 896}, {1, 4304, 1152}, {2, 1152, 4304},
                              {3, 300, 4864}, {8, 448, 320},  {196, 64, 588},  {49, 320, 960},
                              {729, 72, 129}, {64, 130, 4304}};
  uint32_t seed = 1;
  for (const LinearCase& c : cases) {
    // The reference is slow; what it must prove does not need the large ones.
    if (context_.reference_kernels() && c.m * c.n * c.k > 2'000'000) continue;
    const Tensor w = RandomTensor(dtype(), {c.n, c.k}, seed++, 1 / std::sqrt(float(c.k)));
    const Tensor x = RandomTensor(dtype(), {c.m, c.k}, seed++);
    const Tensor bias = RandomTensor(DType::kF32, {c.n}, seed++);
    const LinearWeight weight(Share(w.Clone()), bias.Clone());
    EXPECT_EQ(weight.n(), c.n);
    EXPECT_EQ(weight.k(), c.k);
    EXPECT_EQ(weight.dtype(), dtype());
    const std::vector<double> want = Expected(x, w, bias, Activation::kNone);
    for (DType y_dtype : {DType::kF32, dtype()}) {
      const Tensor y = RandomTensor(y_dtype, {c.m, c.n}, seed++);
      Linear(context_, x, weight, y);
      ExpectClose(y, want, Relative(y_dtype), PerElement(y_dtype), Print(c, dtype()));
    }
  }
}

TEST_P(LinearTest, FusesActivationsBehindTheBias) {
  for (const LinearCase& c : {LinearCase{1, 70, 48}, {4, 129, 96}, {9, 70, 48}, {50, 96, 128}}) {
    for (Activation activation :
         {Activation::kGeluTanh, Activation::kGeluErf, Activation::kQuickGelu}) {
      // A deviation of 3 reaches the tails, where e^x must not overflow.
      const Tensor w = RandomTensor(dtype(), {c.n, c.k}, 1, 3 / std::sqrt(float(c.k)));
      const Tensor x = RandomTensor(dtype(), {c.m, c.k}, 2);
      const Tensor bias = RandomTensor(DType::kF32, {c.n}, 3, 10);
      const LinearWeight weight(Share(w.Clone()), bias.Clone());
      const std::vector<double> want = Expected(x, w, bias, activation);
      for (DType y_dtype : {DType::kF32, dtype()}) {
        const Tensor y(y_dtype, {c.m, c.n});
        Linear(context_, x, weight, y, {.activation = activation});
        ExpectClose(y, want, Relative(y_dtype), PerElement(y_dtype), Print(c, dtype()));
      }
    }
  }
}

TEST_P(LinearTest, AddsToWhatTheResultHolds) {
  for (const LinearCase& c : {LinearCase{1, 70, 48}, {3, 129, 96}, {9, 70, 48}}) {
    const Tensor w = RandomTensor(dtype(), {c.n, c.k}, 1, 1 / std::sqrt(float(c.k)));
    const Tensor x = RandomTensor(dtype(), {c.m, c.k}, 2);
    const Tensor y = RandomTensor(DType::kF32, {c.m, c.n}, 4, 3);
    const LinearWeight weight(Share(w.Clone()), Tensor());
    std::vector<double> want = Expected(x, w, Tensor(), Activation::kNone);
    for (size_t i = 0; i < want.size(); ++i) want[i] += y.data<float>()[i];
    Linear(context_, x, weight, y, {.accumulate = true});
    ExpectClose(y, want, Relative(DType::kF32), PerElement(DType::kF32), Print(c, dtype()));
  }
}

TEST_P(LinearTest, ReadsRowsThatLieApart) {
  for (int64_t m : {1, 4, 11}) {
    const Tensor storage = RandomTensor(dtype(), {m, 100}, 5);
    const TensorView x = Strided(storage, m, 96, 4);
    const Tensor w = RandomTensor(dtype(), {50, 96}, 6);
    const LinearWeight weight(Share(w.Clone()), Tensor());
    const Tensor y(DType::kF32, {m, 50});
    Linear(context_, x, weight, y);
    ExpectClose(y, Expected(x, w, Tensor(), Activation::kNone), Relative(DType::kF32),
                PerElement(DType::kF32), Name(dtype()));
  }
}

TEST_P(LinearTest, NormalisesRowsFirstWhereAsked) {
  constexpr float kEps = 1e-3f;
  for (const LinearCase& c : {LinearCase{1, 40, 64}, {5, 33, 48}}) {
    const Tensor x = RandomTensor(DType::kF32, {c.m, c.k + 4}, 1, 30);
    const ConstTensorView rows = x.view().Columns(0, c.k);
    const Tensor norm = RandomTensor(DType::kF32, {c.k}, 2);
    const LinearWeight weight(Share(RandomTensor(dtype(), {c.n, c.k}, 3)),
                              RandomTensor(DType::kF32, {c.n}, 4));
    const Tensor normed(dtype(), {c.m, c.k});
    RmsNorm(context_, rows, norm, kEps, normed);
    const Tensor want = RandomTensor(DType::kF32, {c.m, c.n}, 5), got = want.Clone();
    Linear(context_, normed, weight, want, {.accumulate = true});
    Linear(context_, rows, weight, got, {.accumulate = true, .rms_norm = norm, .rms_eps = kEps});
    EXPECT_EQ(std::memcmp(got.data<float>(), want.data<float>(), want.SizeBytes()), 0)
        << Print(c, dtype());
  }
}

TEST_P(LinearTest, StacksWeightsBelowEachOther) {
  const Tensor q = RandomTensor(dtype(), {70, 64}, 1), k = RandomTensor(dtype(), {9, 64}, 2);
  const Tensor v = RandomTensor(dtype(), {50, 64}, 3);
  const Tensor q_bias = RandomTensor(DType::kF32, {70}, 4);
  const Tensor v_bias = RandomTensor(DType::kF32, {50}, 5);
  const Tensor none;
  const LinearWeight weight = LinearWeight::Stack(
      {Share(q.Clone()), Share(k.Clone()), Share(v.Clone())}, {&q_bias, &none, &v_bias});
  ASSERT_EQ(weight.n(), 129);
  for (int64_t m : {1, 6}) {
    const Tensor x = RandomTensor(dtype(), {m, 64}, 7), y(DType::kF32, {m, 129});
    Linear(context_, x, weight, y);
    const std::vector<double> parts[] = {Expected(x, q, q_bias, Activation::kNone),
                                         Expected(x, k, Tensor(), Activation::kNone),
                                         Expected(x, v, v_bias, Activation::kNone)};
    std::vector<double> want;
    for (int64_t row = 0; row < m; ++row) {
      for (const std::vector<double>& part : parts) {
        const auto width = static_cast<int64_t>(part.size()) / m;
        want.insert(want.end(), part.begin() + row * width, part.begin() + (row + 1) * width);
      }
    }
    ExpectClose(y, want, Relative(DType::kF32), PerElement(DType::kF32), Name(dtype()));
  }
}

TEST_P(LinearTest, HandsOutItsOutputsAsWeightsOfTheirOwn) {
  const Tensor w = RandomTensor(dtype(), {192, 72}, 1), x = RandomTensor(dtype(), {5, 72}, 3);
  const Tensor bias = RandomTensor(DType::kF32, {192}, 2);
  const LinearWeight weight(Share(w.Clone()), bias.Clone());
  const std::pair<int64_t, int64_t> ranges[] = {{0, 64},  {64, 192}, {128, 192},
                                                {0, 192}, {3, 70},   {70, 72}};
  for (const auto& [begin, end] : ranges) {
    const LinearWeight part = weight.Outputs(begin, end);
    Tensor part_bias(DType::kF32, {end - begin}), y(DType::kF32, {5, end - begin});
    std::copy_n(bias.data<float>() + begin, end - begin, part_bias.data<float>());
    Linear(context_, x, part, y);
    ExpectClose(y, Expected(x, w.view().Slice(begin, end), part_bias, Activation::kNone),
                Relative(DType::kF32), PerElement(DType::kF32),
                std::to_string(begin) + ".." + std::to_string(end));
  }
  EXPECT_THROW(weight.Outputs(0, 193), Error);
  EXPECT_THROW(weight.Outputs(5, 5), Error);
}

TEST_P(LinearTest, HandsOutRowsOfATiedTable) {
  const Tensor w = RandomTensor(dtype(), {131, 45}, 8);
  const LinearWeight table(Share(w.Clone()), Tensor());
  const std::vector<int32_t> ids = {130, 0, 64, 63, 64};
  const Tensor y(DType::kF32, {5, 45}), from_table(DType::kF32, {5, 45});
  Embed(context_, table, ids, y);
  Embed(context_, w, ids, from_table);
  for (int64_t i = 0; i < 5; ++i) {
    for (int64_t k = 0; k < 45; ++k) {
      EXPECT_EQ(At(y, i, k), At(w, ids[i], k));
      EXPECT_EQ(At(from_table, i, k), At(w, ids[i], k));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(AllKernels, LinearTest,
                         ::testing::Combine(::testing::Values(DType::kF32, DType::kBF16),
                                            ::testing::Values(KernelChoice::kFast,
                                                              KernelChoice::kReference)),
                         [](const auto& info) {
                           const bool fast = std::get<1>(info.param) == KernelChoice::kFast;
                           return std::string(Name(std::get<0>(info.param))) +
                                  (fast ? "_fast" : "_reference");
                         });

TEST(LinearWeightTest, PacksUnalignedRowsAnywhereInAMatrix) {
  // Rows 5 to 88 of 90, from an odd address, K on no boundary.
  const int64_t n = 90, k = 45, padded_k = 64;
  const Tensor w = RandomTensor(DType::kBF16, {n, k}, 3);
  std::vector<char> source(n * k * 2 + 1);
  std::memcpy(source.data() + 1, w.view().raw(), n * k * 2);
  std::vector<BFloat16> packed(128 * padded_k, BFloat16{0x7fff});
  PackRows(source.data() + 1, 0, 5, k, packed.data());
  PackRows(source.data() + 1 + 5 * k * 2, 5, n - 5, k, packed.data());
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t i = 0; i < padded_k; ++i) {
      const uint16_t want = i < k ? w.data<BFloat16>()[row * k + i].bits : 0;
      ASSERT_EQ(packed[PackedIndex(row, i, k)].bits, want) << "row " << row << " input " << i;
    }
  }
}

TEST(LinearWeightTest, MapsF32AndCopiesBf16Once) {
  const SharedMatrix f32 = Share(RandomTensor(DType::kF32, {64, 32}, 1));
  const LinearWeight mapped(f32, Tensor());
  EXPECT_EQ(f32.keeper.use_count(), 2);  // held, not copied
  EXPECT_EQ(mapped.SizeBytes(), 64u * 32 * 4);

  SharedMatrix bf16 = Share(RandomTensor(DType::kBF16, {70, 40}, 1));
  int released = 0;
  bf16.release = [&] { ++released; };
  const LinearWeight packed(bf16, RandomTensor(DType::kF32, {70}, 2));
  EXPECT_EQ(bf16.keeper.use_count(), 1);
  EXPECT_EQ(released, 1);
  EXPECT_EQ(packed.SizeBytes(), 128u * 64 * 2 + 70 * 4);
}

TEST(LinearWeightTest, RefusesWhatDoesNotFit) {
  EXPECT_THAT(
      [] {
        LinearWeight(Share(Tensor(DType::kF16, {4, 4})), Tensor());
      },
      ThrowsMessage<Error>(HasSubstr("f32 or bf16, got [4, 4] f16")));
  EXPECT_THAT([] { LinearWeight(Share(Tensor(DType::kF32, {4})), Tensor()); },
              ThrowsMessage<Error>(HasSubstr("got [4] f32")));
  EXPECT_THAT(
      [] {
        LinearWeight(Share(Tensor(DType::kF32, {4, 4})), Tensor(DType::kF32, {5}));
      },
      ThrowsMessage<Error>(HasSubstr("bias must be [4] f32, got [5] f32")));
  EXPECT_THAT(
      [] {
        LinearWeight::Stack(
            {Share(Tensor(DType::kF32, {4, 4})), Share(Tensor(DType::kF32, {4, 5}))}, {});
      },
      ThrowsMessage<Error>(HasSubstr("must be [N, 4] f32, got [4, 5] f32")));
  EXPECT_THAT(
      [] {
        LinearWeight(Share(Tensor(DType::kBF16, {4, 4})), Tensor(),
                     {Device::kCpu, WeightFormat::kInt8});
      },
      ThrowsMessage<Error>(HasSubstr("in int8 must be one of bf16 on a GPU, got bf16 on the cpu")));
}

TEST(LinearTest, NamesWhatDoesNotFit) {
  ExecContext context({});
  const LinearWeight weight(Share(RandomTensor(DType::kBF16, {8, 16}, 1)), Tensor());
  const Tensor x(DType::kBF16, {2, 16}), y(DType::kF32, {2, 8});
  EXPECT_THAT(
      [&] {
        Linear(context, Tensor(DType::kBF16, {2, 15}), weight, y);
      },
      ThrowsMessage<Error>(HasSubstr("x must be [M, 16] bf16, got [2, 15] bf16")));
  EXPECT_THAT(
      [&] {
        Linear(context, Tensor(DType::kF32, {2, 16}), weight, y);
      },
      ThrowsMessage<Error>(HasSubstr("got [2, 16] f32")));
  EXPECT_THAT(
      [&] {
        Linear(context, x, weight, Tensor(DType::kF32, {3, 8}));
      },
      ThrowsMessage<Error>(HasSubstr("y must be a contiguous [2, 8] f32 or bf16")));
  EXPECT_THAT(
      [&] {
        Linear(context, x, weight, Tensor(DType::kBF16, {2, 8}), {.accumulate = true});
      },
      ThrowsMessage<Error>(HasSubstr("accumulate needs y in f32")));
  EXPECT_THROW(
      Linear(context, x, weight, y, {.activation = Activation::kGeluTanh, .accumulate = true}),
      Error);
  EXPECT_THROW(Linear(context, x, LinearWeight(), y), Error);
  const Tensor norm(DType::kF32, {15});
  EXPECT_THAT([&] { Linear(context, x, weight, y, {.rms_norm = norm}); },
              ThrowsMessage<Error>(HasSubstr("x must be [M, 16] f32, got [2, 16] bf16")));
  EXPECT_THAT(
      [&] {
        Linear(context, Tensor(DType::kF32, {2, 16}), weight, y, {.rms_norm = norm});
      },
      ThrowsMessage<Error>(HasSubstr("the norm's weight must be [16] f32, got [15] f32")));
  Linear(context, Tensor(DType::kBF16, {0, 16}), weight, Tensor(DType::kF32, {0, 8}));
}

TEST(LinearTest, GivesTheSameFromAnyThreadWithItsOwnContext) {
  const LinearWeight weight(Share(RandomTensor(DType::kBF16, {200, 96}, 1)), Tensor());
  const Tensor x = RandomTensor(DType::kBF16, {20, 96}, 2);
  ExecContext here({.num_threads = 2});
  const Tensor want(DType::kF32, {20, 200});
  Linear(here, x, weight, want);
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      ExecContext context({.num_threads = 2});
      const Tensor y(DType::kF32, {20, 200});
      for (int i = 0; i < 20; ++i) {
        Linear(context, x, weight, y);
        ASSERT_EQ(std::memcmp(y.data<float>(), want.data<float>(), y.SizeBytes()), 0);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(EmbedTest, NamesTheIdThatIsNotThere) {
  ExecContext context({});
  const Tensor table(DType::kF32, {10, 4}), y(DType::kF32, {2, 4});
  const std::vector<int32_t> beyond = {3, 10}, negative = {-1, 0};
  EXPECT_THAT([&] { Embed(context, table, beyond, y); },
              ThrowsMessage<Error>(HasSubstr("id 1 must lie in [0, 10), got 10")));
  EXPECT_THAT([&] { Embed(context, table, negative, y); },
              ThrowsMessage<Error>(HasSubstr("got -1")));
  EXPECT_THROW(Embed(context, table, beyond, Tensor(DType::kF32, {1, 4})), Error);
  EXPECT_THROW(Embed(context, Tensor(DType::kI8, {10, 4}), beyond, y), Error);
}

TEST(ProductCacheTest, IsBoundedAndDropsWhatWasUsedLongestAgo) {
  ProductCache cache;
  int made = 0;
  static int* count = nullptr;
  count = &made;
  const auto make = [](const dnnl::engine&, const ProductKey&) {
    ++*count;
    return Product();
  };
  const auto key = [](int64_t m) {
    ProductKey k;
    k.m = m;
    return k;
  };
  const int64_t most = ProductCache::kMaxProducts;
  for (int64_t m = 0; m < most; ++m) cache.FindOrMake(key(m), make);
  cache.FindOrMake(key(0), make);  // now the most recent
  EXPECT_EQ(made, most);
  cache.FindOrMake(key(most), make);  // drops 1, not 0
  EXPECT_EQ(cache.size(), ProductCache::kMaxProducts);
  cache.FindOrMake(key(0), make);
  EXPECT_EQ(made, most + 1);
  cache.FindOrMake(key(1), make);
  EXPECT_EQ(made, most + 2);
}

TEST(ChooseLinearTest, FollowsItsTable) {
  constexpr auto kAmx = Bf16Rows::kAmx, kNative = Bf16Rows::kNative;
  constexpr auto kWidened = Bf16Rows::kWidened, kPlain = Bf16Rows::kPlain;
  struct Row {
    int64_t m, n, k;
    DType dtype;
    Bf16Rows bf16_rows;
    bool reference;
    LinearKernel want;
  };
  const Row rows[] = {
      {1, 320, 320, DType::kBF16, kNative, false, LinearKernel::kVector},
      {2, 320, 320, DType::kBF16, kNative, false, LinearKernel::kOneDnn},
      {4, 9728, 896, DType::kBF16, kNative, false, LinearKernel::kVector},
      {5, 9728, 896, DType::kBF16, kNative, false, LinearKernel::kOneDnn},
      {8, 320, 320, DType::kF32, kNative, false, LinearKernel::kVector},
      {9, 320, 320, DType::kF32, kPlain, false, LinearKernel::kOneDnn},
      {64, 896, 896, DType::kBF16, kPlain, false, LinearKernel::kVector},
      {1, 896, 896, DType::kBF16, kWidened, false, LinearKernel::kVector},
      {729, 1152, 4304, DType::kBF16, kWidened, false, LinearKernel::kVector},
      {729, 1152, 4304, DType::kF32, kWidened, false, LinearKernel::kOneDnn},
      {64, 896, 896, DType::kBF16, kAmx, true, LinearKernel::kReference},
      {1, 320, 320, DType::kBF16, kAmx, false, LinearKernel::kVector},
      {4, 9728, 896, DType::kBF16, kAmx, false, LinearKernel::kVector},
      {2, 320, 320, DType::kBF16, kAmx, false, LinearKernel::kAmx},
      {729, 1152, 4304, DType::kBF16, kAmx, false, LinearKernel::kAmx},
      {729, 1152, 4304, DType::kF32, kAmx, false, LinearKernel::kOneDnn},
  };
  for (const Row& row : rows) {
    EXPECT_EQ(ChooseLinear(row.m, row.n, row.k, row.dtype, row.bf16_rows, row.reference), row.want)
        << row.m << " rows of " << Name(row.dtype) << ", " << Name(row.bf16_rows);
  }
  EXPECT_STREQ(Name(LinearKernel::kVector), "vector");
}

}  // namespace
}  // namespace sluice
