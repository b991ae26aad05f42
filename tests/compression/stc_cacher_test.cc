#include "compression/stc_cacher.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>
#include <numeric>
#include <random>
#include <string>

#include "runtime/error.h"
#include "tests/support/tensor_testing.h"
#include "vision/families/siglip.h"
#include "vision/pooling.h"

namespace sluice {
namespace {

using ::sluice::testing::At;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

constexpr int kSide = 74, kPatch = 14, kGrid = 5, kPatches = 25, kWidth = 72, kHeads = 3;
constexpr int kInner = 112, kLayers = 3, kOut = 64, kTokens = 9;

const Checkpoint& TinyFiles() {
  static const Checkpoint checkpoint =
      Checkpoint::Open(std::filesystem::path(SLUICE_SOURCE_DIR) / "tests/golden/tiny_tied");
  return checkpoint;
}

std::unique_ptr<VisionEncoder> LoadTiny(DType dtype) {
  WeightStore weights(
      TinyFiles(), [](const std::string& name) { return std::optional(name); }, dtype);
  SiglipConfig config;
  config.hidden_size = kWidth;
  config.intermediate_size = kInner;
  config.num_heads = kHeads;
  config.layers_to_run = kLayers;
  config.image_size = kSide;
  config.patch_size = kPatch;
  config.output_size = kOut;
  config.preprocess.width = config.preprocess.height = kSide;
  return LoadSiglipEncoder(weights, config);
}

// Frames that resemble each other: noise of which each frame renews some patches.
Tensor Film(int frames, uint32_t seed, int renewed = 3) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  Tensor pixels(DType::kF32, {frames, 3, kSide, kSide});
  constexpr int64_t kFrame = 3 * kSide * kSide;
  float* out = pixels.data<float>();
  for (int64_t i = 0; i < kFrame; ++i) out[i] = uniform(random);
  for (int f = 1; f < frames; ++f) {
    std::copy_n(out + (f - 1) * kFrame, kFrame, out + f * kFrame);
    for (int n = 0; n < renewed; ++n) {
      const int patch = static_cast<int>(random() % kPatches);
      for (int c = 0; c < 3; ++c) {
        for (int y = 0; y < kPatch; ++y) {
          for (int x = 0; x < kPatch; ++x) {
            out[f * kFrame + (c * kSide + patch / kGrid * kPatch + y) * kSide +
                patch % kGrid * kPatch + x] = uniform(random);
          }
        }
      }
    }
  }
  return pixels;
}

std::vector<FramePtr> Frames(int count) {
  std::vector<FramePtr> frames;
  for (int i = 0; i < count; ++i) {
    auto frame = std::make_shared<Frame>();
    frame->index = i;
    frames.push_back(frame);
  }
  return frames;
}

VisualTokens Encode(const VisionEncoder& encoder, const Tensor& pixels, FeatureReuse* reuse,
                    int batch = 100) {
  ExecContext ctx({.num_threads = 2});
  const int frames = static_cast<int>(pixels.dim(0));
  VisualTokens all;
  all.features = Tensor(DType::kF32, {frames * kTokens, kOut});
  for (int f = 0; f < frames; f += batch) {
    const int end = std::min(frames, f + batch);
    const auto names = Frames(end - f);
    const VisualTokens part =
        encoder.Encode(ctx, pixels.view().Slice(f, end), names, {.reuse = reuse});
    std::copy_n(part.features.data<float>(), part.features.shape().NumElements(),
                all.features.data<float>() + f * kTokens * kOut);
  }
  return all;
}

double Distance(const Tensor& got, const Tensor& want, int frame) {
  double error = 0, norm = 0;
  for (int64_t i = int64_t{frame} * kTokens * kOut; i < int64_t{frame + 1} * kTokens * kOut; ++i) {
    error += std::pow(double{got.data<float>()[i]} - want.data<float>()[i], 2);
    norm += std::pow(double{want.data<float>()[i]}, 2);
  }
  return std::sqrt(error / norm);
}

// ---- The tower and the method once more, in double precision and as the paper writes them: with
// the four tensors K, V, A (after the output projection) and M of the reference, one patch after
// another.

using Rows = std::vector<std::vector<double>>;

class DoubleTower {
 public:
  DoubleTower(int interval, double ratio, bool shared)
      : interval_(interval),
        fresh_(std::clamp(int(kPatches * ratio), 1, kPatches)),
        shared_(shared) {}

