// The plain reference of LayerNorm and RmsNorm.
#include "runtime/ops/cpu/norm.h"

#include <cmath>
#include <vector>

namespace sluice {

void NormReference(const NormArgs& args) {
  const int64_t width = args.x.dim(1);
  for (int64_t m = 0; m < args.x.dim(0); ++m) {
    const float* from = args.x.data<float>() + m * args.x.stride0();
    std::vector<float> x(from, from + width);
    if (!args.more.empty()) {
      for (int64_t i = 0; i < width; ++i) {
        x[i] += args.more.data<float>()[m * args.more.stride0() + i];
      }
    }
    double mean = 0;
    if (args.centre) {
      for (int64_t i = 0; i < width; ++i) mean += x[i];
      mean /= width;
    }
    double variance = 0;
    for (int64_t i = 0; i < width; ++i) variance += (x[i] - mean) * (x[i] - mean);
    variance /= width;
    const double scale = 1 / std::sqrt(variance + args.eps);
    for (int64_t i = 0; i < width; ++i) {
      const double value = (x[i] - mean) * scale * args.weight[i] + (args.bias ? args.bias[i] : 0);
      const int64_t at = m * args.y.stride0() + i;
      if (args.y.dtype() == DType::kBF16) {
        args.y.data<BFloat16>()[at] = BFloat16::From(static_cast<float>(value));
      } else {
        args.y.data<float>()[at] = static_cast<float>(value);
      }
    }
  }
}

}  // namespace sluice
