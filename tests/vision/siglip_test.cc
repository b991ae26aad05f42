#include "vision/families/siglip.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "tests/support/tiny_towers.h"

namespace sluice {
namespace {

using ::sluice::testing::kTinySiglip;
using ::sluice::testing::NumberedFrames;
using ::sluice::testing::RandomPixels;
using ::sluice::testing::RelativeDifference;
using ::sluice::testing::TinyTower;

std::unique_ptr<VisionEncoder> LoadTiny(DType dtype, int layers_to_run = kTinySiglip.layers) {
  TinyTower tiny = kTinySiglip;
  tiny.layers = layers_to_run;
  return tiny.Load(dtype);
}

class SiglipTest : public ::testing::TestWithParam<DType> {};

TEST_P(SiglipTest, FramesEncodedOneByOneEqualTheBatch) {
  const auto encoder = LoadTiny(GetParam());
  ExecContext ctx({.num_threads = 2});
  constexpr int kFrames = 5;
  const Tensor pixels = RandomPixels(kFrames, 1);
  const std::vector<FramePtr> frames = NumberedFrames(kFrames);
  const VisualTokens all = encoder->Encode(ctx, pixels, frames);
  ASSERT_EQ(all.size(), kFrames * 9);
  // Products of another number of rows may sum in another order: 1e-5 in f32; in bf16 a sum that
  // rounds the other way is one unit in the last place (2^-9) of single values.
  const double bound = GetParam() == DType::kF32 ? 1e-5 : 1e-2;
  for (int f = 0; f < kFrames; ++f) {
    const VisualTokens one = encoder->Encode(ctx, pixels.view().Slice(f, f + 1), {&frames[f], 1});
    EXPECT_LE(RelativeDifference(one.features, all.features.view().Slice(9 * f, 9 * f + 9)), bound)
        << "frame " << f;
  }
}

TEST_P(SiglipTest, ReferenceKernelsAgreeWithFastOnes) {
  const auto encoder = LoadTiny(GetParam());
  ExecContext fast({.num_threads = 2});
  ExecContext reference({.num_threads = 1, .kernels = KernelChoice::kReference});
  const Tensor pixels = RandomPixels(2, 2);
  const std::vector<FramePtr> frames = NumberedFrames(2);
  EXPECT_LE(RelativeDifference(encoder->Encode(fast, pixels, frames).features,
                               encoder->Encode(reference, pixels, frames).features),
            GetParam() == DType::kF32 ? 1e-5 : 1e-2);
}

TEST_P(SiglipTest, EarlierFeatureLayersStopThere) {
  ExecContext ctx({.num_threads = 2});
  const Tensor pixels = RandomPixels(2, 3);
  const std::vector<FramePtr> frames = NumberedFrames(2);
  std::map<std::string, Tensor> seen;
  LoadTiny(GetParam())
      ->Encode(ctx, pixels, frames, {.probe = [&](std::string_view name, ConstTensorView value) {
                 seen[std::string(name)] = ConvertTo(value, DType::kF32);
               }});
  for (const auto& [layers, name] : {std::pair{0, "embeddings"}, {2, "layer.1"}, {3, "layer.2"}}) {
    LoadTiny(GetParam(), layers)
        ->Encode(ctx, pixels, frames,
                 {.probe = [&, name = name](std::string_view got, ConstTensorView value) {
                   if (got != "tower") return;
                   EXPECT_EQ(RelativeDifference(value, seen[name]), 0) << name;
                 }});
  }
}

INSTANTIATE_TEST_SUITE_P(Types, SiglipTest, ::testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& info) { return Name(info.param); });

TEST(SiglipEncoderTest, TokensKnowTheirFramePlaceAndTime) {
  const auto encoder = LoadTiny(DType::kF32);
  ExecContext ctx({.num_threads = 1});
  EXPECT_EQ(encoder->patches_per_frame(), 25);
  EXPECT_EQ(encoder->tokens_per_frame(), 9);
  const VisualTokens tokens = encoder->Encode(ctx, RandomPixels(2, 4), NumberedFrames(2));
  EXPECT_EQ(tokens.grid_rows, 3);
  EXPECT_EQ(tokens.grid_cols, 3);
  const TokenOrigin& origin = tokens.origins[9 + 5];
  EXPECT_EQ(origin.frame, 11);
  EXPECT_EQ(origin.row, 1);
  EXPECT_EQ(origin.col, 2);
  EXPECT_EQ(origin.time, MediaTime::FromSeconds(0.5));
}

TEST(SiglipEncoderTest, PixelsBehindTheLastWholePatchAreNotRead) {
  const auto encoder = LoadTiny(DType::kF32);
  ExecContext ctx({.num_threads = 1});
  Tensor pixels = RandomPixels(1, 5);
  const VisualTokens before = encoder->Encode(ctx, pixels, NumberedFrames(1));
  for (int64_t plane = 0; plane < 3; ++plane) {
    for (int64_t i = 0; i < 74; ++i) {
      pixels.data<float>()[(plane * 74 + 70) * 74 + i] = NAN;
      pixels.data<float>()[(plane * 74 + i) * 74 + 70] = NAN;
    }
  }
  EXPECT_EQ(
      RelativeDifference(encoder->Encode(ctx, pixels, NumberedFrames(1)).features, before.features),
      0);
}

TEST(SiglipEncoderTest, PixelsOfAnotherSizeAreRefused) {
  const auto encoder = LoadTiny(DType::kF32);
  ExecContext ctx({.num_threads = 1});
  EXPECT_THROW(encoder->Encode(ctx, Tensor(DType::kF32, {1, 3, 70, 74}), NumberedFrames(1)), Error);
  EXPECT_THROW(encoder->Encode(ctx, RandomPixels(1, 6), NumberedFrames(2)), Error);
}

TEST(SiglipEncoderTest, TracesTheWorkItsFlopsPromise) {
  const auto encoder = LoadTiny(DType::kF32);
  ExecContext ctx({.num_threads = 1});
  encoder->Encode(ctx, RandomPixels(3, 7), NumberedFrames(3));
  double flops = 0;
  for (const char* stage : {"patch_embedding", "qkv", "attention", "out", "mlp", "projector"}) {
    flops += ctx.tracer().stages().at(std::string("encode/") + stage).flops;
  }
  EXPECT_DOUBLE_EQ(flops, 3 * encoder->FlopsPerFrame());
}

}  // namespace
}  // namespace sluice
