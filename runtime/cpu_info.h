// What this machine offers. Read once, passed on; nothing here changes behaviour by itself.
#ifndef SLUICE_RUNTIME_CPU_INFO_H_
#define SLUICE_RUNTIME_CPU_INFO_H_

#include <cstdint>
#include <string>

#include "runtime/dtype.h"

namespace sluice {

struct CpuInfo {
  std::string model_name;
  int physical_cores = 1;  // of those this process may run on (affinity, cgroup quota)
  bool avx2 = false, avx512 = false, avx512_bf16 = false, amx_bf16 = false;
  bool avx_vnni = false, avx512_vnni = false;  // int8 products on vectors of 256 and 512 bits
  int64_t memory_bytes = 0;

  static CpuInfo Detect();
  // bf16 where the machine multiplies bf16 natively (AVX512-BF16 or AMX), else f32.
  DType BestComputeType() const { return amx_bf16 || avx512_bf16 ? DType::kBF16 : DType::kF32; }
  // int8 products on the widest vectors there are.
  bool Int8Dot() const { return avx512 ? avx512_vnni : avx_vnni; }
  std::string IsaName() const;  // "AMX-BF16", "AVX512-BF16", "AVX-512", "AVX2", "baseline"
};

}  // namespace sluice

#endif  // SLUICE_RUNTIME_CPU_INFO_H_
