// The implementations behind Subtract and Add of runtime/ops/rows.h. Private to runtime/: arguments
// have been checked by the caller. Rows [begin, end).
#ifndef SLUICE_RUNTIME_OPS_CPU_ROWS_H_
#define SLUICE_RUNTIME_OPS_CPU_ROWS_H_

#include <cstdint>

#include "runtime/tensor.h"

namespace sluice::cpu {

void SubtractReference(ConstTensorView a, ConstTensorView b, TensorView y, int64_t begin,
                       int64_t end);
void AddReference(ConstTensorView a, ConstTensorView b, TensorView y, int64_t begin, int64_t end);

void SubtractSimd(ConstTensorView a, ConstTensorView b, TensorView y, int64_t begin, int64_t end);
void AddSimd(ConstTensorView a, ConstTensorView b, TensorView y, int64_t begin, int64_t end);

}  // namespace sluice::cpu

#endif  // SLUICE_RUNTIME_OPS_CPU_ROWS_H_