  // Hidden states of the next frame after the last layer.
  Rows Run(const Tensor& pixels, int frame) {
    Rows h = Embed(pixels, frame);
    const bool whole = next_++ % interval_ == 0;
    std::vector<int> chosen;
    for (int l = 0; l < kLayers; ++l) {
      const std::string name = "vision_tower.encoder.layers." + std::to_string(l) + ".";
      Kept& kept = kept_[l];
      const Rows n = Norm(h, name + "layer_norm1");
      const Rows k = Project(n, name + "self_attn.k_proj");
      if (whole) {
        chosen.resize(kPatches);
        std::iota(chosen.begin(), chosen.end(), 0);
      } else if (l == 0 || !shared_) {
        chosen = LeastAlike(k, kept.k);
      }
      Rows v = whole ? Rows(kPatches) : kept.v, a = whole ? Rows(kPatches) : kept.a;
      for (int t : chosen) v[t] = Project({n[t]}, name + "self_attn.v_proj")[0];
      for (int t : chosen) {
        const std::vector<double> q = Project({n[t]}, name + "self_attn.q_proj")[0];
        a[t] = Project({Mix(q, k, v)}, name + "self_attn.out_proj")[0];
      }
      for (int t = 0; t < kPatches; ++t) Plus(h[t], a[t]);
      Rows m = whole ? Rows(kPatches) : kept.m;
      for (int t : chosen) {
        Rows inner = Project(Norm({h[t]}, name + "layer_norm2"), name + "mlp.fc1");
        for (double& x : inner[0]) {
          x = 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
        }
        m[t] = Project(inner, name + "mlp.fc2")[0];
      }
      for (int t = 0; t < kPatches; ++t) Plus(h[t], m[t]);
      if (whole) kept = {k, v, a, m};
    }
    return h;
  }

  static Tensor Tokens(const Rows& h) {
    Rows middle = Project(h, "multi_modal_projector.linear_1");
    for (auto& row : middle) {
      for (double& x : row) x = 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    }
    const Rows projected = Project(middle, "multi_modal_projector.linear_2");
    Tensor flat(DType::kF32, {kPatches, kOut}), pooled(DType::kF32, {kTokens, kOut});
    for (int t = 0; t < kPatches; ++t) {
      for (int d = 0; d < kOut; ++d) flat.data<float>()[t * kOut + d] = projected[t][d];
    }
    ExecContext ctx({});
    BilinearPool(kGrid, kGrid, 3, 3).Run(ctx, flat, pooled);
    return pooled;
  }

