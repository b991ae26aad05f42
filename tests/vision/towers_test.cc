// What every vision tower promises, on the tiny ones.
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "runtime/error.h"
#include "tests/support/tiny_towers.h"

namespace sluice {
namespace {

using ::sluice::testing::kTinyClip;
using ::sluice::testing::kTinySide;
using ::sluice::testing::kTinySiglip;
using ::sluice::testing::kTinyTokens;
using ::sluice::testing::NumberedFrames;
using ::sluice::testing::RandomPixels;
using ::sluice::testing::RelativeDifference;
using ::sluice::testing::TinyTower;

class TowerTypesTest : public ::testing::TestWithParam<std::tuple<TinyTower, DType>> {
 protected:
  const TinyTower& tiny() const { return std::get<TinyTower>(GetParam()); }
  DType dtype() const { return std::get<DType>(GetParam()); }
};

TEST_P(TowerTypesTest, FramesEncodedOneByOneEqualTheBatch) {
  const auto encoder = tiny().Load(dtype());
  ExecContext ctx({.num_threads = 2});
  constexpr int kFrames = 5;
  const Tensor pixels = RandomPixels(kFrames, 1);
  const std::vector<FramePtr> frames = NumberedFrames(kFrames);
  const VisualTokens all = encoder->Encode(ctx, pixels, frames);
  ASSERT_EQ(all.size(), kFrames * kTinyTokens);
  // Products of another number of rows may sum in another order: 1e-5 in f32; in bf16 a sum that
  // rounds the other way is one unit in the last place (2^-9) of single values.
  const double bound = dtype() == DType::kF32 ? 1e-5 : 1e-2;
  for (int f = 0; f < kFrames; ++f) {
    const VisualTokens one = encoder->Encode(ctx, pixels.view().Slice(f, f + 1), {&frames[f], 1});
    const auto of_all = all.features.view().Slice(f * kTinyTokens, (f + 1) * kTinyTokens);
    EXPECT_LE(RelativeDifference(one.features, of_all), bound) << "frame " << f;
  }
}

TEST_P(TowerTypesTest, ReferenceKernelsAgreeWithFastOnes) {
  const auto encoder = tiny().Load(dtype());
  ExecContext fast({.num_threads = 2});
  ExecContext reference({.num_threads = 1, .kernels = KernelChoice::kReference});
  const Tensor pixels = RandomPixels(2, 2);
  const std::vector<FramePtr> frames = NumberedFrames(2);
  EXPECT_LE(RelativeDifference(encoder->Encode(fast, pixels, frames).features,
                               encoder->Encode(reference, pixels, frames).features),
            dtype() == DType::kF32 ? 1e-5 : 1e-2);
}

TEST_P(TowerTypesTest, TheFeatureIsTheChosenLayersWithoutAClassToken) {
  ExecContext ctx({.num_threads = 2});
  const Tensor pixels = RandomPixels(2, 3);
  const std::vector<FramePtr> frames = NumberedFrames(2);
  const int64_t rows = tiny().rows(), patches = tiny().patches();
  std::map<std::string, Tensor> seen;  // the rows of patches
  tiny().Load(dtype())->Encode(
      ctx, pixels, frames, {.probe = [&](std::string_view name, ConstTensorView value) {
        if (value.dim(0) != 2 * rows) return;
        Tensor& kept = seen[std::string(name)] = Tensor(DType::kF32, {2 * patches, value.dim(1)});
        for (int64_t f = 0; f < 2; ++f) {
          ConvertInto(value.Slice((f + 1) * rows - patches, (f + 1) * rows),
                      kept.view().Slice(f * patches, (f + 1) * patches));
        }
      }});
  for (int layers = 0; layers <= tiny().layers; ++layers) {
    const std::string last = layers == 0 ? "embeddings" : "layer." + std::to_string(layers - 1);
    TinyTower shorter = tiny();
    shorter.layers = layers;
    int towers = 0;
    shorter.Load(dtype())->Encode(ctx, pixels, frames,
                                  {.probe = [&](std::string_view name, ConstTensorView value) {
                                    if (name != "tower") return;
                                    ++towers;
                                    EXPECT_EQ(RelativeDifference(value, seen.at(last)), 0) << last;
                                  }});
    EXPECT_EQ(towers, 1);
  }
}

INSTANTIATE_TEST_SUITE_P(Types, TowerTypesTest,
                         ::testing::Combine(::testing::Values(kTinySiglip, kTinyClip),
                                            ::testing::Values(DType::kF32, DType::kBF16)),
                         [](const auto& info) {
                           return std::get<TinyTower>(info.param).name + "_" +
                                  Name(std::get<DType>(info.param));
                         });

class TowerTest : public ::testing::TestWithParam<TinyTower> {
 protected:
  const TinyTower& tiny() const { return GetParam(); }
  const std::unique_ptr<VisionEncoder> encoder_ = GetParam().Load(DType::kF32);
  ExecContext ctx_{ExecOptions{.num_threads = 1}};
};

TEST_P(TowerTest, TokensKnowTheirFramePlaceAndTime) {
  EXPECT_EQ(encoder_->patches_per_frame(), tiny().patches());
  EXPECT_EQ(encoder_->tokens_per_frame(), kTinyTokens);
  const VisualTokens tokens = encoder_->Encode(ctx_, RandomPixels(2, 4), NumberedFrames(2));
  EXPECT_EQ(tokens.grid_rows, 3);
  EXPECT_EQ(tokens.grid_cols, 3);
  const TokenOrigin& origin = tokens.origins[kTinyTokens + 5];
  EXPECT_EQ(origin.frame, 11);
  EXPECT_EQ(origin.row, 1);
  EXPECT_EQ(origin.col, 2);
  EXPECT_EQ(origin.time, MediaTime::FromSeconds(0.5));
}

TEST_P(TowerTest, PixelsBehindTheLastWholePatchAreNotRead) {
  Tensor pixels = RandomPixels(1, 5);
  const VisualTokens before = encoder_->Encode(ctx_, pixels, NumberedFrames(1));
  const int64_t end = int64_t{tiny().grid} * tiny().patch;
  for (int64_t plane = 0; plane < 3; ++plane) {
    for (int64_t i = 0; i < kTinySide; ++i) {
      pixels.data<float>()[(plane * kTinySide + end) * kTinySide + i] = NAN;
      pixels.data<float>()[(plane * kTinySide + i) * kTinySide + end] = NAN;
    }
  }
  EXPECT_EQ(RelativeDifference(encoder_->Encode(ctx_, pixels, NumberedFrames(1)).features,
                               before.features),
            0);
}

TEST_P(TowerTest, PixelsOfAnotherSizeAreRefused) {
  EXPECT_THROW(encoder_->Encode(ctx_, Tensor(DType::kF32, {1, 3, 70, 74}), NumberedFrames(1)),
               Error);
  EXPECT_THROW(encoder_->Encode(ctx_, RandomPixels(1, 6), NumberedFrames(2)), Error);
}

TEST_P(TowerTest, TracesTheWorkItsFlopsPromise) {
  encoder_->Encode(ctx_, RandomPixels(3, 7), NumberedFrames(3));
  double flops = 0;
  for (const char* stage : {"patch_embedding", "qkv", "attention", "out", "mlp", "projector"}) {
    flops += ctx_.tracer().stages().at(std::string("encode/") + stage).flops;
  }
  EXPECT_DOUBLE_EQ(flops, 3 * encoder_->FlopsPerFrame());
}

INSTANTIATE_TEST_SUITE_P(Families, TowerTest, ::testing::Values(kTinySiglip, kTinyClip),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace sluice
