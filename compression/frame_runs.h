// Where the tokens of each frame lie.
#ifndef SLUICE_COMPRESSION_FRAME_RUNS_H_
#define SLUICE_COMPRESSION_FRAME_RUNS_H_

#include <cstdint>
#include <span>
#include <vector>

#include "vision/visual_tokens.h"

namespace sluice {

struct FrameRun {
  int64_t begin, end;  // of the tokens
};

// The runs of tokens of the same frame, in order.
std::vector<FrameRun> FrameRuns(const VisualTokens& tokens);

// The listed tokens (ascending), rows copied unchanged.
VisualTokens KeepTokens(const VisualTokens& tokens, std::span<const int64_t> kept);

}  // namespace sluice

#endif  // SLUICE_COMPRESSION_FRAME_RUNS_H_
