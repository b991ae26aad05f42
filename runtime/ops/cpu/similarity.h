// The implementations behind runtime/ops/similarity.h. Private to runtime/: arguments have been
// checked by the caller.
#ifndef SLUICE_RUNTIME_OPS_CPU_SIMILARITY_H_
#define SLUICE_RUNTIME_OPS_CPU_SIMILARITY_H_

#include <cstdint>
#include <span>

#include "runtime/exec_context.h"
#include "runtime/tensor.h"

namespace sluice::cpu {

void RowCosinesReference(ConstTensorView a, ConstTensorView b, TensorView cosines,
                         std::span<const float> center);
void RowCosinesSimd(ExecContext& ctx, ConstTensorView a, ConstTensorView b, TensorView cosines,
                    std::span<const float> center);

void MeanRowReference(ConstTensorView x, std::span<float> mean);
void MeanRowSimd(ConstTensorView x, std::span<float> mean);

void NearestRowsReference(ConstTensorView a, ConstTensorView b, std::span<int32_t> nearest,
                          std::span<float> cosines);
void NearestRowsSimd(ConstTensorView a, ConstTensorView b, std::span<int32_t> nearest,
                     std::span<float> cosines);

}  // namespace sluice::cpu

#endif  // SLUICE_RUNTIME_OPS_CPU_SIMILARITY_H_
