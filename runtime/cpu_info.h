// What this machine offers. Read once, passed on; nothing here changes behaviour by itself.
#ifndef SLUICE_RUNTIME_CPU_INFO_H_
#define SLUICE_RUNTIME_CPU_INFO_H_

#include <cstdint>
#include <string>

namespace sluice {

struct CpuInfo {
  std::string model_name;
  int physical_cores = 1;  // of those this process may run on (affinity, cgroup quota)
  bool avx2 = false, avx512 = false, avx512_bf16 = false, amx_bf16 = false;
  bool avx_vnni = false, avx512_vnni = false;  // int8 products on vectors of 256 and 512 bits
  int64_t memory_bytes = 0;

  static CpuInfo Detect();
  // int8 products on the widest vectors there are.
  bool Int8Dot() const { return avx512 ? avx512_vnni : avx_vnni; }
  std::string IsaName() const;  // "AMX-BF16", "AVX512-BF16", "AVX-512", "AVX2", "baseline"
};

}  // namespace sluice

#endif  // SLUICE_RUNTIME_CPU_INFO_H_
