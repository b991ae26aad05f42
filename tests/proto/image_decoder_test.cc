#include "proto/image_decoder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "proto/exif.h"
#include "runtime/error.h"
#include "tests/support/picture_files.h"

namespace sluice {
namespace {

using ::testing::HasSubstr;
using namespace std::string_literals;

constexpr ImageLimits kLimits{.pixels = 1 << 20};
constexpr ImageFormat kFormats[] = {ImageFormat::kJpeg, ImageFormat::kPng, ImageFormat::kWebp};

std::string File(ImageFormat format, const Frame& frame) {
  switch (format) {
    case ImageFormat::kJpeg:
      return JpegFile(frame);
    case ImageFormat::kPng:
      return PngFile(frame);
    case ImageFormat::kWebp:
      return WebpFile(frame, /*lossless=*/false);
  }
  return "";
}

// The same picture in every form that is taken.
struct Sample {
  std::string name;
  ImageFormat format;
  std::string bytes;
};
std::vector<Sample> Samples(const Frame& frame) {
  return {{"baseline", ImageFormat::kJpeg, JpegFile(frame)},
          {"progressive", ImageFormat::kJpeg, ProgressiveJpegFile(frame)},
          {"png", ImageFormat::kPng, PngFile(frame)},
          {"interlaced", ImageFormat::kPng, PngFile(frame, /*interlaced=*/true)},
          {"lossy", ImageFormat::kWebp, WebpFile(frame, false)},
          {"lossless", ImageFormat::kWebp, WebpFile(frame, true)}};
}

Frame Decoded(ImageFormat format, const std::string& bytes, const ImageLimits& limits = kLimits) {
  Frame frame;
  DecodeImage(format, bytes, limits, frame);
  EXPECT_EQ(frame.rgb.size(), size_t{3} * frame.width * frame.height);
  return frame;
}

void ExpectRefused(ImageFormat format, const std::string& bytes, const std::string& part,
                   const ImageLimits& limits = kLimits) {
  Frame frame;
  try {
    DecodeImage(format, bytes, limits, frame);
    ADD_FAILURE() << "was taken; expected: " << part;
  } catch (const InputError& error) {
    EXPECT_THAT(error.what(), HasSubstr(part));
    EXPECT_THAT(error.what(), testing::StartsWith("[frame] "));
    EXPECT_THAT(error.what(), testing::Not(HasSubstr("\n")));
  }
}

// By how many MiB the process's memory rises at most while `work` runs.
int64_t PeakMiB(const std::function<void()>& work) {
  const auto read = [](const std::string& name) {
    std::ifstream in("/proc/self/status");
    for (std::string word; in >> word;) {
      int64_t kib = 0;
      if (word == name && in >> kib) return kib / 1024;
    }
    return int64_t{0};
  };
  std::ofstream("/proc/self/clear_refs") << 5;  // the peak begins again
  const int64_t before = read("VmRSS:");
  work();
  return read("VmHWM:") - before;
}

// ---- What is taken ---------------------------------------------------------------------------

TEST(ImageDecoderTest, EveryFormatComesOutAsRedGreenBlueRows) {
  const Frame picture = SmoothPicture(37, 22);
  for (const Sample& sample : Samples(picture)) {
    SCOPED_TRACE(sample.name);
    const Frame frame = Decoded(sample.format, sample.bytes);
    ASSERT_EQ(frame.width, 37);
    ASSERT_EQ(frame.height, 22);
    const bool exact = sample.format == ImageFormat::kPng || sample.name == "lossless";
    for (size_t i = 0; i < frame.rgb.size(); ++i) {
      // Chroma is stored at half the resolution: neighbours differ by 3 a column.
      ASSERT_NEAR(frame.rgb[i], picture.rgb[i], exact ? 0 : 16) << i;
    }
  }
}

TEST(ImageDecoderTest, GreyPalettesDeepAndTransparentPngsBecomeRgb) {
  const auto expect = [](const std::string& file, std::vector<uint8_t> rgb) {
    EXPECT_EQ(Decoded(ImageFormat::kPng, file).rgb, rgb);
  };
  for (const int type : {PNG_COLOR_TYPE_GRAY, PNG_COLOR_TYPE_PALETTE}) {
    expect(PngFile(2, 1, type, 1, {0x40}, 1), {0, 0, 0, 255, 255, 255});
    expect(PngFile(2, 1, type, 4, {0x0F}, 1), {0, 0, 0, 255, 255, 255});
    expect(PngFile(2, 1, type, 8, {0, 255}, 2), {0, 0, 0, 255, 255, 255});
  }
  expect(PngFile(1, 1, PNG_COLOR_TYPE_GRAY, 16, {7, 255}, 2), {7, 7, 7});
  expect(PngFile(1, 1, PNG_COLOR_TYPE_GRAY_ALPHA, 8, {7, 0}, 2), {7, 7, 7});
  expect(PngFile(1, 1, PNG_COLOR_TYPE_RGB, 16, {1, 99, 2, 99, 3, 99}, 6), {1, 2, 3});
  expect(PngFile(1, 1, PNG_COLOR_TYPE_RGB_ALPHA, 8, {1, 2, 3, 0}, 4), {1, 2, 3});
}

TEST(ImageDecoderTest, GreyAndCmykJpegsBecomeRgb) {
  const std::vector<uint8_t> grey(64, 77);
  for (const uint8_t value :
       Decoded(ImageFormat::kJpeg, JpegFile(8, 8, JCS_GRAYSCALE, grey.data())).rgb) {
    EXPECT_NEAR(value, 77, 1);
  }
  // As Adobe stores it, 255 is no ink: no cyan, all magenta and yellow, no black is red.
  std::vector<uint8_t> red;
  for (int i = 0; i < 64; ++i) red.insert(red.end(), {255, 0, 0, 255});
  for (const J_COLOR_SPACE space : {JCS_CMYK, JCS_YCCK}) {
    const Frame frame = Decoded(
        ImageFormat::kJpeg, JpegFile(8, 8, JCS_CMYK, red.data(), [&](jpeg_compress_struct& info) {
          jpeg_set_colorspace(&info, space);
        }));
    EXPECT_NEAR(frame.rgb[0], 255, 3);
    EXPECT_NEAR(frame.rgb[1], 0, 3);
    EXPECT_NEAR(frame.rgb[2], 0, 3);
  }
}

TEST(ImageDecoderTest, WhatIsEncodedComesBack) {
  const Frame picture = SmoothPicture(50, 30);
  const Frame frame = Decoded(ImageFormat::kJpeg, EncodeJpeg(picture));
  ASSERT_EQ(frame.rgb.size(), picture.rgb.size());
  for (size_t i = 0; i < frame.rgb.size(); ++i) ASSERT_NEAR(frame.rgb[i], picture.rgb[i], 16);
  EXPECT_THROW(EncodeJpeg(Frame()), Error);
}

TEST(ImageDecoderTest, EveryFormatIsTurnedAsItsExifSays) {
  // Which quarter of the stored picture comes out top left, top right, bottom left, bottom right.
  const std::string shown[] = {"0123", "1032", "3210", "2301", "0213", "2031", "3120", "1302"};
  constexpr uint8_t kColors[4][3] = {{250, 10, 10}, {10, 250, 10}, {10, 10, 250}, {250, 250, 10}};
  Frame picture;
  picture.width = 64;
  picture.height = 32;
  for (int y = 0; y < 32; ++y) {
    for (int x = 0; x < 64; ++x) {
      const auto* color = kColors[y / 16 * 2 + x / 32];
      picture.rgb.insert(picture.rgb.end(), color, color + 3);
    }
  }
  for (int orientation = 1; orientation <= 8; ++orientation) {
    const std::string tiff = OrientationTiff(orientation, orientation % 2 == 0);
    const std::map<ImageFormat, std::string> files = {
        {ImageFormat::kJpeg, WithJpegSegment(JpegFile(picture), 0xE1, "Exif\0\0"s + tiff)},
        {ImageFormat::kPng, WithPngChunks(PngFile(picture), PngChunk("eXIf", tiff))},
        {ImageFormat::kWebp, WithWebpExif(picture, WebpFile(picture, true), tiff)}};
    for (const auto& [format, file] : files) {
      SCOPED_TRACE(std::to_string(orientation) + ", format " +
                   std::to_string(static_cast<int>(format)));
      const Frame frame = Decoded(format, file);
      EXPECT_EQ(frame.width, orientation > 4 ? 32 : 64);
      EXPECT_EQ(frame.height, orientation > 4 ? 64 : 32);
      for (int quarter = 0; quarter < 4; ++quarter) {
        const int x = frame.width * (quarter % 2 * 2 + 1) / 4;
        const int y = frame.height * (quarter / 2 * 2 + 1) / 4;
        const auto* color = kColors[shown[orientation - 1][quarter] - '0'];
        for (int c = 0; c < 3; ++c) {
          EXPECT_NEAR(frame.rgb[3 * (y * frame.width + x) + c], color[c], 8) << quarter;
        }
      }
    }
  }
  const std::string prefixed = "Exif\0\0"s + OrientationTiff(6);  // as some write it in WebP
  EXPECT_EQ(
      Decoded(ImageFormat::kWebp, WithWebpExif(picture, WebpFile(picture, true), prefixed)).width,
      32);
}

TEST(ExifTest, DamagedDataTellsNothing) {
  const std::string tiff = OrientationTiff(6);
  EXPECT_EQ(ExifOrientation(tiff), Orientation::kTurnClockwise);
  for (size_t size = 0; size < 22; ++size) {
    EXPECT_EQ(ExifOrientation(tiff.substr(0, size)), Orientation::kUpright) << size;
  }
  for (const int wrong : {0, 9, 65535}) {
    EXPECT_EQ(ExifOrientation(OrientationTiff(wrong)), Orientation::kUpright);
  }
  std::string far = tiff, many = tiff, other_type = tiff;
  for (int i = 4; i < 8; ++i) far[i] = '\xFF';
  many[8] = many[9] = '\xFF';
  many[11] = 0;  // some other tag
  other_type[13] = 4;
  for (const std::string& damaged : {far, many, other_type}) {
    EXPECT_EQ(ExifOrientation(damaged), Orientation::kUpright);
  }
}

// ---- What is not -----------------------------------------------------------------------------

TEST(ImageDecoderTest, AFileThatEndsEarlyIsRefusedWhereverItEnds) {
  for (const Sample& sample : Samples(SmoothPicture(40, 24))) {
    for (size_t size = 0; size < sample.bytes.size(); ++size) {
      SCOPED_TRACE(sample.name + ", bytes " + std::to_string(size));
      ExpectRefused(sample.format, sample.bytes.substr(0, size), "");
      // With an end of its own nothing is missing but rows. (A progressive file is whole, and less
      // sharp, after each of its scans.)
      if (sample.name != "baseline") continue;
      if (size + 2 < sample.bytes.size()) {
        ExpectRefused(sample.format, sample.bytes.substr(0, size) + "\xFF\xD9", "");
      }
    }
  }
}

TEST(ImageDecoderTest, FilesOfAnotherKindAreRefused) {
  for (const ImageFormat format : kFormats) {
    ExpectRefused(format, "", "expected a");
    ExpectRefused(format, std::string(1000, 'x'), "expected a");
    const auto other = format == ImageFormat::kPng ? ImageFormat::kJpeg : ImageFormat::kPng;
    ExpectRefused(format, File(other, SmoothPicture(64, 48)), "expected a");
  }
}

TEST(ImageDecoderTest, APictureThatUnpacksTooLargeIsRefusedBeforeItIsUnpacked) {
  Frame large;
  large.width = 1000;
  large.height = 1100;
  large.rgb.assign(size_t{3} * 1000 * 1100, 9);
  for (const ImageFormat format : kFormats) {
    ExpectRefused(format, File(format, large), "expected 1 to 1048576 pixels, got 1000x1100");
  }
  const std::string png = PngFile(SmoothPicture(8, 8));
  ExpectRefused(ImageFormat::kPng, WithPngSize(png, 0x7FFFFFFF, 0x7FFFFFFF),
                "expected sides of 1 to 16384 pixels, got 2147483647x2147483647");
}

TEST(ImageDecoderTest, AThinPictureIsRefusedByItsLongSide) {
  const std::vector<uint8_t> rows(20000, 0);
  ExpectRefused(ImageFormat::kPng, PngFile(1, 20000, PNG_COLOR_TYPE_GRAY, 8, rows, 1),
                "expected sides of 1 to 16384 pixels, got 1x20000");
  ExpectRefused(ImageFormat::kJpeg, JpegFile(20000, 1, JCS_GRAYSCALE, rows.data()), "got 20000x1");
  Frame frame;
  EXPECT_THROW(TakeRawImage(1, 20000, std::string(60000, 'a'), kLimits, frame), InputError);
}

TEST(ImageDecoderTest, ASecondSizeIsRefusedWithoutMemoryForEither) {
  const std::string file = JpegFile(SmoothPicture(16, 16));
  const size_t sof = file.find("\xFF\xC0"), sof_bytes = 2 + 17;
  const std::string header = file.substr(sof, sof_bytes);
  ExpectRefused(ImageFormat::kJpeg, file.substr(0, sof) + header + file.substr(sof), "damaged");
  // A segment that is none: some readers pass over it, libjpeg looks into it.
  std::string hidden = file.substr(2);
  const size_t size_at = hidden.find("\xFF\xC0") + 5;
  hidden.replace(size_at, 4, BigEndian(14000, 2) + BigEndian(16000, 2));
  const std::string two = "\xFF\xD8\xFF\0"s + BigEndian(hidden.size() + 2, 2) + hidden + header;
  EXPECT_LT(
      PeakMiB([&] { ExpectRefused(ImageFormat::kJpeg, two, "damaged", {.pixels = 1 << 20}); }), 64);
}

TEST(ImageDecoderTest, AJpegOfHundredsOfScansIsRefused) {
  const Frame picture = SmoothPicture(32, 32);
  ExpectRefused(ImageFormat::kJpeg, JpegFileOfManyScans(picture), "at most 64 scans");
  // Of what one colour is: its mean values.
  const std::string file = ProgressiveJpegFile(picture);
  const size_t scan = file.find("\xFF\xDA");
  ASSERT_NE(scan, file.npos);
  jpeg_scan_info alone[] = {{1, {0, 0, 0, 0}, 0, 63, 0, 0},
                            {1, {1, 0, 0, 0}, 0, 63, 0, 0},
                            {1, {2, 0, 0, 0}, 0, 63, 0, 0}};
  const std::string apart = JpegFile(picture, [&](jpeg_compress_struct& info) {
    info.scan_info = alone;
    info.num_scans = 3;
  });
  EXPECT_EQ(Decoded(ImageFormat::kJpeg, apart).width, 32);
  const size_t last = apart.rfind("\xFF\xDA");
  ExpectRefused(ImageFormat::kJpeg, apart.substr(0, last) + "\xFF\xD9",
                "no data for one of its colours");
}

TEST(ImageDecoderTest, TimeIsBoundedForEveryFormatThatCanTakeLong) {
  for (const Sample& sample : Samples(SmoothPicture(32, 32))) {
    if (sample.format == ImageFormat::kWebp) continue;  // bounded by its pixels
    SCOPED_TRACE(sample.name);
    ExpectRefused(sample.format, sample.bytes, "takes more than",
                  {.pixels = 1 << 20, .seconds = 0});
  }
}

TEST(ImageDecoderTest, MemoryIsBoundedByWhatTheDecoderWouldKeep) {
  const Frame picture = SmoothPicture(512, 512);
  const int64_t bytes = static_cast<int64_t>(picture.rgb.size());
  const ImageLimits tight{.pixels = 1 << 20, .bytes = bytes + (100 << 10)};
  // Rows go out as they come; coefficients of several scans, and a lossless WebP's codes, stay.
  EXPECT_EQ(Decoded(ImageFormat::kJpeg, JpegFile(picture), tight).width, 512);
  EXPECT_EQ(Decoded(ImageFormat::kPng, PngFile(picture), tight).width, 512);
  EXPECT_EQ(Decoded(ImageFormat::kWebp, WebpFile(picture, false), tight).width, 512);
  ExpectRefused(ImageFormat::kJpeg, ProgressiveJpegFile(picture), "bytes of memory", tight);
  ExpectRefused(ImageFormat::kWebp, WebpFile(picture, true), "bytes of memory", tight);
}

TEST(ImageDecoderTest, TextOfAPngIsPassedOverAndNotUnpacked) {
  const Frame picture = SmoothPicture(8, 8);
  const std::string packed = Deflated(std::string(7'900'000, 'a'));
  std::string chunks;
  for (int i = 0; i < 40; ++i) {
    const std::string key = "k" + std::to_string(i) + "\0"s;
    chunks += PngChunk("zTXt", key + "\0"s + packed);
    chunks += PngChunk("iTXt", key + "\1\0\0\0"s + packed);
  }
  chunks += PngChunk("tEXt", "k\0"s + std::string(1 << 20, 'b'));
  for (int i = 0; i < 100'000; ++i) chunks += PngChunk("prVt", "");
  const std::string file = WithPngChunks(PngFile(picture), chunks);
  EXPECT_LT(PeakMiB([&] { EXPECT_EQ(Decoded(ImageFormat::kPng, file).rgb, picture.rgb); }), 64);
}

TEST(ImageDecoderTest, DamageIsToldInTheErrorAndNowhereElse) {
  testing::internal::CaptureStderr();
  testing::internal::CaptureStdout();
  for (const Sample& sample : Samples(SmoothPicture(40, 24))) {
    for (size_t size = 0; size < sample.bytes.size(); size += 7) {
      ExpectRefused(sample.format, sample.bytes.substr(0, size), "");
    }
  }
  std::string sum = PngFile(SmoothPicture(8, 8));
  sum[sum.size() - 20] ^= 1;
  ExpectRefused(ImageFormat::kPng, sum, "damaged");
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "");
  EXPECT_EQ(testing::internal::GetCapturedStdout(), "");
}

TEST(ImageDecoderTest, RandomlyDamagedFilesAreDecodedOrRefusedAndNothingElse) {
  std::mt19937 random(7);
  int refused = 0;
  for (const Sample& sample : Samples(SmoothPicture(64, 48))) {
    for (int i = 0; i < 100; ++i) {
      std::string damaged = sample.bytes;
      for (int k = 0; k < 4; ++k) damaged[random() % damaged.size()] = static_cast<char>(random());
      try {
        Decoded(sample.format, damaged);
      } catch (const InputError&) {
        ++refused;
      }
    }
  }
  EXPECT_GT(refused, 0);
}

TEST(ImageDecoderTest, RawRowsMustBeAsManyBytesAsTheirSizeSays) {
  Frame frame;
  TakeRawImage(2, 3, std::string(18, 'a'), kLimits, frame);
  EXPECT_EQ(frame.rgb.size(), 18u);
  EXPECT_THROW(TakeRawImage(2, 3, std::string(17, 'a'), kLimits, frame), InputError);
  EXPECT_THROW(TakeRawImage(0, 3, "", kLimits, frame), InputError);
  EXPECT_THROW(TakeRawImage(-1, -1, "abc", kLimits, frame), InputError);
  // Products that overflow 32 and 64 bits to something small.
  EXPECT_THROW(TakeRawImage(65536, 65536, "", kLimits, frame), InputError);
  EXPECT_THROW(TakeRawImage(int64_t{1} << 40, int64_t{1} << 40, "", kLimits, frame), InputError);
}

}  // namespace
}  // namespace sluice
