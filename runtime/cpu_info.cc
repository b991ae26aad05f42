#include "runtime/cpu_info.h"

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <optional>
#include <set>
#include <sstream>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace sluice {
namespace {

std::optional<int64_t> ReadInteger(const std::filesystem::path& path) {
  std::ifstream file(path);
  int64_t value = 0;
  if (file >> value) return value;
  return std::nullopt;
}

std::vector<int> AllowedCpus() {
  // The kernel's mask may be wider than cpu_set_t; it is asked with growing sizes.
  for (int cpus = 1024; cpus <= (1 << 18); cpus *= 4) {
    cpu_set_t* mask = CPU_ALLOC(cpus);
    const size_t bytes = CPU_ALLOC_SIZE(cpus);
    std::vector<int> allowed;
    const bool known = sched_getaffinity(0, bytes, mask) == 0;
    for (int cpu = 0; known && cpu < cpus; ++cpu) {
      if (CPU_ISSET_S(cpu, bytes, mask)) allowed.push_back(cpu);
    }
    CPU_FREE(mask);
    if (known) return allowed;
  }
  return {};
}

int PhysicalCores(const std::vector<int>& cpus) {
  std::set<std::pair<int64_t, int64_t>> cores;
  for (int cpu : cpus) {
    const std::filesystem::path topology =
        "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology";
    const auto core = ReadInteger(topology / "core_id");
    const auto package = ReadInteger(topology / "physical_package_id");
    // Without topology every logical processor counts as a core.
    cores.insert(core && package ? std::pair(*package, *core)
                                 : std::pair<int64_t, int64_t>(-1, cpu));
  }
  return static_cast<int>(cores.size());
}

// Where this process stands in a cgroup hierarchy: every directory from its own group up to the
// mount, since limits of the groups above hold too. `controller` is empty for version 2.
std::vector<std::filesystem::path> CgroupDirectories(const std::string& controller) {
  std::ifstream file("/proc/self/cgroup");
  std::string line;
  while (std::getline(file, line)) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    std::string names = line.substr(first, second - first + 1);  // ":cpu,cpuacct:"
    std::replace(names.begin(), names.end(), ':', ',');
    const bool matches = controller.empty()
                             ? names == ",,"
                             : names.find("," + controller + ",") != std::string::npos;
    if (!matches) continue;
    const std::filesystem::path mount =
        controller.empty() ? "/sys/fs/cgroup" : "/sys/fs/cgroup/" + controller;
    std::vector<std::filesystem::path> directories;
    std::filesystem::path group = std::filesystem::path(line.substr(second + 1)).relative_path();
    while (!group.empty()) {
      directories.push_back(mount / group);
      group = group.parent_path();
    }
    directories.push_back(mount);
    return directories;
  }
  return {};
}

// Processors' worth of time the cgroups grant, or nothing when unlimited.
std::optional<double> CpuQuota() {
  std::optional<double> quota;
  const auto limit = [&](double processors) {
    quota = std::min(quota.value_or(processors), processors);
  };
  for (const auto& directory : CgroupDirectories("")) {
    std::ifstream file(directory / "cpu.max");
    std::string max;
    double period = 0;
    if (file >> max >> period && max != "max" && period > 0) {
      limit(std::strtod(max.c_str(), nullptr) / period);
    }
  }
  for (const auto& directory : CgroupDirectories("cpu")) {
    const auto granted = ReadInteger(directory / "cpu.cfs_quota_us");
    const auto period = ReadInteger(directory / "cpu.cfs_period_us");
    if (granted && period && *granted > 0 && *period > 0) limit(double(*granted) / *period);
  }
  return quota;
}

int64_t MemoryBytes() {
  int64_t bytes = int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE);
  for (const auto& directory : CgroupDirectories("")) {
    // "max" is not an integer and leaves the value alone.
    bytes = std::min(bytes, ReadInteger(directory / "memory.max").value_or(bytes));
  }
  for (const auto& directory : CgroupDirectories("memory")) {
    bytes = std::min(bytes, ReadInteger(directory / "memory.limit_in_bytes").value_or(bytes));
  }
  return bytes;
}

std::string ModelName() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line)) {
    if (line.rfind("model name", 0) == 0 && line.find(':') != std::string::npos) {
      const size_t begin = line.find_first_not_of(" \t", line.find(':') + 1);
      if (begin != std::string::npos) return line.substr(begin);
    }
  }
  return "unknown processor";
}

#if defined(__x86_64__)
uint64_t EnabledStates() {
  uint32_t low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

void DetectIsa(CpuInfo& info) {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return;
  const bool fma = c & bit_FMA;
  const uint64_t states = EnabledStates();
  const bool ymm = (states & 0x6) == 0x6, zmm = (states & 0xe6) == 0xe6;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
  const uint32_t subleaves = a;
  info.avx2 = ymm && fma && (b & bit_AVX2);
  info.avx512 = zmm && info.avx2 && (b & bit_AVX512F) && (b & bit_AVX512BW) && (b & bit_AVX512VL) &&
                (b & bit_AVX512DQ);
  info.avx512_vnni = info.avx512 && (c & (1u << 11));
  const bool amx = (d & (1u << 24)) && (d & (1u << 22));  // AMX-TILE, AMX-BF16
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    info.avx512_bf16 = info.avx512 && (a & (1u << 5));
    info.avx_vnni = info.avx2 && (a & (1u << 4));
  }
  // Tiles are usable only where the kernel knows how to save them. This asks whether it does; the
  // permission itself is requested by whoever first uses tiles.
  constexpr int kArchGetXcompSupp = 0x1021;
  constexpr uint64_t kTileData = uint64_t{1} << 18;
  uint64_t supported = 0;
  info.amx_bf16 = info.avx512_bf16 && amx &&
                  syscall(SYS_arch_prctl, kArchGetXcompSupp, &supported) == 0 &&
                  (supported & kTileData);
}
#else
void DetectIsa(CpuInfo&) {}
#endif

}  // namespace

CpuInfo CpuInfo::Detect() {
  CpuInfo info;
  info.model_name = ModelName();
  info.memory_bytes = MemoryBytes();
  info.physical_cores = std::max(1, PhysicalCores(AllowedCpus()));
  if (const auto quota = CpuQuota()) {
    // Rounded down: a thread beyond the quota is stopped in the middle of a product, and all
    // others wait for it.
    info.physical_cores = std::clamp(static_cast<int>(*quota), 1, info.physical_cores);
  }
  DetectIsa(info);
  return info;
}

std::string CpuInfo::IsaName() const {
  if (amx_bf16) return "AMX-BF16";
  if (avx512_bf16) return "AVX512-BF16";
  if (avx512) return "AVX-512";
  if (avx2) return "AVX2";
  return "baseline";
}

}  // namespace sluice
