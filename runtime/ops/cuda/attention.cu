#include <string>

#include "runtime/error.h"
#include "runtime/ops/cuda/attention.h"
#include "runtime/ops/cuda/attention_hopper.cuh"
#include "runtime/ops/cuda/attention_mma.cuh"

namespace sluice::cuda {

void Attention(const AttentionArgs& args, void* workspace, size_t workspace_bytes, Stream stream) {
  CheckAttention(args);
  const AttentionVariant variant = ChooseAttentionVariant(ComputeCapability(), args);
  const size_t needed = AttentionWorkspaceBytes(args);
  if (workspace == nullptr || workspace_bytes < needed ||
      reinterpret_cast<uintptr_t>(workspace) % 256 != 0) {
    throw Error("[cuda attention] the workspace must hold " + std::to_string(needed) +
                " bytes at a multiple of 256, got " + std::to_string(workspace_bytes));
  }
  const bool exact = args.precision == AttentionPrecision::kBF16;
  if (variant.family == AttentionFamily::kHopper) {
    return exact ? hopper::FlashAttention(args, workspace, stream)
                 : hopper::SageAttention(args, workspace, stream);
  }
  return exact ? mma::FlashAttention(args, stream)
               : mma::SageAttention(args, variant.groups, workspace, stream);
}

}  // namespace sluice::cuda
