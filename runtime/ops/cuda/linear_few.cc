#include "runtime/ops/cuda/linear_few.h"

namespace sluice::cuda {

FewRowsLaunch ChooseFewRows(int64_t n, int64_t k, WeightFormat format, bool silu_mul) {
  // As many outputs a warp as leave enough warps that their reads cover the memory's delay; where
  // even few leave too few, parts of K that are still a whole read. Measured on an H100 in a row of
  // launches, one row, microseconds in bf16 / fp8 with (outputs, splits):
  //   37888 x 3584, norm  (2, 1): 91.0 / 55.8  (4, 1): 91.6 / 54.3  (4, 2): 91.8 / 59.4
  //   4608 x 3584, norm   (1, 1): 17.6 / 12.0  (2, 1): 13.1 / 10.0  (4, 2): 13.4 / 10.8
  //   3584 x 18944        (1, 2): 49.6 / 32.9  (2, 1): 53.2 / 29.9  (4, 2): 48.2 / 27.5
  //   3584 x 3584         (1, 1): 10.6 / 10.0  (2, 1): 11.6 / 8.4   (4, 2): 10.9 / 8.1
  //   9728 x 896, norm    (2, 1): 8.5 / 8.1    (4, 1): 6.9 / 7.2    (4, 2): 9.9 / -
  //   896 x 4864          (1, 1): 8.1 / 6.8    (1, 2): 5.9 / 4.6    (1, 4): 4.7 / 6.1
  //   896 x 896           (1, 1): 2.4 / 2.2    (2, 1): 2.6 / 2.4    (4, 1): 3.8 / 3.7
  constexpr int64_t kEnoughWarps = 2000, kEnoughOfParts = 1700;
  // Values of K that a warp reads of a row at once.
  const auto at_once = [&](int outputs) {
    return (format == WeightFormat::kPlain ? 256 : 512) * (outputs == 1 ? 4 : 8 / outputs);
  };
  for (const int outputs : {4, 2}) {
    if (n / outputs >= kEnoughWarps) return {outputs, 1};
  }
  for (const int outputs : {4, 2}) {
    if (2 * at_once(outputs) <= k && 2 * (n / outputs) >= kEnoughOfParts) return {outputs, 2};
  }
  if (silu_mul) return {2, 1};
  FewRowsLaunch launch = {1, 1};
  while (launch.splits < 8 && 2 * launch.splits * at_once(1) <= k) launch.splits *= 2;
  return launch;
}

}  // namespace sluice::cuda
