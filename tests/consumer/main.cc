// Loads a checkpoint with an installed Sluice, opens a video and asks about its beginning.
#include <cstdio>
#include <cstdlib>

#include "runtime/error.h"
#include "streaming/engine.h"

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: consumer MODEL_DIRECTORY VIDEO QUESTION SECONDS\n");
    return 2;
  }
  try {
    const sluice::Engine engine({.model = argv[1]});
    const sluice::VlmInfo& info = engine.vlm()->info();
    std::printf("%s: %s, %lld parameters, computes in %s\n", info.name.c_str(),
                info.architecture.c_str(), static_cast<long long>(info.parameters),
                sluice::Name(info.compute_type));

    sluice::SourceOptions options;
    options.max_frames = 2 * std::atoll(argv[4]);  // two a second
    const auto source = sluice::Source::Open(argv[2], options);
    const auto session = engine.NewSession({});
    const auto context = engine.NewContext();
    const sluice::RunResult result =
        sluice::Run(*context, *session, *source, {{.text = argv[3], .at = {}}}, {});
    std::printf("%lld frames of %s\n%s\n", static_cast<long long>(result.frames),
                result.source.codec.c_str(), result.answers.at(0).generated.text.c_str());
  } catch (const sluice::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
