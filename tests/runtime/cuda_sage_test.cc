// Quantised attention on a GPU through the ops that models call: against its reference number by
// number, against exact attention, and what the trace tells.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "runtime/ops/attention.h"
#include "runtime/ops/cpu/attention_sage.h"
#include "tests/support/gpu_testing.h"
#include "tests/support/tensor_testing.h"

namespace sluice {
namespace {

using ::sluice::testing::At;
using ::sluice::testing::GpuTest;
using ::sluice::testing::RandomTensor;

constexpr auto kAlways = AttentionPrecision::kSageAlways;

struct Distance {
  double cosine = 0, l1 = 0;
};

Distance Compare(ConstTensorView got, ConstTensorView want) {
  double dot = 0, got2 = 0, want2 = 0, error = 0, size = 0;
  for (int64_t i = 0; i < want.dim(0); ++i) {
    for (int64_t j = 0; j < want.dim(1); ++j) {
      const double a = At(got, i, j), b = At(want, i, j);
      dot += a * b;
      got2 += a * a;
      want2 += b * b;
      error += std::abs(a - b);
      size += std::abs(b);
    }
  }
  return {dot / std::sqrt(got2 * want2), error / size};
}

class CudaSageTest : public GpuTest {
 protected:
  void SetUp() override {
    GpuTest::SetUp();
    if (!IsSkipped() && cuda::ComputeCapability() != 90) GTEST_SKIP() << "needs a Hopper GPU";
  }

