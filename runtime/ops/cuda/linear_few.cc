#include "runtime/ops/cuda/linear_few.h"

namespace sluice::cuda {

FewRowsLaunch ChooseFewRows(int64_t n, int64_t k, WeightFormat format, bool silu_mul) {
  // As many outputs a warp as leave enough warps that their reads cover the memory's delay.
  // Measured on an H100, one row in fp8, microseconds with (outputs, splits):
  //   37888 x 3584  (2, 1): 55.6  (4, 1): 53.2  (4, 2): 59.9
  //   3584 x 18944  (1, 1): 38.5  (2, 1): 29.0  (4, 1): 33.8  (4, 2): 28.4
  //   4608 x 3584   (1, 1): 10.4  (2, 1): 11.5  (4, 1): 11.7  (4, 2): 12.3
  //   896 x 4864    (1, 1): 6.1   (1, 2): 5.2   (1, 4): 6.7   (4, 8): 6.0
  //   896 x 896     (1, 1): 2.6   (1, 2): 2.8   (2, 1): 2.9   (4, 1): 3.6
  constexpr int64_t kEnoughWarps = 1100;
  FewRowsLaunch launch;
  for (const int outputs : {4, 2, 1}) {
    if (outputs == 1 && silu_mul) break;
    launch = {outputs, 1};
    // Values of K that a warp reads of a row at once: each part has as many.
    const int64_t at_once =
        (format == WeightFormat::kPlain ? 256 : 512) * (outputs == 1 ? 4 : 8 / outputs);
    const int most_splits = outputs == 1 ? 8 : 2;
    while (n / outputs * launch.splits < kEnoughWarps && launch.splits < most_splits &&
           2 * launch.splits * at_once <= k) {
      launch.splits *= 2;
    }
    if (n / outputs * launch.splits >= kEnoughWarps) break;
  }
  return launch;
}

}  // namespace sluice::cuda
