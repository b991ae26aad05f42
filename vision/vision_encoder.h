// Pictures to visual tokens: tower, projector, pooling. Weights are const; calls on different
// contexts may overlap.
#ifndef SLUICE_VISION_VISION_ENCODER_H_
#define SLUICE_VISION_VISION_ENCODER_H_

#include <functional>
#include <span>
#include <string_view>

#include "runtime/exec_context.h"
#include "runtime/tensor.h"
#include "vision/feature_reuse.h"
#include "vision/frame.h"
#include "vision/preprocess.h"
#include "vision/token_merge.h"
#include "vision/visual_tokens.h"

namespace sluice {

// Sees intermediate results by name ("embeddings", "layer.3", "tower", "projector", "pooled"), each
// whole and in f32, [F * N, width]; for tests and tools. With a probe, all frames go through the
// tower together, whatever scratch memory that takes.
using TensorProbe = std::function<void(std::string_view name, ConstTensorView value)>;

// What takes part in an encoding, beside the weights. Nothing is owned.
struct EncodeHooks {
  // At most one of them: what is reused is matched by place, which merging changes, and a probe
  // sees all rows of frames computed whole.
  FeatureReuse* reuse = nullptr;
  const TokenMerge* merge = nullptr;
  TensorProbe probe = nullptr;
};

class VisionEncoder {
 public:
  virtual ~VisionEncoder() = default;

  // pixels: [F, 3, H, W] f32 as made by Preprocess for `preprocess_config()`.
  // Returns F * tokens_per_frame() tokens, frame-major, row-major; origins carry the frames' index
  // and time. `frames` names the F frames (index and time only are read). Traces "encode" with the
  // operations that were really done, and its parts.
  virtual VisualTokens Encode(ExecContext& ctx, ConstTensorView pixels,
                              std::span<const FramePtr> frames,
                              const EncodeHooks& hooks = {}) const = 0;

  virtual const PreprocessConfig& preprocess_config() const = 0;
  virtual int tokens_per_frame() const = 0;   // after pooling
  virtual int patches_per_frame() const = 0;  // inside the tower
  virtual int head_dim() const = 0;           // of the tower's attention
  virtual int64_t output_size() const = 0;    // E
  // Multiply-adds of products and attention, times 2, of a frame that is computed whole.
  virtual double FlopsPerFrame() const = 0;
};

}  // namespace sluice

#endif  // SLUICE_VISION_VISION_ENCODER_H_
