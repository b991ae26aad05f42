// The plain references of SiluMul and Softmax.
#include "runtime/ops/cpu/activation.h"

#include <algorithm>
#include <cmath>

namespace sluice {

void SiluMulReference(ConstTensorView gate_up, TensorView y) {
  const int64_t width = y.dim(1);
  const auto read = [&](int64_t m, int64_t i) -> double {
    const int64_t at = m * gate_up.stride0() + i;
    return gate_up.dtype() == DType::kBF16 ? gate_up.data<BFloat16>()[at].ToFloat()
                                           : gate_up.data<float>()[at];
  };
  for (int64_t m = 0; m < y.dim(0); ++m) {
    for (int64_t i = 0; i < width; ++i) {
      const double gate = read(m, i);
      const float value = static_cast<float>(gate / (1 + std::exp(-gate)) * read(m, width + i));
      const int64_t at = m * y.stride0() + i;
      if (y.dtype() == DType::kBF16) {
        y.data<BFloat16>()[at] = BFloat16::From(value);
      } else {
        y.data<float>()[at] = value;
      }
    }
  }
}

void SoftmaxReference(TensorView x) {
  for (int64_t m = 0; m < x.dim(0); ++m) {
    float* row = x.data<float>() + m * x.stride0();
    const double largest = *std::max_element(row, row + x.dim(1));
    double sum = 0;
    for (int64_t i = 0; i < x.dim(1); ++i) sum += std::exp(row[i] - largest);
    for (int64_t i = 0; i < x.dim(1); ++i) {
      row[i] = static_cast<float>(std::exp(row[i] - largest) / sum);
    }
  }
}

}  // namespace sluice
