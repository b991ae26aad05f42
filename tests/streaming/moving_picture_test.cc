// Moving PNG and WebP: every picture, at its time, here and in a decoder's process.
#include "streaming/moving_picture.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <optional>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "streaming/apart/apart_source.h"
#include "tests/support/moving_pictures.h"
#include "tests/support/temporary_directory.h"

namespace sluice {
namespace {

using ::sluice::testing::MovingPng;
using ::sluice::testing::MovingWebp;
using ::sluice::testing::PngPart;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr uint32_t kRed = 0xff0000ff, kGreen = 0x00ff00ff, kBlue = 0x0000ffff;

// The pixels of each picture in a row, as 0xRRGGBBAA.
std::vector<std::vector<uint32_t>> Pixels(const std::string& bytes) {
  const auto moving = ReadMovingPng(bytes, 100);
  std::vector<std::vector<uint32_t>> pictures;
  for (MovingPicture::Picture p; (p = moving->Next()).rgba;) {
    std::vector<uint32_t>& pixels = pictures.emplace_back();
    for (int i = 0; i < moving->width() * moving->height(); ++i) {
      const uint8_t* at = p.rgba + 4 * i;
      pixels.push_back(uint32_t{at[0]} << 24 | uint32_t{at[1]} << 16 | uint32_t{at[2]} << 8 |
                       at[3]);
    }
  }
  return pictures;
}

// What reading all pictures fails with, and how many came before that.
std::string Failure(const std::string& bytes, int max_side_pixels = 100) {
  int pictures = 0;
  try {
    const auto moving = ReadMovingPng(bytes, max_side_pixels);
    while (moving->Next().rgba) ++pictures;
  } catch (const Error& error) {
    return std::to_string(pictures) + ": " + error.what();
  }
  return "none";
}

std::vector<PngPart> ThreeParts() {
  return {{2, 1, 0, 0, kRed}, {1, 1, 1, 0, kGreen}, {2, 1, 0, 0, kBlue}};
}

TEST(MovingPngTest, PutsEachPictureInItsPlaceAndTakesItAwayAsItSays) {
  enum { kKeep, kClear, kRestore };
  enum { kReplace, kOver };
  EXPECT_THAT(
      Pixels(MovingPng(2, 1, ThreeParts())),
      ElementsAre(ElementsAre(kRed, kRed), ElementsAre(kRed, kGreen), ElementsAre(kBlue, kBlue)));
  EXPECT_THAT(Pixels(MovingPng(2, 1,
                               {{2, 1, 0, 0, kRed},
                                {1, 1, 1, 0, kGreen, kRestore},
                                {1, 1, 0, 0, kBlue, kClear},
                                {1, 1, 1, 0, kGreen}})),
              ElementsAre(ElementsAre(kRed, kRed), ElementsAre(kRed, kGreen),
                          ElementsAre(kBlue, kRed), ElementsAre(0u, kGreen)));
  EXPECT_THAT(Pixels(MovingPng(2, 1,
                               {{2, 1, 0, 0, kRed},
                                {2, 1, 0, 0, 0x00ff0000, kKeep, kOver},
                                {1, 1, 1, 0, 0x00ff0080, kKeep, kOver},
                                {1, 1, 0, 0, 0x00ff0080, kKeep, kReplace}})),
              ElementsAre(ElementsAre(kRed, kRed), ElementsAre(kRed, kRed),
                          ElementsAre(kRed, 0x7f8000ff), ElementsAre(0x00ff0080, 0x7f8000ff)));
}

TEST(MovingPngTest, ShowsNoPictureThatIsForOtherReaders) {
  EXPECT_THAT(Pixels(MovingPng(2, 1, {{2, 1, 0, 0, kRed}, {2, 1, 0, 0, kBlue}}, true)),
              ElementsAre(ElementsAre(kRed, kRed), ElementsAre(kBlue, kBlue)));
}

TEST(MovingPngTest, TellsWhatIsDamagedAfterThePicturesBeforeIt) {
  const std::string whole = MovingPng(2, 1, ThreeParts());
  EXPECT_EQ(Failure(whole), "none");
  EXPECT_THAT(Failure(whole.substr(0, whole.size() - 30)),
              HasSubstr("2: picture 2 cannot be decoded"));
  EXPECT_THAT(Failure(whole.substr(0, whole.size() - 12)),
              HasSubstr("3: its end is missing (3 of 3"));
  std::string flipped = whole;
  flipped[flipped.find("fdAT") + 10] ^= 1;
  EXPECT_THAT(Failure(flipped), HasSubstr("1: picture 1 cannot be decoded"));

  const size_t last = whole.rfind("fcTL") - 4;
  EXPECT_THAT(Failure(whole.substr(0, last) + testing::PngChunk("IEND", "")),
              HasSubstr("2: its last pictures are missing (2 of 3"));
  const size_t second = whole.find("fdAT") - 4 - 38;
  EXPECT_THAT(Failure(whole.substr(0, second) + whole.substr(last)), HasSubstr("out of order"));
}

TEST(MovingPngTest, RefusesPicturesThatDoNotFit) {
  EXPECT_THAT(Failure(MovingPng(2, 1, {{2, 1, 1, 0, kRed}, {2, 1, 0, 0, kRed}})),
              HasSubstr("2x1 at 1,0 lies outside of 2x1"));
  EXPECT_THAT(Failure(MovingPng(2, 1, {{1, 1, -1, 0, kRed}, {2, 1, 0, 0, kRed}})),
              HasSubstr("lies outside"));
  EXPECT_THAT(Failure(MovingPng(200, 1, {{200, 1, 0, 0, kRed}}), 100),
              HasSubstr("200x1, the longest side allowed is 100"));
  EXPECT_THAT(Failure("\x89PNG\r\n\x1a\n nonsense"), HasSubstr("its header cannot be read"));
}

// ---- As sources ------------------------------------------------------------------------------

struct Shown {
  double seconds;
  int red;
};

std::vector<Shown> Read(Source& source) {
  std::vector<Shown> shown;
  while (const FramePtr frame = source.Next()) {
    shown.push_back({.seconds = frame->time.seconds(), .red = frame->rgb.at(0)});
  }
  EXPECT_EQ(source.warning(), std::nullopt);
  return shown;
}

class MovingPictureTest : public ::testing::Test {
 protected:
  void SetUp() override {
#ifdef __SANITIZE_THREAD__
    GTEST_SKIP() << "GStreamer is not instrumented, each of its handovers would look like a race";
#endif
  }

