#include "compression/stc_cacher.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "runtime/error.h"
#include "runtime/transfer.h"
#include "tests/support/gpu_testing.h"
#include "tests/support/tiny_towers.h"

namespace sluice {
namespace {

using ::sluice::testing::kTinyClip;
using ::sluice::testing::kTinySide;
using ::sluice::testing::kTinySiglip;
using ::sluice::testing::kTinyTokens;
using ::sluice::testing::NumberedFrames;
using ::sluice::testing::RelativeDifference;
using ::sluice::testing::Rows;
using ::sluice::testing::SkippedWithout;
using ::sluice::testing::TinyTower;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

constexpr int kSide = kTinySide, kTokens = kTinyTokens;

// Frames that resemble each other: noise of which each frame renews some patches.
Tensor Film(int frames, uint32_t seed, int renewed = 3, const TinyTower& tiny = kTinySiglip) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  Tensor pixels(DType::kF32, {frames, 3, kSide, kSide});
  constexpr int64_t kFrame = 3 * kSide * kSide;
  float* out = pixels.data<float>();
  for (int64_t i = 0; i < kFrame; ++i) out[i] = uniform(random);
  for (int f = 1; f < frames; ++f) {
    std::copy_n(out + (f - 1) * kFrame, kFrame, out + f * kFrame);
    for (int n = 0; n < renewed; ++n) {
      const int patch = static_cast<int>(random() % tiny.patches());
      for (int c = 0; c < 3; ++c) {
        for (int y = 0; y < tiny.patch; ++y) {
          for (int x = 0; x < tiny.patch; ++x) {
            out[f * kFrame + (c * kSide + patch / tiny.grid * tiny.patch + y) * kSide +
                patch % tiny.grid * tiny.patch + x] = uniform(random);
          }
        }
      }
    }
  }
  return pixels;
}

// Where a test runs; the context lasts, so that on a GPU steps recur and are replayed.
class Place {
 public:
  explicit Place(Device device) : ctx_({.num_threads = 2, .device = device}) {}

  std::unique_ptr<VisionEncoder> Load(const TinyTower& tiny, DType dtype) const {
    return tiny.Load(dtype, ctx_.device());
  }
  // Tokens in host memory.
  Tensor Encode(const VisionEncoder& encoder, ConstTensorView pixels, FeatureReuse* reuse,
                int batch = 100) {
    const int frames = static_cast<int>(pixels.dim(0));
    Tensor all(DType::kF32, {frames * kTokens, encoder.output_size()});
    for (int f = 0; f < frames; f += batch) {
      const int end = std::min(frames, f + batch);
      const Workspace::Scope scope(ctx_.workspace());
      const TensorView there = ctx_.workspace().Allocate(DType::kF32, {end - f, 3, kSide, kSide});
      Transfer(ctx_, pixels.Slice(f, end), there);
      const VisualTokens part =
          encoder.Encode(ctx_, there, NumberedFrames(end - f), {.reuse = reuse});
      Transfer(ctx_, part.features, all.view().Slice(f * kTokens, end * kTokens));
    }
    return all;
  }
  ExecContext& ctx() { return ctx_; }

 private:
  ExecContext ctx_;
};

double Distance(const Tensor& got, const Tensor& want, int frame) {
  const auto of_frame = [&](const Tensor& x) {
    return x.view().Slice(frame * kTokens, (frame + 1) * kTokens);
  };
  return RelativeDifference(of_frame(got), of_frame(want));
}

// ---- The tower and the method once more, in double precision and as the paper writes them: with
// the four tensors K, V, A (after the output projection) and M of the reference, one patch after
// another.

class DoubleTower {
 public:
  DoubleTower(const TinyTower& tiny, int interval, double ratio, bool shared)
      : tiny_(tiny),
        interval_(interval),
        fresh_(std::clamp(int(tiny.patches() * ratio), 1, tiny.patches())),
        shared_(shared),
        kept_(tiny.layers) {}

