// The subcommands of the program. Each Add... adds its subcommand with its options to `app`;
// parsing the command line then runs it. A subcommand throws what goes wrong; main turns that into
// a line on stderr and an exit code.
#ifndef SLUICE_DEMOS_CLI_COMMANDS_H_
#define SLUICE_DEMOS_CLI_COMMANDS_H_

#include <CLI/CLI.hpp>

namespace sluice::cli {

void AddAsk(CLI::App& app);
void AddBench(CLI::App& app);
void AddCalibrate(CLI::App& app);
void AddEval(CLI::App& app);
void AddInfo(CLI::App& app);
void AddLoad(CLI::App& app);
void AddRender(CLI::App& app);
void AddServe(CLI::App& app);
void AddToken(CLI::App& app);

}  // namespace sluice::cli

#endif  // SLUICE_DEMOS_CLI_COMMANDS_H_
