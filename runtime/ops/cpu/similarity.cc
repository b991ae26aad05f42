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

void NearestRowsReference(ConstTensorView a, ConstTensorView b, std::span<int32_t> nearest,
                          std::span<float> cosines) {
  for (int64_t i = 0; i < a.dim(0); ++i) {
    const float* x = a.data<float>() + i * a.stride0();
    for (int64_t j = 0; j < b.dim(0); ++j) {
      const float* y = b.data<float>() + j * b.stride0();
      float dot = 0;
      for (int64_t d = 0; d < a.dim(1); ++d) dot += x[d] * y[d];
      if (j > 0 && dot <= cosines[i]) continue;
      cosines[i] = dot;
      nearest[i] = static_cast<int32_t>(j);
    }
  }
}

}  // namespace sluice::cpu
