// Picture files made by code, whole ones and hostile ones. For the service's tests and the fuzzers'
// seeds.
#ifndef SLUICE_TESTS_SUPPORT_PICTURE_FILES_H_
#define SLUICE_TESTS_SUPPORT_PICTURE_FILES_H_

// clang-format off
#include <cstddef>
#include <cstdio>
#include <jpeglib.h>  // which needs the two before it
// clang-format on
#include <png.h>
#include <webp/encode.h>
#include <zlib.h>

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "vision/frame.h"

namespace sluice {

// Smooth, so that lossy files come close to it.
inline Frame SmoothPicture(int width, int height) {
  Frame frame;
  frame.width = width;
  frame.height = height;
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      for (const int value : {20 + 3 * x, 40 + 2 * y, 200}) {
        frame.rgb.push_back(static_cast<uint8_t>(value));
      }
    }
  }
  return frame;
}

inline std::string BigEndian(uint64_t value, int bytes) {
  std::string text;
  for (int i = bytes - 1; i >= 0; --i) text += static_cast<char>(value >> (8 * i));
  return text;
}

inline std::string LittleEndian(uint64_t value, int bytes) {
  const std::string text = BigEndian(value, bytes);
  return {text.rbegin(), text.rend()};
}

// A TIFF file with an orientation and nothing else.
inline std::string OrientationTiff(int orientation, bool big_endian = true) {
  const auto number = big_endian ? BigEndian : LittleEndian;
  return std::string(big_endian ? "MM" : "II") + number(42, 2) + number(8, 4) + number(1, 2) +
         number(0x0112, 2) + number(3, 2) + number(1, 4) + number(orientation, 2) + number(0, 2) +
         number(0, 4);
}

// ---- JPEG ------------------------------------------------------------------------------------

// values: [height, width, components of `from`]. set: called after the defaults.
inline std::string JpegFile(int width, int height, J_COLOR_SPACE from, const uint8_t* values,
                            const std::function<void(jpeg_compress_struct&)>& set = {}) {
  jpeg_compress_struct info;
  jpeg_error_mgr errors;
  info.err = jpeg_std_error(&errors);
  jpeg_create_compress(&info);
  unsigned char* bytes = nullptr;
  unsigned long size = 0;
  jpeg_mem_dest(&info, &bytes, &size);
  info.image_width = width;
  info.image_height = height;
  info.input_components = from == JCS_CMYK ? 4 : from == JCS_GRAYSCALE ? 1 : 3;
  info.in_color_space = from;
  jpeg_set_defaults(&info);
  jpeg_set_quality(&info, 95, TRUE);
  if (set) set(info);
  jpeg_start_compress(&info, TRUE);
  while (info.next_scanline < info.image_height) {
    JSAMPROW row = const_cast<uint8_t*>(values) +
                   size_t{1} * info.next_scanline * width * info.input_components;
    jpeg_write_scanlines(&info, &row, 1);
  }
  jpeg_finish_compress(&info);
  jpeg_destroy_compress(&info);
  std::string file(reinterpret_cast<const char*>(bytes), size);
  std::free(bytes);
  return file;
}
inline std::string JpegFile(const Frame& frame,
                            const std::function<void(jpeg_compress_struct&)>& set = {}) {
  return JpegFile(frame.width, frame.height, JCS_RGB, frame.rgb.data(), set);
}
inline std::string ProgressiveJpegFile(const Frame& frame) {
  return JpegFile(frame, [](jpeg_compress_struct& info) { jpeg_simple_progression(&info); });
}
// With a scan for each coefficient of each colour: 190, in a right order.
inline std::string JpegFileOfManyScans(const Frame& frame) {
  std::vector<jpeg_scan_info> scans = {{3, {0, 1, 2, 0}, 0, 0, 0, 0}};
  for (int component = 0; component < 3; ++component) {
    for (int k = 1; k < 64; ++k) scans.push_back({1, {component, 0, 0, 0}, k, k, 0, 0});
  }
  return JpegFile(frame, [&](jpeg_compress_struct& info) {
    info.scan_info = scans.data();
    info.num_scans = static_cast<int>(scans.size());
  });
}
// Right after the file's first two bytes.
inline std::string WithJpegSegment(const std::string& file, int marker, const std::string& data) {
  return file.substr(0, 2) + "\xFF" + static_cast<char>(marker) + BigEndian(data.size() + 2, 2) +
         data + file.substr(2);
}

// ---- PNG -------------------------------------------------------------------------------------

