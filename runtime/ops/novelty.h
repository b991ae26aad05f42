// How novel the tokens of frames are, and the choice of the most novel: the arithmetic of the
// STC-Pruner (arXiv 2512.00891), see compression/stc_pruner.h. Rows may be strided; all f32 unless
// told. Throw Error naming what does not fit.
#ifndef SLUICE_RUNTIME_OPS_NOVELTY_H_
#define SLUICE_RUNTIME_OPS_NOVELTY_H_

#include <cstdint>

#include "runtime/exec_context.h"
#include "runtime/tensor.h"

namespace sluice {

enum class NoveltyScore : uint8_t { kGaussian, kDualAnchor };

// Of D channels those that vary least, which novelty looks at.
constexpr int64_t CalmChannels(int64_t channels) { return channels < 2 ? 1 : channels / 2; }

struct NoveltyArgs {
  ConstTensorView x = {};        // [F N, D], the N >= 1 tokens of each of `frames` frames, in order
  int64_t frames = 0;            // F
  ConstTensorView history = {};  // [D] sum over earlier frames, or empty: there was none
  TensorView new_history = {};   // [D] the sum with these frames; may be `history`
  TensorView novelty = {};       // [F N]
  NoveltyScore score = NoveltyScore::kGaussian;
  // The history is of the calm channels' means in the order of their variances, [C], whichever they
  // are.
  bool by_rank = false;
};

// For each frame in turn, over its rows x_i:
//   calm       the C = CalmChannels(D) channels of lowest population variance, of equals the first
//   history   += mean of x_i
//   y_i        x_i at the calm channels, made to length 1
//   t, s       history at the calm channels, made to length 1; mean of y_i
//   novelty_i  kGaussian:   -g(|y_i - t|^2) - g(|y_i - s|^2),
//                           g(d) = sum over j = -3..1 of exp(-d / (2 * 2^j))
//              kDualAnchor: -<y_i, t> - <y_i, s> / |s|
// Means and variances in double.
void Novelty(ExecContext& ctx, const NoveltyArgs& args);

// For each frame in turn: history += its rows, then cosine_i = <x_i, history> / (|x_i| |history|),
// 0 for rows without a direction. In double. x: [F N, D] of F frames; history: [D] double as [2 D]
// i32, or empty: there was none; new_history: likewise, with these frames, may be `history`;
// cosines: [F N].
void HistoryCosines(ExecContext& ctx, ConstTensorView x, int64_t frames, ConstTensorView history,
                    TensorView new_history, TensorView cosines);

// The places of the k largest of each of `groups` equally long parts of `values`, of equals the
// first, counted from the part's beginning and ascending. values: [G N]; places: [G k] i32.
void LargestOfGroups(ExecContext& ctx, ConstTensorView values, int64_t groups, TensorView places);

// Every row that goes joins the row of its frame that stays and is most similar, of equals the
// last, if their cosine is at least `join_from`; what stays becomes the mean of all that joined it
// and itself.
// x: [F N, D]; kept: [F k] i32 as LargestOfGroups tells them; y: [F k, D].
void JoinRows(ExecContext& ctx, ConstTensorView x, int64_t frames, ConstTensorView kept,
              float join_from, TensorView y);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_NOVELTY_H_
