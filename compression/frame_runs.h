// Where the tokens of each frame lie.
#ifndef SLUICE_COMPRESSION_FRAME_RUNS_H_
#define SLUICE_COMPRESSION_FRAME_RUNS_H_

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "runtime/exec_context.h"
#include "vision/visual_tokens.h"

namespace sluice {

struct FrameRun {
  int64_t begin, end;  // of the tokens
};

// How many tokens of a frame of `tokens` a setting `keep` leaves: below 1 a share of them, rounded
// down but at least one; else that number.
int64_t KeptOf(double keep, int64_t tokens);
// Throws InputError, in the name of `method`, unless `keep` is in (0, 1) or a whole number.
void CheckKeep(const std::string& method, double keep);

// KeptOf; throws InputError, in the name of `method`, where there are fewer tokens than to be kept.
int64_t CheckedKeptOf(const std::string& method, double keep, int64_t tokens);

// The runs of tokens of the same frame, in order.
std::vector<FrameRun> FrameRuns(const VisualTokens& tokens);

// Consecutive frames with equally many tokens: what an op over frames takes at once.
struct FrameGroup {
  int64_t begin, end;  // of the tokens
  int64_t frames;
  int64_t length() const { return (end - begin) / frames; }
};
// All frames, in order.
std::vector<FrameGroup> FrameGroups(const VisualTokens& tokens);

// The listed tokens (ascending), rows copied unchanged where they lie, which is where `ctx` works.
VisualTokens KeepTokens(ExecContext& ctx, const VisualTokens& tokens,
                        std::span<const int64_t> kept);

}  // namespace sluice

#endif  // SLUICE_COMPRESSION_FRAME_RUNS_H_
