// JPEG, by libjpeg-turbo.
// clang-format off
#include <cstddef>
#include <cstdio>
#include <jpeglib.h>  // which needs the two before it
// clang-format on
#include <jerror.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "proto/exif.h"
#include "proto/image_codecs.h"
#include "runtime/error.h"

namespace sluice {
namespace {

using namespace std::string_view_literals;

constexpr int kExifMarker = JPEG_APP0 + 1;

// What the library calls when something is wrong. `base` is first: the library knows only that.
struct JpegErrors {
  jpeg_error_mgr base;
  CFailure failure;
};

[[noreturn]] void Fail(j_common_ptr info) {
  auto* const errors = reinterpret_cast<JpegErrors*>(info->err);
  char line[JMSG_LENGTH_MAX];
  info->err->format_message(info, line);
  std::snprintf(errors->failure.line, sizeof errors->failure.line, "%s", line);
  std::longjmp(errors->failure.back, 1);
}

jpeg_error_mgr* Install(JpegErrors& errors) {
  jpeg_std_error(&errors.base);
  errors.base.error_exit = Fail;
  errors.base.emit_message = [](j_common_ptr info, int level) {
    if (level < 0) Fail(info);  // a warning: from here on the library makes pixels up
  };
  errors.base.output_message = [](j_common_ptr) {};
  return &errors.base;
}

// Ink in both and in black over white paper.
uint8_t Light(int ink, int black) {
  const int product = (255 - ink) * (255 - black) + 127;
  return static_cast<uint8_t>(product / 255);
}

class JpegReader {
 public:
  JpegReader(std::string_view bytes, const ImageLimits& limits, Frame& frame)
      : bytes_(bytes), limits_(limits), frame_(frame), timer_(limits.seconds) {
    info_.err = Install(errors_);
  }
  JpegReader(const JpegReader&) = delete;
  JpegReader& operator=(const JpegReader&) = delete;
  ~JpegReader() {
    if (made_) jpeg_destroy_decompress(&info_);
  }

  Orientation Decode() {
    Call([&] { ReadHeader(); });
    CheckImageSize(info_.image_width, info_.image_height, limits_);
    ChooseColours();
    frame_.width = static_cast<int>(info_.image_width);
    frame_.height = static_cast<int>(info_.image_height);
    frame_.rgb.resize(size_t{3} * frame_.width * frame_.height);
    if (cmyk_) row_.resize(size_t{4} * frame_.width);
    // Of what the library keeps of a file with several scans: all coefficients.
    info_.mem->max_memory_to_use = static_cast<long>(
        std::max(limits_.bytes - static_cast<int64_t>(frame_.rgb.size()), int64_t{1}));
    Call([&] { ReadPixels(); });
    switch (outcome_) {
      case Outcome::kDone:
        break;
      case Outcome::kTooSlow:
        ThrowTooSlow("JPEG", limits_);
      case Outcome::kTooManyScans:
        throw InputError("[frame] expected a JPEG file of at most " +
                         std::to_string(limits_.scans) + " scans, got more; send a simpler one");
      case Outcome::kPartMissing:
        ThrowDamaged("JPEG", "it has no data for one of its colours");
    }
    return orientation_;
  }

 private:
  enum class Outcome { kDone, kTooSlow, kTooManyScans, kPartMissing };

  template <typename Work>
  void Call(const Work& work) {
    if (CallC(errors_.failure, work)) return;
    const int code = errors_.base.msg_code;
    if (code == JERR_NO_BACKING_STORE || code == JERR_OUT_OF_MEMORY) {
      throw InputError("[frame] decoding the JPEG file takes more than " +
                       std::to_string(limits_.bytes) +
                       " bytes of memory; send a smaller picture, or one that is not progressive");
    }
    ThrowDamaged("JPEG", errors_.failure.line);
  }

  void ReadHeader() {
    jpeg_create_decompress(&info_);
    made_ = true;
    jpeg_mem_src(&info_, reinterpret_cast<const uint8_t*>(bytes_.data()),
                 static_cast<unsigned long>(bytes_.size()));
    jpeg_save_markers(&info_, kExifMarker, 0xFFFF);
    jpeg_read_header(&info_, TRUE);
    for (auto* marker = info_.marker_list; marker != nullptr; marker = marker->next) {
      const std::string_view data(reinterpret_cast<const char*>(marker->data), marker->data_length);
      if (marker->marker != kExifMarker || !data.starts_with("Exif\0\0"sv)) continue;
      orientation_ = ExifOrientation(data);
      break;
    }
  }

