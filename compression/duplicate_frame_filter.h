// Drops frames that show nothing new: a frame all of whose visual tokens resemble the tokens at the
// same places of the last kept frame contributes no tokens. A fixed camera on a quiet scene then
// costs nothing.
//
// The measure is the lowest cosine over a frame's tokens, not their mean: one small thing that
// appears changes few tokens, and it is what somebody will ask about. The comparison is with the
// last *kept* frame, so slow drift is not lost: it adds up until a frame is kept.
//
// Costs 3 E multiply-adds a token and remembers one frame of features.
#ifndef SLUICE_COMPRESSION_DUPLICATE_FRAME_FILTER_H_
#define SLUICE_COMPRESSION_DUPLICATE_FRAME_FILTER_H_

#include <string>
#include <vector>

#include "compression/token_compressor.h"

namespace sluice {

class DuplicateFrameFilter final : public TokenCompressor {
 public:
  static constexpr double kDefaultThreshold = 0.95;

  // Throws InputError unless -1 <= threshold <= 1. At 1 only frames with the very same directions
  // count as duplicates (up to rounding).
  explicit DuplicateFrameFilter(double threshold);

  std::string name() const override { return "duplicate-frames"; }
  VisualTokens Compress(ExecContext& ctx, VisualTokens tokens) override;
  void Undo() override;

 private:
  // One frame's tokens: rows of an [M, E] matrix and where they were.
  struct KeptFrame {
    std::vector<float> features;
    std::vector<TokenOrigin> origins;
  };
  bool Duplicates(const VisualTokens& tokens, int64_t begin, int64_t end) const;

  const double threshold_;
  KeptFrame last_kept_, before_compress_;
};

}  // namespace sluice

#endif  // SLUICE_COMPRESSION_DUPLICATE_FRAME_FILTER_H_
