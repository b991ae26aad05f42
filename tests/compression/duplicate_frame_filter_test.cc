#include "compression/duplicate_frame_filter.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "runtime/error.h"

namespace sluice {
namespace {

// Noise of a few levels around a picture, as a camera adds it.
Frame Noisy(uint32_t seed, int width, int height, int level, int noise) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> wobble(-noise, noise);
  Frame frame;
  frame.width = width;
  frame.height = height;
  frame.rgb.resize(size_t{3} * width * height);
  for (size_t i = 0; i < frame.rgb.size(); ++i) {
    frame.rgb[i] =
        static_cast<uint8_t>(level + static_cast<int>(i / 3) % width * 40 / width + wobble(random));
  }
  return frame;
}

TEST(DuplicateFrameFilterTest, TheFirstFramePassesAndItsCopiesDoNot) {
  for (const double threshold : {0.0, 4.0, 254.0}) {
    DuplicateFrameFilter filter(threshold);
    const Frame frame = Noisy(1, 100, 70, 90, 20);
    EXPECT_TRUE(filter.Passes(frame));
    for (int i = 0; i < 3; ++i) EXPECT_FALSE(filter.Passes(frame));
    EXPECT_EQ(filter.duplicates(), 3);
  }
}

TEST(DuplicateFrameFilterTest, NoiseOfACameraIsNothingNew) {
  DuplicateFrameFilter filter(4);
  EXPECT_TRUE(filter.Passes(Noisy(1, 640, 360, 90, 8)));
  for (uint32_t i = 2; i < 12; ++i) EXPECT_FALSE(filter.Passes(Noisy(i, 640, 360, 90, 8))) << i;
}

TEST(DuplicateFrameFilterTest, ASmallThingThatAppearsIsNew) {
  DuplicateFrameFilter filter(4);
  Frame frame = Noisy(1, 640, 360, 90, 4);
  EXPECT_TRUE(filter.Passes(frame));
  for (int y = 200; y < 212; ++y) {
    for (int x = 400; x < 412; ++x) frame.rgb[3 * (y * 640 + x)] = 250;
  }
  EXPECT_TRUE(filter.Passes(frame));
  EXPECT_FALSE(filter.Passes(frame));
}

TEST(DuplicateFrameFilterTest, SlowDriftAddsUpUntilAFramePasses) {
  DuplicateFrameFilter filter(4);
  int passed = 0;
  for (int level = 60; level < 120; ++level) passed += filter.Passes(Noisy(1, 64, 64, level, 0));
  EXPECT_EQ(passed, 12);  // every fifth: 5 levels are more than 4
}

TEST(DuplicateFrameFilterTest, AFrameOfAnotherSizeIsNew) {
  DuplicateFrameFilter filter(254);
  EXPECT_TRUE(filter.Passes(Noisy(1, 64, 48, 90, 0)));
  EXPECT_TRUE(filter.Passes(Noisy(1, 48, 64, 90, 0)));
  EXPECT_TRUE(filter.Passes(Noisy(1, 1, 1, 90, 0)));
  EXPECT_FALSE(filter.Passes(Noisy(1, 1, 1, 91, 0)));
}

TEST(DuplicateFrameFilterTest, MemoryIsThatOfOneThumbnail) {
  DuplicateFrameFilter filter(0);
  filter.Passes(Noisy(1, 640, 360, 90, 8));
  EXPECT_EQ(filter.SizeBytes(), 32 * 32 * 3 * 4);
}

TEST(DuplicateFrameFilterTest, PicturesThatDoNotFitTheirSizeAreRefused) {
  DuplicateFrameFilter filter(0);
  Frame frame = Noisy(1, 8, 8, 90, 0);
  frame.rgb.pop_back();
  EXPECT_THROW(filter.Passes(frame), InputError);
  EXPECT_THROW(filter.Passes(Frame()), InputError);
}

TEST(DuplicateFrameFilterTest, ThresholdsOutOfRangeAreRefused) {
  for (const double threshold : {-1.0, 255.0, std::nan("")}) {
    EXPECT_THROW(DuplicateFrameFilter filter(threshold), InputError) << threshold;
  }
}

}  // namespace
}  // namespace sluice
