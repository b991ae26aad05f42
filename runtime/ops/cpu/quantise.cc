// The plain reference of QuantiseRows. No product in 8 bits runs on a CPU, so there is no fast
// path.
#include "runtime/ops/cpu/quantise.h"

#include <algorithm>
#include <cmath>

#include "runtime/ops/quantise.h"

namespace sluice {

E4m3 E4m3::From(float value) {
  const auto sign = static_cast<uint8_t>(std::signbit(value) ? 0x80 : 0);
  if (std::isnan(value)) return {static_cast<uint8_t>(sign | 0x7f)};
  const float size = std::min(std::abs(value), 448.0f);
  // Below 2^-6 numbers are as far apart as above it.
  const int exponent = size < 0x1p-6f ? -6 : std::ilogb(size);
  // In units of the last place, 8 and more where the number is normal; one rounded up to 16 becomes
  // the next exponent's first.
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(size, 3 - exponent)));
  return {static_cast<uint8_t>(sign | (units + 8 * (exponent + 6)))};
}

float E4m3::ToFloat() const {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if (exponent == 15 && mantissa == 7) return std::nanf("");
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                   : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return bits & 0x80 ? -size : size;
}

void QuantiseReference(ConstTensorView x, WeightFormat format, TensorView q, TensorView factors) {
  const int64_t width = x.dim(1);
  for (int64_t m = 0; m < x.dim(0); ++m) {
    const BFloat16* row = x.data<BFloat16>() + m * x.stride0();
    float amax = kLeastAmax;
    for (int64_t i = 0; i < width; ++i) amax = std::max(amax, std::abs(row[i].ToFloat()));
    const float inverse = LargestOf(format) / amax;
    factors.data<float>()[m] = amax / LargestOf(format);
    auto* const to = static_cast<uint8_t*>(q.raw()) + m * q.stride0();
    for (int64_t i = 0; i < q.dim(1); ++i) {
      const float scaled = i < width ? row[i].ToFloat() * inverse : 0;
      if (format == WeightFormat::kFp8) {
        to[i] = E4m3::From(scaled).bits;
      } else {
        to[i] = static_cast<uint8_t>(
            static_cast<int8_t>(std::clamp(std::nearbyint(scaled), -127.0f, 127.0f)));
      }
    }
  }
}

}  // namespace sluice