  // Hidden states of the next frame after the last layer.
  Rows Run(const Tensor& pixels, int frame) {
    Rows h = tiny_.Embed(pixels, frame);
    const int rows = tiny_.rows();
    const bool whole = next_++ % interval_ == 0;
    std::vector<int> chosen;
    for (int l = 0; l < tiny_.layers; ++l) {
      const std::string name = TinyTower::LayerName(l);
      Kept& kept = kept_[l];
      const Rows n = tiny_.Norm(h, name + "layer_norm1");
      const Rows k = tiny_.Project(n, name + "self_attn.k_proj");
      if (whole) {
        chosen.resize(rows);
        std::iota(chosen.begin(), chosen.end(), 0);
      } else if (l == 0 || !shared_) {
        chosen = LeastAlike(k, kept.k);
      }
      Rows v = whole ? Rows(rows) : kept.v, a = whole ? Rows(rows) : kept.a;
      for (int t : chosen) v[t] = tiny_.Project({n[t]}, name + "self_attn.v_proj")[0];
      for (int t : chosen) {
        const std::vector<double> q = tiny_.Project({n[t]}, name + "self_attn.q_proj")[0];
        const Rows p = tiny_.Attention(q, k, std::vector<double>(rows));
        a[t] = tiny_.Project({tiny_.Mix(p, v)}, name + "self_attn.out_proj")[0];
      }
      for (int t = 0; t < rows; ++t) Plus(h[t], a[t]);
      Rows m = whole ? Rows(rows) : kept.m;
      for (int t : chosen) m[t] = tiny_.Mlp({h[t]}, l)[0];
      for (int t = 0; t < rows; ++t) Plus(h[t], m[t]);
      if (whole) kept = {k, v, a, m};
    }
    return h;
  }

 private:
  struct Kept {
    Rows k, v, a, m;
  };
  static void Plus(std::vector<double>& x, const std::vector<double>& y) {
    for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
  }
  // The class token first, if there is one; it is always fresh.
  std::vector<int> LeastAlike(const Rows& k, const Rows& reference) const {
    std::vector<double> cosine(tiny_.rows());
    for (int t = 0; t < tiny_.rows(); ++t) {
      double ab = 0, aa = 0, bb = 0;
      for (int d = 0; d < tiny_.width; ++d) {
        ab += k[t][d] * reference[t][d];
        aa += k[t][d] * k[t][d];
        bb += reference[t][d] * reference[t][d];
      }
      cosine[t] = ab / std::max(std::sqrt(aa * bb), 1e-8);
      // Patches that did not change are alike up to rounding; then the lower index goes first.
      if (cosine[t] > 1 - 1e-7) cosine[t] = 1;
    }
    std::vector<int> order(tiny_.patches());
    std::iota(order.begin(), order.end(), tiny_.class_tokens);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return cosine[a] < cosine[b]; });
    order.resize(fresh_);
    std::sort(order.begin(), order.end());
    if (tiny_.class_tokens) order.insert(order.begin(), 0);
    return order;
  }

  const TinyTower& tiny_;
  const int interval_, fresh_;
  const bool shared_;
  std::vector<Kept> kept_;
  int next_ = 0;
};

// Every patch of every frame is new noise over a common ground, so that no two patches tie.
Tensor RestlessFilm(int frames, uint32_t seed) {
  Tensor pixels = Film(frames, seed, 0);
  std::mt19937 random(seed + 1);
  std::uniform_real_distribution<float> uniform(-0.4f, 0.4f);
  for (int64_t i = 3 * kSide * kSide; i < pixels.shape().NumElements(); ++i) {
    pixels.data<float>()[i] += uniform(random) * static_cast<float>(i / 1000 % 7) / 7;
  }
  return pixels;
}

// Skips where there is no such device.
template <typename Param>
class StcCacherDeviceTest : public ::testing::TestWithParam<Param> {
 protected:
  void SetUp() override {
    if (SkippedWithout(device())) return;
    place_ = std::make_unique<Place>(device());
  }
  Device device() const {
    if constexpr (std::is_same_v<Param, Device>) {
      return this->GetParam();
    } else {
      return std::get<Device>(this->GetParam());
    }
  }

  std::unique_ptr<Place> place_;
};

class StcCacherFamiliesTest : public StcCacherDeviceTest<std::tuple<TinyTower, Device>> {
 protected:
  const TinyTower& tiny() const { return std::get<TinyTower>(GetParam()); }
};

