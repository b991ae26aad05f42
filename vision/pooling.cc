#include "vision/pooling.h"

#include <algorithm>
#include <bit>
#include <string>

#include "runtime/error.h"
#include "runtime/ops/cuda/pictures.h"
#include "runtime/parallel.h"
#include "runtime/transfer.h"

namespace sluice {

void AveragePool(ExecContext& ctx, ConstTensorView x, int rows, int cols, int stride,
                 TensorView y) {
  const int64_t in_tokens = int64_t{rows} * cols, width = x.dim(1);
  const int64_t out_rows = rows / stride, out_cols = cols / stride;
  const int64_t frames = x.dim(0) / in_tokens;
  if (x.dim(0) != frames * in_tokens || y.shape() != Shape{frames * out_rows * out_cols, width}) {
    throw Error("[pool] grids of " + std::to_string(in_tokens) + " tokens become " +
                std::to_string(out_rows * out_cols) + ", got " + x.shape().ToString() + " and " +
                y.shape().ToString());
  }
  if (OnGpu("pool", ctx, {x, y})) {
    cuda::GridTaps taps;
    taps.rows = rows;
    taps.cols = cols;
    taps.out_rows = static_cast<int>(out_rows);
    taps.out_cols = static_cast<int>(out_cols);
    taps.span = stride;
    return ctx.Queue(cuda::BlendGrid, x, taps, y);
  }
  const float* in = x.data<float>();
  float* out = y.data<float>();
  const int64_t in_stride = x.stride0(), out_stride = y.stride0();
  const float share = 1.0f / static_cast<float>(stride * stride);
  ParallelFor(ctx, frames * out_rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const float* grid = in + line / out_rows * in_tokens * in_stride;
      for (int64_t c = 0; c < out_cols; ++c) {
        float* to = out + (line * out_cols + c) * out_stride;
        std::fill_n(to, width, 0.0f);
        for (int64_t i = 0; i < stride; ++i) {
          for (int64_t j = 0; j < stride; ++j) {
            const int64_t row = line % out_rows * stride + i;
            const float* from = grid + (row * cols + c * stride + j) * in_stride;
            for (int64_t d = 0; d < width; ++d) to[d] += from[d];
          }
        }
        for (int64_t d = 0; d < width; ++d) to[d] *= share;
      }
    }
  });
}

std::vector<BilinearPool::Tap> BilinearPool::Taps(int in, int out) {
  // In f32, as the reference computes it.
  const float scale = static_cast<float>(in) / static_cast<float>(out);
  std::vector<Tap> taps(out);
  for (int i = 0; i < out; ++i) {
    const float position = std::max(scale * (static_cast<float>(i) + 0.5f) - 0.5f, 0.0f);
    const int low = std::min(static_cast<int>(position), in - 1);
    taps[i] = {low, std::min(low + 1, in - 1), position - static_cast<float>(low)};
  }
  return taps;
}

BilinearPool::BilinearPool(int rows, int cols, int out_rows, int out_cols)
    : rows_(rows), cols_(cols), row_taps_(Taps(rows, out_rows)), col_taps_(Taps(cols, out_cols)) {}

void BilinearPool::Run(ExecContext& ctx, ConstTensorView x, TensorView y) const {
  const int64_t in_tokens = int64_t{rows_} * cols_, width = x.dim(1);
  const int64_t out_tokens = int64_t{out_rows()} * out_cols();
  const int64_t frames = x.dim(0) / in_tokens;
  if (x.dim(0) != frames * in_tokens || y.shape() != Shape{frames * out_tokens, width}) {
    throw Error("[pool] grids of " + std::to_string(in_tokens) + " tokens become " +
                std::to_string(out_tokens) + ", got " + x.shape().ToString() + " and " +
                y.shape().ToString());
  }
  if (OnGpu("pool", ctx, {x, y})) {
    // Rows' and columns' lows, highs and fractions, one after another.
    std::vector<int32_t> numbers;
    for (const std::vector<Tap>* side : {&row_taps_, &col_taps_}) {
      for (const Tap& tap : *side) numbers.push_back(tap.low);
      for (const Tap& tap : *side) numbers.push_back(tap.high);
      for (const Tap& tap : *side) numbers.push_back(std::bit_cast<int32_t>(tap.fraction));
    }
    const Workspace::Scope scope(ctx.workspace());
    const int32_t* const there = Within(ctx, numbers);
    const int32_t* const of_cols = there + 3 * out_rows();
    cuda::GridTaps taps;
    taps.rows = rows_;
    taps.cols = cols_;
    taps.out_rows = out_rows();
    taps.out_cols = out_cols();
    taps.row_low = there;
    taps.row_high = there + out_rows();
    taps.row_share = reinterpret_cast<const float*>(there + 2 * out_rows());
    taps.col_low = of_cols;
    taps.col_high = of_cols + out_cols();
    taps.col_share = reinterpret_cast<const float*>(of_cols + 2 * out_cols());
    return ctx.Queue(cuda::BlendGrid, x, taps, y);
  }
  const float* in = x.data<float>();
  float* out = y.data<float>();
  const int64_t in_stride = x.stride0(), out_stride = y.stride0();
  ParallelFor(ctx, frames * out_rows(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const Tap& row = row_taps_[line % out_rows()];
      const float* grid = in + line / out_rows() * in_tokens * in_stride;
      const float* above = grid + int64_t{row.low} * cols_ * in_stride;
      const float* below = grid + int64_t{row.high} * cols_ * in_stride;
      for (int c = 0; c < out_cols(); ++c) {
        const Tap& col = col_taps_[c];
        const float* a = above + col.low * in_stride;
        const float* b = above + col.high * in_stride;
        const float* p = below + col.low * in_stride;
        const float* q = below + col.high * in_stride;
        float* to = out + (line * out_cols() + c) * out_stride;
        for (int64_t d = 0; d < width; ++d) {
          const float upper = (1.0f - col.fraction) * a[d] + col.fraction * b[d];
          const float lower = (1.0f - col.fraction) * p[d] + col.fraction * q[d];
          to[d] = (1.0f - row.fraction) * upper + row.fraction * lower;
        }
      }
    }
  });
}

}  // namespace sluice
