#include "proto/memory_defaults.h"

#include <gtest/gtest.h>

#include "proto/server_config.h"

namespace sluice {
namespace {

constexpr int64_t kGiB = int64_t{1} << 30;

TEST(MemoryDefaultsTest, StreamsTakeThreeQuartersOfWhatTheWeightsLeave) {
  const MemoryShares shares = SharesOf(16 * kGiB, 2 * kGiB, 32);
  EXPECT_EQ(shares.kv_mb, 6 << 10);
  EXPECT_EQ(shares.stream_host_mb, 96);
  EXPECT_EQ(shares.queued_picture_mb, 768);
  EXPECT_LE(2 * 2 * kGiB +
                (shares.kv_mb + 32 * shares.stream_host_mb + shares.queued_picture_mb) * (1 << 20),
            16 * kGiB);
}

TEST(MemoryDefaultsTest, AStreamsEarlierFramesStayBelowAGigabyteOnALargeMachine) {
  EXPECT_EQ(SharesOf(2048 * kGiB, kGiB, 4).stream_host_mb, 1024);
}

TEST(MemoryDefaultsTest, AModelThatIsTooLargeLeavesSomethingRatherThanNoLimit) {
  const MemoryShares shares = SharesOf(kGiB, kGiB, 64);
  EXPECT_EQ(shares.kv_mb, 1);
  EXPECT_EQ(shares.stream_host_mb, 1);
  EXPECT_EQ(shares.queued_picture_mb, 16);
}

TEST(MemoryDefaultsTest, PicturesThatWaitAreBoundedWhateverIsSaid) {
  ServerConfig config;
  config.scheduler.max_streams = 32;
  EXPECT_EQ(WithMemory(config, 16 * kGiB, 2 * kGiB, true).scheduler.queued_bytes, 768 << 20);
  config.queued_picture_mb = 5;
  EXPECT_EQ(WithMemory(config, 16 * kGiB, 2 * kGiB, true).scheduler.queued_bytes, 5 << 20);
}

}  // namespace
}  // namespace sluice
