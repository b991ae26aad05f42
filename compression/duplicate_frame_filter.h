// Tells frames that show nothing new, before anything is spent on them: cameras repeat frames, and
// a fixed one on a quiet scene sends the same picture for hours.
//
// A frame is compared by its thumbnail, the means of up to 32 x 32 cells of the picture, which
// noise hardly moves. The measure is the largest difference of a cell, not the mean of all: one
// small thing that appears changes few cells, and it is what somebody will ask about. The
// comparison is with the last frame that passed, so slow drift adds up until a frame passes.
//
// Reads at most 16 x 16 pixels of a cell, so that large pictures cost no more than 512 x 512 ones.
#ifndef SLUICE_COMPRESSION_DUPLICATE_FRAME_FILTER_H_
#define SLUICE_COMPRESSION_DUPLICATE_FRAME_FILTER_H_

#include <cstdint>
#include <vector>

#include "runtime/archive.h"
#include "vision/frame.h"

namespace sluice {

// Throws InputError on an empty picture and on one whose bytes do not fit its size.
Thumbnail MakeThumbnail(const Frame& frame);

// One per stream; used by one thread at a time. A copy is a snapshot.
class DuplicateFrameFilter {
 public:
  // threshold: in levels of 255; a frame passes when a cell differs by more. At 0 only frames with
  // the same thumbnail are duplicates. Throws InputError unless in [0, 255).
  explicit DuplicateFrameFilter(double threshold);

  // The first frame passes, and so does one of another size than the last that passed. Compares the
  // frame's own thumbnail if it has one. Throws as MakeThumbnail.
  bool Passes(const Frame& frame);

  double threshold() const { return threshold_; }
  int64_t duplicates() const { return duplicates_; }  // frames that did not pass
  // Saves or loads all but the threshold.
  void Persist(Archive& archive);
  int64_t SizeBytes() const { return static_cast<int64_t>(last_.size() * sizeof(float)); }

 private:
  double threshold_;
  int width_ = 0, height_ = 0;  // of the last frame that passed
  std::vector<float> last_;     // its thumbnail, [rows, columns, 3]
  int64_t duplicates_ = 0;
};

}  // namespace sluice

#endif  // SLUICE_COMPRESSION_DUPLICATE_FRAME_FILTER_H_
