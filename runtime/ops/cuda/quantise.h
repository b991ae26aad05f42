// QuantiseRows on a CUDA device; the contract is that of runtime/ops/quantise.h.
#ifndef SLUICE_RUNTIME_OPS_CUDA_QUANTISE_H_
#define SLUICE_RUNTIME_OPS_CUDA_QUANTISE_H_

#include "runtime/ops/cuda/device.h"
#include "runtime/tensor.h"
#include "runtime/weight_format.h"

namespace sluice::cuda {

void QuantiseRows(ConstTensorView x, WeightFormat format, TensorView q, TensorView factors,
                  Stream stream);

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_QUANTISE_H_
