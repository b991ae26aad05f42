// A moving PNG is a PNG whose further pictures lie in chunks that other readers pass over (APNG,
// part of PNG's third edition). Each is handed to libpng as a PNG of its own and laid onto the
// canvas as its control chunk says.
#include <png.h>
#include <zlib.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "runtime/error.h"
#include "streaming/moving_picture.h"

namespace sluice {
namespace {

using std::chrono::nanoseconds;

constexpr std::string_view kSignature("\x89PNG\r\n\x1a\n", 8);
constexpr size_t kHeaderBytes = 13, kControlBytes = 26, kAroundChunk = 12;

uint32_t BigEndian(std::string_view bytes, size_t at, size_t count = 4) {
  uint32_t value = 0;
  for (size_t i = 0; i < count; ++i) value = value << 8 | static_cast<uint8_t>(bytes[at + i]);
  return value;
}

void AppendBigEndian(std::string& to, uint32_t value) {
  for (int shift = 24; shift >= 0; shift -= 8) to += static_cast<char>(value >> shift & 0xff);
}

// Of a chunk's type and data, which follow each other.
uint32_t Checksum(std::string_view type_and_data) {
  return static_cast<uint32_t>(crc32(0, reinterpret_cast<const Bytef*>(type_and_data.data()),
                                     static_cast<uInt>(type_and_data.size())));
}

void AppendChunk(std::string& to, std::string_view type, std::string_view data) {
  AppendBigEndian(to, static_cast<uint32_t>(data.size()));
  const size_t at = to.size();
  to.append(type).append(data);
  AppendBigEndian(to, Checksum(std::string_view(to).substr(at)));
}

struct Chunk {
  std::string_view type, data;
};

enum class Disposal { kKeep, kClear, kRestore };  // of a picture, before the next one

struct Control {
  uint32_t width, height, x, y;
  nanoseconds duration;
  Disposal disposal;
  bool over;  // blended onto the canvas, else put in its place
};

class MovingPng final : public MovingPicture {
 public:
  MovingPng(std::string bytes, int max_side_pixels) : bytes_(std::move(bytes)) {
    const std::optional<Chunk> header = bytes_.starts_with(kSignature) ? NextChunk() : std::nullopt;
    if (!header || header->type != "IHDR" || header->data.size() != kHeaderBytes) {
      throw Error("damaged: its header cannot be read");
    }
    header_ = header->data;
    width_ = BigEndian(header_, 0);
    height_ = BigEndian(header_, 4);
    CheckSides(width_, height_, max_side_pixels);
    if (width_ == 0 || height_ == 0) throw Error("damaged: its pictures are of no size");
    canvas_.resize(size_t{4} * width_ * height_);
  }

  int width() const override { return static_cast<int>(width_); }
  int height() const override { return static_cast<int>(height_); }

  Picture Next() override {
    std::optional<Control> control;
    std::string coded;
    size_t before = at_;
    for (std::optional<Chunk> chunk; (chunk = NextChunk()); before = at_) {
      if (chunk->type == "fcTL") {
        if (control) {  // of the next picture
          at_ = before;
          break;
        }
        control = ReadControl(chunk->data);
      } else if (chunk->type == "IDAT") {
        // Without a control chunk before it, it is for readers that know of no moving pictures.
        if (control) coded += chunk->data;
      } else if (chunk->type == "fdAT") {
        CheckSequence(chunk->data);
        if (control) coded += chunk->data.substr(4);
      } else if (chunk->type == "acTL" && chunk->data.size() == 8) {
        promised_ = BigEndian(chunk->data, 0);
      } else if (chunk->type == "PLTE" || chunk->type == "tRNS") {
        AppendChunk(palette_, chunk->type, chunk->data);
      }
    }
    if (!control) {
      if (damage_.empty() && shown_ < promised_) damage_ = "its last pictures are missing";
      if (damage_.empty()) return {};
      throw Error(damage_ + " (" + std::to_string(shown_) + " of " + std::to_string(promised_) +
                  " pictures can be read)");
    }
    Dispose();
    Show(*control, Decode(*control, coded));
    ++shown_;
    const Picture picture{
        .rgba = canvas_.data(), .begin = begin_, .end = begin_ + control->duration};
    // A picture may be said to last no time.
    begin_ += std::max<nanoseconds>(control->duration, std::chrono::milliseconds(1));
    return picture;
  }

 private:
  // None at the end, which is also where the file is damaged.
  std::optional<Chunk> NextChunk() {
    const std::string_view rest = std::string_view(bytes_).substr(at_);
    const size_t size = rest.size() < kAroundChunk ? 0 : BigEndian(rest, 0);
    if (!damage_.empty()) return std::nullopt;
    if (rest.size() < kAroundChunk || rest.size() - kAroundChunk < size) {
      damage_ = "its end is missing";
      return std::nullopt;
    }
    if (Checksum(rest.substr(4, 4 + size)) != BigEndian(rest, 8 + size)) {
      damage_ = "damaged: a checksum is wrong at byte " + std::to_string(at_);
      return std::nullopt;
    }
    const Chunk chunk{.type = rest.substr(4, 4), .data = rest.substr(8, size)};
    if (chunk.type == "IEND") return std::nullopt;
    at_ += kAroundChunk + size;
    return chunk;
  }