 private:
  struct Kept {
    Rows k, v, a, m;
  };
  static ConstTensorView Weight(const std::string& name) {
    return TinyFiles().tensors().at(name).view;
  }
  static void Plus(std::vector<double>& x, const std::vector<double>& y) {
    for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
  }
  static Rows Project(const Rows& x, const std::string& name) {
    const ConstTensorView w = Weight(name + ".weight"), b = Weight(name + ".bias");
    Rows y(x.size(), std::vector<double>(w.dim(0)));
    for (size_t i = 0; i < x.size(); ++i) {
      for (int64_t n = 0; n < w.dim(0); ++n) {
        y[i][n] = At(b, 0, n);
        for (size_t d = 0; d < x[i].size(); ++d) y[i][n] += x[i][d] * At(w, n, d);
      }
    }
    return y;
  }
  static Rows Norm(const Rows& x, const std::string& name) {
    const ConstTensorView w = Weight(name + ".weight"), b = Weight(name + ".bias");
    Rows y = x;
    for (auto& row : y) {
      double mean = 0, variance = 0;
      for (double v : row) mean += v / kWidth;
      for (double v : row) variance += (v - mean) * (v - mean) / kWidth;
      for (int d = 0; d < kWidth; ++d) {
        row[d] = (row[d] - mean) / std::sqrt(variance + 1e-6) * At(w, 0, d) + At(b, 0, d);
      }
    }
    return y;
  }
  static Rows Embed(const Tensor& pixels, int frame) {
    const std::string name = "vision_tower.embeddings.";
    const ConstTensorView w = Weight(name + "patch_embedding.weight");
    const ConstTensorView b = Weight(name + "patch_embedding.bias");
    const ConstTensorView p = Weight(name + "position_embedding.weight");
    Rows h(kPatches, std::vector<double>(kWidth));
    // [E, 3, 14, 14] read as [E, 588].
    const ConstTensorView flat(w.raw(), w.dtype(), {kWidth, 3 * kPatch * kPatch},
                               3 * kPatch * kPatch);
    for (int t = 0; t < kPatches; ++t) {
      for (int e = 0; e < kWidth; ++e) {
        double sum = At(b, 0, e) + At(p, t, e);
        for (int i = 0; i < 3 * kPatch * kPatch; ++i) {
          const int c = i / (kPatch * kPatch), y = i / kPatch % kPatch, x = i % kPatch;
          sum += At(flat, e, i) *
                 pixels.data<float>()[((int64_t{frame} * 3 + c) * kSide + t / kGrid * kPatch + y) *
                                          kSide +
                                      t % kGrid * kPatch + x];
        }
        h[t][e] = sum;
      }
    }
    return h;
  }
  static std::vector<double> Mix(const std::vector<double>& q, const Rows& k, const Rows& v) {
    constexpr int kHead = kWidth / kHeads;
    std::vector<double> out(kWidth);
    for (int first = 0; first < kWidth; first += kHead) {
      std::vector<double> p(kPatches);
      double sum = 0;
      for (int t = 0; t < kPatches; ++t) {
        double dot = 0;
        for (int d = first; d < first + kHead; ++d) dot += q[d] * k[t][d];
        sum += p[t] = std::exp(dot / std::sqrt(double(kHead)));
      }
      for (int t = 0; t < kPatches; ++t) {
        for (int d = first; d < first + kHead; ++d) out[d] += p[t] / sum * v[t][d];
      }
    }
    return out;
  }
  std::vector<int> LeastAlike(const Rows& k, const Rows& reference) const {
    std::vector<double> cosine(kPatches);
    for (int t = 0; t < kPatches; ++t) {
      double ab = 0, aa = 0, bb = 0;
      for (int d = 0; d < kWidth; ++d) {
        ab += k[t][d] * reference[t][d];
        aa += k[t][d] * k[t][d];
        bb += reference[t][d] * reference[t][d];
      }
      cosine[t] = ab / std::max(std::sqrt(aa * bb), 1e-8);
      // Patches that did not change are alike up to rounding; then the lower index goes first.
      if (cosine[t] > 1 - 1e-7) cosine[t] = 1;
    }
    std::vector<int> order(kPatches);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return cosine[a] < cosine[b]; });
    order.resize(fresh_);
    std::sort(order.begin(), order.end());
    return order;
  }

  const int interval_, fresh_;
  const bool shared_;
  int next_ = 0;
  Kept kept_[kLayers];
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

