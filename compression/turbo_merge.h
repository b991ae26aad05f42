// Merges similar visual tokens of a frame after projector and pooling, in one go (the way the
// authors of Turbo, arXiv 2407.11717, recommend for multimodal models; FOLDER, arXiv 2501.02430).
// Unlike pruning, a merge keeps a weighted mean of what it removes.
//
// Turbo spares tokens of high semantic value, which it reads off the class token's attention. A
// tower without one gives novelty instead (ours): a_i = 1 - cos(x_i, mean of all tokens so far),
// scaled to mean 1 over the frame and cut at its 95th percentile; priority = cos - lambda a_i.
// lambda = 0 is ToMe (arXiv 2210.09461). Features stay where they lie.
#ifndef SLUICE_COMPRESSION_TURBO_MERGE_H_
#define SLUICE_COMPRESSION_TURBO_MERGE_H_

#include <memory>
#include <string>
#include <vector>

#include "compression/frame_runs.h"
#include "compression/token_compressor.h"

namespace sluice {

class TurboMerge final : public TokenCompressor {
 public:
  struct Options {
    double keep = 0.5;  // below 1: a share of the tokens of a frame; else so many of them
    double lambda = 0.25;
  };
  // Throws InputError unless keep is in (0, 1) or a whole number and lambda >= 0.
  explicit TurboMerge(const Options& options);

  std::string name() const override { return options_.lambda == 0 ? "tome-merge" : "turbo-merge"; }
  int64_t TokensLeft(int64_t tokens) const override {
    return CheckedKeptOf(name(), options_.keep, tokens);
  }
  VisualTokens Compress(ExecContext& ctx, VisualTokens tokens) override;
  void Undo() override { sum_ = before_compress_; }
  void Persist(Archive& archive) override;
  int64_t SizeBytes() const override;

 private:
  // [F N] what sparing each row of frames of equal length is worth; they join the history, if
  // novelty spares.
  std::vector<float> Values(ExecContext& ctx, ConstTensorView x, int64_t frames);

  const Options options_;
  // Of all tokens so far: [D] double as [2 D] i32, wherever the latest lay; null before the first.
  std::shared_ptr<const Tensor> sum_, before_compress_;
};

}  // namespace sluice

#endif  // SLUICE_COMPRESSION_TURBO_MERGE_H_
