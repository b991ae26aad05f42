// WebP, by libwebp.
#include <webp/decode.h>
#include <webp/demux.h>

#include <algorithm>
#include <memory>
#include <string>

#include "proto/exif.h"
#include "proto/image_codecs.h"
#include "runtime/error.h"

namespace sluice {
namespace {

using namespace std::string_view_literals;

struct DemuxerDelete {
  void operator()(WebPDemuxer* demuxer) const { WebPDemuxDelete(demuxer); }
};
using DemuxerPtr = std::unique_ptr<WebPDemuxer, DemuxerDelete>;

const uint8_t* Bytes(std::string_view data) {
  return reinterpret_cast<const uint8_t*>(data.data());
}

// A still picture's own chunk, which is all that is decoded: no alpha, which would be left out.
std::string_view PictureChunk(const WebPDemuxer* demuxer) {
  WebPIterator iterator;
  if (WebPDemuxGetFrame(demuxer, 1, &iterator) == 0) ThrowDamaged("WebP", "it has no picture");
  std::string_view chunk(reinterpret_cast<const char*>(iterator.fragment.bytes),
                         iterator.fragment.size);
  WebPDemuxReleaseIterator(&iterator);
  constexpr size_t kHead = 8;
  if (chunk.starts_with("ALPH"sv) && chunk.size() >= kHead) {
    size_t size = 0;  // little-endian; a chunk of an odd size is padded
    for (int i = 3; i >= 0; --i) size = size << 8 | static_cast<uint8_t>(chunk[4 + i]);
    chunk.remove_prefix(std::min(chunk.size(), kHead + size + size % 2));
  }
  return chunk;
}

Orientation StoredOrientation(const WebPDemuxer* demuxer) {
  WebPChunkIterator iterator;
  if (WebPDemuxGetChunk(demuxer, "EXIF", 1, &iterator) == 0) return Orientation::kUpright;
  const Orientation orientation =
      ExifOrientation({reinterpret_cast<const char*>(iterator.chunk.bytes), iterator.chunk.size});
  WebPDemuxReleaseChunkIterator(&iterator);
  return orientation;
}

// What decoding may take, at most. The library has no limit of its own: a lossless file may bring
// prefix codes for every 4x4 pixels, 20 bits each at least, for which it takes up to 20,016 bytes.
int64_t MostBytes(const WebPBitstreamFeatures& features, size_t file_bytes) {
  constexpr int64_t kLossless = 2, kMostGroups = 65536, kGroupBytes = 20016, kGroupBits = 20;
  const int64_t width = features.width, height = features.height;
  const int64_t rows = 64 * width, picture = 3 * width * height;
  if (features.format != kLossless) return picture + rows;
  const int64_t groups = std::min({kMostGroups, (width + 3) / 4 * ((height + 3) / 4),
                                   static_cast<int64_t>(file_bytes) * 8 / kGroupBits + 1});
  return picture + rows + 6 * width * height + groups * kGroupBytes;
}

}  // namespace

// Its time needs no clock: it is bounded by the number of pixels.
Orientation DecodeWebp(std::string_view bytes, const ImageLimits& limits, Frame& frame) {
  const WebPData data = {Bytes(bytes), bytes.size()};
  const DemuxerPtr demuxer(WebPDemux(&data));
  if (!demuxer) ThrowDamaged("WebP", "its parts do not make a whole");
  if (WebPDemuxGetI(demuxer.get(), WEBP_FF_FRAME_COUNT) > 1 ||
      (WebPDemuxGetI(demuxer.get(), WEBP_FF_FORMAT_FLAGS) & ANIMATION_FLAG) != 0) {
    throw InputError("[frame] expected a still WebP file, got one that moves; send its frames");
  }
  const std::string_view chunk = PictureChunk(demuxer.get());
  WebPDecoderConfig config;
  if (WebPInitDecoderConfig(&config) == 0 ||
      WebPGetFeatures(Bytes(chunk), chunk.size(), &config.input) != VP8_STATUS_OK) {
    ThrowDamaged("WebP", "its picture has no header");
  }
  const WebPBitstreamFeatures& features = config.input;
  CheckImageSize(features.width, features.height, limits);
  if (MostBytes(features, chunk.size()) > limits.bytes) {
    throw InputError("[frame] decoding the WebP file may take more than " +
                     std::to_string(limits.bytes) +
                     " bytes of memory; send it as PNG or not lossless");
  }
  frame.width = features.width;
  frame.height = features.height;
  frame.rgb.resize(size_t{3} * frame.width * frame.height);
  config.output.colorspace = MODE_RGB;
  config.output.is_external_memory = 1;
  config.output.u.RGBA = {frame.rgb.data(), 3 * frame.width, frame.rgb.size()};
  const VP8StatusCode status = WebPDecode(Bytes(chunk), chunk.size(), &config);
  WebPFreeDecBuffer(&config.output);
  switch (status) {
    case VP8_STATUS_OK:
      return StoredOrientation(demuxer.get());
    case VP8_STATUS_OUT_OF_MEMORY:
      throw InputError(
          "[frame] there is no memory to decode the WebP file; send a smaller picture");
    case VP8_STATUS_NOT_ENOUGH_DATA:
    case VP8_STATUS_SUSPENDED:
      ThrowDamaged("WebP", "it ends early");
    default:
      ThrowDamaged("WebP", "its picture cannot be decoded");
  }
}

}  // namespace sluice