TEST_P(StcCacherFamiliesTest, EqualsTheFourTensorFormInDoublePrecision) {
  constexpr int kFrames = 9;
  const auto encoder = place_->Load(tiny(), DType::kF32);
  const Tensor pixels = RestlessFilm(kFrames, 11);
  for (const bool shared : {false, true}) {
    for (const int interval : {2, 3}) {
      for (const double ratio : {0.05, 0.4}) {
        std::vector<Tensor> want;
        DoubleTower tower(tiny(), interval, ratio, shared);
        for (int f = 0; f < kFrames; ++f) want.push_back(tiny().Tokens(tower.Run(pixels, f)));
        for (const int batch : {1, 4}) {
          StcCacher cacher({.interval = interval,
                            .ratio = ratio,
                            .shared_selection = shared,
                            .refresh_below = -1});
          const Tensor got = place_->Encode(*encoder, pixels, &cacher, batch);
          for (int f = 0; f < kFrames; ++f) {
            // f32 sums of some hundred products through three layers.
            EXPECT_LE(RelativeDifference(got.view().Slice(f * kTokens, (f + 1) * kTokens), want[f]),
                      1e-5)
                << "frame " << f << " interval " << interval << " ratio " << ratio << " shared "
                << shared << " in batches of " << batch;
          }
        }
      }
    }
  }
}

TEST_P(StcCacherFamiliesTest, ComputingEveryPatchAfreshIsTheDenseTower) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const auto encoder = place_->Load(tiny(), dtype);
    const Tensor pixels = Film(6, 1, 8, tiny());
    const Tensor dense = place_->Encode(*encoder, pixels, nullptr);
    StcCacher cacher({.interval = 3, .ratio = 1, .refresh_below = -1});
    const Tensor cached = place_->Encode(*encoder, pixels, &cacher);
    // The same products on other numbers of rows; in bf16 a sum may round the other way (2^-9).
    for (int f = 0; f < 6; ++f) {
      EXPECT_LE(Distance(cached, dense, f), dtype == DType::kF32 ? 1e-5 : 1e-2);
    }
    EXPECT_EQ(cacher.counts().patches, 6 * tiny().layers * tiny().patches() * 4 / 6);
    EXPECT_EQ(cacher.counts().fresh, cacher.counts().patches);
    EXPECT_EQ(cacher.counts().whole, 2);
  }
}

TEST_P(StcCacherFamiliesTest, TracesTheOperationsOfItsProducts) {
  const auto encoder = place_->Load(tiny(), DType::kF32);
  StcCacher cacher({.interval = 3, .ratio = 0.3});
  place_->Encode(*encoder, RestlessFilm(5, 2), &cacher);
  const auto& stages = place_->ctx().tracer().stages();
  double parts = 0;
  for (const char* stage :
       {"patch_embedding", "keys", "qkv", "attention", "out", "mlp", "projector"}) {
    parts += stages.at(std::string("encode/") + stage).flops;
  }
  EXPECT_NEAR(parts / stages.at("encode").flops, 1, 1e-9);
}

INSTANTIATE_TEST_SUITE_P(Families, StcCacherFamiliesTest,
                         ::testing::Combine(::testing::Values(kTinySiglip, kTinyClip),
                                            ::testing::Values(Device::kCpu, Device::kCuda)),
                         [](const auto& info) {
                           return std::get<TinyTower>(info.param).name + "_" +
                                  Name(std::get<Device>(info.param));
                         });

class StcCacherTypesTest : public StcCacherDeviceTest<std::tuple<DType, Device>> {
 protected:
  DType dtype() const { return std::get<DType>(GetParam()); }
};

TEST_P(StcCacherTypesTest, AFrameThatEqualsItsReferenceHasItsFeaturesAtEveryRatio) {
  const auto encoder = place_->Load(kTinySiglip, dtype());
  const Tensor pixels = Film(4, 2, 0);
  const Tensor dense = place_->Encode(*encoder, pixels, nullptr);
  for (const double ratio : {0.01, 0.3, 0.9}) {
    StcCacher cacher({.interval = 4, .ratio = ratio});
    const Tensor cached = place_->Encode(*encoder, pixels, &cacher);
    // What is kept is rounded to the compute dtype once a layer.
    for (int f = 0; f < 4; ++f) {
      EXPECT_LE(Distance(cached, dense, f), dtype() == DType::kF32 ? 1e-5 : 1e-2);
    }
    EXPECT_EQ(cacher.counts().refreshes, 0);
  }
}

