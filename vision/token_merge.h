// The seam through which a method may merge tokens inside the vision tower.
//
// In every layer, between attention and MLP, so many tokens of each frame join others: a token's
// row becomes the mean of its members, weighted by how many patches each stands for (its size). All
// frames of a batch lose as many, so that the batch stays dense; which ones, every frame decides
// for itself. Behind the last layer every patch receives a copy of the token it went into, and the
// grid is whole again. Tokens are chosen and merged in host memory, wherever the tower runs.
#ifndef SLUICE_VISION_TOKEN_MERGE_H_
#define SLUICE_VISION_TOKEN_MERGE_H_

#include <cstdint>
#include <span>

#include "runtime/exec_context.h"
#include "runtime/tensor.h"

namespace sluice {

// Const: threads and streams may share one.
class TokenMerge {
 public:
  virtual ~TokenMerge() = default;

  // How many of a frame's `tokens` leave in a layer, class_tokens (0 or 1, the first) among them.
  virtual int64_t TokensToRemove(int64_t tokens, int64_t class_tokens) const = 0;
  // Over how many queries of a frame without a class token the attention that its tokens receive is
  // averaged; with one, that token's query is the only one. 0: nobody asks.
  virtual int queries_to_average() const = 0;
  // Whether a token of size s attracts attention as s tokens would: log s is added to its scores.
  virtual bool weighs_keys() const = 0;

  // Chooses for each of the n tokens of one frame its place among the n - remove > 0 that are left;
  // tokens with the same place merge, and every place is taken. The class token's is 0, alone.
  // keys: [n, D] f32 of this layer, averaged over heads. received: n values, the attention each
  // token receives, which add up to 1; or empty. Called by several threads at once, which all only
  // read `ctx`; must not throw.
  virtual void ChoosePlaces(const ExecContext& ctx, ConstTensorView keys,
                            std::span<const float> received, int64_t class_tokens, int64_t remove,
                            std::span<int32_t> places) const = 0;
};

// Rows that share a place become their mean weighted by size, summed in double; a row that has its
// place alone keeps its bits. x: [n, D] f32; sizes, places: n values; merged: [n', D] f32, no part
// of x; merged_sizes: n' values.
void MergeRows(ConstTensorView x, std::span<const float> sizes, std::span<const int32_t> places,
               TensorView merged, std::span<float> merged_sizes);

}  // namespace sluice

#endif  // SLUICE_VISION_TOKEN_MERGE_H_
