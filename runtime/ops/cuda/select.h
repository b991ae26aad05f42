// Comparing rows and choosing among values on a CUDA device. Arguments have been checked by the
// caller.
#ifndef SLUICE_RUNTIME_OPS_CUDA_SELECT_H_
#define SLUICE_RUNTIME_OPS_CUDA_SELECT_H_

#include "runtime/ops/cuda/device.h"
#include "runtime/tensor.h"

namespace sluice::cuda {

// As runtime/ops/similarity.h; center: D values on the device, or null.
void RowCosines(ConstTensorView a, ConstTensorView b, const float* center, TensorView cosines,
                Stream stream);
// ids[i] = the first place of the largest value of x's row i; -1 where a value is no number or none
// is above -infinity. x: [M, V] f32; ids: [M] i32.
void ArgMax(ConstTensorView x, TensorView ids, Stream stream);

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_SELECT_H_
