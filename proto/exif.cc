#include "proto/exif.h"

#include <cstdint>

namespace sluice {
namespace {

using namespace std::string_view_literals;

// Unsigned numbers of a TIFF file, whose first two bytes tell their order. What lies outside of the
// file is 0.
class TiffBytes {
 public:
  explicit TiffBytes(std::string_view bytes) : bytes_(bytes), big_(bytes.starts_with("MM")) {}
  uint64_t Number(uint64_t at, int size) const {
    uint64_t value = 0;
    for (int i = 0; i < size; ++i) {
      const uint64_t from = at + static_cast<uint64_t>(big_ ? i : size - 1 - i);
      value = value << 8 | (from < bytes_.size() ? static_cast<uint8_t>(bytes_[from]) : 0);
    }
    return value;
  }

 private:
  const std::string_view bytes_;
  const bool big_;
};

}  // namespace

Orientation ExifOrientation(std::string_view exif) {
  constexpr uint64_t kTag = 0x0112, kShort = 3, kEntryBytes = 12;
  if (exif.starts_with("Exif\0\0"sv)) exif.remove_prefix(6);
  if (!exif.starts_with("II*\0"sv) && !exif.starts_with("MM\0*"sv)) return Orientation::kUpright;
  const TiffBytes tiff(exif);
  const uint64_t directory = tiff.Number(4, 4), entries = tiff.Number(directory, 2);
  for (uint64_t i = 0; i < entries; ++i) {
    const uint64_t entry = directory + 2 + i * kEntryBytes;
    if (entry + kEntryBytes > exif.size()) break;
    if (tiff.Number(entry, 2) != kTag) continue;
    const uint64_t type = tiff.Number(entry + 2, 2), value = tiff.Number(entry + 8, 2);
    const bool known = type == kShort && value >= 1 && value <= 8;
    return known ? static_cast<Orientation>(value) : Orientation::kUpright;
  }
  return Orientation::kUpright;
}

}  // namespace sluice