// rows: as they are stored, `row_bytes` each. Palettes are all greys.
inline std::string PngFile(int width, int height, int color_type, int depth,
                           const std::vector<uint8_t>& rows, size_t row_bytes,
                           bool interlaced = false) {
  std::string file;
  png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, nullptr, nullptr, nullptr);
  png_infop info = png_create_info_struct(png);
  png_set_write_fn(
      png, &file,
      [](png_structp to, png_bytep data, size_t size) {
        static_cast<std::string*>(png_get_io_ptr(to))
            ->append(reinterpret_cast<const char*>(data), size);
      },
      nullptr);
  png_set_user_limits(png, PNG_UINT_31_MAX, PNG_UINT_31_MAX);
  png_set_IHDR(png, info, width, height, depth, color_type,
               interlaced ? PNG_INTERLACE_ADAM7 : PNG_INTERLACE_NONE, PNG_COMPRESSION_TYPE_DEFAULT,
               PNG_FILTER_TYPE_DEFAULT);
  if (color_type == PNG_COLOR_TYPE_PALETTE) {
    std::vector<png_color> palette;
    for (int i = 0; i < 1 << depth; ++i) {
      const auto grey = static_cast<png_byte>(i * 255 / ((1 << depth) - 1));
      palette.push_back({grey, grey, grey});
    }
    png_set_PLTE(png, info, palette.data(), static_cast<int>(palette.size()));
  }
  png_write_info(png, info);
  const int passes = png_set_interlace_handling(png);
  for (int pass = 0; pass < passes; ++pass) {
    for (int y = 0; y < height; ++y) png_write_row(png, rows.data() + row_bytes * y);
  }
  png_write_end(png, nullptr);
  png_destroy_write_struct(&png, &info);
  return file;
}
inline std::string PngFile(const Frame& frame, bool interlaced = false) {
  return PngFile(frame.width, frame.height, PNG_COLOR_TYPE_RGB, 8, frame.rgb,
                 size_t{3} * frame.width, interlaced);
}
inline std::string PngChunk(const std::string& type, const std::string& data) {
  const std::string body = type + data;
  const uLong sum = crc32(0, reinterpret_cast<const Bytef*>(body.data()), body.size());
  return BigEndian(data.size(), 4) + body + BigEndian(sum, 4);
}
// Right after the header.
inline std::string WithPngChunks(const std::string& file, const std::string& chunks) {
  constexpr size_t kHead = 8 + 25;
  return file.substr(0, kHead) + chunks + file.substr(kHead);
}
// The same file with another size in its header.
inline std::string WithPngSize(const std::string& file, uint32_t width, uint32_t height) {
  const std::string header = BigEndian(width, 4) + BigEndian(height, 4) + file.substr(24, 5);
  return file.substr(0, 8) + PngChunk("IHDR", header) + file.substr(8 + 25);
}
inline std::string Deflated(const std::string& data) {
  uLongf size = compressBound(data.size());
  std::string out(size, '\0');
  compress2(reinterpret_cast<Bytef*>(out.data()), &size,
            reinterpret_cast<const Bytef*>(data.data()), data.size(), 9);
  out.resize(size);
  return out;
}

// ---- WebP ------------------------------------------------------------------------------------

inline std::string WebpFile(const Frame& frame, bool lossless) {
  uint8_t* bytes = nullptr;
  const size_t size = lossless ? WebPEncodeLosslessRGB(frame.rgb.data(), frame.width, frame.height,
                                                       3 * frame.width, &bytes)
                               : WebPEncodeRGB(frame.rgb.data(), frame.width, frame.height,
                                               3 * frame.width, 95, &bytes);
  std::string file(reinterpret_cast<const char*>(bytes), size);
  WebPFree(bytes);
  return file;
}
inline std::string WebpChunk(const std::string& type, const std::string& data) {
  return type + LittleEndian(data.size(), 4) + data + std::string(data.size() % 2, '\0');
}
// The extended form of a simple file, with EXIF data after its picture.
inline std::string WithWebpExif(const Frame& frame, const std::string& file,
                                const std::string& exif) {
  constexpr int kExifFlag = 8;
  const std::string head = LittleEndian(kExifFlag, 4) + LittleEndian(frame.width - 1, 3) +
                           LittleEndian(frame.height - 1, 3);
  const std::string body =
      "WEBP" + WebpChunk("VP8X", head) + file.substr(12) + WebpChunk("EXIF", exif);
  return "RIFF" + LittleEndian(body.size(), 4) + body;
}

}  // namespace sluice

#endif  // SLUICE_TESTS_SUPPORT_PICTURE_FILES_H_
