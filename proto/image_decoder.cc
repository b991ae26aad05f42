#include "proto/image_decoder.h"

#include <webp/decode.h>

#include <opencv2/imgcodecs.hpp>
#include <opencv2/imgproc.hpp>
#include <string>
#include <vector>

#include "runtime/error.h"

namespace sluice {
namespace {

int64_t Byte(std::string_view bytes, size_t i) { return static_cast<uint8_t>(bytes[i]); }

int64_t BigEndian(std::string_view bytes, size_t at, int count) {
  int64_t value = 0;
  for (int i = 0; i < count; ++i) value = value << 8 | Byte(bytes, at + i);
  return value;
}

// The first frame header (SOF) among the segments; libjpeg takes the same one.
std::optional<ImageSize> JpegSize(std::string_view bytes) {
  if (!bytes.starts_with("\xFF\xD8")) return std::nullopt;
  size_t at = 2;
  while (at + 4 <= bytes.size()) {
    if (Byte(bytes, at) != 0xFF) return std::nullopt;
    const int64_t marker = Byte(bytes, at + 1);
    if (marker == 0xFF) {  // a fill byte
      ++at;
      continue;
    }
    if (marker == 0x01 || (marker >= 0xD0 && marker <= 0xD8)) {  // stand alone
      at += 2;
      continue;
    }
    const bool frame =
        marker >= 0xC0 && marker <= 0xCF && marker != 0xC4 && marker != 0xC8 && marker != 0xCC;
    if (frame) {
      if (at + 9 > bytes.size()) return std::nullopt;
      return ImageSize{BigEndian(bytes, at + 7, 2), BigEndian(bytes, at + 5, 2)};
    }
    if (marker == 0xD9 || marker == 0xDA) return std::nullopt;  // pixels before any frame header
    at += 2 + static_cast<size_t>(BigEndian(bytes, at + 2, 2));
  }
  return std::nullopt;
}

std::optional<ImageSize> PngSize(std::string_view bytes) {
  using namespace std::string_view_literals;
  if (bytes.size() < 24 || !bytes.starts_with("\x89PNG\r\n\x1A\n"sv)) return std::nullopt;
  if (bytes.substr(12, 4) != "IHDR") return std::nullopt;
  return ImageSize{BigEndian(bytes, 16, 4), BigEndian(bytes, 20, 4)};
}

std::optional<ImageSize> WebpSize(std::string_view bytes) {
  int width = 0, height = 0;
  if (!WebPGetInfo(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size(), &width, &height)) {
    return std::nullopt;
  }
  return ImageSize{width, height};
}

// Not through OpenCV: it asks every decoder it has whether the bytes are its own, libwebp first,
// and where that refuses a damaged file others try it that nobody asked for (DICOM took 3 GB).
bool DecodeWebp(std::string_view bytes, ImageSize size, Frame& frame) {
  frame.width = static_cast<int>(size.width);
  frame.height = static_cast<int>(size.height);
  frame.rgb.resize(static_cast<size_t>(size.width * size.height * 3));
  return WebPDecodeRGBInto(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size(),
                           frame.rgb.data(), frame.rgb.size(), 3 * frame.width) != nullptr;
}

// JPEG and PNG. OpenCV takes the first decoder whose signature the bytes begin with, and
// ReadImageSize has seen that they begin with one of these two.
bool DecodeWithOpenCv(std::string_view bytes, ImageSize size, Frame& frame) {
  cv::Mat image;
  try {
    // OpenCV wants the bytes mutable but does not write them.
    const cv::Mat file(1, static_cast<int>(bytes.size()), CV_8UC1, const_cast<char*>(bytes.data()));
    image = cv::imdecode(file, cv::IMREAD_COLOR);
  } catch (const cv::Exception&) {
    return false;
  }
  const bool upright = image.cols == size.width && image.rows == size.height;
  const bool turned = image.cols == size.height && image.rows == size.width;
  if (image.empty() || image.type() != CV_8UC3 || (!upright && !turned)) return false;
  frame.width = image.cols;
  frame.height = image.rows;
  frame.rgb.resize(static_cast<size_t>(image.cols) * image.rows * 3);
  cv::Mat rgb(image.rows, image.cols, CV_8UC3, frame.rgb.data());
  cv::cvtColor(image, rgb, cv::COLOR_BGR2RGB);
  return true;
}

constexpr const char* kNames[] = {"JPEG", "PNG", "WebP"};

std::string Text(int64_t width, int64_t height) {
  return std::to_string(width) + "x" + std::to_string(height);
}

// Sides are checked alone first, so that their product cannot overflow.
void CheckSize(int64_t width, int64_t height, int64_t max_pixels) {
  if (width < 1 || height < 1 || width > max_pixels || height > max_pixels ||
      width * height > max_pixels) {
    throw InputError("[frame] expected 1 to " + std::to_string(max_pixels) + " pixels, got " +
                     Text(width, height) + "; send a smaller picture");
  }
}

}  // namespace

std::optional<ImageSize> ReadImageSize(ImageFormat format, std::string_view bytes) {
  switch (format) {
    case ImageFormat::kJpeg:
      return JpegSize(bytes);
    case ImageFormat::kPng:
      return PngSize(bytes);
    case ImageFormat::kWebp:
      return WebpSize(bytes);
  }
  return std::nullopt;
}

void DecodeImage(ImageFormat format, std::string_view bytes, int64_t max_pixels, Frame& frame) {
  const std::string name = kNames[static_cast<int>(format)];
  const auto size = ReadImageSize(format, bytes);
  if (!size) throw InputError("[frame] expected a " + name + " file, got other bytes");
  CheckSize(size->width, size->height, max_pixels);
  const bool decoded = format == ImageFormat::kWebp ? DecodeWebp(bytes, *size, frame)
                                                    : DecodeWithOpenCv(bytes, *size, frame);
  if (!decoded) throw InputError("[frame] the " + name + " file is damaged");
}

void TakeRawImage(int64_t width, int64_t height, std::string_view bytes, int64_t max_pixels,
                  Frame& frame) {
  CheckSize(width, height, max_pixels);
  if (bytes.size() != static_cast<size_t>(width * height * 3)) {
    throw InputError("[frame] expected " + std::to_string(width * height * 3) + " bytes for " +
                     Text(width, height) + " pixels, got " + std::to_string(bytes.size()));
  }
  frame.width = static_cast<int>(width);
  frame.height = static_cast<int>(height);
  frame.rgb.assign(bytes.begin(), bytes.end());
}

std::string EncodeJpeg(const Frame& frame) {
  // OpenCV wants the bytes mutable but does not write them.
  const cv::Mat rgb(frame.height, frame.width, CV_8UC3, const_cast<uint8_t*>(frame.rgb.data()));
  cv::Mat bgr;
  cv::cvtColor(rgb, bgr, cv::COLOR_RGB2BGR);
  std::vector<uint8_t> bytes;
  cv::imencode(".jpg", bgr, bytes, {cv::IMWRITE_JPEG_QUALITY, 95});
  return {bytes.begin(), bytes.end()};
}

}  // namespace sluice
