// Threads for work done while loading, when there is no ExecContext yet.
#ifndef SLUICE_RUNTIME_LOAD_THREADS_H_
#define SLUICE_RUNTIME_LOAD_THREADS_H_

#include <algorithm>
#include <cstdint>

#include "runtime/cpu_info.h"

namespace sluice {

// Calls body(begin, end) on disjoint ranges that cover [0, count), spread over the machine's cores.
// The body must not throw.
template <typename Body>
void ParallelLoad(int64_t count, const Body& body) {
  // Asked once: Detect reads a dozen files.
  static const int cores = CpuInfo::Detect().physical_cores;
  const int threads = static_cast<int>(std::min<int64_t>(cores, count));
  if (threads <= 1) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) body(count * t / threads, count * (t + 1) / threads);
}

}  // namespace sluice

#endif  // SLUICE_RUNTIME_LOAD_THREADS_H_
