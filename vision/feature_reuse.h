// The seam through which a method may reuse patch features of an earlier frame inside the vision
// tower.
#ifndef SLUICE_VISION_FEATURE_REUSE_H_
#define SLUICE_VISION_FEATURE_REUSE_H_

#include <cstdint>
#include <span>
#include <vector>

#include "runtime/exec_context.h"
#include "runtime/tensor.h"

namespace sluice {

// Decides, layer by layer, which patches are computed afresh. One per stream; used by one thread at
// a time.
class FeatureReuse {
 public:
  virtual ~FeatureReuse() = default;

  // Called before the layer's products with the residual stream of one frame. Returns the patches
  // (ascending) whose keys, values and MLP are to be computed; the others keep what `Restore`
  // provides. hidden: [N, E] f32.
  virtual std::vector<int32_t> Select(ExecContext& ctx, int layer, ConstTensorView hidden) = 0;

  // Called after the layer with its input and output; rows of `output` for patches that were not
  // selected are to be filled in by the method. input, output: [N, E] f32.
  virtual void Restore(ExecContext& ctx, int layer, std::span<const int32_t> computed,
                       ConstTensorView input, TensorView output) = 0;
};

}  // namespace sluice

#endif  // SLUICE_VISION_FEATURE_REUSE_H_
