#include "vision/visual_tokens.h"

#include <algorithm>

#include "runtime/transfer.h"

namespace sluice {

VisualTokens GridTokens(std::span<const FramePtr> frames, int rows, int cols, int64_t width,
                        Device device) {
  VisualTokens tokens;
  tokens.grid_rows = rows;
  tokens.grid_cols = cols;
  const auto count = static_cast<int64_t>(frames.size()) * rows * cols;
  tokens.features = Tensor(DType::kF32, {count, width}, device);
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

int64_t VisualTokens::SizeBytes() const {
  return static_cast<int64_t>(features.SizeBytes() + origins.size() * sizeof(TokenOrigin) +
                              scores.size() * sizeof(float));
}

VisualTokens Joined(ExecContext& ctx, std::span<const VisualTokens> batches) {
  int64_t count = 0;
  bool scored = true;
  for (const VisualTokens& batch : batches) {
    count += batch.size();
    scored = scored && batch.scores.size() == batch.origins.size();
  }
  const int64_t width = batches.front().features.dim(1);
  VisualTokens all;
  all.grid_rows = batches.front().grid_rows;
  all.grid_cols = batches.front().grid_cols;
  all.features = Tensor(DType::kF32, {count, width}, batches.front().features.device());
  int64_t begin = 0;
  for (const VisualTokens& batch : batches) {
    Transfer(ctx, batch.features, all.features.view().Slice(begin, begin + batch.size()));
    begin += batch.size();
    all.origins.insert(all.origins.end(), batch.origins.begin(), batch.origins.end());
    if (scored) all.scores.insert(all.scores.end(), batch.scores.begin(), batch.scores.end());
  }
  return all;
}

}  // namespace sluice
