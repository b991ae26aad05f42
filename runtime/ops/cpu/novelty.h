// The references behind runtime/ops/novelty.h. Private to runtime/: arguments have been checked by
// the caller.
#ifndef SLUICE_RUNTIME_OPS_CPU_NOVELTY_H_
#define SLUICE_RUNTIME_OPS_CPU_NOVELTY_H_

#include <cstdint>

#include "runtime/ops/novelty.h"
#include "runtime/tensor.h"

namespace sluice::cpu {

void Novelty(const NoveltyArgs& args);
void HistoryCosines(ConstTensorView x, int64_t frames, ConstTensorView history,
                    TensorView new_history, TensorView cosines);
void LargestOfGroups(ConstTensorView values, int64_t groups, TensorView places);
void JoinRows(ConstTensorView x, int64_t frames, ConstTensorView kept, float join_from,
              TensorView y);

}  // namespace sluice::cpu

#endif  // SLUICE_RUNTIME_OPS_CPU_NOVELTY_H_
