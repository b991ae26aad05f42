// Random tensors and comparisons for tests of ops.
#ifndef SLUICE_TESTS_SUPPORT_TENSOR_TESTING_H_
#define SLUICE_TESTS_SUPPORT_TENSOR_TESTING_H_

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "runtime/tensor.h"

namespace sluice::testing {

// N(0, deviation^2), rounded to `dtype` (f32, f16 or bf16); the same for the same seed.
inline Tensor RandomTensor(DType dtype, Shape shape, uint32_t seed, float deviation = 1) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0, deviation);
  Tensor values(DType::kF32, shape);
  for (int64_t i = 0; i < shape.NumElements(); ++i) values.data<float>()[i] = normal(generator);
  return dtype == DType::kF32 ? std::move(values) : ConvertTo(values, dtype);
}

// What Rope takes for heads of so many channels: theta^(-2 i / head_dim), [head_dim / 2] f32.
inline Tensor RotaryFrequencies(int head_dim, double theta) {
  Tensor frequencies(DType::kF32, {head_dim / 2});
  for (int i = 0; i < head_dim / 2; ++i) {
    frequencies.data<float>()[i] = static_cast<float>(std::pow(theta, -2.0 * i / head_dim));
  }
  return frequencies;
}

// Element (row, column) of a rank-2 view, or element `column` of a rank-1 view at row 0.
inline double At(ConstTensorView x, int64_t row, int64_t column) {
  const int64_t i = row * (x.shape().rank() == 1 ? 0 : x.stride0()) + column;
  switch (x.dtype()) {
    case DType::kF32:
      return x.data<float>()[i];
    case DType::kF16:
      return x.data<Float16>()[i].ToFloat();
    case DType::kBF16:
      return x.data<BFloat16>()[i].ToFloat();
    default:
      return std::numeric_limits<double>::quiet_NaN();
  }
}

// All elements of a rank-2 view, row after row.
inline std::vector<double> Values(ConstTensorView x) {
  std::vector<double> values;
  for (int64_t i = 0; i < x.dim(0); ++i) {
    for (int64_t j = 0; j < x.dim(1); ++j) values.push_back(At(x, i, j));
  }
  return values;
}

// A view of `rows` x `columns` elements whose rows are `gap` elements further apart than needed.
inline TensorView Strided(const Tensor& storage, int64_t rows, int64_t columns, int64_t gap) {
  return TensorView(storage.view().raw(), storage.dtype(), {rows, columns}, columns + gap);
}

// Compares a rank-2 result with rows of doubles by relative L2 distance, and every element within
// `element` of the root mean square of what is wanted. Tells the first element outside.
inline void ExpectClose(ConstTensorView got, const std::vector<double>& want, double relative,
                        double element, const std::string& what) {
  const int64_t columns = got.dim(1);
  ASSERT_EQ(got.shape().NumElements(), static_cast<int64_t>(want.size())) << what;
  double error = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) norm += want[i] * want[i];
  const double rms = std::sqrt(norm / std::max<size_t>(want.size(), 1));
  for (int64_t row = 0; row < got.dim(0); ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const double a = At(got, row, column), b = want[row * columns + column];
      ASSERT_LE(std::abs(a - b), element * (rms + std::abs(b)) + 1e-30)
          << what << ": element [" << row << ", " << column << "] must be " << b << ", got " << a;
      error += (a - b) * (a - b);
    }
  }
  EXPECT_LE(std::sqrt(error), relative * std::sqrt(norm) + 1e-30) << what;
}

}  // namespace sluice::testing

#endif  // SLUICE_TESTS_SUPPORT_TENSOR_TESTING_H_
