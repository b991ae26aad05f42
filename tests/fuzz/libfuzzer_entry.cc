// Compiled once for each target, whose name is SLUICE_FUZZ_TARGET.
#include <cstddef>
#include <cstdint>

#include "runtime/error.h"
#include "tests/fuzz/targets.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  for (const sluice::FuzzTarget& target : sluice::kFuzzTargets) {
    if (std::string_view(target.name) != SLUICE_FUZZ_TARGET) continue;
    try {
      target.run({reinterpret_cast<const char*>(data), size});
    } catch (const sluice::Error&) {  // refused, as it should be
    }
  }
  return 0;
}
