// A thread takes an element of the result, neighbours take neighbours; bound by memory.
#include "runtime/ops/cuda/launch.cuh"
#include "runtime/ops/cuda/pictures.h"

namespace sluice::cuda {
namespace {

constexpr int kChannels = 3;

template <typename T>
__global__ void GatherPatchesKernel(const float* pixels, int64_t frame_stride, int side, int patch,
                                    int before, T* gathered, int64_t rows) {
  const int grid = side / patch, area = patch * patch, width = kChannels * area;
  const int per_frame = before + grid * grid;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; at < rows * width; at += step) {
    const int64_t row = at / width;
    const int column = static_cast<int>(at % width);
    const int place = static_cast<int>(row % per_frame) - before;
    float value = 0;
    if (place >= 0) {
      const int channel = column / area, y = column % area / patch, x = column % patch;
      const int64_t line = int64_t{channel} * side + place / grid * patch + y;
      value = pixels[row / per_frame * frame_stride + line * side + place % grid * patch + x];
    }
    gathered[at] = FromFloat<T>(value);
  }
}

__global__ void RepeatRowsKernel(const float* x, int64_t count, float* y, int64_t all) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; at < all; at += step) {
    y[at] = x[at % count];
  }
}

// The order of sums is that of the CPU, so that results differ by contraction only.
__global__ void BlendGridKernel(const float* x, int64_t x_stride, GridTaps t, float* y,
                                int64_t y_stride, int64_t tokens, int64_t width) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; at < tokens * width;
       at += step) {
    const int64_t token = at / width, d = at % width;
    const int col = static_cast<int>(token % t.out_cols);
    const int row = static_cast<int>(token / t.out_cols % t.out_rows);
    const int64_t frame = token / (int64_t{t.out_rows} * t.out_cols);
    const float* const grid = x + frame * t.rows * t.cols * x_stride + d;
    const auto value = [&](int r, int c) { return grid[(int64_t{r} * t.cols + c) * x_stride]; };
    float result = 0;
    if (t.span > 0) {
      for (int i = 0; i < t.span; ++i) {
        for (int j = 0; j < t.span; ++j) result += value(row * t.span + i, col * t.span + j);
      }
      result *= 1.0f / static_cast<float>(t.span * t.span);
    } else {
      const float s = t.col_share[col], r = t.row_share[row];
      const auto line = [&](int at_row) {
        return (1.0f - s) * value(at_row, t.col_low[col]) + s * value(at_row, t.col_high[col]);
      };
      result = (1.0f - r) * line(t.row_low[row]) + r * line(t.row_high[row]);
    }
    y[token * y_stride + d] = result;
  }
}

}  // namespace

void GatherPatches(ConstTensorView pixels, int64_t patch, int64_t before, TensorView gathered,
                   Stream stream) {
  const int64_t count = gathered.shape().NumElements();
  if (count == 0) return;
  WithType(gathered.dtype(), [&](auto element) {
    using T = decltype(element);
    GatherPatchesKernel<<<BlocksFor(count), kThreads, 0, stream>>>(
        static_cast<const float*>(pixels.raw()), pixels.stride0(), static_cast<int>(pixels.dim(3)),
        static_cast<int>(patch), static_cast<int>(before), static_cast<T*>(gathered.raw()),
        gathered.dim(0));
  });
  CheckLaunch("gather patches");
}

void RepeatRows(ConstTensorView x, TensorView y, Stream stream) {
  const int64_t all = y.shape().NumElements();
  if (all == 0) return;
  RepeatRowsKernel<<<BlocksFor(all), kThreads, 0, stream>>>(static_cast<const float*>(x.raw()),
                                                            x.shape().NumElements(),
                                                            static_cast<float*>(y.raw()), all);
  CheckLaunch("repeat rows");
}

void BlendGrid(ConstTensorView x, const GridTaps& taps, TensorView y, Stream stream) {
  const int64_t all = y.shape().NumElements();
  if (all == 0) return;
  BlendGridKernel<<<BlocksFor(all), kThreads, 0, stream>>>(
      static_cast<const float*>(x.raw()), x.stride0(), taps, static_cast<float*>(y.raw()),
      y.stride0(), y.dim(0), y.dim(1));
  CheckLaunch("pool");
}

}  // namespace sluice::cuda
