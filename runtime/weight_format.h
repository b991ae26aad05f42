// How the matrix of a projection is kept.
#ifndef SLUICE_RUNTIME_WEIGHT_FORMAT_H_
#define SLUICE_RUNTIME_WEIGHT_FORMAT_H_

#include <cstdint>

namespace sluice {

// The formats of 8 bits have a factor (f32) for each output: see runtime/ops/quantise.h.
enum class WeightFormat : uint8_t {
  kPlain,  // in the type that products are computed in, f32 or bf16
  kFp8,    // e4m3: 4 bits of exponent, 3 of mantissa
  kInt8,   // -127 to 127
};

constexpr const char* Name(WeightFormat format) {
  switch (format) {
    case WeightFormat::kPlain:
      return "plain";
    case WeightFormat::kFp8:
      return "fp8";
    case WeightFormat::kInt8:
      return "int8";
  }
  return "?";
}

}  // namespace sluice

#endif  // SLUICE_RUNTIME_WEIGHT_FORMAT_H_
