#include "compression/turbo_tower.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>
#include <utility>

#include "compression/stc_cacher.h"
#include "runtime/error.h"
#include "runtime/ops/attention.h"
#include "tests/support/gpu_testing.h"
#include "tests/support/tiny_towers.h"

namespace sluice {
namespace {

using ::sluice::testing::kTinyClip;
using ::sluice::testing::kTinySiglip;
using ::sluice::testing::kTinyTokens;
using ::sluice::testing::NumberedFrames;
using ::sluice::testing::RandomPixels;
using ::sluice::testing::RandomTensor;
using ::sluice::testing::RelativeDifference;
using ::sluice::testing::Rows;
using ::sluice::testing::TinyTower;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

VisualTokens Encode(const VisionEncoder& encoder, const Tensor& pixels, const TokenMerge* merge,
                    ExecContext& ctx) {
  const Tensor there = TransferTo(ctx, pixels, ctx.device());
  VisualTokens tokens =
      encoder.Encode(ctx, there, NumberedFrames(static_cast<int>(pixels.dim(0))), {.merge = merge});
  tokens.features = TransferTo(ctx, tokens.features, Device::kCpu);
  return tokens;
}

// The tower and the method once more, in double precision: tokens as lists of their members.
Rows MergedTower(const TinyTower& tiny, const TurboOptions& options, Rows h) {
  std::vector<std::vector<int>> members(h.size());
  for (size_t i = 0; i < h.size(); ++i) members[i] = {static_cast<int>(i)};
  for (int l = 0; l < tiny.layers; ++l) {
    const std::string name = TinyTower::LayerName(l);
    const size_t n = h.size();
    const Rows x = tiny.Norm(h, name + "layer_norm1");
    const Rows k = tiny.Project(x, name + "self_attn.k_proj");
    const Rows q = tiny.Project(x, name + "self_attn.q_proj");
    const Rows v = tiny.Project(x, name + "self_attn.v_proj");
    std::vector<double> bias(n), a(n);
    for (size_t i = 0; i < n; ++i) {
      bias[i] = options.proportional_attention ? std::log(double(members[i].size())) : 0;
    }
    Rows mixed(n);
    const size_t asked = tiny.class_tokens ? 1 : std::min<size_t>(64, n);
    for (size_t i = 0; i < n; ++i) {
      const Rows p = tiny.Attention(q[i], k, bias);
      mixed[i] = tiny.Mix(p, v);
      for (size_t j = 0; i < asked && j < n; ++j) {
        for (const auto& head : p) a[j] += head[j] / tiny.heads;
      }
    }
    const Rows out = tiny.Project(mixed, name + "self_attn.out_proj");
    for (size_t i = 0; i < n; ++i) {
      for (int d = 0; d < tiny.width; ++d) h[i][d] += out[i][d];
    }

    if (!tiny.class_tokens) {
      std::vector<double> sorted = a;
      std::sort(sorted.begin(), sorted.end());
      for (double& value : a) value = std::min(value, sorted[static_cast<size_t>(0.95 * (n - 1))]);
    }
    const double sum = std::accumulate(a.begin(), a.end(), 0.0);
    for (double& value : a) value *= options.lambda * double(n) / sum;
    Rows metric(n, std::vector<double>(tiny.width / tiny.heads));
    for (size_t i = 0; i < n; ++i) {
      double norm = 0;
      for (int d = 0; d < tiny.width; ++d) metric[i][d % metric[i].size()] += k[i][d];
      for (double value : metric[i]) norm += value * value;
      for (double& value : metric[i]) value /= std::sqrt(norm);
    }
    struct Source {
      size_t from, to;
      double priority;
    };
    std::vector<Source> sources;
    for (size_t i = 0; i < n; i += 2) {
      if (i == 0 && tiny.class_tokens) continue;
      Source best = {i, 0, -10};
      for (size_t j = 1; j < n; j += 2) {
        const double cosine =
            std::inner_product(metric[i].begin(), metric[i].end(), metric[j].begin(), 0.0);
        if (cosine > best.priority) best = {i, j, cosine};
      }
      best.priority -= a[i];
      sources.push_back(best);
    }
    std::stable_sort(sources.begin(), sources.end(),
                     [](const Source& s, const Source& t) { return s.priority > t.priority; });
    const size_t r = n < size_t(options.min_tokens)
                         ? 0
                         : std::min<size_t>(options.remove, (n - tiny.class_tokens) / 2);
    std::vector<double> size(n);
    Rows total(n, std::vector<double>(tiny.width));
    for (size_t i = 0; i < n; ++i) {
      size[i] = double(members[i].size());
      for (int d = 0; d < tiny.width; ++d) total[i][d] = size[i] * h[i][d];
    }
    std::vector<bool> gone(n);
    for (size_t s = 0; s < r; ++s) {
      const Source& source = sources[s];
      gone[source.from] = true;
      size[source.to] += double(members[source.from].size());
      for (int d = 0; d < tiny.width; ++d) total[source.to][d] += total[source.from][d];
      auto& list = members[source.to];
      list.insert(list.end(), members[source.from].begin(), members[source.from].end());
    }
    Rows left;
    std::vector<std::vector<int>> left_members;
    for (size_t parity : {0, 1}) {
      for (size_t i = parity; i < n; i += 2) {
        if (gone[i]) continue;
        for (double& value : total[i]) value /= size[i];
        left.push_back(total[i]);
        left_members.push_back(members[i]);
      }
    }
    // Nothing moves where nothing merges.
    if (r > 0) {
      h = left;
      members = left_members;
    }
    const Rows m = tiny.Mlp(h, l);
    for (size_t i = 0; i < h.size(); ++i) {
      for (int d = 0; d < tiny.width; ++d) h[i][d] += m[i][d];
    }
  }
  Rows grid(tiny.rows());
  for (size_t i = 0; i < h.size(); ++i) {
    for (const int member : members[i]) grid[member] = h[i];
  }
  return grid;
}

class TurboTowerTest : public ::testing::TestWithParam<TinyTower> {
 protected:
  // f32 sums of some hundred products through three layers, against double precision.
  void CompareWithTheMethod(Device device);
};

void TurboTowerTest::CompareWithTheMethod(Device device) {
  const TinyTower& tiny = GetParam();
  const auto encoder = tiny.Load(DType::kF32, device);
  for (const bool proportional : {true, false}) {
    for (const double lambda : {0.0, 0.3, 2.0}) {
      for (const double remove : {1, 5, 100}) {
        const TurboOptions options = {.remove = remove,
                                      .lambda = lambda,
                                      .min_tokens = 8,
                                      .proportional_attention = proportional};
        const TurboTower turbo(options);
        const Tensor pixels = RandomPixels(2, static_cast<uint32_t>(remove) + 7);
        for (const KernelChoice kernels : {KernelChoice::kFast, KernelChoice::kReference}) {
          ExecContext ctx({.num_threads = 2, .kernels = kernels, .device = device});
          const VisualTokens got = Encode(*encoder, pixels, &turbo, ctx);
          for (int f = 0; f < 2; ++f) {
            const Tensor want = tiny.Tokens(MergedTower(tiny, options, tiny.Embed(pixels, f)));
            EXPECT_LE(RelativeDifference(
                          got.features.view().Slice(f * kTinyTokens, (f + 1) * kTinyTokens), want),
                      2e-5)
                << "remove " << remove << " lambda " << lambda << " proportional " << proportional;
          }
        }
      }
    }
  }
}

TEST_P(TurboTowerTest, EqualsTheMethodInDoublePrecision) { CompareWithTheMethod(Device::kCpu); }

TEST_P(TurboTowerTest, EqualsTheMethodInDoublePrecisionOnAGpu) {
  if (::sluice::testing::SkippedWithout(Device::kCuda)) return;
  CompareWithTheMethod(Device::kCuda);
}

TEST_P(TurboTowerTest, RemovingNothingIsTheDenseTowerBitForBit) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const auto encoder = GetParam().Load(dtype);
    ExecContext ctx({.num_threads = 2});
    const Tensor pixels = RandomPixels(3, 1);
    const VisualTokens dense = Encode(*encoder, pixels, nullptr, ctx);
    for (const TurboOptions& options : {TurboOptions{.remove = 0, .min_tokens = 0},
                                        TurboOptions{.remove = 9, .min_tokens = 1000}}) {
      const TurboTower turbo(options);
      const VisualTokens merged = Encode(*encoder, pixels, &turbo, ctx);
      EXPECT_EQ(std::memcmp(merged.features.data<float>(), dense.features.data<float>(),
                            dense.features.SizeBytes()),
                0);
    }
  }
}

