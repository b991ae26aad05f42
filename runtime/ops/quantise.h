// Rows in 8 bits with a factor each: weights, whose rows are outputs, and what is multiplied with
// them.
#ifndef SLUICE_RUNTIME_OPS_QUANTISE_H_
#define SLUICE_RUNTIME_OPS_QUANTISE_H_

#include <cstdint>

#include "runtime/exec_context.h"
#include "runtime/tensor.h"
#include "runtime/weight_format.h"

namespace sluice {

// A number of 8 bits with 4 of exponent and 3 of mantissa, up to 448, without infinities.
struct E4m3 {
  uint8_t bits;

  // Rounds to nearest, ties to even; beyond 448 is 448. NaN stays NaN.
  static E4m3 From(float value);
  float ToFloat() const;
};

// The largest number of a format, which a row's largest becomes.
constexpr float LargestOf(WeightFormat format) {
  return format == WeightFormat::kFp8 ? 448.0f : 127.0f;
}
// Rows of less are treated as if this were their largest: factors stay normal numbers.
inline constexpr float kLeastAmax = 1e-20f;
// Elements of 8 bits: whole numbers, or the bits of an e4m3.
constexpr DType StorageOf(WeightFormat format) {
  return format == WeightFormat::kInt8 ? DType::kI8 : DType::kU8;
}

// factors[m] = amax / largest and q[m, i] = round(x[m, i] * (largest / amax)) with
// amax = max(kLeastAmax, max_i |x[m, i]|), every operation rounded to nearest even in f32.
// x: [M, K] bf16, rows may be strided; q: [M, Q] with Q >= K, zeros behind column K, contiguous;
// factors: [M] f32. REQUIRES: format is not plain, x is finite.
void QuantiseRows(ExecContext& ctx, ConstTensorView x, WeightFormat format, TensorView q,
                  TensorView factors);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_QUANTISE_H_
