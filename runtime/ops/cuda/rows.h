// Moving and adding rows on a CUDA device; the contracts are those of runtime/ops/rows.h. Arguments
// have been checked by the caller.
#ifndef SLUICE_RUNTIME_OPS_CUDA_ROWS_H_
#define SLUICE_RUNTIME_OPS_CUDA_ROWS_H_

#include <cstdint>
#include <span>

#include "runtime/ops/cuda/device.h"
#include "runtime/ops/rows.h"
#include "runtime/tensor.h"

namespace sluice::cuda {

void CopyMatrix(ConstTensorView x, TensorView y, Stream stream);
void ZeroRows(TensorView y, Stream stream);
// y = x, rounded to y's dtype.
void Convert(ConstTensorView x, TensorView y, Stream stream);
// y[i] = table[ids[i]] in f32; ids on the device.
void EmbedRows(ConstTensorView table, const int32_t* ids, TensorView y, Stream stream);

void GatherRows(ConstTensorView x, const RowLists& lists, TensorView y, Stream stream);
void OverlayRows(std::span<const ConstTensorView> rest, ConstTensorView x, const RowLists& lists,
                 TensorView y, Stream stream);
// y = a + sign * b.
void AddRows(ConstTensorView a, float sign, ConstTensorView b, TensorView y, Stream stream);
void SubtractListed(ConstTensorView a, std::span<const ConstTensorView> b, const RowLists& lists,
                    TensorView y, Stream stream);
void AddListed(std::span<const ConstTensorView> a, ConstTensorView b, const RowLists& lists,
               TensorView y, Stream stream);

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_ROWS_H_
