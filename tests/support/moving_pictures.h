// Moving pictures made by code.
#ifndef SLUICE_TESTS_SUPPORT_MOVING_PICTURES_H_
#define SLUICE_TESTS_SUPPORT_MOVING_PICTURES_H_

#include <png.h>
#include <webp/encode.h>
#include <webp/mux.h>
#include <zlib.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

namespace sluice::testing {

// A WebP of 32x24: grey pictures of `levels`, picture i from i * i * 100 ms on.
inline std::string MovingWebp(const std::vector<uint8_t>& levels) {
  constexpr int kWidth = 32, kHeight = 24;
  WebPAnimEncoderOptions options;
  if (!WebPAnimEncoderOptionsInit(&options)) std::abort();
  WebPAnimEncoder* encoder = WebPAnimEncoderNew(kWidth, kHeight, &options);
  const int count = static_cast<int>(levels.size());
  for (int i = 0; i < count; ++i) {
    WebPConfig config;
    WebPPicture picture;
    if (!WebPConfigInit(&config) || !WebPPictureInit(&picture)) std::abort();
    config.lossless = 1;
    picture.use_argb = 1;
    picture.width = kWidth;
    picture.height = kHeight;
    if (!WebPPictureAlloc(&picture)) std::abort();
    std::fill_n(picture.argb, picture.argb_stride * kHeight, 0xff000000u + 0x010101u * levels[i]);
    if (!WebPAnimEncoderAdd(encoder, &picture, i * i * 100, &config)) std::abort();
    WebPPictureFree(&picture);
  }
  WebPAnimEncoderAdd(encoder, nullptr, count * count * 100, nullptr);
  WebPData data;
  WebPDataInit(&data);
  if (!WebPAnimEncoderAssemble(encoder, &data)) std::abort();
  std::string bytes(reinterpret_cast<const char*>(data.bytes), data.size);
  WebPDataClear(&data);
  WebPAnimEncoderDelete(encoder);
  return bytes;
}

struct PngPart {
  int width, height, x, y;
  uint32_t rgba;  // of all its pixels, 0xRRGGBBAA
  int disposal = 0, blend = 0;
  int milliseconds = 100;
};

inline std::string PngNumber(uint32_t value, int bytes = 4) {
  std::string text;
  for (int i = bytes - 1; i >= 0; --i) text += static_cast<char>(value >> 8 * i & 0xff);
  return text;
}

inline std::string PngChunk(const std::string& type, const std::string& data) {
  const std::string both = type + data;
  const auto sum = crc32(0, reinterpret_cast<const Bytef*>(both.data()), both.size());
  return PngNumber(static_cast<uint32_t>(data.size())) + both +
         PngNumber(static_cast<uint32_t>(sum));
}

// A whole PNG of one colour.
inline std::string StillPng(int width, int height, uint32_t rgba) {
  std::string pixels;
  for (int i = 0; i < width * height; ++i) pixels += PngNumber(rgba);
  png_image image = {};
  image.version = PNG_IMAGE_VERSION;
  image.width = static_cast<png_uint_32>(width);
  image.height = static_cast<png_uint_32>(height);
  image.format = PNG_FORMAT_RGBA;
  png_alloc_size_t size = 0;
  if (!png_image_write_to_memory(&image, nullptr, &size, 0, pixels.data(), 0, nullptr)) {
    std::abort();
  }
  std::string bytes(size, '\0');
  if (!png_image_write_to_memory(&image, bytes.data(), &size, 0, pixels.data(), 0, nullptr)) {
    std::abort();
  }
  return bytes;
}

// The contents of its IDAT chunks.
inline std::string PngData(const std::string& png) {
  std::string data;
  for (size_t at = 8; at + 12 <= png.size();) {
    size_t size = 0;
    for (int i = 0; i < 4; ++i) size = size << 8 | static_cast<uint8_t>(png[at + i]);
    if (png.compare(at + 4, 4, "IDAT") == 0) data += png.substr(at + 8, size);
    at += 12 + size;
  }
  return data;
}

// A moving PNG. With `hidden` it begins with a picture for readers that know of no moving ones.
inline std::string MovingPng(int width, int height, const std::vector<PngPart>& parts,
                             bool hidden = false) {
  const std::string header = PngNumber(static_cast<uint32_t>(width)) +
                             PngNumber(static_cast<uint32_t>(height)) +
                             std::string("\x08\x06\0\0\0", 5);
  std::string bytes =
      "\x89PNG\r\n\x1a\n" + PngChunk("IHDR", header) +
      PngChunk("acTL", PngNumber(static_cast<uint32_t>(parts.size())) + PngNumber(0));
  if (hidden) bytes += PngChunk("IDAT", PngData(StillPng(width, height, 0xff00ffff)));
  uint32_t sequence = 0;
  bool first = !hidden;
  for (const PngPart& part : parts) {
    std::string control = PngNumber(sequence++);
    for (const int number : {part.width, part.height, part.x, part.y}) {
      control += PngNumber(static_cast<uint32_t>(number));
    }
    control += PngNumber(static_cast<uint32_t>(part.milliseconds), 2) + PngNumber(1000, 2);
    control += static_cast<char>(part.disposal);
    control += static_cast<char>(part.blend);
    bytes += PngChunk("fcTL", control);
    const std::string data = PngData(StillPng(part.width, part.height, part.rgba));
    if (first) {
      bytes += PngChunk("IDAT", data);
    } else {  // in two chunks, as long pictures are
      const size_t half = data.size() / 2;
      bytes += PngChunk("fdAT", PngNumber(sequence++) + data.substr(0, half));
      bytes += PngChunk("fdAT", PngNumber(sequence++) + data.substr(half));
    }
    first = false;
  }
  return bytes + PngChunk("IEND", "");
}

}  // namespace sluice::testing

#endif  // SLUICE_TESTS_SUPPORT_MOVING_PICTURES_H_
