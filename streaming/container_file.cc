#include "streaming/container_file.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <optional>
#include <string_view>

namespace sluice {
namespace {

constexpr uint64_t kMaxHeaderBytes = uint64_t{64} << 20;
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

struct Box {
  std::string type;
  uint64_t header = 8;
  uint64_t size = 0;  // with the header; 0: to the end
};

std::optional<Box> ReadBox(std::string_view head) {
  if (head.size() < 8) return std::nullopt;
  Box box{.type = std::string(head.substr(4, 4)), .size = BigEndian(head.substr(0, 4))};
  if (box.size == 1) {
    if (head.size() < 16) return std::nullopt;
    box.header = 16;
    box.size = BigEndian(head.substr(8, 8));
  }
  if (box.size != 0 && box.size < box.header) return std::nullopt;
  return box;
}

// The contents of the first box `type` among those in `boxes`.
std::optional<std::string_view> Find(std::string_view boxes, std::string_view type) {
  while (const std::optional<Box> box = ReadBox(boxes)) {
    const uint64_t size = box->size == 0 ? boxes.size() : box->size;
    if (size > boxes.size()) return std::nullopt;
    if (box->type == type) return boxes.substr(box->header, size - box->header);
    boxes.remove_prefix(size);
  }
  return std::nullopt;
}

// Whether the first track whose description holds an 'nclx' colour box says "full range".
bool FullRange(std::string_view tracks) {
  while (const std::optional<Box> box = ReadBox(tracks)) {
    const uint64_t size = box->size == 0 ? tracks.size() : box->size;
    if (size > tracks.size()) return false;
    std::optional<std::string_view> inner;
    if (box->type == "trak") inner = tracks.substr(box->header, size - box->header);
    for (const char* type : {"mdia", "minf", "stbl", "stsd"}) {
      if (inner) inner = Find(*inner, type);
    }
    tracks.remove_prefix(size);
    // After the count: an entry's header of 8 bytes and a picture's description of 78.
    constexpr size_t kEntry = 8, kDescription = 8 + 78;
    if (!inner || inner->size() < kEntry + kDescription) continue;
    const std::optional<std::string_view> colr = Find(inner->substr(kEntry + kDescription), "colr");
    if (colr && colr->size() >= 11 && colr->starts_with("nclx")) return (*colr)[10] & 0x80;
  }
  return false;
}

ContainerFacts ReadMp4(File& file) {
  ContainerFacts facts;
  uint64_t at = 0;
  for (int i = 0; i < kMaxBoxes && at < file.size(); ++i) {
    const std::optional<Box> box = ReadBox(file.Read(at, 16));
    if (!box || box->size == 0) break;
    if (box->type == "moov" && box->size <= kMaxHeaderBytes) {
      const std::string moov = file.Read(at + box->header, box->size - box->header);
      facts.full_range = FullRange(moov);
    }
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
      const uint64_t pictures = BigEndian(std::string_view(head).substr(8, 4));
      if (pictures > 1) {
        facts.unread = "only the first of its " + std::to_string(pictures) +
                       " pictures is read; make a video or a GIF of it";
      }
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
    facts.moving_webp =
        extended.size() == 9 && extended.starts_with("VP8X") && extended[8] & kMoves;
    return facts;
  }
  if (head.starts_with("RIFF") && head.substr(8) == "AVI ") return ReadAvi(file);
  for (const char* type : {"ftyp", "moov", "mdat", "free", "wide", "skip", "styp", "pnot"}) {
    if (head.substr(4, 4) == type) return ReadMp4(file);
  }
  return {};
}

}  // namespace sluice
