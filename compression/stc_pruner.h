// STC-Pruner (Streaming Token Compression, arXiv 2512.00891, section on the Pruner; training-free,
// knows no question): of every frame stay the tokens that are least like what was seen before and
// least like the rest of the frame.
//
//   Y   the half of the channels that vary least over the tokens of the frame
//   s   spatial anchor: mean over a frame of its normalised rows of Y
//   t   temporal anchor: mean of all Y seen so far, this frame included, normalised
//   kGaussian:    redundancy(y) = g(|y - t|^2) + g(|y - s|^2), y normalised,
//                 g(x) = sum over j = -3..1 of exp(-x / (2 * 2^j))           as released
//   kDualAnchor:  redundancy(y) = cos(y, t) + cos(y, s), s normalised        as the paper has it
// Tokens carry their novelty as scores. The tokens of lowest redundancy stay, ties to the lower
// index, rows unchanged and in order.
// All of it runs where the tokens lie; only scores and the choice come to the host, once a call.
//
// With `join_from` tokens that go are not lost but averaged into what stays (ours): a model that
// tells frames apart by their background misses it less.
//
// Different from the authors' code: which channels vary least is chosen anew for every frame, and
// theirs adds the means of unlike channels into one history. `kCompat` does that too, for
// comparison; otherwise the history keeps all channels. Theirs keeps a list, this a sum.
#ifndef SLUICE_COMPRESSION_STC_PRUNER_H_
#define SLUICE_COMPRESSION_STC_PRUNER_H_

#include <memory>
#include <string>

#include "compression/frame_runs.h"
#include "compression/token_compressor.h"
#include "runtime/ops/novelty.h"

namespace sluice {

class StcPruner final : public TokenCompressor {
 public:
  using Score = NoveltyScore;
  enum class History { kFixed, kCompat };
  struct Options {
    double keep = 1.0 / 3;  // below 1: a share of the tokens of a frame; else so many of them
    Score score = Score::kGaussian;
    History history = History::kFixed;
    // Cosine from which on a token that goes joins the most similar one of its frame that stays
    // (the mean of all that joined); above 1: none does, as published.
    double join_from = 2;
  };

  // Throws InputError unless keep is in (0, 1) or a whole number.
  explicit StcPruner(const Options& options);

  std::string name() const override;
  int64_t TokensLeft(int64_t tokens) const override {
    return CheckedKeptOf(name(), options_.keep, tokens);
  }
  VisualTokens Compress(ExecContext& ctx, VisualTokens tokens) override;
  void Undo() override { sum_ = before_compress_; }
  void Persist(Archive& archive) override;
  int64_t SizeBytes() const override;

 private:
  const Options options_;
  // Sum of the means of all frames, by channel or by rank, wherever the latest frames lay; null
  // before the first.
  std::shared_ptr<const Tensor> sum_, before_compress_;
};

}  // namespace sluice

#endif  // SLUICE_COMPRESSION_STC_PRUNER_H_
