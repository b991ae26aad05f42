// The seam through which a method may reuse what the vision tower computed for an earlier frame.
//
// Some frames are computed whole; each is the reference of those that follow. Of any other frame,
// every layer computes the keys of all patches, asks the method which patches to compute afresh,
// and takes the rest from the reference:
//   values         of fresh patches from this frame, of all others from the reference
//   attention      of fresh patches only, over all keys and values
//   h'             of fresh patches h + attention + MLP, of all others h + the reference's update
// where a layer's update is what it added to the residual stream of the reference.
// The grid stays whole: every patch of every frame has a feature. A class token is no patch: the
// method never sees it, and it is always computed afresh, for it looks at all of them.
#ifndef SLUICE_VISION_FEATURE_REUSE_H_
#define SLUICE_VISION_FEATURE_REUSE_H_

#include <cstdint>
#include <span>
#include <vector>

#include "runtime/exec_context.h"
#include "runtime/ops/similarity.h"
#include "runtime/tensor.h"

namespace sluice {

// What stays of a reference frame at one layer; R the rows of a frame (the class token, where there
// is one, and N patches), V the tower's width, in the compute dtype.
struct LayerReference {
  Tensor keys;    // [R, V] with bias, heads side by side
  Tensor values;  // [R, V] likewise
  Tensor update;  // [R, V] what the layer added to the residual stream
};

// One per stream; used by one thread at a time.
class FeatureReuse {
 public:
  virtual ~FeatureReuse() = default;

  // Which frames of the coming batch are computed whole, one flag a frame, as far as that is known
  // before their keys are. Changes nothing.
  virtual std::vector<bool> Schedule(int64_t frames) const = 0;

  // Called once for each batch of frames. Returns which of them are computed whole, one flag a
  // frame: all that are scheduled, maybe more. The first one is, unless there is a reference() of
  // an earlier batch. layers: of the tower. first_keys: the first layer's keys of each frame, [N,
  // V] in the compute dtype. May wait for the GPU.
  virtual std::vector<bool> ChooseWhole(ExecContext& ctx, int layers,
                                        std::span<const ConstTensorView> first_keys) = 0;

  // How many of a frame's patches each layer computes afresh, of frames that are not computed
  // whole: 1 to all.
  virtual int64_t FreshPatches(int64_t patches) const = 0;
  // Chooses which, of several frames: one row of `fresh` [F, FreshPatches(N)] i32 each, ascending,
  // where the context works. What the layer before has chosen of these frames is still there.
  // keys[i]: a frame's keys and those of its reference, [N, V], rows may be strided. Part of a step
  // that recurs (runtime/ops/cuda/recorder.h): it waits for nothing. Threads may call this for
  // different frames at once, with contexts of their own.
  virtual void ChooseFresh(ExecContext& ctx, int layer, std::span<const RowPairs> keys,
                           TensorView fresh) const = 0;

  // Whether the frame after this batch may need the last whole frame's reference().
  virtual bool KeepsReference() const = 0;
  // What is kept of the last whole frame of all batches; layers are filled in one after another, in
  // batches after which it is kept.
  virtual LayerReference& reference(int layer) = 0;
};

}  // namespace sluice

#endif  // SLUICE_VISION_FEATURE_REUSE_H_
