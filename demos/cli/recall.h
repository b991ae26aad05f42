// What a stream's memory is worth: films of the demo world that stand still from some moment on,
// asked about what happened in them after so many quiet frames.
#ifndef SLUICE_DEMOS_CLI_RECALL_H_
#define SLUICE_DEMOS_CLI_RECALL_H_

#include <vector>

#include "demos/cli/common.h"
#include "demos/cli/evaluation.h"
#include "streaming/engine.h"

namespace sluice::cli {

// Plays each film of `set` (kRecallFilmFrames frames, then quiet ones up to the largest distance)
// to three sessions: with options.memory, with its window alone, and with no memory at all while
// the context holds the stream. At every distance each is asked the same questions, which only the
// film answers: what left last, what changed last where that is not there any more, and which of
// two appeared first. `head`: what the report begins with. Throws InputError without
// options.memory.
inline constexpr int kRecallFilmFrames = 24;
Json MeasureRecall(const Engine& engine, const SessionOptions& options, const ClipSet& set,
                   std::vector<int> distances, Json head);

// The report as a table.
void PrintRecall(const Json& report);

}  // namespace sluice::cli

#endif  // SLUICE_DEMOS_CLI_RECALL_H_
