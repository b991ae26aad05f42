#include "demos/cli/help.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

namespace sluice::cli {
namespace {

constexpr char kMore[] = "More";  // the group of options that only --help-all shows

class Formatter final : public CLI::Formatter {
 public:
  std::string make_help(const CLI::App* app, std::string name,
                        CLI::AppFormatMode mode) const override {
    const std::string first = app->get_help_ptr()->get_group();
    const auto options = app->get_options();
    const auto others = std::count_if(options.begin(), options.end(), [&](const CLI::Option* o) {
      return !o->get_group().empty() && o->get_group() != first;
    });
    if (mode != CLI::AppFormatMode::Normal || app->get_options(IsMore).empty()) {
      return CLI::Formatter::make_help(app, std::move(name), mode);
    }
    const auto shown =
        app->get_options([&](const CLI::Option* o) { return o->get_group() == first; });
    return make_description(app) + make_usage(app, std::move(name)) +
           make_group(first, false, {shown.begin(), shown.end()}) + "\n" + std::to_string(others) +
           " more options: sluice " + app->get_name() + " --help-all\n";
  }

 private:
  static bool IsMore(const CLI::Option* option) { return option->get_group() == kMore; }
};

}  // namespace

void SetHelp(CLI::App& app) {
  constexpr size_t kColumn = 36;  // where the words begin
  const auto formatter = std::make_shared<Formatter>();
  formatter->column_width(kColumn);
  app.formatter(formatter);
  app.set_help_all_flag("--help-all", "Print this with every option there is");
}

void ShowFirst(CLI::App& command, std::initializer_list<const char*> names) {
  const std::string first = command.get_help_ptr()->get_group();
  for (CLI::Option* option : command.get_options()) {
    const bool asks_for_help =
        option == command.get_help_ptr() || option == command.get_help_all_ptr();
    if (!asks_for_help && option->get_group() == first) option->group(kMore);
  }
  for (const char* name : names) command.get_option(name)->group(first);
}

}  // namespace sluice::cli
