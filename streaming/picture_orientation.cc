#include "streaming/picture_orientation.h"

#include <array>
#include <cstring>
#include <vector>

namespace sluice {
namespace {

using Bytes = std::span<const uint8_t>;

constexpr unsigned kDisplayOrientation = 47;

// Flips come before the turn, which is anticlockwise by `quarters` of a full one.
Orientation Compose(bool left_right, bool up_down, unsigned quarters) {
  // Exchanging both is a half turn; exchanging up and down is a half turn after left and right.
  quarters = (quarters + (up_down ? 2 : 0)) % 4;
  constexpr std::array kTurned = {Orientation::kUpright, Orientation::kTurnAnticlockwise,
                                  Orientation::kUpsideDown, Orientation::kTurnClockwise};
  constexpr std::array kMirrored = {Orientation::kMirrored, Orientation::kTransposed,
                                    Orientation::kFlipped, Orientation::kTransversed};
  return left_right != up_down ? kMirrored[quarters] : kTurned[quarters];
}

// The messages of an SEI unit after its header.
std::optional<Orientation> ReadSei(Bytes coded) {
  std::vector<uint8_t> bytes;  // without the 03 that keeps start codes out
  bytes.reserve(coded.size());
  int zeros = 0;
  for (const uint8_t byte : coded) {
    if (zeros >= 2 && byte == 3) {
      zeros = 0;
      continue;
    }
    zeros = byte == 0 ? zeros + 1 : 0;
    bytes.push_back(byte);
  }
  size_t at = 0;
  const auto number = [&] {
    unsigned value = 0;
    while (at < bytes.size() && bytes[at] == 0xff) value += bytes[at++];
    return at < bytes.size() ? value + bytes[at++] : value;
  };
  while (at + 2 < bytes.size()) {
    const unsigned type = number(), size = number();
    if (size > bytes.size() - at) return std::nullopt;
    if (type == kDisplayOrientation && size >= 3) {
      const unsigned bits = unsigned{bytes[at]} << 16 | bytes[at + 1] << 8 | bytes[at + 2];
      if (bits >> 23 & 1) return Orientation::kUpright;  // "cancel"
      const unsigned turn = bits >> 5 & 0xffff;          // in 2^-16 of a full one
      return Compose(bits >> 22 & 1, bits >> 21 & 1, (turn + 0x2000) >> 14 & 3);
    }
    at += size;
  }
  return std::nullopt;
}

}  // namespace

std::optional<Orientation> SeiOrientation(Bytes picture, NalCodec codec, int length_bytes) {
  const size_t header = codec == NalCodec::kH264 ? 1 : 2;
  size_t at = 0;
  while (at < picture.size()) {
    size_t end = picture.size();
    if (length_bytes > 0) {
      if (picture.size() - at < static_cast<size_t>(length_bytes)) return std::nullopt;
      uint64_t length = 0;
      for (int i = 0; i < length_bytes; ++i) length = length << 8 | picture[at++];
      if (length > picture.size() - at) return std::nullopt;
      end = at + static_cast<size_t>(length);
    } else {
      constexpr std::array<uint8_t, 3> kStart = {0, 0, 1};
      const auto find = [&](size_t from) -> size_t {
        const void* found = memmem(picture.data() + from, picture.size() - from, kStart.data(), 3);
        return found ? static_cast<size_t>(static_cast<const uint8_t*>(found) - picture.data())
                     : picture.size();
      };
      at = find(at) + 3;
      if (at >= picture.size()) return std::nullopt;
      end = find(at);
    }
    const Bytes unit = picture.subspan(at, end - at);
    at = end;
    if (unit.size() <= header) continue;
    const unsigned type = codec == NalCodec::kH264 ? unit[0] & 0x1f : unit[0] >> 1 & 0x3f;
    const bool is_sei = codec == NalCodec::kH264 ? type == 6 : type == 39;
    const bool is_slice = codec == NalCodec::kH264 ? type >= 1 && type <= 5 : type < 32;
    if (is_slice) return std::nullopt;  // messages come before what they are about
    if (!is_sei) continue;
    if (const auto found = ReadSei(unit.subspan(header))) return found;
  }
  return std::nullopt;
}

Bytes JpegExif(Bytes jpeg) {
  constexpr std::array<uint8_t, 6> kExif = {'E', 'x', 'i', 'f', 0, 0};
  size_t at = 2;
  while (at + 4 <= jpeg.size() && jpeg[at] == 0xff) {
    const uint8_t marker = jpeg[at + 1];
    if (marker == 0xda || marker == 0xd9) break;
    const size_t length = static_cast<size_t>(jpeg[at + 2] << 8 | jpeg[at + 3]);
    if (length < 2 || at + 2 + length > jpeg.size()) break;
    const Bytes content = jpeg.subspan(at + 4, length - 2);
    if (marker == 0xe1 && content.size() > kExif.size() &&
        std::memcmp(content.data(), kExif.data(), kExif.size()) == 0) {
      return content.subspan(kExif.size());
    }
    at += 2 + length;
  }
  return {};
}

}  // namespace sluice
