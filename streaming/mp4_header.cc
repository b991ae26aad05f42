#include "streaming/mp4_header.h"

namespace sluice {
namespace {

constexpr uint64_t kMaxHeaderBytes = uint64_t{64} << 20;
constexpr size_t kHead = 8, kLongHead = 16;  // of a box

uint64_t BigEndian(std::string_view bytes) {
  uint64_t value = 0;
  for (const char byte : bytes) value = value << 8 | static_cast<unsigned char>(byte);
  return value;
}

// The contents of the first box `type` among those in `boxes`.
std::optional<std::string_view> Find(std::string_view boxes, std::string_view type) {
  while (const std::optional<Mp4Box> box = ReadMp4Box(boxes)) {
    const uint64_t size = box->size == 0 ? boxes.size() : box->size;
    if (size > boxes.size()) return std::nullopt;
    if (box->type == type) return boxes.substr(box->header, size - box->header);
    boxes.remove_prefix(size);
  }
  return std::nullopt;
}

// As Mp4RangeFinder::full_range.
bool FullRange(std::string_view tracks) {
  while (const std::optional<Mp4Box> box = ReadMp4Box(tracks)) {
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

}  // namespace

std::optional<Mp4Box> ReadMp4Box(std::string_view head) {
  if (head.size() < 8) return std::nullopt;
  Mp4Box box{.type = std::string(head.substr(4, 4)), .size = BigEndian(head.substr(0, 4))};
  if (box.size == 1) {
    if (head.size() < 16) return std::nullopt;
    box.header = 16;
    box.size = BigEndian(head.substr(8, 8));
  }
  if (box.size != 0 && box.size < box.header) return std::nullopt;
  return box;
}

void Mp4RangeFinder::Read(uint64_t at, std::string_view bytes) {
  while (!done_) {
    const uint64_t next = box_at_ + box_.size();
    if (next < at || next - at >= bytes.size()) return;
    bytes.remove_prefix(next - at);
    at = next;
    std::optional<Mp4Box> box = ReadMp4Box(box_);
    const uint64_t wanted = box ? box->size : box_.size() < kHead ? kHead : kLongHead;
    box_.append(bytes.substr(0, wanted - box_.size()));
    box = ReadMp4Box(box_);
    if (!box) {
      done_ = box_.size() >= kLongHead;
    } else if (box->size == 0 || box->size > UINT64_MAX - box_at_) {
      done_ = true;
    } else if (box->type != "moov") {
      box_at_ += box->size;
      box_.clear();
    } else if (box->size > kMaxHeaderBytes) {
      done_ = true;
    } else if (box_.size() == box->size) {
      full_range_ = FullRange(std::string_view(box_).substr(box->header));
      done_ = true;
    }
  }
}

}  // namespace sluice
