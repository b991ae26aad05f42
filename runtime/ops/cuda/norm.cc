#include "runtime/ops/cuda/norm.h"

#include <algorithm>

namespace sluice::cuda {

NormLaunch ChooseRmsNorm(int64_t d, bool aligned) {
  NormLaunch launch;
  launch.vector = aligned && d % 4 == 0 ? 4 : 1;
  const int64_t vectors = (d + launch.vector - 1) / launch.vector;
  // A thread for every vector up to 512: more threads wait longer for each other's sums than they
  // gain. 896 and 3584 elements then take 224 and 448 threads with one and two vectors each.
  const int64_t per_thread = (vectors + 511) / 512;
  launch.kept_vectors = per_thread <= 1 ? 1 : per_thread <= 2 ? 2 : per_thread <= 4 ? 4 : 8;
  if (per_thread > 8) launch.kept_vectors = 0;
  const int64_t threads =
      launch.kept_vectors == 0 ? 512 : (vectors + launch.kept_vectors - 1) / launch.kept_vectors;
  launch.threads = static_cast<int>((std::max<int64_t>(threads, 1) + 31) / 32 * 32);
  return launch;
}

NormLaunch ChooseLayerNorm(int64_t d, bool aligned) {
  constexpr int64_t kMostThreads = 512;
  NormLaunch launch;
  launch.vector = aligned && d % 4 == 0 ? 4 : 1;
  const int64_t vectors = (d + launch.vector - 1) / launch.vector;
  // Two sums over the block are waited for, so few warps with several vectors a thread: as many as
  // leave the fewest threads idle. 1152 elements take 96 threads with three vectors each, 1024 take
  // 64 with four.
  int64_t least_idle = 0;
  for (const int kept : {8, 4, 3, 2, 1}) {
    const int64_t threads = ((vectors + kept - 1) / kept + 31) / 32 * 32;
    const int64_t idle = threads * kept - vectors;
    if (threads > kMostThreads) break;
    if (kept == 8 && threads <= kMostThreads / 2) continue;  // four do
    if (launch.threads > 0 && idle >= least_idle) continue;
    launch.threads = static_cast<int>(threads);
    launch.kept_vectors = kept;
    least_idle = idle;
  }
  if (launch.threads == 0) launch.threads = kMostThreads;
  return launch;
}

}  // namespace sluice::cuda
