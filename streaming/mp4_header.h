// The boxes of an MP4's header.
#ifndef SLUICE_STREAMING_MP4_HEADER_H_
#define SLUICE_STREAMING_MP4_HEADER_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace sluice {

struct Mp4Box {
  std::string type;
  uint64_t header = 8;
  uint64_t size = 0;  // with the header; 0: to the end
};

// Of a box's first bytes; 16 suffice. None if they are too few or damaged.
std::optional<Mp4Box> ReadMp4Box(std::string_view head);

// Whether an MP4's header says that colours use all 256 levels, which GStreamer 1.22's demuxer
// passes over. Sees the bytes that the demuxer is given or fetches, which walks from box to box as
// this does. Used by one thread at a time.
class Mp4RangeFinder {
 public:
  // `bytes` lie at `at` in the file.
  void Read(uint64_t at, std::string_view bytes);
  // Whether the first track whose description holds an 'nclx' colour box says so.
  bool full_range() const { return full_range_; }

 private:
  bool done_ = false;  // the header was read, or is not to be found
  bool full_range_ = false;
  uint64_t box_at_ = 0;  // of the next one
  std::string box_;      // what has come of it
};

}  // namespace sluice

#endif  // SLUICE_STREAMING_MP4_HEADER_H_
