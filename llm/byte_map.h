// GPT-2's map from the 256 bytes to printable code points, which byte-level vocabularies are
// written in: bytes 21-7E, A1-AC and AE-FF stand for themselves, the other 68 follow from U+0100.
#ifndef SLUICE_LLM_BYTE_MAP_H_
#define SLUICE_LLM_BYTE_MAP_H_

#include <array>
#include <cstdint>
#include <optional>

namespace sluice {

struct ByteMap {
  std::array<char32_t, 256> chars{};
  std::array<int16_t, 0x144> bytes{};  // -1 where a code point stands for no byte

  constexpr ByteMap() {
    bytes.fill(-1);
    char32_t other = 0x100;
    for (int byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
      chars[byte] = printable ? static_cast<char32_t>(byte) : other++;
      bytes[chars[byte]] = static_cast<int16_t>(byte);
    }
  }
  constexpr char32_t ToChar(uint8_t byte) const { return chars[byte]; }
  constexpr std::optional<uint8_t> ToByte(char32_t c) const {
    if (c >= bytes.size() || bytes[c] < 0) return std::nullopt;
    return static_cast<uint8_t>(bytes[c]);
  }
};

inline constexpr ByteMap kByteMap;

}  // namespace sluice

#endif  // SLUICE_LLM_BYTE_MAP_H_
