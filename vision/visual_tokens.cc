#include "vision/visual_tokens.h"

namespace sluice {

VisualTokens GridTokens(std::span<const FramePtr> frames, int rows, int cols, int64_t width) {
  VisualTokens tokens;
  tokens.grid_rows = rows;
  tokens.grid_cols = cols;
  const auto count = static_cast<int64_t>(frames.size()) * rows * cols;
  tokens.features = Tensor(DType::kF32, {count, width});
  tokens.origins.reserve(count);
  for (const FramePtr& frame : frames) {
    for (int row = 0; row < rows; ++row) {
      for (int col = 0; col < cols; ++col) {
        tokens.origins.push_back({.frame = static_cast<int32_t>(frame->index),
                                  .row = static_cast<int16_t>(row),
                                  .col = static_cast<int16_t>(col),
                                  .time = frame->time});
      }
    }
  }
  return tokens;
}

}  // namespace sluice
