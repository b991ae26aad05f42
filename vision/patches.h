// What every tower does with pictures before its first layer.
#ifndef SLUICE_VISION_PATCHES_H_
#define SLUICE_VISION_PATCHES_H_

#include <cstdint>
#include <functional>

#include "runtime/exec_context.h"
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

// Lays out squares of `patch` x `patch` pixels as rows in the order (channel, y, x), that of a
// convolution's kernel, in `gathered`'s dtype; a remainder of the picture is not read. gathered:
// [F * (before + N), 3 * patch * patch]; the first `before` rows of every frame become zero, so
// that one product serves frames with a class token.
void GatherPatches(ExecContext& ctx, ConstTensorView pixels, int64_t patch, int64_t before,
                   TensorView gathered);

// Every frame's rows of y [F * R, D] = x [R, D]. Both f32.
void RepeatRows(ExecContext& ctx, ConstTensorView x, TensorView y);

}  // namespace sluice

#endif  // SLUICE_VISION_PATCHES_H_
