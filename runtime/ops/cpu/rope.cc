// The plain reference of Rope.
#include "runtime/ops/cpu/rope.h"

#include <cmath>

#include "runtime/ops/cpu/element.h"

namespace sluice {
namespace {

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
        const float a = cpu::ToFloat(first[i]), b = cpu::ToFloat(second[i]);
        cpu::Store(a * c - b * n, first + i);
        cpu::Store(b * c + a * n, second + i);
      }
    }
  }
}

}  // namespace

void RopeReference(TensorView x, int head_dim, std::span<const int32_t> positions,
                   const float* inv_freq) {
  cpu::WithType(x.dtype(),
                [&](auto element) { Rotate<decltype(element)>(x, head_dim, positions, inv_freq); });
}

}  // namespace sluice
