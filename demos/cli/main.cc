// The program `sluice`. Exit codes: 0 ok, 1 something failed at run time, 2 wrong usage or input.
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <string>
#include <system_error>

#include "demos/cli/commands.h"
#include "demos/cli/help.h"
#include "runtime/error.h"

namespace {

constexpr int kFailed = 1;
constexpr int kWrongInput = 2;

int Fail(int code, const char* line) {
  std::fprintf(stderr, "sluice: %s\n", line);
  return code;
}

// By default libgomp spins for milliseconds at the end of every parallel loop. Where other work
// shares the cores (a video decoder is enough) its threads then wait for one that is not running,
// and everything takes up to a hundred times as long. About 150 microseconds of spinning cover the
// gaps between our loops (with 50, a prefill of 49 tokens in the small model takes 1.1 instead of
// 0.85 ms: threads fall asleep in the parts that run on one of them). libgomp reads this once,
// before main: hence the second start, which costs a few milliseconds. If it cannot be had, things
// work as they are.
void LimitSpinning(char** argv) {
  if (std::getenv("GOMP_SPINCOUNT") != nullptr || std::getenv("OMP_WAIT_POLICY") != nullptr) return;
  setenv("GOMP_SPINCOUNT", "3000", 1);
  std::error_code error;  // by its path, so that the process goes by its name
  const auto program = std::filesystem::read_symlink("/proc/self/exe", error);
  if (!error) execv(program.c_str(), argv);
}

// What is opened later must not become what a caller closed: writing to it fails instead.
void HoldStandardDescriptors() {
  for (const int descriptor : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (fcntl(descriptor, F_GETFD) >= 0) continue;
    (void)!open("/dev/null", descriptor == STDIN_FILENO ? O_WRONLY : O_RDONLY);
  }
}

}  // namespace

int main(int argc, char** argv) {
  HoldStandardDescriptors();
  LimitSpinning(argv);
  CLI::App app("Watches video and answers questions about it, on your own machine.", "sluice");
  app.set_version_flag("--version", "sluice " SLUICE_VERSION);
  app.require_subcommand(1);
  sluice::cli::SetHelp(app);
  sluice::cli::AddAsk(app);
  sluice::cli::AddInfo(app);
  sluice::cli::AddBench(app);
  sluice::cli::AddEval(app);
  sluice::cli::AddCalibrate(app);
  sluice::cli::AddRender(app);
  sluice::cli::AddServe(app);
  sluice::cli::AddLoad(app);
  sluice::cli::AddToken(app);

  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& success) {  // --help, --version
    return app.exit(success);
  } catch (const CLI::ParseError& error) {
    const auto commands = app.get_subcommands();
    if (commands.empty() && app.remaining_size() > 0) {
      return Fail(kWrongInput,
                  ("unknown command '" + app.remaining()[0] + "' (see sluice --help)").c_str());
    }
    const std::string help = commands.empty() ? "sluice" : "sluice " + commands[0]->get_name();
    return Fail(kWrongInput, (std::string(error.what()) + " (see " + help + " --help)").c_str());
  } catch (const sluice::InputError& error) {
    return Fail(kWrongInput, error.what());
  } catch (const std::exception& error) {
    return Fail(kFailed, error.what());
  }
  // A full disk or a closed pipe shows when what was printed is written out.
  // An earlier failure leaves nothing to write, but its mark.
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0)
    return Fail(kFailed, "[stdout] cannot write the result");
  return 0;
}
