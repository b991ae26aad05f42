#include <string>

#include "runtime/error.h"
#include "runtime/ops/cuda/attention.h"
#include "runtime/ops/cuda/attention_hopper.cuh"

namespace sluice::cuda {

void Attention(const AttentionArgs& args, void* workspace, size_t workspace_bytes, Stream stream) {
  CheckAttention(args);
  const size_t needed = AttentionWorkspaceBytes(args);
  if (workspace == nullptr || workspace_bytes < needed ||
      reinterpret_cast<uintptr_t>(workspace) % 256 != 0) {
    throw Error("[cuda attention] the workspace must hold " + std::to_string(needed) +
                " bytes at a multiple of 256, got " + std::to_string(workspace_bytes));
  }
  if (const int capability = ComputeCapability(); capability != 90) {
    throw Error("[cuda attention] the device must have compute capability 9.0, got " +
                std::to_string(capability / 10) + "." + std::to_string(capability % 10));
  }
  switch (args.precision) {
    case AttentionPrecision::kBF16:
      return hopper::FlashAttention(args, workspace, stream);
    case AttentionPrecision::kInt8Fp8:
      return hopper::SageAttention(args, workspace, stream);
  }
}

}  // namespace sluice::cuda
