#include "vision/orientation.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

namespace sluice {
namespace {

// Letters for pixels, rows separated by '/'.
std::string Upright(const std::string& stored, Orientation how) {
  const size_t width = stored.find('/'), height = (stored.size() + 1) / (width + 1);
  const size_t row_bytes = 3 * width + 5;  // rows are padded
  std::vector<uint8_t> rgb(row_bytes * height, '#');
  for (size_t y = 0; y < height; ++y) {
    for (size_t x = 0; x < width; ++x) {
      std::fill_n(&rgb[y * row_bytes + 3 * x], 3, stored[y * (width + 1) + x]);
    }
  }
  Frame frame;
  CopyUpright(rgb.data(), row_bytes, static_cast<int>(width), static_cast<int>(height), how, frame);
  EXPECT_EQ(frame.rgb.size(), size_t{3} * frame.width * frame.height);
  std::string text;
  for (int y = 0; y < frame.height; ++y) {
    for (int x = 0; x < frame.width; ++x) {
      text += static_cast<char>(frame.rgb[size_t{3} * (y * frame.width + x) + 2]);
    }
    text += '/';
  }
  text.pop_back();
  return text;
}

TEST(OrientationTest, TurnsEachOfTheEightUpright) {
  const std::string stored = "abc/def";
  EXPECT_EQ(Upright(stored, Orientation::kUpright), "abc/def");
  EXPECT_EQ(Upright(stored, Orientation::kMirrored), "cba/fed");
  EXPECT_EQ(Upright(stored, Orientation::kUpsideDown), "fed/cba");
  EXPECT_EQ(Upright(stored, Orientation::kFlipped), "def/abc");
  EXPECT_EQ(Upright(stored, Orientation::kTransposed), "ad/be/cf");
  EXPECT_EQ(Upright(stored, Orientation::kTurnClockwise), "da/eb/fc");
  EXPECT_EQ(Upright(stored, Orientation::kTransversed), "fc/eb/da");
  EXPECT_EQ(Upright(stored, Orientation::kTurnAnticlockwise), "cf/be/ad");
}

}  // namespace
}  // namespace sluice
