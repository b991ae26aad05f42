// What sampling needs of logits that lie on a CUDA device, so that a few numbers are copied to the
// host instead of all logits. The host's side, and the order of tokens: llm/sampler.h.
#ifndef SLUICE_RUNTIME_OPS_CUDA_SAMPLE_H_
#define SLUICE_RUNTIME_OPS_CUDA_SAMPLE_H_

#include <cstddef>
#include <cstdint>

#include "runtime/ops/cuda/device.h"

namespace sluice::cuda {

// The logits of the listed ids below `count` become logit * penalty where negative, else logit /
// penalty; of an id that comes twice, once. ids: `listed` numbers on the device; seen: scratch of
// PenaltyWorkspaceBytes(count).
size_t PenaltyWorkspaceBytes(int32_t count);
void Penalise(float* logits, int32_t count, const int32_t* ids, int64_t listed, float penalty,
              void* seen, Stream stream);

// Ids fall into parts of equal length, the last maybe shorter.
constexpr int kSampleParts = 128;
constexpr int32_t SamplePartLength(int32_t count) {
  return (count + kSampleParts - 1) / kSampleParts;
}
constexpr int kMostCandidates = 4096;

struct LogitSummary {
  double masses[kSampleParts];  // of each part: sum of exp((logit - top) / temperature)
  float top;                    // -infinity where no logit is above
  int32_t broken;               // whether a logit is no number or infinite
  int32_t candidates;           // how many there are, maybe more than were written
  int32_t cut;                  // scratch
};
struct Candidate {
  int32_t id;
  float logit;
};

struct SummariseArgs {
  const float* logits = nullptr;
  int32_t count = 0;
  float temperature = 1;
  // Candidates are wanted: ids above some logit, with all their equals; at least top_k of them, or,
  // where that is 0, as many as hold top_p of all mass; all finite ones where there are not as
  // many. In no order.
  bool wants_candidates = false;
  int32_t top_k = 0;
  double top_p = 1;
  LogitSummary* summary = nullptr;
  Candidate* candidates = nullptr;  // [kMostCandidates]
  void* workspace = nullptr;        // SummariseWorkspaceBytes()
};
size_t SummariseWorkspaceBytes();
void SummariseLogits(const SummariseArgs& args, Stream stream);

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_SAMPLE_H_
