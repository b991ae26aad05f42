// The plain reference of Rope.
#include "runtime/ops/cpu/rope.h"

#include <cmath>

namespace sluice {
namespace {

template <typename T>
float Read(const T& value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return value.ToFloat();
  } else {
    return value;
  }
}

template <typename T>
void Write(float value, T* to) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    *to = BFloat16::From(value);
  } else {
    *to = value;
  }
}

template <typename T>
void Rotate(TensorView x, int head_dim, std::span<const int32_t> positions, const float* inv_freq) {
  const int half = head_dim / 2;
  for (int64_t s = 0; s < x.dim(0); ++s) {
    for (int64_t head = 0; head < x.dim(1) / head_dim; ++head) {
      T* first = x.data<T>() + s * x.stride0() + head * head_dim;
      T* second = first + half;
      for (int i = 0; i < half; ++i) {
        const double angle = RopeAngle(positions[s], inv_freq[i]);
        const auto c = static_cast<float>(std::cos(angle));
        const auto n = static_cast<float>(std::sin(angle));
        const float a = Read(first[i]), b = Read(second[i]);
        Write(a * c - b * n, first + i);
        Write(b * c + a * n, second + i);
      }
    }
  }
}

}  // namespace

void RopeReference(TensorView x, int head_dim, std::span<const int32_t> positions,
                   const float* inv_freq) {
  if (x.dtype() == DType::kBF16) {
    Rotate<BFloat16>(x, head_dim, positions, inv_freq);
  } else {
    Rotate<float>(x, head_dim, positions, inv_freq);
  }
}

}  // namespace sluice