TEST_P(StcCacherTypesTest, HowFramesAreBatchedMakesNoDifference) {
  const auto encoder = place_->Load(kTinySiglip, dtype());
  const Tensor pixels = RestlessFilm(9, 3);
  StcCacher together({.interval = 4, .ratio = 0.3});
  const Tensor want = place_->Encode(*encoder, pixels, &together);
  for (const int batch : {1, 2, 5}) {
    StcCacher apart({.interval = 4, .ratio = 0.3});
    const Tensor got = place_->Encode(*encoder, pixels, &apart, batch);
    for (int f = 0; f < 9; ++f) {
      EXPECT_LE(Distance(got, want, f), dtype() == DType::kF32 ? 1e-5 : 2e-2)
          << "frame " << f << " in batches of " << batch;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Types, StcCacherTypesTest,
                         ::testing::Combine(::testing::Values(DType::kF32, DType::kBF16),
                                            ::testing::Values(Device::kCpu, Device::kCuda)),
                         [](const auto& info) {
                           return std::string(Name(std::get<DType>(info.param))) + "_" +
                                  Name(std::get<Device>(info.param));
                         });

class StcCacherTest : public StcCacherDeviceTest<Device> {};

TEST_P(StcCacherTest, ErrorsFallAsMorePatchesAreComputed) {
  const auto encoder = place_->Load(kTinySiglip, DType::kF32);
  const Tensor pixels = Film(2, 4, 9);
  const Tensor dense = place_->Encode(*encoder, pixels, nullptr);
  double last = 1e9;
  for (const double ratio : {0.04, 0.2, 0.4, 1.0}) {
    StcCacher cacher({.interval = 2, .ratio = ratio, .refresh_below = -1});
    const double error = Distance(place_->Encode(*encoder, pixels, &cacher), dense, 1);
    EXPECT_LT(error, last) << ratio;
    last = error;
  }
}

TEST_P(StcCacherTest, ACutIsComputedWholeOutOfTurn) {
  const auto encoder = place_->Load(kTinySiglip, DType::kF32);
  Tensor pixels = Film(6, 5, 1);
  const Tensor other = Film(6, 500, 1);
  constexpr int64_t kFrame = 3 * kSide * kSide;
  std::copy_n(other.data<float>(), 3 * kFrame, pixels.data<float>() + 3 * kFrame);
  const Tensor dense = place_->Encode(*encoder, pixels, nullptr);
  for (const int batch : {1, 2, 6}) {
    StcCacher cacher({.interval = 100, .ratio = 0.2});
    const Tensor cached = place_->Encode(*encoder, pixels, &cacher, batch);
    EXPECT_EQ(cacher.counts().whole, 2) << batch;
    EXPECT_EQ(cacher.counts().refreshes, 1) << batch;
    EXPECT_LE(Distance(cached, dense, 3), 1e-5) << batch;
  }
}

TEST_P(StcCacherTest, InterleavedStreamsAreEachAsIfAlone) {
  const auto encoder = place_->Load(kTinySiglip, DType::kF32);
  constexpr int kFrames = 12;  // enough for steps to be replayed on a GPU
  const Tensor a = RestlessFilm(kFrames, 6), b = RestlessFilm(kFrames, 7);
  StcCacher alone_a({}), alone_b({}), mixed_a({}), mixed_b({});
  const Tensor want_a = place_->Encode(*encoder, a, &alone_a, 1);
  const Tensor want_b = place_->Encode(*encoder, b, &alone_b, 1);
  for (int f = 0; f < kFrames; ++f) {
    for (const auto& [film, cacher, want] :
         {std::tuple(&a, &mixed_a, &want_a), std::tuple(&b, &mixed_b, &want_b)}) {
      const Tensor one = place_->Encode(*encoder, film->view().Slice(f, f + 1), cacher);
      EXPECT_TRUE(std::equal(one.data<float>(), one.data<float>() + kTokens * kTinySiglip.out,
                             want->data<float>() + f * kTokens * kTinySiglip.out))
          << f;
    }
  }
}

TEST_P(StcCacherTest, ResetComputesTheNextFrameWholeAndMemoryStaysFlat) {
  const auto encoder = place_->Load(kTinySiglip, DType::kBF16);
  StcCacher cacher({.interval = 50, .ratio = 0.2, .refresh_below = -1});
  place_->Encode(*encoder, Film(3, 8), &cacher);
  const int64_t bytes = cacher.SizeBytes();
  EXPECT_EQ(bytes,
            kTinySiglip.layers * 3 * kTinySiglip.patches() * kTinySiglip.width *
                2);  // keys, values, update in bf16
  place_->Encode(*encoder, Film(40, 9), &cacher, 7);
  EXPECT_EQ(cacher.SizeBytes(), bytes);
  EXPECT_EQ(cacher.counts().whole, 1);
  cacher.Reset();
  EXPECT_EQ(cacher.SizeBytes(), 0);
  place_->Encode(*encoder, Film(1, 10), &cacher);
  EXPECT_EQ(cacher.counts().whole, 2);
}

// With a refresh in the middle.
TEST_P(StcCacherTest, ReplayedStepsGiveTheBitsOfDirectOnes) {
  if (device() == Device::kCpu) return;  // nothing is replayed there
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const TinyTower& tiny : {kTinySiglip, kTinyClip}) {
      constexpr int kFrames = 24;
      const auto encoder = place_->Load(tiny, dtype);
      Tensor pixels = RestlessFilm(kFrames, 21);
      constexpr int64_t kFrame = 3 * kSide * kSide, kCut = 13;
      const Tensor other = RestlessFilm(kFrames - kCut, 500);
      std::copy_n(other.data<float>(), other.shape().NumElements(),
                  pixels.data<float>() + kCut * kFrame);
      for (const int batch : {1, 3, 4}) {
        StcCacher lasting({.interval = 6, .ratio = 0.3}), direct({.interval = 6, .ratio = 0.3});
        const Tensor got = place_->Encode(*encoder, pixels, &lasting, batch);
        for (int f = 0; f < kFrames; f += batch) {
          Place once(device());
          const Tensor want =
              once.Encode(*encoder, pixels.view().Slice(f, std::min(kFrames, f + batch)), &direct);
          ASSERT_EQ(std::memcmp(got.data<float>() + f * kTokens * tiny.out, want.data<float>(),
                                want.SizeBytes()),
                    0)
              << "frame " << f << " in batches of " << batch << " " << Name(dtype);
        }
        EXPECT_EQ(lasting.counts().refreshes, direct.counts().refreshes);
        EXPECT_GE(lasting.counts().refreshes, 1);
      }
    }
  }
  EXPECT_GT(place_->ctx().recorder()->counts().replayed, 50);
}

