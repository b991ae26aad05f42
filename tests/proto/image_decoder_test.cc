#include "proto/image_decoder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <opencv2/imgcodecs.hpp>
#include <random>
#include <string>
#include <vector>

#include "runtime/error.h"

namespace sluice {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kMaxPixels = 1 << 20;
constexpr ImageFormat kFormats[] = {ImageFormat::kJpeg, ImageFormat::kPng, ImageFormat::kWebp};
constexpr const char* kEndings[] = {".jpg", ".png", ".webp"};

// Smooth, so that lossy files come close to it.
cv::Mat Picture(int width, int height) {
  cv::Mat image(height, width, CV_8UC3);
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      image.at<cv::Vec3b>(y, x) =
          cv::Vec3b(200, static_cast<uint8_t>(40 + 2 * y), static_cast<uint8_t>(20 + 3 * x));
    }
  }
  return image;
}

std::string File(ImageFormat format, const cv::Mat& image) {
  std::vector<uint8_t> bytes;
  cv::imencode(kEndings[static_cast<int>(format)], image, bytes);
  return {bytes.begin(), bytes.end()};
}

void ExpectRefused(ImageFormat format, const std::string& bytes, const std::string& part) {
  Frame frame;
  try {
    DecodeImage(format, bytes, kMaxPixels, frame);
    ADD_FAILURE() << "was taken; expected: " << part;
  } catch (const InputError& error) {
    EXPECT_THAT(error.what(), HasSubstr(part));
  }
}

TEST(ImageDecoderTest, EveryFormatComesOutAsRedGreenBlueRows) {
  const cv::Mat image = Picture(37, 22);
  for (const ImageFormat format : kFormats) {
    Frame frame;
    DecodeImage(format, File(format, image), kMaxPixels, frame);
    ASSERT_EQ(frame.width, 37);
    ASSERT_EQ(frame.height, 22);
    ASSERT_EQ(frame.rgb.size(), 37u * 22 * 3);
    for (int y = 0; y < 22; y += 7) {
      for (int x = 0; x < 37; x += 6) {
        const cv::Vec3b& bgr = image.at<cv::Vec3b>(y, x);
        for (int c = 0; c < 3; ++c) {
          // Chroma is stored at half the resolution: neighbours differ by 3 a column.
          EXPECT_NEAR(frame.rgb[(y * 37 + x) * 3 + c], bgr[2 - c], 16) << y << " " << x << " " << c;
        }
      }
    }
  }
}

TEST(ImageDecoderTest, TheHeaderTellsTheSize) {
  for (const ImageFormat format : kFormats) {
    const auto size = ReadImageSize(format, File(format, Picture(300, 17)));
    ASSERT_TRUE(size);
    EXPECT_EQ(size->width, 300);
    EXPECT_EQ(size->height, 17);
  }
}

TEST(ImageDecoderTest, APictureThatUnpacksTooLargeIsRefusedByItsHeader) {
  for (const ImageFormat format : kFormats) {
    ExpectRefused(format, File(format, cv::Mat(1100, 1000, CV_8UC3, cv::Scalar(1, 2, 3))),
                  "got 1000x1100");
  }
  // A header that promises 2^31 x 2^31 pixels, with nothing behind it.
  std::string png = File(ImageFormat::kPng, Picture(8, 8)).substr(0, 40);
  for (int i = 16; i < 24; ++i) png[i] = static_cast<char>(i % 4 == 0 ? 0x7F : 0xFF);
  ExpectRefused(ImageFormat::kPng, png, "expected 1 to");
}

TEST(ImageDecoderTest, FilesThatEndEarlyOrAreOfAnotherKindAreRefused) {
  for (const ImageFormat format : kFormats) {
    const std::string file = File(format, Picture(64, 48));
    ExpectRefused(format, file.substr(0, 20), "[frame]");
    ExpectRefused(format, "", "expected a");
    ExpectRefused(format, std::string(1000, 'x'), "expected a");
    const auto other = format == ImageFormat::kPng ? ImageFormat::kJpeg : ImageFormat::kPng;
    ExpectRefused(format, File(other, Picture(64, 48)), "expected a");
  }
}

TEST(ImageDecoderTest, RandomlyDamagedFilesAreDecodedOrRefusedAndNothingElse) {
  std::mt19937 random(7);
  int refused = 0;
  for (const ImageFormat format : kFormats) {
    const std::string file = File(format, Picture(64, 48));
    for (int i = 0; i < 200; ++i) {
      std::string damaged = file;
      for (int k = 0; k < 4; ++k) damaged[random() % damaged.size()] = static_cast<char>(random());
      Frame frame;
      try {
        DecodeImage(format, damaged, kMaxPixels, frame);
        EXPECT_EQ(frame.rgb.size(), static_cast<size_t>(frame.width) * frame.height * 3);
      } catch (const InputError&) {
        ++refused;
      }
    }
  }
  EXPECT_GT(refused, 0);
}

TEST(ImageDecoderTest, RawRowsMustBeAsManyBytesAsTheirSizeSays) {
  Frame frame;
  TakeRawImage(2, 3, std::string(18, 'a'), kMaxPixels, frame);
  EXPECT_EQ(frame.rgb.size(), 18u);
  EXPECT_THROW(TakeRawImage(2, 3, std::string(17, 'a'), kMaxPixels, frame), InputError);
  EXPECT_THROW(TakeRawImage(0, 3, "", kMaxPixels, frame), InputError);
  EXPECT_THROW(TakeRawImage(-1, -1, "abc", kMaxPixels, frame), InputError);
  // Products that overflow 32 and 64 bits to something small.
  EXPECT_THROW(TakeRawImage(65536, 65536, "", kMaxPixels, frame), InputError);
  EXPECT_THROW(TakeRawImage(int64_t{1} << 40, int64_t{1} << 40, "", kMaxPixels, frame), InputError);
}

}  // namespace
}  // namespace sluice
