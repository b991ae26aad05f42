// `sluice CMD --help` shows what everybody needs first, `--help-all` every option.
#ifndef SLUICE_DEMOS_CLI_HELP_H_
#define SLUICE_DEMOS_CLI_HELP_H_

#include <initializer_list>

namespace CLI {
class App;
}

namespace sluice::cli {

// For `app` and the commands that are added to it afterwards.
void SetHelp(CLI::App& app);

// --help of `command` shows the options `names` only, and how many others --help-all shows. Called
// once all options are there. Commands without this call show all of theirs.
void ShowFirst(CLI::App& command, std::initializer_list<const char*> names);

}  // namespace sluice::cli

#endif  // SLUICE_DEMOS_CLI_HELP_H_
