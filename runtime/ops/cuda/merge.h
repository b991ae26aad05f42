// Finding rows that are alike and merging them, on a CUDA device. Arguments have been checked by
// the caller.
#ifndef SLUICE_RUNTIME_OPS_CUDA_MERGE_H_
#define SLUICE_RUNTIME_OPS_CUDA_MERGE_H_

#include <cstdint>

#include "runtime/ops/cuda/device.h"
#include "runtime/tensor.h"

namespace sluice::cuda {

// For the rows at even places of each of `groups` equal parts of x [G N, D] f32 the row at an odd
// place of the same part whose cosine is highest, of equals the first, and that cosine. nearest:
// [G E] i32, counted among the odd ones; cosines: [G E] f32; E = ceil(N / 2), N >= 2.
void NearestOfPairs(ConstTensorView x, int64_t groups, TensorView nearest, TensorView cosines,
                    Stream stream);

// x: [G N, D] f32, merged: [G M, D] f32, of G groups. to: of each row of x its place among the M of
// its group, or -1 for none; every place has a row. A row that has its place alone keeps its bits,
// others become their mean weighed by `sizes`, summed in double in their order. sizes: [G N], or
// null: all 1; merged_sizes: [G M] their sums, or null. All on the device.
struct MergeRowsArgs {
  ConstTensorView x;
  int64_t groups = 1;
  const float* sizes = nullptr;
  const int32_t* to = nullptr;
  TensorView merged;
  float* merged_sizes = nullptr;
};
void MergeRows(const MergeRowsArgs& args, Stream stream);

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_MERGE_H_
