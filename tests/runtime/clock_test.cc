#include "runtime/clock.h"

#include <gtest/gtest.h>

namespace sluice {
namespace {

TEST(MediaTimeTest, SecondsComeBackAsTheyWereGiven) {
  for (int64_t ms = 0; ms < 100000; ++ms) {
    const double seconds = static_cast<double>(ms) / 1000;
    ASSERT_EQ(MediaTime::FromSeconds(seconds).seconds(), seconds) << ms;
  }
}

}  // namespace
}  // namespace sluice
