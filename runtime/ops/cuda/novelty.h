// The novelty of tokens on a CUDA device. Contracts: runtime/ops/novelty.h. Arguments have been
// checked by the caller.
#ifndef SLUICE_RUNTIME_OPS_CUDA_NOVELTY_H_
#define SLUICE_RUNTIME_OPS_CUDA_NOVELTY_H_

#include <cstddef>
#include <cstdint>

#include "runtime/ops/cuda/device.h"
#include "runtime/ops/novelty.h"
#include "runtime/tensor.h"

namespace sluice::cuda {

size_t NoveltyWorkspaceBytes(const NoveltyArgs& args);
void Novelty(const NoveltyArgs& args, void* workspace, Stream stream);
// sums: [F, 2 D] i32 scratch.
void HistoryCosines(ConstTensorView x, int64_t frames, ConstTensorView history,
                    TensorView new_history, TensorView sums, TensorView cosines, Stream stream);
void LargestOfGroups(ConstTensorView values, int64_t groups, TensorView places, Stream stream);
// to: [F N] i32, where each row goes: scratch.
void JoinRows(ConstTensorView x, int64_t frames, ConstTensorView kept, float join_from,
              TensorView to, TensorView y, Stream stream);

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_NOVELTY_H_