INSTANTIATE_TEST_SUITE_P(Devices, StcCacherTest, ::testing::Values(Device::kCpu, Device::kCuda),
                         [](const auto& info) { return Name(info.param); });

// What all keys of a tower have in common says nothing of the picture.
TEST(StcCacherChangeTest, ACutShowsHoweverMuchKeysHaveInCommon) {
  constexpr int64_t kPatches = 50, kWidth = 96;
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const float common : {0.0f, 10.0f}) {
      std::mt19937 random(12);
      std::normal_distribution<float> normal;
      const auto keys_of = [&](const Tensor* like, float change) {
        Tensor keys(DType::kF32, {kPatches, kWidth});
        for (int64_t i = 0; i < kPatches * kWidth; ++i) {
          keys.data<float>()[i] =
              like ? like->data<float>()[i] + change * normal(random) : common + normal(random);
        }
        return keys;
      };
      const Tensor first = keys_of(nullptr, 0), moved = keys_of(&first, 0.3f);
      const Tensor other = keys_of(nullptr, 0);
      StcCacher cacher({.interval = 100});
      const auto whole = [&](const Tensor& keys) {
        ExecContext ctx({});
        const Tensor narrow = ConvertTo(keys, dtype);
        const ConstTensorView of_frame = narrow;
        const bool is_whole = cacher.ChooseWhole(ctx, 1, {&of_frame, 1})[0];
        if (is_whole) cacher.reference(0).keys = narrow.Clone();
        return is_whole;
      };
      EXPECT_TRUE(whole(first));
      EXPECT_FALSE(whole(moved)) << Name(dtype) << " " << common;
      EXPECT_TRUE(whole(other)) << Name(dtype) << " " << common;
      EXPECT_EQ(cacher.counts().refreshes, 1);
    }
  }
}

TEST(StcCacherOptionsTest, SettingsOutOfRangeAreRefused) {
  EXPECT_THAT([] { StcCacher cacher({.interval = 0}); },
              ThrowsMessage<InputError>(HasSubstr("interval must be at least 1")));
  for (const double ratio : {0.0, -1.0, 1.01, std::nan("")}) {
    EXPECT_THAT([&] { StcCacher cacher({.ratio = ratio}); },
                ThrowsMessage<InputError>(HasSubstr("must lie in (0, 1]")));
  }
  EXPECT_THAT([] { StcCacher cacher({.refresh_below = 1.5}); },
              ThrowsMessage<InputError>(HasSubstr("a cosine in -1..1")));
}

}  // namespace
}  // namespace sluice
