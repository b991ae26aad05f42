// Merges similar visual tokens of a frame after projector and pooling, in one go (the way the
// authors of Turbo, arXiv 2407.11717, recommend for multimodal models; FOLDER, arXiv 2501.02430).
// Unlike pruning, a merge keeps a weighted mean of what it removes.
//
// Turbo spares tokens of high semantic value, which it reads off the class token's attention. A
// tower without one gives novelty instead (ours): a_i = 1 - cos(x_i, mean of all tokens so far),
// scaled to mean 1 over the frame and cut at its 95th percentile; priority = cos - lambda a_i.
// lambda = 0 is ToMe (arXiv 2210.09461).
#ifndef SLUICE_COMPRESSION_TURBO_MERGE_H_
#define SLUICE_COMPRESSION_TURBO_MERGE_H_

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
  void Persist(Archive& archive) override {
    archive.Array("sum", sum_);
    before_compress_ = sum_;
  }

  int64_t SizeBytes() const override {
    return static_cast<int64_t>((sum_.size() + before_compress_.size()) * sizeof(double));
  }

 private:
  // [N] what sparing each row of a frame is worth; the frame joins the history.
  std::vector<float> Values(ConstTensorView x);

  const Options options_;
  std::vector<double> sum_, before_compress_;  // of all tokens so far
};

}  // namespace sluice

#endif  // SLUICE_COMPRESSION_TURBO_MERGE_H_