  // What the Hopper variant gives for one sequence: [queries, heads * D] f32.
  static Tensor Reference(const Tensor& q, const Tensor& k, const Tensor& v, int heads,
                          int kv_heads, int head_dim, bool causal) {
    Tensor out(DType::kF32, q.shape());
    const auto column = [&](const Tensor& x, int head) {
      std::vector<float> rows;
      for (int64_t i = 0; i < x.dim(0); ++i) {
        for (int d = 0; d < head_dim; ++d) {
          rows.push_back(static_cast<float>(At(x, i, head * head_dim + d)));
        }
      }
      return rows;
    };
    for (int head = 0; head < heads; ++head) {
      const std::vector<float> own_q = column(q, head);
      const std::vector<float> own_k = column(k, head / (heads / kv_heads));
      const std::vector<float> own_v = column(v, head / (heads / kv_heads));
      std::vector<float> result(own_q.size());
      cpu::SageReference({.q = own_q.data(),
                          .k = own_k.data(),
                          .v = own_v.data(),
                          .queries = q.dim(0),
                          .keys = k.dim(0),
                          .head_dim = head_dim,
                          .scale = 1 / std::sqrt(static_cast<float>(head_dim)),
                          .causal = causal},
                         cpu::SageVariant::Hopper(), result.data());
      for (size_t i = 0; i < result.size(); ++i) {
        const int64_t row = static_cast<int64_t>(i) / head_dim;
        out.data<float>()[row * out.dim(1) + head * head_dim + static_cast<int64_t>(i) % head_dim] =
            result[i];
      }
    }
    return out;
  }
};

// Up to 512 keys, of which the kernel's sample is all. The same roundings in the same order but for
// approximate exponentials and reciprocals (a rounding to 3 or 8 bits falls to the other side now
// and then) and bf16 results, whose rounding alone is 1.4e-3.
constexpr double kSameL1 = 5e-3, kSameCosine = 0.9999;

TEST_F(CudaSageTest, OpsAgreeWithTheReferenceNumberByNumber) {
  for (const int head_dim : {64, 72, 80, 128}) {
    for (const auto& [queries, keys] :
         {std::pair(17, 63), std::pair(64, 129), std::pair(200, 511), std::pair(129, 512)}) {
      constexpr int kHeads = 2;
      const Tensor q = RandomTensor(DType::kBF16, {queries, kHeads * head_dim}, 1);
      const Tensor k = RandomTensor(DType::kBF16, {keys, kHeads * head_dim}, 2);
      const Tensor v = RandomTensor(DType::kBF16, {keys, kHeads * head_dim}, 3);
      const Tensor got(DType::kBF16, q.shape(), Device::kCuda);
      EncoderAttention(*gpu_, There(q), There(k), There(v), 1, kHeads, head_dim,
                       1 / std::sqrt(static_cast<float>(head_dim)), got, {}, kAlways);
      const Distance distance =
          Compare(Here(got), Reference(q, k, v, kHeads, kHeads, head_dim, false));
      EXPECT_LE(distance.l1, kSameL1) << queries << " x " << keys << " x " << head_dim;
      EXPECT_GE(distance.cosine, kSameCosine) << queries << " x " << keys << " x " << head_dim;
    }
  }
}

TEST_F(CudaSageTest, CausalAttentionOverBlocksAgreesWithTheReferenceAndExactAttention) {
  constexpr int kHeads = 14, kKvHeads = 2;
  for (const int head_dim : {64, 128}) {
    for (const auto& [begin, length] :
         {std::pair(0, 2), std::pair(0, 200), std::pair(300, 196), std::pair(63, 130)}) {
      const int64_t keys = begin + length, blocks = (keys + kKvBlockTokens - 1) / kKvBlockTokens;
      const auto bytes = static_cast<int64_t>(KvBlockBytes(kKvHeads, head_dim, DType::kBF16));
      const Tensor pool(DType::kU8, {blocks, bytes}, Device::kCuda);
      std::vector<void*> places;
      for (int64_t i = 0; i < blocks; ++i) places.push_back(pool.view().Slice(i, i + 1).raw());
      const KvLayerView kv{.blocks = places,
                           .kv_heads = kKvHeads,
                           .head_dim = head_dim,
                           .dtype = DType::kBF16,
                           .device = Device::kCuda,
                           .base = pool.view().raw()};
      const Tensor q = RandomTensor(DType::kBF16, {length, kHeads * head_dim}, 1);
      const Tensor k = RandomTensor(DType::kBF16, {keys, kKvHeads * head_dim}, 2);
      const Tensor v = RandomTensor(DType::kBF16, {keys, kKvHeads * head_dim}, 3);
      StoreKv(*gpu_, There(k), There(v), 0, kv);
      const float scale = 1 / std::sqrt(static_cast<float>(head_dim));
      const Tensor got(DType::kBF16, q.shape(), Device::kCuda);
      const Tensor exact(DType::kBF16, q.shape(), Device::kCuda);
      const Tensor there = There(q);
      CausalAttention(*gpu_, there, begin, kHeads, scale, kv, got, kAlways);
      CausalAttention(*gpu_, there, begin, kHeads, scale, kv, exact);
      const std::string what =
          std::to_string(begin) + " + " + std::to_string(length) + " x " + std::to_string(head_dim);
      const Distance same =
          Compare(Here(got), Reference(q, k, v, kHeads, kKvHeads, head_dim, true));
      EXPECT_LE(same.l1, kSameL1) << what;
      EXPECT_GE(same.cosine, kSameCosine) << what;
      const Distance method = Compare(Here(got), Here(exact));
      EXPECT_LE(method.l1, 0.05) << what;
      EXPECT_GE(method.cosine, 0.999) << what;
    }
  }
}

TEST_F(CudaSageTest, TheTraceTellsWhatRan) {
  constexpr int64_t kLong = 1024;
  const auto run = [&](int head_dim, AttentionPrecision precision) {
    const Tensor x = There(RandomTensor(DType::kBF16, {kLong, 4 * head_dim}, 1));
    const Tensor out(DType::kBF16, x.shape(), Device::kCuda);
    EncoderAttention(*gpu_, x, x, x, 1, 4, head_dim, 0.1f, out, {}, precision);
  };
  const auto items = [&](const char* stage) {
    const auto found = gpu_->tracer().stages().find(stage);
    return found == gpu_->tracer().stages().end() ? 0 : found->second.items;
  };
  run(64, AttentionPrecision::kExact);
  EXPECT_EQ(items("attention/sage") + items("attention/exact"), 0);
  run(64, AttentionPrecision::kSage);  // not faster for narrow heads
  EXPECT_EQ(items("attention/exact"), kLong);
  run(64, kAlways);
  EXPECT_EQ(items("attention/sage"), kLong);
}

}  // namespace
}  // namespace sluice
