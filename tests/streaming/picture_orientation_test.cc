#include "streaming/picture_orientation.h"

#include <gtest/gtest.h>

#include <vector>

namespace sluice {
namespace {

using Bytes = std::vector<uint8_t>;

// The message's content; `turn` in 2^-16 of a full turn, anticlockwise.
Bytes Message(bool left_right, bool up_down, unsigned turn) {
  const unsigned bits = unsigned{left_right} << 22 | unsigned{up_down} << 21 | turn << 5 | 0x18;
  return {47, 3, static_cast<uint8_t>(bits >> 16), static_cast<uint8_t>(bits >> 8),
          static_cast<uint8_t>(bits)};
}

Bytes Unit(Bytes header, const Bytes& content, bool length) {
  header.insert(header.end(), content.begin(), content.end());
  Bytes unit = length ? Bytes{0, 0, 0, static_cast<uint8_t>(header.size())} : Bytes{0, 0, 0, 1};
  unit.insert(unit.end(), header.begin(), header.end());
  return unit;
}

TEST(PictureOrientationTest, FollowsEveryFlipAndTurnOfAnSei) {
  struct Case {
    bool left_right, up_down;
    unsigned turn;
    Orientation expected;
  };
  for (const Case& c :
       {Case{false, false, 0, Orientation::kUpright},
        Case{false, false, 0x4000, Orientation::kTurnAnticlockwise},
        Case{false, false, 0x8000, Orientation::kUpsideDown},
        Case{false, false, 0xc000, Orientation::kTurnClockwise},
        Case{false, false, 0xbfff, Orientation::kTurnClockwise},
        Case{true, false, 0, Orientation::kMirrored}, Case{false, true, 0, Orientation::kFlipped},
        Case{true, true, 0, Orientation::kUpsideDown},
        Case{true, false, 0x4000, Orientation::kTransposed},
        Case{false, true, 0x4000, Orientation::kTransversed}}) {
    for (const bool length : {false, true}) {
      Bytes h264 = Unit({9}, {0xf0}, length);
      const Bytes sei = Unit({6}, Message(c.left_right, c.up_down, c.turn), length);
      h264.insert(h264.end(), sei.begin(), sei.end());
      EXPECT_EQ(SeiOrientation(h264, NalCodec::kH264, length ? 4 : 0), c.expected);
      const Bytes h265 = Unit({39 << 1, 1}, Message(c.left_right, c.up_down, c.turn), length);
      EXPECT_EQ(SeiOrientation(h265, NalCodec::kH265, length ? 4 : 0), c.expected);
    }
  }
}

TEST(PictureOrientationTest, FindsNothingInPicturesWithoutIt) {
  const Bytes other = Unit({6}, {5, 1, 0, 0x80, 0x80}, false);
  EXPECT_EQ(SeiOrientation(other, NalCodec::kH264, 0), std::nullopt);
  const Bytes sei = Unit({6}, Message(false, false, 0x4000), true);
  for (size_t size = 0; size < sei.size(); ++size) {
    EXPECT_EQ(SeiOrientation(std::span(sei).first(size), NalCodec::kH264, 4), std::nullopt);
  }
  Bytes late = Unit({5}, {1, 2, 3}, true);  // after the picture
  late.insert(late.end(), sei.begin(), sei.end());
  EXPECT_EQ(SeiOrientation(late, NalCodec::kH264, 4), std::nullopt);
}

TEST(PictureOrientationTest, FindsTheExifOfAJpeg) {
  const Bytes jpeg = {0xff, 0xd8, 0xff, 0xe0, 0, 3,   7,   0xff, 0xe1, 0, 10, 'E',
                      'x',  'i',  'f',  0,    0, 'M', 'M', 0xff, 0xda, 0, 2};
  const std::span<const uint8_t> exif = JpegExif(jpeg);
  ASSERT_EQ(exif.size(), 2u);
  EXPECT_EQ(exif[0], 'M');
  for (size_t size = 0; size < 19; ++size)
    EXPECT_TRUE(JpegExif(std::span(jpeg).first(size)).empty());
}

}  // namespace
}  // namespace sluice
