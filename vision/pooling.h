// Smaller grids of tokens: torch's interpolate(mode="bilinear", align_corners=False) without
// antialias, and its AvgPool2d.
#ifndef SLUICE_VISION_POOLING_H_
#define SLUICE_VISION_POOLING_H_

#include <cstdint>
#include <vector>

#include "runtime/exec_context.h"
#include "runtime/tensor.h"

namespace sluice {

// The mean of every `stride` x `stride` square: y[r, c] = sum x[stride r + i, stride c + j] /
// stride^2. Rows and columns that fill no square are dropped. x: [F * rows * cols, D] f32,
// frame-major and row-major; y: [F * (rows / stride) * (cols / stride), D] f32. Throws Error on
// other shapes.
void AveragePool(ExecContext& ctx, ConstTensorView x, int rows, int cols, int stride, TensorView y);

// Immutable; safe for many threads.
class BilinearPool {
 public:
  BilinearPool() = default;
  // REQUIRES: all sizes >= 1.
  BilinearPool(int rows, int cols, int out_rows, int out_cols);

  // x: [F * rows * cols, D] f32, frame-major and row-major; y: [F * out_rows * out_cols, D] f32.
  // Every output is the sum of at most four rows of x, in f32.
  void Run(ExecContext& ctx, ConstTensorView x, TensorView y) const;

  int out_rows() const { return static_cast<int>(row_taps_.size()); }
  int out_cols() const { return static_cast<int>(col_taps_.size()); }

 private:
  // out[i] = (1 - fraction) in[low] + fraction in[high]
  struct Tap {
    int32_t low, high;
    float fraction;
  };
  static std::vector<Tap> Taps(int in, int out);

  int rows_ = 0, cols_ = 0;
  std::vector<Tap> row_taps_, col_taps_;
};

}  // namespace sluice

#endif  // SLUICE_VISION_POOLING_H_
