#include "vision/patches.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "runtime/convert.h"
#include "runtime/error.h"
#include "runtime/ops/cuda/pictures.h"
#include "runtime/ops/traced_linear.h"
#include "runtime/parallel.h"
#include "runtime/transfer.h"

namespace sluice {
namespace {

constexpr int64_t kMostRowsAtOnce = 3072;

// Lays out squares of `patch` x `patch` pixels as rows in the order (channel, y, x), that of a
// convolution's kernel, in `gathered`'s dtype. gathered: [F * (before + N), 3 * patch * patch]; the
// first `before` rows of every frame become zero, so that one product serves frames with a class
// token.
void GatherPatches(ExecContext& ctx, ConstTensorView pixels, int64_t patch, int64_t before,
                   TensorView gathered) {
  const int64_t side = pixels.dim(3), grid = side / patch;
  if (OnGpu("gather_patches", ctx, {pixels, gathered})) {
    return ctx.Queue(cuda::GatherPatches, pixels, patch, before, gathered);
  }
  const DType dtype = gathered.dtype();
  const int64_t row_bytes = gathered.dim(1) * static_cast<int64_t>(SizeOf(dtype));
  const int64_t piece = patch * static_cast<int64_t>(SizeOf(dtype));
  ParallelFor(ctx, pixels.dim(0) * grid, 1, [&](int64_t begin, int64_t end) {
    std::vector<char> line(side * SizeOf(dtype));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t frame = row / grid, patch_row = row % grid;
      char* const frame_at =
          static_cast<char*>(gathered.raw()) + frame * (before + grid * grid) * row_bytes;
      if (patch_row == 0) std::memset(frame_at, 0, before * row_bytes);
      char* const patches_at = frame_at + (before + patch_row * grid) * row_bytes;
      for (int64_t c = 0; c < kPixelChannels; ++c) {
        for (int64_t y = 0; y < patch; ++y) {
          const float* from = pixels.data<float>() + frame * pixels.stride0() +
                              (c * side + patch_row * patch + y) * side;
          ConvertElements(from, DType::kF32, line.data(), dtype, side);
          char* to = patches_at + (c * patch + y) * piece;
          for (int64_t p = 0; p < grid; ++p, to += row_bytes) {
            std::memcpy(to, line.data() + p * piece, piece);
          }
        }
      }
    }
  });
}

// Every frame's rows of y [F * R, D] = x [R, D]. Both f32.
void RepeatRows(ExecContext& ctx, ConstTensorView x, TensorView y) {
  if (OnGpu("repeat_rows", ctx, {x, y})) return ctx.Queue(cuda::RepeatRows, x, y);
  const int64_t count = x.shape().NumElements();
  ParallelFor(ctx, y.dim(0) / x.dim(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t f = begin; f < end; ++f) {
      std::memcpy(y.data<float>() + f * count, x.data<float>(), x.SizeBytes());
    }
  });
}

}  // namespace

void CheckPixels(ConstTensorView pixels, int64_t frames, int64_t side) {
  const Shape expected{frames, kPixelChannels, side, side};
  if (pixels.shape() == expected && pixels.dtype() == DType::kF32) return;
  throw Error("[encode] pixels must be " + expected.ToString() + " f32, got " +
              pixels.shape().ToString() + " " + Name(pixels.dtype()));
}

void ForBatches(int64_t frames, int64_t rows, bool all_together,
                const std::function<void(int64_t begin, int64_t end)>& encode) {
  if (frames == 0) return;
  const int64_t most = all_together ? frames : std::max<int64_t>(1, kMostRowsAtOnce / rows);
  const int64_t batches = (frames + most - 1) / most;
  for (int64_t b = 0; b < batches; ++b) encode(frames * b / batches, frames * (b + 1) / batches);
}

void EmbedPatches(ExecContext& ctx, ConstTensorView pixels, int64_t patch,
                  const LinearWeight& embedding, ConstTensorView start, TensorView hidden) {
  const Workspace::Scope scope(ctx.workspace());
  const int64_t grid = pixels.dim(3) / patch;
  const TensorView gathered =
      ctx.workspace().Allocate(embedding.dtype(), {hidden.dim(0), kPixelChannels * patch * patch});
  {
    TraceScope trace(&ctx.tracer(), "encode/patches", hidden.dim(0));
    trace.AddWork(0, static_cast<double>(gathered.SizeBytes()) + pixels.SizeBytes());
    GatherPatches(ctx, pixels, patch, start.dim(0) - grid * grid, gathered);
    RepeatRows(ctx, start, hidden);
  }
  TracedLinear(ctx, "encode/patch_embedding", gathered, embedding, hidden, {.accumulate = true});
}

}  // namespace sluice
