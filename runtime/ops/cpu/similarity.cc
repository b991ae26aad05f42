#include "runtime/ops/cpu/similarity.h"

#include <algorithm>
#include <cmath>

namespace sluice::cpu {
namespace {

float ToFloat(float value) { return value; }
float ToFloat(BFloat16 value) { return value.ToFloat(); }

template <typename T>
void Rows(ConstTensorView a, ConstTensorView b, TensorView cosines) {
  for (int64_t m = 0; m < a.dim(0); ++m) {
    const T* x = a.data<T>() + m * a.stride0();
    const T* y = b.data<T>() + m * b.stride0();
    float xy = 0, xx = 0, yy = 0;
    for (int64_t d = 0; d < a.dim(1); ++d) {
      xy += ToFloat(x[d]) * ToFloat(y[d]);
      xx += ToFloat(x[d]) * ToFloat(x[d]);
      yy += ToFloat(y[d]) * ToFloat(y[d]);
    }
    cosines.data<float>()[m] = xy / std::max(std::sqrt(xx) * std::sqrt(yy), 1e-8f);
  }
}

}  // namespace

void RowCosinesReference(ConstTensorView a, ConstTensorView b, TensorView cosines) {
  if (a.dtype() == DType::kF32) {
    Rows<float>(a, b, cosines);
  } else {
    Rows<BFloat16>(a, b, cosines);
  }
}

}  // namespace sluice::cpu
