// Bipartite soft matching: the step of ToMe (Bolya et al., arXiv 2210.09461) and Turbo (arXiv
// 2407.11717) that merges similar tokens.
//
//   A = tokens at even places, B = tokens at odd places
//   partner_i  = argmax over j in B of cos(metric_i, metric_j)
//   priority_i = cos(metric_i, metric_partner) - value_i          high: merged first
//   the r tokens of A with the highest priority join their partners: features become the mean
//   weighted by size, sizes add up; ties go to the lower place
// The result is what is left of A, then B, so that the next step pairs other neighbours.
#ifndef SLUICE_COMPRESSION_BIPARTITE_MERGE_H_
#define SLUICE_COMPRESSION_BIPARTITE_MERGE_H_

#include <cstdint>
#include <span>
#include <vector>

#include "runtime/exec_context.h"
#include "runtime/tensor.h"

namespace sluice {

// Tokens of `groups` frames on their way through merging, as many of each. All vectors are as long
// as there are tokens.
struct MergeState {
  int64_t groups = 1;
  Tensor features;              // [G N, D] f32 where the context works
  std::vector<float> sizes;     // how many original tokens each stands for
  std::vector<float> values;    // what is subtracted from the similarity; averaged by size
  std::vector<int64_t> places;  // of the token that the others joined
  int64_t count() const { return static_cast<int64_t>(sizes.size()) / groups; }  // of a group
};

// One step of matching. places[i]: where token i of the metric goes among the N - remove tokens
// that are left, those of A first; the sources share their partners' places. metric: [N, D] f32,
// made to unit length here, sums in f32. values: N, or empty for none. The first `spared` tokens, 0
// or 1, are no sources. remove: at most (N - spared) / 2. Only reads `ctx`.
void MatchTokens(const ExecContext& ctx, ConstTensorView metric, std::span<const float> values,
                 int64_t spared, int64_t remove, std::span<int32_t> places);

// What values are made of: no value beyond the 95th percentile; all of them times what makes their
// mean `mean`.
void CutAt95thPercentile(std::span<float> values);
void ScaleToMean(std::span<float> values, double mean);

// Removes `remove` tokens of each group, at most those of A. The metric is the features themselves.
// On a GPU pairs are found and rows are merged there; the choice is the host's, from a similarity
// for each token of A.
void MergeStep(ExecContext& ctx, MergeState& state, int64_t remove);

// Steps, each removing at most half, until `keep` >= 1 tokens of each group are left; then in the
// order of their places.
void MergeTo(ExecContext& ctx, MergeState& state, int64_t keep);

}  // namespace sluice

#endif  // SLUICE_COMPRESSION_BIPARTITE_MERGE_H_
