#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <random>

#include "runtime/error.h"
#include "vision/preprocess.h"

namespace sluice {
namespace {

TEST(ResizeForTowerTest, PreprocessingItsPictureGivesTheSameBits) {
  const PreprocessConfig configs[] = {{.width = 48, .height = 32},
                                      {.width = 32, .height = 32, .fit = PictureFit::kCenterCrop}};
  constexpr int kSizes[][2] = {{100, 75}, {48, 32}, {32, 32}, {7, 300}, {300, 7}, {20, 20}};
  ExecContext ctx{ExecOptions()};
  for (const PreprocessConfig& config : configs) {
    for (const auto& [width, height] : kSizes) {
      auto frame = std::make_shared<Frame>();
      frame->width = width;
      frame->height = height;
      frame->index = 3;
      std::mt19937 random(width);
      for (int i = 0; i < 3 * width * height; ++i) frame->rgb.push_back(random() >> 24);
      const auto resized = std::make_shared<const Frame>(ResizeForTower(ctx, *frame, config));
      EXPECT_EQ(resized->width, config.width);
      EXPECT_EQ(resized->height, config.height);
      EXPECT_EQ(resized->index, 3);
      Tensor direct(DType::kF32, {1, 3, config.height, config.width});
      Tensor in_two(DType::kF32, {1, 3, config.height, config.width});
      Preprocess(ctx, std::vector<FramePtr>{frame}, config, direct);
      Preprocess(ctx, std::vector<FramePtr>{resized}, config, in_two);
      EXPECT_EQ(std::memcmp(direct.view().raw(), in_two.view().raw(), direct.SizeBytes()), 0)
          << width << "x" << height;
    }
  }
}

TEST(ResizeForTowerTest, RefusesSidesWhoseResizingWouldTakeSeconds) {
  ExecContext ctx{ExecOptions()};
  Frame thin;
  thin.width = 1;
  thin.height = 1'000'000;
  thin.rgb.resize(3'000'000);
  EXPECT_THROW(ResizeForTower(ctx, thin, {}), InputError);
}

}  // namespace
}  // namespace sluice
