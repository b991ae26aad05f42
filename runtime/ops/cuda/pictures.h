// What vision towers do around their layers, on a CUDA device. Contracts: vision/patches.h and
// vision/pooling.h. Arguments have been checked by the caller.
#ifndef SLUICE_RUNTIME_OPS_CUDA_PICTURES_H_
#define SLUICE_RUNTIME_OPS_CUDA_PICTURES_H_

#include <cstdint>

#include "runtime/ops/cuda/device.h"
#include "runtime/tensor.h"

namespace sluice::cuda {

// pixels: [F, 3, side, side] f32; gathered: [F * (before + N), 3 * patch * patch] f32 or bf16.
void GatherPatches(ConstTensorView pixels, int64_t patch, int64_t before, TensorView gathered,
                   Stream stream);
// y: as many copies of x below each other as it has room for; f32.
void RepeatRows(ConstTensorView x, TensorView y, Stream stream);

// Every frame's grid of rows x cols tokens becomes one of out_rows x out_cols: tokens at row
// row_low[i] + 0 .. span - 1, weighed the same (span > 0), or, with span 0, those at row_low[i] and
// row_high[i] weighed 1 - row_share[i] and row_share[i]; columns likewise. Numbers on the device.
struct GridTaps {
  int rows = 0, cols = 0, out_rows = 0, out_cols = 0;
  int span = 0;
  const int32_t *row_low = nullptr, *row_high = nullptr, *col_low = nullptr, *col_high = nullptr;
  const float *row_share = nullptr, *col_share = nullptr;
};
// x: [F * rows * cols, D], y: [F * out_rows * out_cols, D], f32.
void BlendGrid(ConstTensorView x, const GridTaps& taps, TensorView y, Stream stream);

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_PICTURES_H_