TEST(StcCacherTest, EqualsTheFourTensorFormInDoublePrecision) {
  const auto encoder = LoadTiny(DType::kF32);
  const Tensor pixels = RestlessFilm(5, 11);
  for (const bool shared : {false, true}) {
    for (const int interval : {2, 3}) {
      for (const double ratio : {0.05, 0.4}) {
        StcCacher cacher({.interval = interval,
                          .ratio = ratio,
                          .shared_selection = shared,
                          .refresh_below = -1});
        const VisualTokens got = Encode(*encoder, pixels, &cacher, 4);
        DoubleTower tower(interval, ratio, shared);
        for (int f = 0; f < 5; ++f) {
          const Tensor want = DoubleTower::Tokens(tower.Run(pixels, f));
          double error = 0, norm = 0;
          for (int i = 0; i < kTokens * kOut; ++i) {
            error += std::pow(
                double{got.features.data<float>()[f * kTokens * kOut + i]} - want.data<float>()[i],
                2);
            norm += std::pow(double{want.data<float>()[i]}, 2);
          }
          // f32 sums of some hundred products through three layers.
          EXPECT_LE(std::sqrt(error / norm), 1e-5) << "frame " << f << " interval " << interval
                                                   << " ratio " << ratio << " shared " << shared;
        }
      }
    }
  }
}

class StcCacherTypesTest : public ::testing::TestWithParam<DType> {};

TEST_P(StcCacherTypesTest, ComputingEveryPatchAfreshIsTheDenseTower) {
  const auto encoder = LoadTiny(GetParam());
  const Tensor pixels = Film(6, 1, 8);
  const VisualTokens dense = Encode(*encoder, pixels, nullptr);
  StcCacher cacher({.interval = 3, .ratio = 1, .refresh_below = -1});
  const VisualTokens cached = Encode(*encoder, pixels, &cacher);
  // The same products on other numbers of rows; in bf16 a sum may round the other way (2^-9).
  for (int f = 0; f < 6; ++f) {
    EXPECT_LE(Distance(cached.features, dense.features, f),
              GetParam() == DType::kF32 ? 1e-5 : 1e-2);
  }
  EXPECT_EQ(cacher.counts().fresh, cacher.counts().patches);
  EXPECT_EQ(cacher.counts().whole, 2);
}

TEST_P(StcCacherTypesTest, AFrameThatEqualsItsReferenceHasItsFeaturesAtEveryRatio) {
  const auto encoder = LoadTiny(GetParam());
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
  const auto encoder = LoadTiny(GetParam());
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
  const auto encoder = LoadTiny(DType::kF32);
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
  const auto encoder = LoadTiny(DType::kF32);
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
        const bool is_whole = cacher.ChooseWhole(ctx, 1, 1, [&] { return narrow.view(); })[0];
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
  const auto encoder = LoadTiny(DType::kF32);
  const Tensor a = RestlessFilm(5, 6), b = RestlessFilm(5, 7);
  StcCacher alone_a({}), alone_b({}), mixed_a({}), mixed_b({});
  const VisualTokens want_a = Encode(*encoder, a, &alone_a, 1);
  const VisualTokens want_b = Encode(*encoder, b, &alone_b, 1);
  ExecContext ctx({.num_threads = 2});
  const auto name = Frames(1);
  for (int f = 0; f < 5; ++f) {
    for (const auto& [film, cacher, want] :
         {std::tuple(&a, &mixed_a, &want_a), std::tuple(&b, &mixed_b, &want_b)}) {
      const VisualTokens one =
          encoder->Encode(ctx, film->view().Slice(f, f + 1), name, {.reuse = cacher});
      EXPECT_TRUE(std::equal(one.features.data<float>(),
                             one.features.data<float>() + kTokens * kOut,
                             want->features.data<float>() + f * kTokens * kOut));
    }
  }
}

TEST(StcCacherTest, ResetComputesTheNextFrameWholeAndMemoryStaysFlat) {
  const auto encoder = LoadTiny(DType::kBF16);
  StcCacher cacher({.interval = 50, .ratio = 0.2, .refresh_below = -1});
  Encode(*encoder, Film(3, 8), &cacher);
  const int64_t bytes = cacher.SizeBytes();
  EXPECT_EQ(bytes, kLayers * 3 * kPatches * kWidth * 2);  // keys, values, update in bf16
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
