#include "proto/memory_defaults.h"

#include <gtest/gtest.h>

#include "proto/server_config.h"

namespace sluice {
namespace {

constexpr int64_t kGiB = int64_t{1} << 30;

TEST(MemoryDefaultsTest, StreamsAndSourcesTakeSevenEighthsOfWhatTheWeightsLeave) {
  const MemoryShares shares = SharesOf(16 * kGiB, 2 * kGiB, 32, 512);
  EXPECT_EQ(shares.kv_mb, 6 << 10);
  EXPECT_EQ(shares.stream_host_mb, 48);
  EXPECT_EQ(shares.queued_picture_mb, 768);
  EXPECT_EQ(shares.sources, 4);
  EXPECT_LE(2 * 2 * kGiB + (shares.kv_mb + 32 * shares.stream_host_mb + shares.queued_picture_mb +
                            shares.sources * 512) *
                               (1 << 20),
            16 * kGiB);
}

TEST(MemoryDefaultsTest, AStreamsEarlierFramesStayBelowAGigabyteOnALargeMachine) {
  EXPECT_EQ(SharesOf(2048 * kGiB, kGiB, 4, 1024).stream_host_mb, 1024);
}

TEST(MemoryDefaultsTest, AModelThatIsTooLargeLeavesSomethingRatherThanNoLimit) {
  const MemoryShares shares = SharesOf(kGiB, kGiB, 64, 1024);
  EXPECT_EQ(shares.kv_mb, 1);
  EXPECT_EQ(shares.stream_host_mb, 1);
  EXPECT_EQ(shares.queued_picture_mb, 16);
  EXPECT_EQ(shares.sources, 1);
}

TEST(MemoryDefaultsTest, PicturesThatWaitAreBoundedWhateverIsSaid) {
  ServerConfig config;
  config.scheduler.max_streams = 32;
  EXPECT_EQ(WithMemory(config, 16 * kGiB, 2 * kGiB, true).scheduler.queued_bytes, 768 << 20);
  config.queued_picture_mb = 5;
  EXPECT_EQ(WithMemory(config, 16 * kGiB, 2 * kGiB, true).scheduler.queued_bytes, 5 << 20);
}

TEST(MemoryDefaultsTest, SourcesAreAsManyAsTheOperatorSaysOrTheMemoryBears) {
  ServerConfig config;
  EXPECT_EQ(WithMemory(config, 16 * kGiB, 2 * kGiB, false).service.max_sources, 2);
  EXPECT_EQ(WithMemory(config, 2048 * kGiB, 2 * kGiB, false).service.max_sources, 16);
  config.max_sources = 0;
  EXPECT_EQ(WithMemory(config, 16 * kGiB, 2 * kGiB, false).service.max_sources, 0);
}

}  // namespace
}  // namespace sluice
