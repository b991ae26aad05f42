#include "runtime/ops/cpu/amx.h"

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "runtime/cpu_info.h"

namespace sluice::cpu {

bool AmxAllowed() {
#if defined(__x86_64__)
  static const bool allowed = [] {
    constexpr int kArchReqXcompPerm = 0x1023,
                  kTileData = 18;  // linux/Documentation/arch/x86/xstate
    return CpuInfo::Detect().amx_bf16 && syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0;
  }();
  return allowed;
#else
  return false;
#endif
}

}  // namespace sluice::cpu
