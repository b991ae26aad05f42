// The implementation behind QuantiseRows. Private to runtime/.
#ifndef SLUICE_RUNTIME_OPS_CPU_QUANTISE_H_
#define SLUICE_RUNTIME_OPS_CPU_QUANTISE_H_

#include "runtime/tensor.h"
#include "runtime/weight_format.h"

namespace sluice {

// After the checks of runtime/ops/quantise.h.
void QuantiseReference(ConstTensorView x, WeightFormat format, TensorView q, TensorView factors);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_CPU_QUANTISE_H_
