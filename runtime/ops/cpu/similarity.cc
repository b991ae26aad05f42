#include "runtime/ops/cpu/similarity.h"

#include <algorithm>
#include <cmath>

#include "runtime/ops/cpu/element.h"

namespace sluice::cpu {
namespace {

template <typename T>
void Rows(ConstTensorView a, ConstTensorView b, TensorView cosines, std::span<const float> center) {
  for (int64_t m = 0; m < a.dim(0); ++m) {
    const T* x = a.data<T>() + m * a.stride0();
    const T* y = b.data<T>() + m * b.stride0();
    float xy = 0, xx = 0, yy = 0;
    for (int64_t d = 0; d < a.dim(1); ++d) {
      const float middle = center.empty() ? 0 : center[d];
      const float u = ToFloat(x[d]) - middle, v = ToFloat(y[d]) - middle;
      xy += u * v;
      xx += u * u;
      yy += v * v;
    }
    cosines.data<float>()[m] = xy / std::max(std::sqrt(xx) * std::sqrt(yy), 1e-8f);
  }
}

template <typename T>
void Mean(ConstTensorView x, std::span<float> mean) {
  std::fill(mean.begin(), mean.end(), 0.0f);
  for (int64_t m = 0; m < x.dim(0); ++m) {
    const T* row = x.data<T>() + m * x.stride0();
    for (size_t d = 0; d < mean.size(); ++d) mean[d] += ToFloat(row[d]);
  }
  for (float& value : mean) value /= static_cast<float>(x.dim(0));
}

}  // namespace

void RowCosinesReference(ConstTensorView a, ConstTensorView b, TensorView cosines,
                         std::span<const float> center) {
  WithType(a.dtype(), [&](auto element) { Rows<decltype(element)>(a, b, cosines, center); });
}

void MeanRowReference(ConstTensorView x, std::span<float> mean) {
  WithType(x.dtype(), [&](auto element) { Mean<decltype(element)>(x, mean); });
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
