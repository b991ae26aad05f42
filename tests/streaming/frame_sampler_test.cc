#include "streaming/frame_sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "runtime/error.h"

namespace sluice {
namespace {

SourceOptions AtFps(double fps) {
  SourceOptions options;
  options.rate.fps = fps;
  return options;
}

SourceOptions EveryNth(int n) {
  SourceOptions options;
  options.rate.every_nth = n;
  return options;
}

// Numbers of the frames taken from those at `times`, until the sampler says end.
std::vector<int> Taken(const SourceOptions& options, const std::vector<double>& times) {
  FrameSampler sampler(options);
  std::vector<int> taken;
  for (size_t i = 0; i < times.size(); ++i) {
    const auto verdict = sampler.Decide(MediaTime::FromSeconds(times[i]));
    if (verdict == FrameSampler::Verdict::kEnd) break;
    if (verdict == FrameSampler::Verdict::kTake) taken.push_back(static_cast<int>(i));
  }
  return taken;
}

std::vector<double> Constant(double fps, int count) {
  std::vector<double> times;
  for (int i = 0; i < count; ++i) times.push_back(i / fps);
  return times;
}

TEST(FrameSamplerTest, TakesTheReferencesFramesWhereTheRatesDivide) {
  // 10 frames a second, 2 wanted, 35 frames: the reference takes int(arange(0, 35, 35 / 7)).
  EXPECT_EQ(Taken(AtFps(2), Constant(10, 35)), (std::vector<int>{0, 5, 10, 15, 20, 25, 30}));
}

TEST(FrameSamplerTest, TakesTheFrameNearestToEachTarget) {
  // Targets 0, 1/3, 2/3, 1, 4/3 among frames every 0.1 s.
  EXPECT_EQ(Taken(AtFps(3), Constant(10, 15)), (std::vector<int>{0, 3, 7, 10, 13}));
}

TEST(FrameSamplerTest, KeepsToTheClockAtBroadcastRates) {
  const auto taken = Taken(AtFps(2), Constant(30000.0 / 1001, 30 * 600));
  ASSERT_EQ(taken.size(), 1202u);  // 600.6 s: targets 0 .. 600.5
  for (size_t k = 0; k < taken.size(); ++k) {
    ASSERT_NEAR(taken[k] * 1001.0 / 30000, 0.5 * static_cast<double>(k), 0.5 * 1001 / 30000 + 1e-9)
        << "frame " << taken[k];
  }
}

TEST(FrameSamplerTest, ForgivesTimeStampsRoundedToMilliseconds) {
  std::vector<double> times;
  for (int i = 0; i < 300; ++i) times.push_back(std::floor(i * 1000.0 / 30) / 1000);
  const auto taken = Taken(AtFps(10), times);
  ASSERT_EQ(taken.size(), 100u);
  for (size_t k = 0; k < taken.size(); ++k) EXPECT_EQ(taken[k], static_cast<int>(3 * k));
}

TEST(FrameSamplerTest, NeverTakesAFrameTwiceFromASlowStream) {
  EXPECT_EQ(Taken(AtFps(5), Constant(1, 4)), (std::vector<int>{0, 1, 2, 3}));
}

TEST(FrameSamplerTest, TakesAllFramesAtTheirOwnRate) {
  EXPECT_EQ(Taken(AtFps(29.97), Constant(29.97, 1000)).size(), 1000u);
}

TEST(FrameSamplerTest, HonoursVariableFrameRatesByTimeStamp) {
  // A burst, a pause of three seconds, a burst.
  EXPECT_EQ(Taken(AtFps(2), {0, 0.1, 0.2, 0.3, 0.48, 0.6, 3.6, 3.7, 3.95, 4.0, 4.5}),
            (std::vector<int>{0, 4, 6, 8, 10}));
}

TEST(FrameSamplerTest, TakesEveryNthFrame) {
  EXPECT_EQ(Taken(EveryNth(4), {0, 1, 2, 2.5, 9, 10, 11, 12, 100}), (std::vector<int>{0, 4, 8}));
  EXPECT_EQ(Taken(EveryNth(1), Constant(25, 5)), (std::vector<int>{0, 1, 2, 3, 4}));
}

TEST(FrameSamplerTest, CountsFromBeginAndStopsBeforeEnd) {
  SourceOptions options = AtFps(2);
  options.begin = MediaTime::FromSeconds(1.05);
  options.end = MediaTime::FromSeconds(2.5);
  // In range: 11 (1.1) .. 24; targets 1.05, 1.55, 2.05.
  EXPECT_EQ(Taken(options, Constant(10, 50)), (std::vector<int>{11, 15, 20}));
  options.rate.every_nth = 5;
  EXPECT_EQ(Taken(options, Constant(10, 50)), (std::vector<int>{11, 16, 21}));
}

TEST(FrameSamplerTest, SaysTheSameWhetherOrNotTheFramesBeforeBeginWereSeen) {
  for (double begin : {0.35, 0.5, 1.0, 1.77}) {
    SourceOptions options = AtFps(3);
    options.begin = MediaTime::FromSeconds(begin);
    FrameSampler all(options), sought(options);
    for (double t = 0; t < 5; t += t < 2 ? 0.13 : 0.04) {
      const MediaTime time = MediaTime::FromSeconds(t);
      const auto verdict = all.Decide(time);
      if (t < begin) continue;
      EXPECT_EQ(verdict, sought.Decide(time)) << "at " << t;
    }
  }
}

TEST(FrameSamplerTest, PassesOverTimeStampsThatDoNotAdvance) {
  EXPECT_EQ(Taken(EveryNth(1), {0, 0.1, 0.1, 0.05, 0.2}), (std::vector<int>{0, 1, 4}));
  EXPECT_EQ(Taken(AtFps(10), {0, 0, 0.1, 0.1, 0.2}), (std::vector<int>{0, 2, 4}));
}

TEST(FrameSamplerTest, EndsAfterTheFramesWanted) {
  SourceOptions options = AtFps(2);
  options.max_frames = 3;
  EXPECT_EQ(Taken(options, Constant(10, 100)), (std::vector<int>{0, 5, 10}));
}

TEST(FrameSamplerTest, StartsOverAfterReset) {
  FrameSampler sampler(AtFps(1));
  EXPECT_EQ(sampler.Decide(MediaTime::FromSeconds(7)), FrameSampler::Verdict::kTake);
  sampler.Reset();
  EXPECT_EQ(sampler.Decide(MediaTime::FromSeconds(0)), FrameSampler::Verdict::kTake);
}

TEST(FrameSamplerTest, RefusesOptionsThatNameNoFrames) {
  for (double fps : {0.0, -1.0, 1e6, std::numeric_limits<double>::quiet_NaN()}) {
    EXPECT_THROW(FrameSampler{AtFps(fps)}, InputError) << fps;
  }
  EXPECT_THROW(FrameSampler{EveryNth(-2)}, InputError);
  SourceOptions options;
  options.begin = MediaTime::FromSeconds(-1);
  EXPECT_THROW(FrameSampler{options}, InputError);
  options.begin = options.end = MediaTime::FromSeconds(3);
  EXPECT_THROW(FrameSampler{options}, InputError);
  options = {};
  options.max_frames = -1;
  EXPECT_THROW(FrameSampler{options}, InputError);
}

}  // namespace
}  // namespace sluice
