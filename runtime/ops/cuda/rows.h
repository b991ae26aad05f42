// Moving and adding rows on a CUDA device; the contracts are those of runtime/ops/rows.h. Arguments
// have been checked by the caller.
#ifndef SLUICE_RUNTIME_OPS_CUDA_ROWS_H_
#define SLUICE_RUNTIME_OPS_CUDA_ROWS_H_

#include <cstdint>

#include "runtime/ops/cuda/device.h"
#include "runtime/tensor.h"

namespace sluice::cuda {

// Which rows, of matrices with `groups` groups of equal length: count indices on the device, each
// counted from its group's first row. No indices: all rows.
struct RowList {
  const int32_t* indices = nullptr;
  int64_t count = 0, groups = 1;
};

// y = x, rounded to y's dtype.
void Convert(ConstTensorView x, TensorView y, Stream stream);
// y[i] = table[ids[i]] in f32; ids on the device.
void EmbedRows(ConstTensorView table, const int32_t* ids, TensorView y, Stream stream);

// y[i] = x[list[i]], and y[list[i]] = x[i].
void GatherRows(ConstTensorView x, const RowList& list, TensorView y, Stream stream);
void ScatterRows(ConstTensorView x, const RowList& list, TensorView y, Stream stream);
// y[to] = a[i] + sign * b[from], row by row. Where there is a list, `listed` tells which of a, b
// and y have a row for each row of the matrix; the others have one for each index.
struct Listed {
  bool a = false, b = false, y = false;
};
void AddRows(ConstTensorView a, float sign, ConstTensorView b, TensorView y, const RowList& list,
             Listed listed, Stream stream);

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_ROWS_H_
