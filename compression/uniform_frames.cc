#include "compression/uniform_frames.h"

#include <cmath>

#include "compression/frame_runs.h"
#include "runtime/error.h"

namespace sluice {

UniformFrames::UniformFrames(double every) {
  if (!(every >= 1 && every <= 1e6 && every == std::floor(every))) {
    throw InputError("[uniform-frames] expected a whole number of frames of at least 1, got " +
                     std::to_string(every));
  }
  every_ = static_cast<int64_t>(every);
}

VisualTokens UniformFrames::Compress(ExecContext& ctx, VisualTokens tokens) {
  before_compress_ = next_;
  std::vector<int64_t> kept;
  for (const FrameRun& run : FrameRuns(tokens)) {
    // The newest frame of each group stays: questions are about now.
    if (++next_ % every_ != 0) continue;
    for (int64_t i = run.begin; i < run.end; ++i) kept.push_back(i);
  }
  if (static_cast<int64_t>(kept.size()) == tokens.size()) return tokens;
  return KeepTokens(ctx, tokens, kept);
}

}  // namespace sluice
