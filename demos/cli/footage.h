// sluice eval --footage: what reusing features of earlier frames does to them, on any video.
#ifndef SLUICE_DEMOS_CLI_FOOTAGE_H_
#define SLUICE_DEMOS_CLI_FOOTAGE_H_

#include <string>

#include "demos/cli/common.h"
#include "streaming/engine.h"

namespace sluice::cli {

struct FootageFlags {
  std::string source;  // as `sluice ask --source`; empty: none
  double fps = 2.0;
};

// Encodes every frame twice, one after the other and one frame at a time, as from a live source:
// whole, and as options.cacher says. Compares the features as they leave the encoder. `head`: what
// the report begins with. Throws InputError without options.cacher.
Json CompareFootage(const Engine& engine, const SessionOptions& options, const FootageFlags& flags,
                    Json head);

// The report as tables: means, then the frames out of turn and what followed them, then the frames
// that came out least alike.
void PrintFootage(const Json& report);

}  // namespace sluice::cli

#endif  // SLUICE_DEMOS_CLI_FOOTAGE_H_
