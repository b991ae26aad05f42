#include "runtime/clock.h"

#include <cinttypes>
#include <cstdio>

namespace sluice {

std::string MediaTime::ToString() const {
  const bool negative = ns_ < 0;
  // Rounded to the millisecond first, so that 59.9996 s becomes 00:01:00.000 and not 00:00:60.000.
  const uint64_t magnitude = negative ? uint64_t{0} - static_cast<uint64_t>(ns_) : ns_;
  const uint64_t ms = magnitude / 1000000 + (magnitude % 1000000 >= 500000 ? 1 : 0);
  char text[48];
  std::snprintf(text, sizeof(text), "%s%02" PRIu64 ":%02" PRIu64 ":%02" PRIu64 ".%03" PRIu64,
                negative ? "-" : "", ms / 3600000, ms / 60000 % 60, ms / 1000 % 60, ms % 1000);
  return text;
}

}  // namespace sluice
