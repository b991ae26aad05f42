#include "compression/stc_cacher.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <string>

#include "runtime/error.h"
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

VisualTokens Encode(const VisionEncoder& encoder, const Tensor& pixels, FeatureReuse* reuse,
                    int batch = 100) {
  ExecContext ctx({.num_threads = 2});
  const int frames = static_cast<int>(pixels.dim(0));
  VisualTokens all;
  all.features = Tensor(DType::kF32, {frames * kTokens, encoder.output_size()});
  for (int f = 0; f < frames; f += batch) {
    const int end = std::min(frames, f + batch);
    const auto names = NumberedFrames(end - f);
    const VisualTokens part =
        encoder.Encode(ctx, pixels.view().Slice(f, end), names, {.reuse = reuse});
    std::copy_n(part.features.data<float>(), part.features.shape().NumElements(),
                all.features.data<float>() + f * kTokens * encoder.output_size());
  }
  return all;
}

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

class StcCacherFamiliesTest : public ::testing::TestWithParam<TinyTower> {};

TEST_P(StcCacherFamiliesTest, EqualsTheFourTensorFormInDoublePrecision) {
  const TinyTower& tiny = GetParam();
  const auto encoder = tiny.Load(DType::kF32);
  const Tensor pixels = RestlessFilm(5, 11);
  for (const bool shared : {false, true}) {
    for (const int interval : {2, 3}) {
      for (const double ratio : {0.05, 0.4}) {
        StcCacher cacher({.interval = interval,
                          .ratio = ratio,
                          .shared_selection = shared,
                          .refresh_below = -1});
        const VisualTokens got = Encode(*encoder, pixels, &cacher, 4);
        DoubleTower tower(tiny, interval, ratio, shared);
        for (int f = 0; f < 5; ++f) {
          const Tensor want = tiny.Tokens(tower.Run(pixels, f));
          // f32 sums of some hundred products through three layers.
          EXPECT_LE(
              RelativeDifference(got.features.view().Slice(f * kTokens, (f + 1) * kTokens), want),
              1e-5)
              << "frame " << f << " interval " << interval << " ratio " << ratio << " shared "
              << shared;
        }
      }
    }
  }
}

TEST_P(StcCacherFamiliesTest, ComputingEveryPatchAfreshIsTheDenseTower) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const auto encoder = GetParam().Load(dtype);
    const Tensor pixels = Film(6, 1, 8, GetParam());
    const VisualTokens dense = Encode(*encoder, pixels, nullptr);
    StcCacher cacher({.interval = 3, .ratio = 1, .refresh_below = -1});
    const VisualTokens cached = Encode(*encoder, pixels, &cacher);
    // The same products on other numbers of rows; in bf16 a sum may round the other way (2^-9).
    for (int f = 0; f < 6; ++f) {
      EXPECT_LE(Distance(cached.features, dense.features, f), dtype == DType::kF32 ? 1e-5 : 1e-2);
    }
    EXPECT_EQ(cacher.counts().patches, 6 * GetParam().layers * GetParam().patches() * 4 / 6);
    EXPECT_EQ(cacher.counts().fresh, cacher.counts().patches);
    EXPECT_EQ(cacher.counts().whole, 2);
  }
}

TEST_P(StcCacherFamiliesTest, TracesTheOperationsOfItsProducts) {
  const auto encoder = GetParam().Load(DType::kF32);
  StcCacher cacher({.interval = 3, .ratio = 0.3});
  ExecContext ctx({.num_threads = 1});
  encoder->Encode(ctx, RestlessFilm(5, 2), NumberedFrames(5), {.reuse = &cacher});
  double parts = 0;
  for (const char* stage :
       {"patch_embedding", "keys", "qkv", "attention", "out", "mlp", "projector"}) {
    parts += ctx.tracer().stages().at(std::string("encode/") + stage).flops;
  }
  EXPECT_NEAR(parts / ctx.tracer().stages().at("encode").flops, 1, 1e-9);
}

INSTANTIATE_TEST_SUITE_P(Families, StcCacherFamiliesTest, ::testing::Values(kTinySiglip, kTinyClip),
                         [](const auto& info) { return info.param.name; });

class StcCacherTypesTest : public ::testing::TestWithParam<DType> {};

TEST_P(StcCacherTypesTest, AFrameThatEqualsItsReferenceHasItsFeaturesAtEveryRatio) {
  const auto encoder = kTinySiglip.Load(GetParam());
  const Tensor pixels = Film(4, 2, 0);
  const VisualTokens dense = Encode(*encoder, pixels, nullptr);
  for (const double ratio : {0.01, 0.3, 0.9}) {
    StcCacher cacher({.interval = 4, .ratio = ratio});
    const VisualTokens cached = Encode(*encoder, pixels, &cacher);
    // What is kept is rounded to the compute dtype once a layer.
    for (int f = 0; f < 4; ++f) {
      EXPECT_LE(Distance(cached.features, dense.features, f),
                GetParam() == DType::kF32 ? 1e-5 : 1e-2);
    }
    EXPECT_EQ(cacher.counts().refreshes, 0);
  }
}

