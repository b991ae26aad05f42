#include "runtime/ops/cuda/norm.h"

#include <algorithm>

namespace sluice::cuda {

RmsNormLaunch ChooseRmsNorm(int64_t d, bool aligned) {
  RmsNormLaunch launch;
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

}  // namespace sluice::cuda
