// Visual tokens with their provenance: what a compressor or a layer policy needs to know about
// geometry.
#ifndef SLUICE_VISION_VISUAL_TOKENS_H_
#define SLUICE_VISION_VISUAL_TOKENS_H_

#include <cstdint>
#include <span>
#include <vector>

#include "runtime/clock.h"
#include "runtime/exec_context.h"
#include "runtime/tensor.h"
#include "vision/frame.h"

namespace sluice {

// Where one visual token comes from.
struct TokenOrigin {
  int32_t frame = 0;  // number of the frame in the stream
  int16_t row = 0;    // in the pooled grid
  int16_t col = 0;
  MediaTime time;  // of the frame
};

// M tokens in the order in which the decoder shall read them.
struct VisualTokens {
  // [M, E] f32, already in the decoder's embedding space; as an encoder makes them, where it runs.
  Tensor features;
  std::vector<TokenOrigin> origins;  // M entries
  int grid_rows = 0;                 // of the full grid of one frame
  int grid_cols = 0;
  // How much each token matters, higher is more, as the compressor that chose them last sees it; M
  // values, or empty where none said.
  std::vector<float> scores;

  int64_t size() const { return static_cast<int64_t>(origins.size()); }
  int64_t SizeBytes() const;
};

// One token for every place of a grid of `rows` x `cols` over each frame, frame-major, row-major;
// features [M, width] on that device still to be written.
VisualTokens GridTokens(std::span<const FramePtr> frames, int rows, int cols, int64_t width,
                        Device device);

// Those of all batches, in their order, on the device of the first. Scores are kept if every batch
// with a token has them. At least one batch.
VisualTokens Joined(ExecContext& ctx, std::span<const VisualTokens> batches);

}  // namespace sluice

#endif  // SLUICE_VISION_VISUAL_TOKENS_H_
