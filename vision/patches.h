// What every tower does with pictures before its first layer.
#ifndef SLUICE_VISION_PATCHES_H_
#define SLUICE_VISION_PATCHES_H_

#include <cstdint>
#include <functional>

#include "runtime/exec_context.h"
#include "runtime/ops/linear.h"
#include "runtime/tensor.h"

namespace sluice {

inline constexpr int kPixelChannels = 3;

// Throws Error unless pixels are [frames, 3, side, side] f32.
void CheckPixels(ConstTensorView pixels, int64_t frames, int64_t side);

// Calls encode(begin, end) for batches of nearly equal size that cover [0, frames): as many frames
// together as keep the products at full speed, few enough to bound the scratch memory (about 60 MB
// at a width of 1152). rows: of one frame in the tower. all_together: one batch, whatever it takes.
void ForBatches(int64_t frames, int64_t rows, bool all_together,
                const std::function<void(int64_t begin, int64_t end)>& encode);

// hidden [F * R, V] f32 = what `embedding` [V, 3 * patch * patch] makes of the picture's squares of
// `patch` x `patch` pixels, row by row, plus `start` [R, V] f32 in every frame. A remainder of the
// picture is not read. Rows that `start` has more than a frame has patches come first and see no
// pixel: a class token. Traces "encode/patches" and "encode/patch_embedding".
void EmbedPatches(ExecContext& ctx, ConstTensorView pixels, int64_t patch,
                  const LinearWeight& embedding, ConstTensorView start, TensorView hidden);

}  // namespace sluice

#endif  // SLUICE_VISION_PATCHES_H_