TEST_P(TurboTowerTest, EveryRunAndEveryBatchGivesTheSameBits) {
  const auto encoder = GetParam().Load(DType::kBF16);
  const TurboTower turbo({.remove = 4, .lambda = 0.25, .min_tokens = 4});
  const Tensor pixels = RandomPixels(4, 3);
  ExecContext ctx({.num_threads = 2}), single({.num_threads = 1});
  const VisualTokens first = Encode(*encoder, pixels, &turbo, ctx);
  for (int run = 0; run < 20; ++run) {
    const VisualTokens again = Encode(*encoder, pixels, &turbo, run % 2 ? ctx : single);
    ASSERT_EQ(std::memcmp(again.features.data<float>(), first.features.data<float>(),
                          first.features.SizeBytes()),
              0);
  }
}

TEST_P(TurboTowerTest, TracesFewerOperationsThanTheDenseTower) {
  const auto encoder = GetParam().Load(DType::kF32);
  ExecContext ctx({.num_threads = 1});
  const TurboTower turbo({.remove = 6, .lambda = 0.25, .min_tokens = 4});
  Encode(*encoder, RandomPixels(3, 7), &turbo, ctx);
  double parts = 0;
  for (const auto& [name, cost] : ctx.tracer().stages()) {
    if (name.starts_with("encode/") && name != "encode/norm" && name != "encode/pool") {
      parts += cost.flops;
    }
  }
  const double all = ctx.tracer().stages().at("encode").flops;
  EXPECT_NEAR(parts / all, 1, 1e-9);
  EXPECT_LT(all, 3 * encoder->FlopsPerFrame());
}

