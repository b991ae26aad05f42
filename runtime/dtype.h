// Element types of tensors and conversions between them.
#ifndef SLUICE_RUNTIME_DTYPE_H_
#define SLUICE_RUNTIME_DTYPE_H_

#include <bit>
#include <cstddef>
#include <cstdint>

namespace sluice {

enum class DType : uint8_t { kF32, kF16, kBF16, kI8, kU8, kI32 };
inline constexpr DType kLastDType = DType::kI32;

constexpr size_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kF16:
    case DType::kBF16:
      return 2;
    case DType::kI8:
    case DType::kU8:
      return 1;
  }
  return 0;
}

constexpr const char* Name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kF16:
      return "f16";
    case DType::kBF16:
      return "bf16";
    case DType::kI8:
      return "i8";
    case DType::kU8:
      return "u8";
    case DType::kI32:
      return "i32";
  }
  return "?";
}

// The upper half of a float. Conversion rounds to nearest, ties to even; NaN stays NaN.
struct BFloat16 {
  uint16_t bits;

  static BFloat16 From(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value);
    if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40u)};
    return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
  }
  float ToFloat() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

// IEEE binary16. `ToFloat` is exact (subnormals included).
struct Float16 {
  uint16_t bits;

  static Float16 From(float value) {
    return {std::bit_cast<uint16_t>(static_cast<_Float16>(value))};
  }
  float ToFloat() const { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
};

}  // namespace sluice

#endif  // SLUICE_RUNTIME_DTYPE_H_