  std::string Write(const std::string& name, const std::string& bytes) const {
    std::ofstream(directory_.path() / name, std::ios::binary) << bytes;
    return directory_.path() / name;
  }
  static SourceOptions All() {
    SourceOptions options;
    options.rate.every_nth = 1;
    return options;
  }
  static std::unique_ptr<Source> Apart(const std::string& path) {
    ApartInput input;
    input.label = "a file";
    input.file = apart::UniqueFd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
    return OpenApart(std::move(input), All(), {});
  }

  TemporaryDirectory directory_;
};

TEST_F(MovingPictureTest, EveryPictureOfAPngIsReadAtItsTime) {
  std::vector<PngPart> parts;
  for (int i = 0; i < 5; ++i) {
    parts.push_back({16, 8, 0, 0, static_cast<uint32_t>(50 * i) << 24 | 0xff});
    parts.back().milliseconds = 100 * (i + 1);
  }
  const std::string path = Write("a.png", MovingPng(16, 8, parts));
  for (const bool apart : {false, true}) {
    SCOPED_TRACE(apart);
    const auto source = apart ? Apart(path) : Source::Open(path, All());
    EXPECT_EQ(source->info().codec, "APNG");
    const std::vector<Shown> shown = Read(*source);
    ASSERT_EQ(shown.size(), 5u);
    for (int i = 0; i < 5; ++i) {
      EXPECT_EQ(shown[i].red, 50 * i);
      EXPECT_NEAR(shown[i].seconds, 0.05 * i * (i + 1), 1e-9);
    }
  }
}

TEST_F(MovingPictureTest, AWebpIsReadInADecodersProcessToo) {
  const std::string path = Write("a.webp", MovingWebp({20, 80, 140, 200}));
  const std::vector<Shown> shown = Read(*Apart(path));
  ASSERT_EQ(shown.size(), 4u);
  for (int i = 0; i < 4; ++i) {
    EXPECT_NEAR(shown[i].red, 20 + 60 * i, 1);
    EXPECT_NEAR(shown[i].seconds, 0.1 * i * i, 1e-9);
  }
}

}  // namespace
}  // namespace sluice