TEST_P(TurboTowerTest, ReuseAndMergingAreNotTakenTogether) {
  const auto encoder = GetParam().Load(DType::kF32);
  ExecContext ctx({});
  const TurboTower turbo({});
  StcCacher cacher({});
  EXPECT_THAT(
      [&] {
        encoder->Encode(ctx, RandomPixels(1, 1), NumberedFrames(1),
                        {.reuse = &cacher, .merge = &turbo});
      },
      ThrowsMessage<Error>(HasSubstr("at most one of")));
}

INSTANTIATE_TEST_SUITE_P(Families, TurboTowerTest, ::testing::Values(kTinySiglip, kTinyClip),
                         [](const auto& info) { return info.param.name; });

std::vector<int32_t> Places(const TurboTower& turbo, const Tensor& keys,
                            const std::vector<float>& received, int64_t class_tokens,
                            int64_t remove) {
  ExecContext ctx({});
  std::vector<int32_t> places(keys.dim(0));
  turbo.ChoosePlaces(ctx, keys, received, class_tokens, remove, places);
  return places;
}

TEST(TurboPlacesTest, SizesAddUpAndNoPlaceStaysEmpty) {
  const TurboTower turbo({.lambda = 0.25});
  for (const int64_t count : {2, 3, 41, 196, 257}) {
    for (const int64_t class_tokens : {0, 1}) {
      for (const int64_t remove : {int64_t{1}, count / 5, (count - class_tokens) / 2}) {
        if (remove < 1 || remove > (count - class_tokens) / 2) continue;
        const Tensor keys = RandomTensor(DType::kF32, {count, 24}, static_cast<uint32_t>(count));
        const std::vector<float> received(count, 1.0f / static_cast<float>(count));
        const auto places = Places(turbo, keys, received, class_tokens, remove);
        std::vector<float> sizes(count, 1), merged_sizes(count - remove);
        const Tensor merged(DType::kF32, {count - remove, 24});
        MergeRows(keys, sizes, places, merged, merged_sizes);
        EXPECT_EQ(std::accumulate(merged_sizes.begin(), merged_sizes.end(), 0.0f), count);
        EXPECT_GE(*std::min_element(merged_sizes.begin(), merged_sizes.end()), 1);
        if (class_tokens) {
          EXPECT_EQ(places[0], 0);
          EXPECT_EQ(merged_sizes[0], 1);
        }
      }
    }
  }
}

