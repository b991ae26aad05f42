// Turbo (arXiv 2312.07408, 2407.11717; training-free) inside the vision tower: in every block,
// between attention and MLP, the most redundant tokens of little semantic value join the tokens
// they resemble most (compression/bipartite_merge.h). lambda = 0 is ToMe (arXiv 2210.09461).
//
//   priority_i = max_j cos(key_i, key_j) - lambda a_i        keys averaged over heads
//   a_i        = n times the attention that the class token pays to token i
//
// A tower without class token gives the attention that i receives from queries spread evenly over
// the frame instead (ours), cut at its 95th percentile: towers park tokens of large norm in empty
// background, which draw attention without meaning; then scaled to mean 1.
//
// Different from the authors' code: lambda instead of alpha times a hidden constant (lambda =
// alpha c / n), so that it does not depend on the resolution; tokens keep their order among those
// that stay, with and without class token; the grid is restored behind the tower.
#ifndef SLUICE_COMPRESSION_TURBO_TOWER_H_
#define SLUICE_COMPRESSION_TURBO_TOWER_H_

#include "vision/token_merge.h"

namespace sluice {

struct TurboOptions {
  // Tokens that leave every block, a whole number from 0; below 1 the share of its tokens, at most
  // a half.
  double remove = 8;
  // What being attended to is worth beside similarity. 0 unless it is shown to help: on towers
  // without class token it costs time, and our default model answers worse with it.
  double lambda = 0;
  int min_tokens = 40;                 // blocks with fewer remove none
  bool proportional_attention = true;  // a merged token attracts what its members would
  bool operator==(const TurboOptions&) const = default;
};

class TurboTower final : public TokenMerge {
 public:
  // Throws InputError on a number that is neither, a negative lambda or min_tokens.
  explicit TurboTower(const TurboOptions& options);

  int64_t TokensToRemove(int64_t tokens, int64_t class_tokens) const override;
  int queries_to_average() const override { return options_.lambda > 0 ? 64 : 0; }
  bool weighs_keys() const override { return options_.proportional_attention; }
  void ChoosePlaces(const ExecContext& ctx, ConstTensorView keys, std::span<const float> received,
                    int64_t class_tokens, int64_t remove, std::span<int32_t> places) const override;

 private:
  const TurboOptions options_;
};

}  // namespace sluice

#endif  // SLUICE_COMPRESSION_TURBO_TOWER_H_
