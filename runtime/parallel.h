// Loops over the threads of a context. OpenMP, so that our loops and oneDNN's share one pool.
#ifndef SLUICE_RUNTIME_PARALLEL_H_
#define SLUICE_RUNTIME_PARALLEL_H_

#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "runtime/exec_context.h"

namespace sluice {

// Calls body(begin, end) on disjoint ranges that cover [0, count), one range a thread, each at
// least `grain` long; all on this thread where threads already share out an outer loop. The body
// must not throw.
template <typename Body>
void ParallelFor(ExecContext& ctx, int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  const int64_t most = (count + grain - 1) / std::max<int64_t>(grain, 1);
  const int threads = static_cast<int>(std::min<int64_t>(ctx.num_threads(), most));
  if (threads <= 1 || omp_in_parallel()) {
    body(int64_t{0}, count);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) body(count * t / threads, count * (t + 1) / threads);
}

}  // namespace sluice

#endif  // SLUICE_RUNTIME_PARALLEL_H_
