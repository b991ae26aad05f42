#include "streaming/tone_map.h"

#include <gtest/gtest.h>

#include <array>

namespace sluice {
namespace {

std::array<int, 3> Convert(const ToneMap& map, std::array<double, 3> codes) {
  std::array<uint16_t, 4> argb = {0xffff};
  for (int i = 0; i < 3; ++i) argb[i + 1] = static_cast<uint16_t>(codes[i] * 65535 + 0.5);
  std::array<uint8_t, 3> rgb;
  map.Convert(argb.data(), 1, rgb.data());
  return {rgb[0], rgb[1], rgb[2]};
}

// Codes by BT.2408: reference white (203 cd/m2) is 58 % of PQ and 75 % of HLG.
TEST(ToneMapTest, ShowsReferenceWhiteNearTheTopAndHighlightsAboveIt) {
  for (const auto& [transfer, white] : {std::pair{Transfer::kPq, 0.5807}, {Transfer::kHlg, 0.75}}) {
    const ToneMap map(transfer, true);
    EXPECT_EQ(Convert(map, {0, 0, 0}), (std::array{0, 0, 0}));
    const int shown = Convert(map, {white, white, white})[0];
    EXPECT_NEAR(shown, 233, 2);  // T(1) = 0.816
    const int bright = Convert(map, {white + 0.1, white + 0.1, white + 0.1})[0];
    EXPECT_GT(bright, shown);
    EXPECT_NEAR(Convert(map, {1, 1, 1})[0], 255, 1);
  }
}

TEST(ToneMapTest, LeavesGreyGreyAndGrowsWithTheLight) {
  for (const Transfer transfer : {Transfer::kPq, Transfer::kHlg, Transfer::kOrdinary}) {
    const ToneMap map(transfer, true);
    int before = -1;
    for (double code = 0; code <= 1; code += 0.01) {
      const std::array<int, 3> rgb = Convert(map, {code, code, code});
      EXPECT_NEAR(rgb[0], rgb[1], 1) << code;
      EXPECT_NEAR(rgb[0], rgb[2], 1) << code;
      EXPECT_GE(rgb[1], before) << code;
      before = rgb[1];
    }
  }
}

TEST(ToneMapTest, BringsWideColoursToOrdinaryOnes) {
  const ToneMap map(Transfer::kOrdinary, true);
  // BT.709's red is (0.6274, 0.0691, 0.0164) of light in BT.2020.
  const std::array<int, 3> red = Convert(map, {0.8131, 0.2907, 0.1341});
  EXPECT_NEAR(red[0], 255, 2);
  EXPECT_NEAR(red[1], 0, 12);
  EXPECT_NEAR(red[2], 0, 12);
  EXPECT_EQ(Convert(map, {1, 0, 0}), (std::array{255, 0, 0}));
}

}  // namespace
}  // namespace sluice
