#include "proto/memory_defaults.h"

#include <algorithm>

namespace sluice {

MemoryShares SharesOf(int64_t memory_bytes, int64_t weight_bytes, int max_streams,
                      int64_t source_mb) {
  constexpr int64_t kMostHostMb = 1024, kLeastPicturesMb = 16, kMostSources = 16;
  const int64_t left_mb = std::max<int64_t>(0, memory_bytes - 2 * weight_bytes) >> 20;
  return {
      .kv_mb = std::max<int64_t>(1, left_mb / 2),
      .stream_host_mb = std::clamp<int64_t>(left_mb / 8 / std::max(1, max_streams), 1, kMostHostMb),
      .queued_picture_mb = std::max(kLeastPicturesMb, left_mb / 16),
      .sources = static_cast<int>(std::clamp<int64_t>(
          left_mb * 3 / 16 / std::max<int64_t>(1, source_mb), 1, kMostSources))};
}

}  // namespace sluice
