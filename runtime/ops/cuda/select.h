// Comparing rows and choosing among values on a CUDA device. Arguments have been checked by the
// caller.
#ifndef SLUICE_RUNTIME_OPS_CUDA_SELECT_H_
#define SLUICE_RUNTIME_OPS_CUDA_SELECT_H_

#include <span>

#include "runtime/ops/cuda/device.h"
#include "runtime/ops/similarity.h"
#include "runtime/tensor.h"

namespace sluice::cuda {

// As runtime/ops/similarity.h; all operands on the device.
void RowCosines(std::span<const RowPairs> pairs, TensorView cosines, Stream stream);
void MeanRow(ConstTensorView x, TensorView mean, Stream stream);
void LowestPlaces(ConstTensorView values, TensorView places, Stream stream);
// ids[i] = the first place of the largest value of x's row i; -1 where a value is no number or none
// is above -infinity. x: [M, V] f32; ids: [M] i32.
void ArgMax(ConstTensorView x, TensorView ids, Stream stream);

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_SELECT_H_