TEST_P(StcCacherTypesTest, HowFramesAreBatchedMakesNoDifference) {
  const auto encoder = kTinySiglip.Load(GetParam());
  const Tensor pixels = RestlessFilm(9, 3);
  StcCacher together({.interval = 4, .ratio = 0.3});
  const VisualTokens want = Encode(*encoder, pixels, &together);
  for (const int batch : {1, 2, 5}) {
    StcCacher apart({.interval = 4, .ratio = 0.3});
    const VisualTokens got = Encode(*encoder, pixels, &apart, batch);
    for (int f = 0; f < 9; ++f) {
      EXPECT_LE(Distance(got.features, want.features, f), GetParam() == DType::kF32 ? 1e-5 : 2e-2)
          << "frame " << f << " in batches of " << batch;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Types, StcCacherTypesTest, ::testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& info) { return Name(info.param); });

TEST(StcCacherTest, ErrorsFallAsMorePatchesAreComputed) {
  const auto encoder = kTinySiglip.Load(DType::kF32);
  const Tensor pixels = Film(2, 4, 9);
  const VisualTokens dense = Encode(*encoder, pixels, nullptr);
  double last = 1e9;
  for (const double ratio : {0.04, 0.2, 0.4, 1.0}) {
    StcCacher cacher({.interval = 2, .ratio = ratio, .refresh_below = -1});
    const double error = Distance(Encode(*encoder, pixels, &cacher).features, dense.features, 1);
    EXPECT_LT(error, last) << ratio;
    last = error;
  }
}

TEST(StcCacherTest, ACutIsComputedWholeOutOfTurn) {
  const auto encoder = kTinySiglip.Load(DType::kF32);
  Tensor pixels = Film(6, 5, 1);
  const Tensor other = Film(6, 500, 1);
  constexpr int64_t kFrame = 3 * kSide * kSide;
  std::copy_n(other.data<float>(), 3 * kFrame, pixels.data<float>() + 3 * kFrame);
  const VisualTokens dense = Encode(*encoder, pixels, nullptr);
  StcCacher cacher({.interval = 100, .ratio = 0.2});
  const VisualTokens cached = Encode(*encoder, pixels, &cacher, 2);
  EXPECT_EQ(cacher.counts().whole, 2);
  EXPECT_EQ(cacher.counts().refreshes, 1);
  EXPECT_LE(Distance(cached.features, dense.features, 3), 1e-5);
}

// What all keys of a tower have in common says nothing of the picture.
TEST(StcCacherTest, ACutShowsHoweverMuchKeysHaveInCommon) {
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

TEST(StcCacherTest, InterleavedStreamsAreEachAsIfAlone) {
  const auto encoder = kTinySiglip.Load(DType::kF32);
  const Tensor a = RestlessFilm(5, 6), b = RestlessFilm(5, 7);
  StcCacher alone_a({}), alone_b({}), mixed_a({}), mixed_b({});
  const VisualTokens want_a = Encode(*encoder, a, &alone_a, 1);
  const VisualTokens want_b = Encode(*encoder, b, &alone_b, 1);
  ExecContext ctx({.num_threads = 2});
  const auto name = NumberedFrames(1);
  for (int f = 0; f < 5; ++f) {
    for (const auto& [film, cacher, want] :
         {std::tuple(&a, &mixed_a, &want_a), std::tuple(&b, &mixed_b, &want_b)}) {
      const VisualTokens one =
          encoder->Encode(ctx, film->view().Slice(f, f + 1), name, {.reuse = cacher});
      EXPECT_TRUE(std::equal(one.features.data<float>(),
                             one.features.data<float>() + kTokens * kTinySiglip.out,
                             want->features.data<float>() + f * kTokens * kTinySiglip.out));
    }
  }
}

TEST(StcCacherTest, ResetComputesTheNextFrameWholeAndMemoryStaysFlat) {
  const auto encoder = kTinySiglip.Load(DType::kBF16);
  StcCacher cacher({.interval = 50, .ratio = 0.2, .refresh_below = -1});
  Encode(*encoder, Film(3, 8), &cacher);
  const int64_t bytes = cacher.SizeBytes();
  EXPECT_EQ(bytes,
            kTinySiglip.layers * 3 * kTinySiglip.patches() * kTinySiglip.width *
                2);  // keys, values, update in bf16
  Encode(*encoder, Film(40, 9), &cacher, 7);
  EXPECT_EQ(cacher.SizeBytes(), bytes);
  EXPECT_EQ(cacher.counts().whole, 1);
  cacher.Reset();
  EXPECT_EQ(cacher.SizeBytes(), 0);
  Encode(*encoder, Film(1, 10), &cacher);
  EXPECT_EQ(cacher.counts().whole, 2);
}

TEST(StcCacherTest, SettingsOutOfRangeAreRefused) {
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