TEST(TurboPlacesTest, LargeLambdaSparesWhatIsAttendedToAndKeepsThePartners) {
  constexpr int64_t kCount = 60, kRemove = 7;
  const Tensor keys = RandomTensor(DType::kF32, {kCount, 16}, 3);
  std::vector<float> received(kCount);
  for (int64_t i = 0; i < kCount; ++i) received[i] = static_cast<float>((i * 37) % kCount + 1);
  const auto all = Places(TurboTower({.lambda = 0}), keys, {}, 1, 29);
  const auto places = Places(TurboTower({.lambda = 1000}), keys, received, 1, kRemove);
  std::vector<std::pair<float, int64_t>> order;
  for (int64_t i = 2; i < kCount; i += 2) order.push_back({received[i], i});
  std::sort(order.begin(), order.end());
  // Places of the odd tokens tell them apart.
  const auto partner = [&](const std::vector<int32_t>& of, int64_t token) {
    for (int64_t j = 1; j < kCount; j += 2) {
      if (of[j] == of[token]) return j;
    }
    return int64_t{-1};
  };
  for (size_t i = 0; i < order.size(); ++i) {
    const int64_t token = order[i].second;
    EXPECT_EQ(partner(places, token), i < kRemove ? partner(all, token) : -1) << token;
  }
}

TEST(TurboPlacesTest, TwinsMergeFirstAndTheNextAttentionIsUnchanged) {
  constexpr int64_t kCount = 20, kWidth = 32;
  const Tensor x = RandomTensor(DType::kF32, {kCount, kWidth}, 5);
  std::copy_n(x.data<float>() + 6 * kWidth, kWidth, x.data<float>() + 11 * kWidth);
  const auto places = Places(TurboTower({.lambda = 0}), x, {}, 0, 1);
  EXPECT_EQ(places[6], places[11]);
  const std::vector<float> sizes(kCount, 1);
  std::vector<float> merged_sizes(kCount - 1);
  const Tensor merged(DType::kF32, {kCount - 1, kWidth}), bias(DType::kF32, {kCount - 1});
  MergeRows(x, sizes, places, merged, merged_sizes);
  EXPECT_EQ(std::memcmp(merged.data<float>() + places[6] * kWidth, x.data<float>() + 6 * kWidth,
                        kWidth * sizeof(float)),
            0);
  for (int64_t i = 0; i < kCount - 1; ++i) bias.data<float>()[i] = std::log(merged_sizes[i]);
  ExecContext ctx({});
  const Tensor q = RandomTensor(DType::kF32, {5, kWidth}, 6);
  const Tensor whole(DType::kF32, {5, kWidth}), after(DType::kF32, {5, kWidth});
  EncoderAttention(ctx, q, x, x, 1, 2, 16, 0.25f, whole);
  EncoderAttention(ctx, q, merged, merged, 1, 2, 16, 0.25f, after, bias);
  EXPECT_LE(RelativeDifference(after, whole), 1e-5);
}

TEST(TurboOptionsTest, CountsSharesAndTheFloorDecideHowManyLeave) {
  EXPECT_EQ(TurboTower({.remove = 8}).TokensToRemove(196, 0), 8);
  EXPECT_EQ(TurboTower({.remove = 300}).TokensToRemove(197, 1), 98);
  EXPECT_EQ(TurboTower({.remove = 0.1}).TokensToRemove(196, 0), 19);
  EXPECT_EQ(TurboTower({.remove = 0.5}).TokensToRemove(257, 1), 128);
  EXPECT_EQ(TurboTower({.remove = 8}).TokensToRemove(40, 0), 8);
  EXPECT_EQ(TurboTower({.remove = 8}).TokensToRemove(39, 0), 0);
}

TEST(TurboOptionsTest, WhatIsOutOfRangeIsRefused) {
  for (const double remove : {-1.0, 0.6, 1.5, -0.1, std::nan("")}) {
    EXPECT_THAT([&] { TurboTower turbo({.remove = remove}); },
                ThrowsMessage<InputError>(HasSubstr("a share in (0, 0.5]")));
  }
  EXPECT_THAT([] { TurboTower turbo({.lambda = -1}); },
              ThrowsMessage<InputError>(HasSubstr("lambda")));
}

}  // namespace
}  // namespace sluice
