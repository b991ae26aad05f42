// SiluMul and Softmax on a CUDA device; the contracts are those of runtime/ops/activation.h.
// Arguments have been checked by the caller.
#ifndef SLUICE_RUNTIME_OPS_CUDA_ACTIVATION_H_
#define SLUICE_RUNTIME_OPS_CUDA_ACTIVATION_H_

#include "runtime/ops/cuda/device.h"
#include "runtime/tensor.h"

namespace sluice::cuda {

void SiluMul(ConstTensorView gate_up, TensorView y, Stream stream);
void Softmax(TensorView x, Stream stream);

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_ACTIVATION_H_
