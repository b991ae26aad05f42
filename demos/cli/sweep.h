// sluice eval --sweep: ways of saving work, side by side.
#ifndef SLUICE_DEMOS_CLI_SWEEP_H_
#define SLUICE_DEMOS_CLI_SWEEP_H_

#include <span>
#include <string>
#include <vector>

#include "demos/cli/common.h"
#include "demos/cli/evaluation.h"
#include "streaming/engine.h"

namespace sluice::cli {

struct SweepFlags {
  std::string file;                         // empty: no sweep
  std::vector<std::string> configurations;  // "NAME: FLAGS"; none: the built-in list
};

struct SweepConfiguration {
  std::string name;
  std::string flags;  // method flags as on the command line
};
// What is compared unless told otherwise; dense, the first of any sweep, is not in it.
std::span<const SweepConfiguration> SweepConfigurations();

// Plays every clip under every configuration, one after the other, so that what else the machine
// does in the meantime meets them all alike. Writes the report to `flags.file` and a drawing of it
// beside it (.svg in place of .json), and returns it. `head`: what the report begins with. Throws
// InputError before the first clip on configurations that cannot run and files that cannot be
// written.
Json Sweep(const Engine& engine, const ClipSet& clips, const SweepFlags& flags, Json head);

// The report as a table.
void PrintSweep(const Json& report);

}  // namespace sluice::cli

#endif  // SLUICE_DEMOS_CLI_SWEEP_H_
