// Loads a checkpoint with an installed Sluice and says what it is.
#include <cstdio>

#include "llm/vlm.h"
#include "runtime/error.h"

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: consumer MODEL_DIRECTORY\n");
    return 2;
  }
  try {
    const auto vlm = sluice::Vlm::Load(argv[1], {});
    const sluice::VlmInfo& info = vlm->info();
    std::printf("%s: %s, %lld parameters, %d tokens a frame, computes in %s\n", info.name.c_str(),
                info.architecture.c_str(), static_cast<long long>(info.parameters),
                vlm->encoder().tokens_per_frame(), sluice::Name(info.compute_type));
  } catch (const sluice::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
