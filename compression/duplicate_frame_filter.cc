#include "compression/duplicate_frame_filter.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "runtime/error.h"

namespace sluice {
namespace {

constexpr int kCells = 32;    // along a side, at most
constexpr int kSamples = 16;  // along a side of a cell, at most

std::vector<float> Cells(const Frame& frame) {
  const int rows = std::min(kCells, frame.height), columns = std::min(kCells, frame.width);
  const int step_y = std::max(1, frame.height / rows / kSamples);
  const int step_x = std::max(1, frame.width / columns / kSamples);
  std::vector<float> cells;
  cells.reserve(size_t{3} * rows * columns);
  for (int row = 0; row < rows; ++row) {
    const int top = row * frame.height / rows, bottom = (row + 1) * frame.height / rows;
    for (int column = 0; column < columns; ++column) {
      const int left = column * frame.width / columns;
      const int right = (column + 1) * frame.width / columns;
      int sums[3] = {}, count = 0;
      for (int y = top; y < bottom; y += step_y) {
        for (int x = left; x < right; x += step_x, ++count) {
          const uint8_t* pixel = frame.rgb.data() + 3 * (size_t(y) * frame.width + x);
          for (int c = 0; c < 3; ++c) sums[c] += pixel[c];
        }
      }
      for (const int sum : sums) {
        cells.push_back(static_cast<float>(sum) / static_cast<float>(count));
      }
    }
  }
  return cells;
}

}  // namespace

Thumbnail MakeThumbnail(const Frame& frame) {
  const size_t expected = size_t{3} * std::max(frame.width, 0) * std::max(frame.height, 0);
  if (expected == 0 || frame.rgb.size() != expected) {
    throw InputError("[duplicate-frames] a picture of " + std::to_string(frame.width) + "x" +
                     std::to_string(frame.height) + " has " + std::to_string(expected) +
                     " bytes of RGB and is not empty, got " + std::to_string(frame.rgb.size()));
  }
  return {.width = frame.width, .height = frame.height, .cells = Cells(frame)};
}

DuplicateFrameFilter::DuplicateFrameFilter(double threshold) : threshold_(threshold) {
  if (!(threshold >= 0 && threshold < 255)) {
    throw InputError(
        "[duplicate-frames] the threshold is in levels of 255 and lies in [0, 255), "
        "got " +
        std::to_string(threshold));
  }
}

bool DuplicateFrameFilter::Passes(const Frame& frame) {
  Thumbnail thumbnail = frame.thumbnail ? *frame.thumbnail : MakeThumbnail(frame);
  if (thumbnail.width == width_ && thumbnail.height == height_) {
    float most = 0;
    for (size_t i = 0; i < thumbnail.cells.size(); ++i) {
      most = std::max(most, std::abs(thumbnail.cells[i] - last_[i]));
    }
    if (most <= threshold_) {
      ++duplicates_;
      return false;
    }
  }
  last_ = std::move(thumbnail.cells);
  width_ = thumbnail.width;
  height_ = thumbnail.height;
  return true;
}

void DuplicateFrameFilter::Persist(Archive& archive) {
  archive.Number("width", width_, 0);
  archive.Number("height", height_, 0);
  archive.Array("thumbnail", last_);
  archive.Number("duplicates", duplicates_, int64_t{0});
  const size_t expected = size_t{3} * std::min(kCells, height_) * std::min(kCells, width_);
  if (last_.size() != expected) {
    archive.Refuse("thumbnail", std::to_string(expected) + " values of this size of picture",
                   std::to_string(last_.size()));
  }
}

}  // namespace sluice
