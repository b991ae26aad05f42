#include "streaming/container_file.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <optional>
#include <string_view>

#include "streaming/mp4_header.h"

namespace sluice {
namespace {

constexpr int kMaxBoxes = 1 << 20;  // fragmented recordings have some a second

uint64_t BigEndian(std::string_view bytes) {
  uint64_t value = 0;
  for (const char byte : bytes) value = value << 8 | static_cast<unsigned char>(byte);
  return value;
}

std::string Promise(uint64_t promised, uint64_t size) {
  return "its header promises " + std::to_string(promised) + " bytes, the file has " +
         std::to_string(size);
}

class File {
 public:
  explicit File(const std::filesystem::path& path) : in_(path, std::ios::binary) {
    in_.seekg(0, std::ios::end);
    size_ = in_ ? static_cast<uint64_t>(in_.tellg()) : 0;
  }
  uint64_t size() const { return size_; }
  // Less at the file's end.
  std::string Read(uint64_t at, uint64_t count) {
    if (at >= size_) return "";
    std::string bytes(std::min(count, size_ - at), '\0');
    in_.clear();
    in_.seekg(static_cast<std::streamoff>(at));
    in_.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    bytes.resize(static_cast<size_t>(in_.gcount()));
    return bytes;
  }

 private:
  std::ifstream in_;
  uint64_t size_ = 0;
};

// ---- MP4 ----------------------------------------------------------------------------------------

ContainerFacts ReadMp4(File& file) {
  ContainerFacts facts;
  uint64_t at = 0;
  for (int i = 0; i < kMaxBoxes && at < file.size(); ++i) {
    const std::optional<Mp4Box> box = ReadMp4Box(file.Read(at, 16));
    if (!box || box->size == 0) break;
    if (box->size > file.size() - at) {
      facts.cut_off = Promise(at + box->size, file.size());
      break;
    }
    at += box->size;
  }
  return facts;
}

// ---- Matroska -----------------------------------------------------------------------------------

constexpr std::string_view kEbml = "\x1a\x45\xdf\xa3", kSegment = "\x18\x53\x80\x67";

// Where the element at `at` ends, which has an ID of four bytes; none if it does not say.
std::optional<uint64_t> ElementEnd(File& file, uint64_t at) {
  const std::string head = file.Read(at, 12);
  if (head.size() < 5 || head[4] == 0) return std::nullopt;
  const int length = std::countl_zero(static_cast<uint8_t>(head[4])) + 1;
  if (head.size() < size_t{4} + length) return std::nullopt;
  const uint64_t mask = (uint64_t{1} << 7 * length) - 1;
  const uint64_t size = BigEndian(std::string_view(head).substr(4, length)) & mask;
  if (size == mask) return std::nullopt;  // "unknown": written while it was recorded
  return at + 4 + length + size;
}

ContainerFacts ReadMatroska(File& file) {
  ContainerFacts facts;
  const std::optional<uint64_t> segment = ElementEnd(file, 0);
  if (!segment || file.Read(*segment, 4) != kSegment) return facts;
  const std::optional<uint64_t> end = ElementEnd(file, *segment);
  if (!end) return facts;
  if (*end > file.size()) facts.cut_off = Promise(*end, file.size());
  if (file.Read(*end, 4) == kEbml) {
    facts.unread = "another recording is joined to it at byte " + std::to_string(*end) + " of " +
                   std::to_string(file.size()) + " and was not read; split the file there";
  }
  return facts;
}

// ---- AVI ----------------------------------------------------------------------------------------

ContainerFacts ReadAvi(File& file) {
  ContainerFacts facts;
  const std::string size = file.Read(4, 4);
  uint64_t promised = 0;
  for (int i = 3; i >= 0; --i) promised = promised << 8 | static_cast<unsigned char>(size[i]);
  // A writer into a pipe cannot return to fill it in.
  if (promised == 0 || promised >= 0xfffffff0) return facts;
  if (promised + 8 > file.size()) facts.cut_off = Promise(promised + 8, file.size());
  return facts;
}

// ---- PNG ----------------------------------------------------------------------------------------

constexpr std::string_view kPng = "\x89PNG\r\n\x1a\n";

// A moving PNG says so before its first picture.
ContainerFacts ReadPng(File& file) {
  ContainerFacts facts;
  uint64_t at = kPng.size();
  for (int i = 0; i < 100; ++i) {
    const std::string head = file.Read(at, 12);
    if (head.size() < 12 || head.substr(4, 4) == "IDAT") break;
    if (head.substr(4, 4) == "acTL") {
      if (BigEndian(std::string_view(head).substr(8, 4)) > 1) facts.moving = MovingFormat::kPng;
      break;
    }
    at += 12 + BigEndian(std::string_view(head).substr(0, 4));
  }
  return facts;
}

}  // namespace

ContainerFacts ReadContainerFacts(const std::filesystem::path& path) {
  File file(path);
  const std::string head = file.Read(0, 12);
  if (head.size() < 12) return {};
  if (head.starts_with(kPng)) return ReadPng(file);
  if (head.starts_with(kEbml)) return ReadMatroska(file);
  if (head.starts_with("RIFF") && head.substr(8) == "WEBP") {
    const std::string extended = file.Read(12, 9);
    constexpr char kMoves = 2;
    ContainerFacts facts;
    if (extended.size() == 9 && extended.starts_with("VP8X") && extended[8] & kMoves) {
      facts.moving = MovingFormat::kWebp;
    }
    return facts;
  }
  if (head.starts_with("RIFF") && head.substr(8) == "AVI ") return ReadAvi(file);
  for (const char* type : {"ftyp", "moov", "mdat", "free", "wide", "skip", "styp", "pnot"}) {
    if (head.substr(4, 4) == type) return ReadMp4(file);
  }
  return {};
}

}  // namespace sluice