  void ChooseColours() {
    switch (info_.jpeg_color_space) {
      case JCS_GRAYSCALE:
      case JCS_RGB:
      case JCS_YCbCr:
        info_.out_color_space = JCS_RGB;
        return;
      case JCS_CMYK:
      case JCS_YCCK:
        info_.out_color_space = JCS_CMYK;
        cmyk_ = true;
        return;
      default:
        throw InputError("[frame] expected a JPEG file in grey, YCbCr, RGB, CMYK or YCCK, got " +
                         std::to_string(info_.num_components) + " unknown components");
    }
  }

  // Progressive files and those with a scan for each colour: all scans are read before the first
  // row comes out, so that their number and their time can be bounded.
  Outcome ReadScans() {
    unsigned seen = 0;  // components whose mean values came
    info_.buffered_image = TRUE;
    jpeg_start_decompress(&info_);
    for (int status = JPEG_REACHED_SOS; status != JPEG_REACHED_EOI;
         status = jpeg_consume_input(&info_)) {
      if (timer_.Over()) return Outcome::kTooSlow;
      if (status != JPEG_REACHED_SOS) continue;
      if (info_.input_scan_number > limits_.scans) return Outcome::kTooManyScans;
      for (int i = 0; info_.Ss == 0 && i < info_.comps_in_scan; ++i) {
        seen |= 1u << info_.cur_comp_info[i]->component_index;
      }
    }
    if (seen != (1u << info_.num_components) - 1) return Outcome::kPartMissing;
    jpeg_start_output(&info_, info_.input_scan_number);
    return Outcome::kDone;
  }

  void ReadPixels() {
    const bool several = jpeg_has_multiple_scans(&info_);
    if (several) {
      outcome_ = ReadScans();
      if (outcome_ != Outcome::kDone) return;
    } else {
      jpeg_start_decompress(&info_);
    }
    while (info_.output_scanline < info_.output_height) {
      if (timer_.Over()) {
        outcome_ = Outcome::kTooSlow;
        return;
      }
      uint8_t* const to = frame_.rgb.data() + size_t{3} * frame_.width * info_.output_scanline;
      JSAMPROW row = cmyk_ ? row_.data() : to;
      jpeg_read_scanlines(&info_, &row, 1);
      if (cmyk_) ConvertRow(to);
    }
    if (several) jpeg_finish_output(&info_);
    jpeg_finish_decompress(&info_);  // to the end of the file
  }

  // Adobe's programs, and all that follow them, store light in place of ink.
  void ConvertRow(uint8_t* to) const {
    const int flip = info_.saw_Adobe_marker ? 255 : 0;
    for (int x = 0; x < frame_.width; ++x) {
      const uint8_t* from = row_.data() + 4 * x;
      for (int c = 0; c < 3; ++c) to[3 * x + c] = Light(from[c] ^ flip, from[3] ^ flip);
    }
  }

  const std::string_view bytes_;
  const ImageLimits& limits_;
  Frame& frame_;
  DecodeTimer timer_;
  JpegErrors errors_ = {};
  jpeg_decompress_struct info_ = {};
  bool made_ = false, cmyk_ = false;
  Orientation orientation_ = Orientation::kUpright;
  Outcome outcome_ = Outcome::kDone;
  std::vector<uint8_t> row_;  // of a CMYK picture
};

}  // namespace

Orientation DecodeJpeg(std::string_view bytes, const ImageLimits& limits, Frame& frame) {
  return JpegReader(bytes, limits, frame).Decode();
}

std::string EncodeJpeg(const Frame& frame) {
  constexpr int kQuality = 95;
  if (frame.rgb.empty()) throw Error("[encode_jpeg] expected a picture, got an empty one");
  JpegErrors errors = {};
  jpeg_compress_struct info = {};
  info.err = Install(errors);
  unsigned char* bytes = nullptr;
  unsigned long size = 0;
  const bool done = CallC(errors.failure, [&] {
    jpeg_create_compress(&info);
    jpeg_mem_dest(&info, &bytes, &size);
    info.image_width = static_cast<JDIMENSION>(frame.width);
    info.image_height = static_cast<JDIMENSION>(frame.height);
    info.input_components = 3;
    info.in_color_space = JCS_RGB;
    jpeg_set_defaults(&info);
    jpeg_set_quality(&info, kQuality, TRUE);
    jpeg_start_compress(&info, TRUE);
    while (info.next_scanline < info.image_height) {
      // The library wants the bytes mutable but does not write them.
      JSAMPROW row =
          const_cast<uint8_t*>(frame.rgb.data()) + size_t{3} * frame.width * info.next_scanline;
      jpeg_write_scanlines(&info, &row, 1);
    }
    jpeg_finish_compress(&info);
  });
  jpeg_destroy_compress(&info);
  std::string file(reinterpret_cast<const char*>(bytes), done ? size : 0);
  std::free(bytes);
  if (!done) throw Error(std::string("[encode_jpeg] ") + errors.failure.line);
  return file;
}

}  // namespace sluice
