// PNG, by libpng.
#include <png.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <string>

#include "proto/exif.h"
#include "proto/image_codecs.h"
#include "runtime/error.h"

namespace sluice {
namespace {

class PngReader {
 public:
  PngReader(std::string_view bytes, const ImageLimits& limits, Frame& frame)
      : bytes_(bytes), limits_(limits), frame_(frame), timer_(limits.seconds) {}
  PngReader(const PngReader&) = delete;
  PngReader& operator=(const PngReader&) = delete;
  ~PngReader() {
    if (png_ != nullptr) png_destroy_read_struct(&png_, &info_, nullptr);
  }

  Orientation Decode() {
    Call([&] { ReadHeader(); });
    const int64_t width = png_get_image_width(png_, info_);
    const int64_t height = png_get_image_height(png_, info_);
    CheckImageSize(width, height, limits_);
    if (3 * width * height + kRowsBytes * width > limits_.bytes) {
      throw InputError("[frame] decoding the PNG file takes more than " +
                       std::to_string(limits_.bytes) + " bytes of memory; send a smaller picture");
    }
    frame_.width = static_cast<int>(width);
    frame_.height = static_cast<int>(height);
    frame_.rgb.resize(static_cast<size_t>(3 * width * height));
    Call([&] { ReadPixels(); });
    return orientation_;
  }

 private:
  // A pixel of the few rows that the library holds: at most 8 bytes in each of about 4.
  static constexpr int64_t kRowsBytes = 32;

  template <typename Work>
  void Call(const Work& work) {
    if (CallC(failure_, work)) return;
    if (too_slow_) ThrowTooSlow("PNG", limits_);
    ThrowDamaged("PNG", failure_.line);
  }

  // What the library only warns of is damage as well.
  static void Fail(png_structp png, png_const_charp line) {
    auto& failure = static_cast<PngReader*>(png_get_error_ptr(png))->failure_;
    std::snprintf(failure.line, sizeof failure.line, "%s", line);
    std::longjmp(failure.back, 1);
  }

  // Also where time is looked at: a few bytes may unpack into many, but no picture is unpacked
  // without being read.
  static void Read(png_structp png, png_bytep to, size_t size) {
    auto* const self = static_cast<PngReader*>(png_get_io_ptr(png));
    self->too_slow_ = self->timer_.Over();
    if (self->too_slow_) png_error(png, "it takes too long");
    if (size > self->bytes_.size() - self->at_) png_error(png, "it ends early");
    std::memcpy(to, self->bytes_.data() + self->at_, size);
    self->at_ += size;
  }

  void ReadHeader() {
    png_ = png_create_read_struct(PNG_LIBPNG_VER_STRING, this, Fail, Fail);
    info_ = png_ == nullptr ? nullptr : png_create_info_struct(png_);
    if (info_ == nullptr) {
      std::snprintf(failure_.line, sizeof failure_.line, "there is no memory for it");
      std::longjmp(failure_.back, 1);
    }
    png_set_read_fn(png_, this, Read);
    png_set_user_limits(png_, PNG_UINT_31_MAX, PNG_UINT_31_MAX);  // ours are checked in their place
    // Text, profiles and all else that is not pixels is passed over, neither unpacked nor kept.
    png_set_keep_unknown_chunks(png_, PNG_HANDLE_CHUNK_NEVER, nullptr, -1);
    png_set_keep_unknown_chunks(png_, PNG_HANDLE_CHUNK_AS_DEFAULT,
                                reinterpret_cast<png_const_bytep>("eXIf"), 1);
    png_read_info(png_, info_);
  }

  void ReadPixels() {
    png_set_palette_to_rgb(png_);
    png_set_expand_gray_1_2_4_to_8(png_);
    png_set_gray_to_rgb(png_);
    png_set_strip_16(png_);
    png_set_strip_alpha(png_);
    const int passes = png_set_interlace_handling(png_);
    png_read_update_info(png_, info_);
    if (png_get_rowbytes(png_, info_) != size_t{3} * frame_.width) {
      png_error(png_, "its rows are of another length than its size says");
    }
    for (int pass = 0; pass < passes; ++pass) {
      for (int y = 0; y < frame_.height; ++y) {
        png_read_row(png_, frame_.rgb.data() + size_t{3} * frame_.width * y, nullptr);
      }
    }
    png_read_end(png_, info_);
    png_uint_32 size = 0;
    png_bytep exif = nullptr;
    if (png_get_eXIf_1(png_, info_, &size, &exif) != 0) {
      orientation_ = ExifOrientation({reinterpret_cast<const char*>(exif), size});
    }
  }

  const std::string_view bytes_;
  const ImageLimits& limits_;
  Frame& frame_;
  DecodeTimer timer_;
  size_t at_ = 0;  // of the bytes
  bool too_slow_ = false;
  CFailure failure_ = {};
  png_structp png_ = nullptr;
  png_infop info_ = nullptr;
  Orientation orientation_ = Orientation::kUpright;
};

}  // namespace

Orientation DecodePng(std::string_view bytes, const ImageLimits& limits, Frame& frame) {
  return PngReader(bytes, limits, frame).Decode();
}

}  // namespace sluice
