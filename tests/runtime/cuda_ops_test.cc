// Ops on the GPU against their references on the CPU.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "runtime/error.h"
#include "runtime/ops/activation.h"
#include "runtime/ops/linear.h"
#include "runtime/ops/norm.h"
#include "runtime/ops/rope.h"
#include "runtime/ops/rows.h"
#include "runtime/ops/similarity.h"
#include "runtime/transfer.h"
#include "tests/support/gpu_testing.h"
#include "tests/support/tensor_testing.h"

namespace sluice {
namespace {

using ::sluice::testing::ExpectClose;
using ::sluice::testing::GpuTest;
using ::sluice::testing::RandomTensor;
using ::sluice::testing::RotaryFrequencies;
using ::sluice::testing::Values;

// Rows and widths: none, one, odd, prime, a block and one more, of real models.
const std::pair<int64_t, int64_t> kSizes[] = {{0, 8},    {1, 1},      {3, 37},    {5, 896},
                                              {7, 1025}, {196, 1152}, {33, 3584}, {1000, 64}};
constexpr DType kTypes[] = {DType::kF32, DType::kBF16};

class CudaOpsTest : public GpuTest {
 protected:
  // A matrix with `gap` elements behind each row, so that strides count.
  static Tensor Rows(DType dtype, int64_t m, int64_t d, int64_t gap, int seed) {
    return RandomTensor(dtype, {m, d + gap}, seed, 4);
  }
  // What lies on the GPU against a reference on the CPU. f32: sums of D terms in another order and
  // functions good to 2 ulp. bf16: one rounding, which may fall to the other side.
  void ExpectEqual(const Tensor& on_gpu, const Tensor& want, const std::string& what) {
    const Tensor got = Here(on_gpu);
    const double tolerance = want.dtype() == DType::kF32 ? 2e-6 : 8e-3;
    ExpectClose(got, Values(want), tolerance, tolerance, what);
  }
};

TEST_F(CudaOpsTest, CopiesKeepRowsApart) {
  for (const auto& [m, d] : kSizes) {
    for (const DType dtype : kTypes) {
      const Tensor x = Rows(dtype, m, d, 3, 1), back = Rows(dtype, m, d, 5, 2);
      const Tensor expected = back.Clone();
      CopyRows(reference_, x.view().Columns(0, d), expected.view().Columns(0, d));
      const Tensor device(dtype, {m, d + 1}, Device::kCuda);
      Transfer(*gpu_, x.view().Columns(0, d), device.view().Columns(1, d + 1));
      Transfer(*gpu_, device.view().Columns(1, d + 1), back.view().Columns(0, d));
      EXPECT_EQ(Values(back), Values(expected)) << m << " x " << d;
    }
  }
}

TEST_F(CudaOpsTest, NormsEqualTheReference) {
  std::vector<std::pair<int64_t, int64_t>> sizes(std::begin(kSizes), std::end(kSizes));
  // The longest that is kept in registers, and beyond.
  sizes.insert(sizes.end(), {{2, 16384}, {3, 20000}, {2, 16381}});
  for (const auto& [m, d] : sizes) {
    for (const int64_t gap : {0, 3, 8}) {
      for (const DType dtype : kTypes) {
        SCOPED_TRACE((Shape{m, d}.ToString() + " " + Name(dtype)));
        const Tensor x = Rows(DType::kF32, m, d, gap, 1), more = Rows(DType::kF32, m, d, 2, 4);
        const Tensor weight = RandomTensor(DType::kF32, {d}, 2),
                     bias = RandomTensor(DType::kF32, {d}, 3);
        const Tensor gx = There(x), gmore = There(more), gw = There(weight), gb = There(bias);
        const Tensor want(dtype, {m, d}), got(dtype, {m, d}, Device::kCuda);
        const auto cut = [&, width = d](const Tensor& t) { return t.view().Columns(0, width); };
        RmsNorm(reference_, cut(x), weight, 1e-6f, want);
        RmsNorm(*gpu_, cut(gx), gw, 1e-6f, got);
        ExpectEqual(got, want, "rms_norm");
        LayerNorm(reference_, cut(x), weight, bias, 1e-6f, want);
        LayerNorm(*gpu_, cut(gx), gw, gb, 1e-6f, got);
        ExpectEqual(got, want, "layer_norm");
        LayerNorm(reference_, cut(x), weight, bias, 1e-6f, want, cut(more));
        LayerNorm(*gpu_, cut(gx), gw, gb, 1e-6f, got, cut(gmore));
        ExpectEqual(got, want, "layer_norm of a sum");
      }
    }
  }
}

TEST_F(CudaOpsTest, ActivationsEqualTheReference) {
  for (const auto& [m, d] : kSizes) {
    for (const DType in : kTypes) {
      for (const DType out : kTypes) {
        SCOPED_TRACE((Shape{m, d}.ToString() + " " + Name(in) + " " + Name(out)));
        const Tensor x = RandomTensor(in, {m, 2 * d}, 1, 4), gx = There(x);
        const Tensor want(out, {m, d}), got(out, {m, d}, Device::kCuda);
        SiluMul(reference_, x, want);
        SiluMul(*gpu_, gx, got);
        ExpectEqual(got, want, "silu_mul");
      }
    }
    const Tensor x = Rows(DType::kF32, m, d, 0, 2), gx = There(x);
    Softmax(reference_, x);
    Softmax(*gpu_, gx);
    ExpectEqual(gx, x, "softmax");
  }
}

TEST_F(CudaOpsTest, RotationsEqualTheReferenceAtAnyPosition) {
  for (const int head_dim : {2, 64, 72, 128}) {
    for (const DType dtype : kTypes) {
      constexpr int kRows = 9, kHeads = 3;
      const Tensor x = Rows(dtype, kRows, kHeads * head_dim, 4, 1), gx = There(x);
      const Tensor frequencies = RotaryFrequencies(head_dim, 1e6);
      const std::vector<int32_t> positions = {0,     1,      -1,      77,           65535,
                                              65536, -70000, 1 << 22, (1 << 30) + 1};
      Rope(reference_, x.view().Columns(0, kHeads * head_dim), head_dim, positions, frequencies);
      Rope(*gpu_, gx.view().Columns(0, kHeads * head_dim), head_dim, positions, There(frequencies));
      ExpectEqual(gx, x, "rope " + std::to_string(head_dim));
    }
  }
}

TEST_F(CudaOpsTest, ProductsEqualTheReference) {
  struct Size {
    int64_t m, n, k;
  };
  // One row and many, odd sizes, sizes of real models; N even for gate and up.
  const Size sizes[] = {{1, 896, 896},  {3, 38, 37},    {49, 320, 320}, {196, 304, 1152},
                        {8, 1728, 896}, {5, 64, 4864},  {64, 128, 72},  {17, 2, 1},
                        {2, 40, 896},   {4, 1728, 320}, {3, 130, 4864}};
  for (const auto& [m, n, k] : sizes) {
    for (const DType dtype : kTypes) {
      for (const bool biased : {false, true}) {
        for (const Activation activation :
             {Activation::kNone, Activation::kGeluTanh, Activation::kGeluErf,
              Activation::kQuickGelu, Activation::kSiluMul}) {
          for (const DType out : {DType::kF32, dtype}) {
            for (const bool accumulate : {false, true}) {
              if (accumulate && (activation != Activation::kNone || out != DType::kF32)) continue;
              // Products of about 1, so that activations bend.
              const Tensor x = RandomTensor(dtype, {m, k + 8}, 1);
              const auto w = std::make_shared<Tensor>(
                  RandomTensor(dtype, {n, k}, 2, 1 / std::sqrt(static_cast<float>(k))));
              const auto bias = [&] {
                return biased ? RandomTensor(DType::kF32, {n}, 3) : Tensor();
              };
              const LinearWeight weight({*w, w, nullptr}, bias());
              const LinearWeight on_gpu({*w, w, nullptr}, bias(), Device::kCuda);
              const Tensor want =
                  RandomTensor(out, {m, activation == Activation::kSiluMul ? n / 2 : n}, 4);
              const Tensor got = There(want), gx = There(x);
              const LinearOptions options{.activation = activation, .accumulate = accumulate};
              Linear(reference_, x.view().Columns(0, k), weight, want, options);
              Linear(*gpu_, gx.view().Columns(0, k), on_gpu, got, options);
              // f32: sums of K terms of size 1/sqrt(K) in another order. bf16 rounds by 2^-8 at
              // most: the bias, the result, the reference's; or gate, up and result, here or there.
              const bool paired = activation == Activation::kSiluMul;
              const bool rounded = out == DType::kBF16 || (paired && dtype == DType::kBF16);
              const double tolerance = !rounded ? 2e-5 : paired ? 1.6e-2 : 1.2e-2;
              ExpectClose(Here(got), Values(want), tolerance, tolerance,
                          "linear " + std::to_string(m) + " x " + std::to_string(n) + " x " +
                              std::to_string(k) + " " + Name(dtype) + " activation " +
                              std::to_string(static_cast<int>(activation)));
            }
          }
        }
      }
    }
  }
}

TEST_F(CudaOpsTest, SumsAndCopiesEqualTheReference) {
  for (const auto& [m, d] : kSizes) {
    for (const DType dtype : kTypes) {
      for (const int64_t gap : {0, 3, 8}) {
        SCOPED_TRACE((Shape{m, d}.ToString() + " " + Name(dtype)));
        const Tensor a = Rows(DType::kF32, m, d, gap, 3), b = Rows(DType::kF32, m, d, gap, 4);
        const Tensor x = Rows(dtype, m, d, gap, 5);
        const Tensor ga = There(a), gb = There(b), gx = There(x);
        const auto cut = [width = d](const Tensor& t) { return t.view().Columns(0, width); };
        const Tensor sum(DType::kF32, {m, d}), gsum(DType::kF32, {m, d}, Device::kCuda);
        Add(reference_, cut(a), cut(x), sum);
        Add(*gpu_, cut(ga), cut(gx), gsum);
        ExpectEqual(gsum, sum, "add");
        const Tensor off(dtype, {m, d}), goff(dtype, {m, d}, Device::kCuda);
        Subtract(reference_, cut(a), cut(b), off);
        Subtract(*gpu_, cut(ga), cut(gb), goff);
        ExpectEqual(goff, off, "subtract");
        CopyRows(reference_, cut(x), off);
        CopyRows(*gpu_, cut(gx), goff);
        EXPECT_EQ(Values(Here(goff)), Values(off)) << "copy_rows";
        ZeroRows(*gpu_, cut(gx));
        ZeroRows(reference_, cut(x));
        EXPECT_EQ(Values(Here(gx)), Values(x)) << "zero_rows";
      }
    }
  }
}

TEST_F(CudaOpsTest, ListedRowsMoveAndAddAsInTheReference) {
  for (const auto& [m, d] : kSizes) {
    for (const DType dtype : kTypes) {
      // One group, some, more than one launch takes.
      for (const int64_t groups : {1, 2, 19}) {
        for (const int64_t ahead : {0, 1}) {
          if (m <= ahead || (groups > 2 && m * d > 10000)) continue;
          SCOPED_TRACE((Shape{groups, m, d}.ToString() + " " + Name(dtype)));
          // A random third of the rows of each group, ascending.
          const int64_t count = (m - ahead + 2) / 3;
          std::mt19937 random(static_cast<uint32_t>(m));
          std::vector<int32_t> indices;
          for (int64_t g = 0; g < groups; ++g) {
            std::vector<int32_t> all(m - ahead);
            std::iota(all.begin(), all.end(), 0);
            std::shuffle(all.begin(), all.end(), random);
            std::sort(all.begin(), all.begin() + count);
            indices.insert(indices.end(), all.begin(), all.begin() + count);
          }
          const Workspace::Scope scope(reference_.workspace()), gpu_scope(gpu_->workspace());
          RowLists lists = ListRows(reference_, indices, groups);
          RowLists there = ListRows(*gpu_, indices, groups);
          lists.ahead = there.ahead = ahead;
          const int64_t listed = groups * lists.each();
          // Columns of something wider, as values are of a product.
          const Tensor wide = RandomTensor(dtype, {listed, 2 * d}, 2), gwide = There(wide);
          const auto some = wide.view().Columns(d, 2 * d), gsome = gwide.view().Columns(d, 2 * d);
          const Tensor x = RandomTensor(dtype, {groups * m, d}, 1), gx = There(x);
          const Tensor want(dtype, {listed, d}), got(dtype, {listed, d}, Device::kCuda);
          GatherRows(reference_, x, lists, want);
          GatherRows(*gpu_, gx, there, got);
          ExpectEqual(got, want, "gather_rows");

          std::vector<Tensor> apart, gapart, apart32, gapart32;
          for (int64_t g = 0; g < groups; ++g) {
            apart.push_back(RandomTensor(dtype, {m, d}, 20 + g));
            gapart.push_back(There(apart.back()));
            apart32.push_back(RandomTensor(DType::kF32, {m, d}, 50 + g));
            gapart32.push_back(There(apart32.back()));
          }
          const auto views = [](const std::vector<Tensor>& tensors) {
            return std::vector<ConstTensorView>(tensors.begin(), tensors.end());
          };
          OverlayRows(reference_, views(apart), some, lists, x);
          OverlayRows(*gpu_, views(gapart), gsome, there, gx);
          ExpectEqual(gx, x, "overlay_rows");
          if (dtype != DType::kF32) continue;

          const Tensor few(DType::kF32, {listed, d}), gfew(DType::kF32, {listed, d}, Device::kCuda);
          AddListed(reference_, views(apart32), x, lists, few);
          AddListed(*gpu_, views(gapart32), gx, there, gfew);
          ExpectEqual(gfew, few, "add_listed");
          SubtractListed(reference_, some, views(apart32), lists, x);
          SubtractListed(*gpu_, gsome, views(gapart32), there, gx);
          ExpectEqual(gx, x, "subtract_listed");
        }
      }
    }
  }
}

TEST_F(CudaOpsTest, NormsOfMatricesThatLieApartEqualTheReference) {
  for (const auto& [m, d] : kSizes) {
    for (const int count : {1, 3, 18}) {
      if (m == 0 || (count > 3 && m * d > 10000)) continue;
      const Tensor weight = RandomTensor(DType::kF32, {d}, 2),
                   bias = RandomTensor(DType::kF32, {d}, 3);
      const Tensor gw = There(weight), gb = There(bias);
      std::vector<Tensor> x, gx;
      for (int i = 0; i < count; ++i) {
        x.push_back(Rows(DType::kF32, m, d, i % 2 * 4, 10 + i));
        gx.push_back(There(x.back()));
      }
      const auto views = [width = d](const std::vector<Tensor>& tensors) {
        std::vector<ConstTensorView> all;
        for (const Tensor& t : tensors) all.push_back(t.view().Columns(0, width));
        return all;
      };
      for (const int covered : {0, 1, count - 1}) {
        const Tensor more = RandomTensor(DType::kF32, {covered * m, d}, 4), gmore = There(more);
        const Tensor want(DType::kBF16, {count * m, d}),
            got(DType::kBF16, {count * m, d}, Device::kCuda);
        LayerNorm(reference_, views(x), weight, bias, 1e-6f, want, more);
        LayerNorm(*gpu_, views(gx), gw, gb, 1e-6f, got, gmore);
        ExpectEqual(
            got, want,
            "layer_norm of " + std::to_string(count) + " matrices " + Shape{m, d}.ToString());
      }
    }
  }
}

TEST_F(CudaOpsTest, CosinesAndMeansEqualTheReference) {
  for (const auto& [m, d] : kSizes) {
    for (const DType dtype : kTypes) {
      for (const int count : {1, 2, 17}) {
        if (m == 0 || (count > 2 && m * d > 10000)) continue;
        SCOPED_TRACE((Shape{count, m, d}.ToString() + " " + Name(dtype)));
        const Tensor mean(DType::kF32, {d}), gmean(DType::kF32, {d}, Device::kCuda);
        std::vector<Tensor> keep;
        std::vector<RowPairs> pairs, gpairs;
        for (int i = 0; i < count; ++i) {
          for (const int64_t gap : {int64_t{0}, int64_t{8} * (i % 2)}) {
            keep.push_back(Rows(dtype, m, d, gap, 10 * i + static_cast<int>(keep.size())));
            keep.push_back(There(keep.back()));
          }
          const auto at = [&, width = d](int back) {
            return keep[keep.size() - back].view().Columns(0, width);
          };
          pairs.push_back({at(4), at(2), {}});
          gpairs.push_back({at(3), at(1), {}});
        }
        MeanRow(reference_, pairs[0].b, mean);
        MeanRow(*gpu_, gpairs[0].b, gmean);
        const Tensor mean_back = Here(gmean);
        // Sums of up to 1000 values of N(0, 4^2) in another order.
        for (int64_t i = 0; i < d; ++i) {
          ASSERT_NEAR(mean_back.data<float>()[i], mean.data<float>()[i], 2e-5) << i;
        }
        for (const bool centred : {false, true}) {
          for (int i = 0; i < count; ++i) {
            pairs[i].center = centred ? mean.view() : ConstTensorView();
            gpairs[i].center = centred ? gmean.view() : ConstTensorView();
          }
          const Tensor cosines(DType::kF32, {count, m}),
              on_gpu(DType::kF32, {count, m}, Device::kCuda);
          RowCosines(reference_, pairs, cosines);
          RowCosines(*gpu_, gpairs, on_gpu);
          const Tensor back = Here(on_gpu);
          // Sums of up to 3584 products in another order, relative to the norms. With one value a
          // row, and that the mean itself, the cosine is a sign of next to nothing.
          if (centred && (m == 1 || d == 1)) continue;
          for (int64_t i = 0; i < count * m; ++i) {
            ASSERT_NEAR(back.data<float>()[i], cosines.data<float>()[i], 1e-5)
                << i << " centred " << centred;
          }
        }
      }
    }
  }
}

TEST_F(CudaOpsTest, LowestPlacesAreThoseOfTheReference) {
  for (const int64_t count : {1, 2, 31, 196, 576, 729, 1024, 1025, 4096, 5000, 16384}) {
    for (const int64_t rows : {1, 3}) {
      const Tensor values = RandomTensor(DType::kF32, {rows, count}, static_cast<uint32_t>(count));
      float* data = values.data<float>();
      // Ties, zeros of both signs, and what is no number.
      for (int64_t i = 0; i < rows * count; i += 3) data[i] = std::round(data[i]);
      for (int64_t i = 5; i < rows * count; i += 11) data[i] = i % 2 ? 0.f : -0.f;
      for (int64_t i = 7; i < rows * count; i += 50) {
        data[i] = i % 4 == 1 ? std::nanf("") : i % 4 == 2 ? INFINITY : -INFINITY;
      }
      const Tensor on_gpu = There(values);
      for (const int64_t k : {int64_t{1}, (count + 3) / 4, count / 2, count - 1, count}) {
        if (k < 1) continue;
        const Tensor want(DType::kI32, {rows, k}), got(DType::kI32, {rows, k}, Device::kCuda);
        LowestPlaces(reference_, values, want);
        LowestPlaces(*gpu_, on_gpu, got);
        const Tensor back = Here(got);
        for (int64_t i = 0; i < rows * k; ++i) {
          ASSERT_EQ(back.data<int32_t>()[i], want.data<int32_t>()[i])
              << k << " of " << count << " at " << i;
        }
      }
    }
  }
}

TEST_F(CudaOpsTest, StepsThatHaveNotRunForLongAreForgotten) {
  const Tensor x(DType::kF32, {3, 8}, Device::kCuda);
  const auto run = [&](const std::string& key) {
    gpu_->Recurring(key, [&] { ZeroRows(*gpu_, x); });
  };
  for (int i = 0; i < 3; ++i) run("first");
  const cuda::Recorder::Counts& counts = gpu_->recorder()->counts();
  EXPECT_EQ(counts.replayed, 1);
  for (int i = 0; i < 256; ++i) run("another " + std::to_string(i));
  run("first");
  EXPECT_EQ(counts.direct, 1 + 256 + 1);
  EXPECT_EQ(counts.replayed, 1);
}

TEST_F(CudaOpsTest, TensorsElsewhereAndReadingThemHereAreRefused) {
  const Tensor x = RandomTensor(DType::kF32, {3, 8}, 1), weight = RandomTensor(DType::kF32, {8}, 2);
  const Tensor gx = There(x);
  EXPECT_THROW(RmsNorm(*gpu_, gx, weight, 1e-6f, gx), Error);
  EXPECT_THROW(RmsNorm(reference_, gx, weight, 1e-6f, x), Error);
  EXPECT_THROW(gx.data<float>(), Error);
  EXPECT_THROW(ConvertTo(gx, DType::kBF16), Error);
}

TEST(CudaAbsentTest, WithoutAGpuAContextOnItIsRefused) {
  if (cuda::DeviceCount() > 0) GTEST_SKIP() << "there is a GPU";
  EXPECT_THROW(ExecContext(ExecOptions{.device = Device::kCuda}), Error);
  EXPECT_THROW(Tensor(DType::kF32, {1}, Device::kCuda), Error);
}

}  // namespace
}  // namespace sluice
