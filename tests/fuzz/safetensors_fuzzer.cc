#include "runtime/safetensors.h"
#include "tests/fuzz/scratch_file.h"
#include "tests/fuzz/targets.h"

namespace sluice {

void FuzzSafetensors(std::string_view bytes) {
  static const ScratchFile file("model.safetensors");
  Checkpoint::Open(file.Holding(bytes).parent_path()).Fingerprint();
}

}  // namespace sluice