  void CheckSequence(std::string_view data) {
    if (data.size() < 4 || BigEndian(data, 0) != sequence_++) {
      throw Error("damaged: its pictures are out of order");
    }
  }

  Control ReadControl(std::string_view data) {
    CheckSequence(data);
    if (data.size() != kControlBytes) throw Error("damaged: a picture's size cannot be read");
    const uint32_t denominator = BigEndian(data, 22, 2);
    const int64_t disposal = data[24];
    const Control control{.width = BigEndian(data, 4),
                          .height = BigEndian(data, 8),
                          .x = BigEndian(data, 12),
                          .y = BigEndian(data, 16),
                          .duration = nanoseconds(int64_t{1000000000} * BigEndian(data, 20, 2) /
                                                  (denominator == 0 ? 100 : denominator)),
                          .disposal = disposal == 1   ? Disposal::kClear
                                      : disposal == 2 ? Disposal::kRestore
                                                      : Disposal::kKeep,
                          .over = data[25] == 1};
    if (control.width == 0 || control.height == 0 || control.x > width_ || control.y > height_ ||
        control.width > width_ - control.x || control.height > height_ - control.y) {
      throw Error("damaged: a picture of " + std::to_string(control.width) + "x" +
                  std::to_string(control.height) + " at " + std::to_string(control.x) + "," +
                  std::to_string(control.y) + " lies outside of " + std::to_string(width_) + "x" +
                  std::to_string(height_));
    }
    return control;
  }

  std::vector<uint8_t> Decode(const Control& control, std::string_view coded) const {
    std::string header, png(kSignature);
    AppendBigEndian(header, control.width);
    AppendBigEndian(header, control.height);
    header += header_.substr(8);
    AppendChunk(png, "IHDR", header);
    png += palette_;
    AppendChunk(png, "IDAT", coded);
    AppendChunk(png, "IEND", "");

    png_image image = {};
    image.version = PNG_IMAGE_VERSION;
    std::vector<uint8_t> rgba;
    if (png_image_begin_read_from_memory(&image, png.data(), png.size())) {
      image.format = PNG_FORMAT_RGBA;
      image.flags |= PNG_IMAGE_FLAG_16BIT_sRGB;
      rgba.resize(PNG_IMAGE_SIZE(image));
      if (png_image_finish_read(&image, nullptr, rgba.data(), 0, nullptr)) return rgba;
    }
    const std::string why = image.message;
    png_image_free(&image);
    throw Error("picture " + std::to_string(shown_) + " cannot be decoded: " + why);
  }

  // Ends the picture before.
  void Dispose() {
    if (shown_ == 0) return;
    const size_t row = size_t{4} * last_.width;
    for (uint32_t y = 0; y < last_.height && last_.disposal != Disposal::kKeep; ++y) {
      uint8_t* to = At(last_, y);
      if (last_.disposal == Disposal::kClear) {
        std::memset(to, 0, row);
      } else {
        std::memcpy(to, &covered_[row * y], row);
      }
    }
  }

  void Show(const Control& control, const std::vector<uint8_t>& rgba) {
    const size_t row = size_t{4} * control.width;
    last_ = control;
    if (control.disposal == Disposal::kRestore) covered_.resize(row * control.height);
    for (uint32_t y = 0; y < control.height; ++y) {
      uint8_t* to = At(control, y);
      if (control.disposal == Disposal::kRestore) std::memcpy(&covered_[row * y], to, row);
      const uint8_t* from = &rgba[row * y];
      if (control.over) {
        for (size_t i = 0; i < row; i += 4) Blend(from + i, to + i);
      } else {
        std::memcpy(to, from, row);
      }
    }
  }

  uint8_t* At(const Control& control, uint32_t y) {
    return &canvas_[4 * (size_t{control.y + y} * width_ + control.x)];
  }

  static void Blend(const uint8_t* from, uint8_t* to) {
    const int above = from[3] * 255, below = (255 - from[3]) * to[3], alpha = above + below;
    if (alpha == 0) return;
    for (int c = 0; c < 3; ++c) {
      to[c] = static_cast<uint8_t>((from[c] * above + to[c] * below + alpha / 2) / alpha);
    }
    to[3] = static_cast<uint8_t>((alpha + 127) / 255);
  }

  const std::string bytes_;
  size_t at_ = kSignature.size();
  std::string damage_;
  std::string_view header_;
  std::string palette_;  // chunks, for each picture
  uint32_t width_ = 0, height_ = 0, promised_ = 0, shown_ = 0, sequence_ = 0;
  nanoseconds begin_{0};
  std::vector<uint8_t> canvas_;  // [height, width, 4]
  Control last_ = {};
  std::vector<uint8_t> covered_;  // what the last picture covers, where it is to be restored
};

}  // namespace

std::unique_ptr<MovingPicture> ReadMovingPng(std::string bytes, int max_side_pixels) {
  return std::make_unique<MovingPng>(std::move(bytes), max_side_pixels);
}

}  // namespace sluice
