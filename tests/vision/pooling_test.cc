#include "vision/pooling.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <tuple>

#include "runtime/error.h"

namespace sluice {
namespace {

Tensor Random(Shape shape, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Tensor x(DType::kF32, shape);
  for (int64_t i = 0; i < shape.NumElements(); ++i) x.data<float>()[i] = normal(random);
  return x;
}

TEST(PoolingTest, EqualsTheSeparableFormulaOnOddAndEvenGrids) {
  ExecContext ctx({.num_threads = 2});
  for (const auto& [rows, cols] : {std::pair{27, 27}, {14, 14}, {5, 5}, {1, 1}, {2, 7}, {3, 4}}) {
    const int frames = 2, width = 19, out_rows = (rows + 1) / 2, out_cols = (cols + 1) / 2;
    const Tensor x = Random({frames * rows * cols, width}, rows * 100 + cols);
    Tensor y(DType::kF32, {frames * out_rows * out_cols, width});
    const BilinearPool pool(rows, cols, out_rows, out_cols);
    ASSERT_EQ(pool.out_rows(), out_rows);
    pool.Run(ctx, x, y);
    const auto weight = [](int in, int out, int i, int j) {
      const double p = std::max(0.0, (i + 0.5) * in / out - 0.5);
      const int low = static_cast<int>(p), high = std::min(low + 1, in - 1);
      return (low == j ? 1 - (p - low) : 0.0) + (high == j ? p - low : 0.0);
    };
    for (int f = 0; f < frames; ++f) {
      for (int r = 0; r < out_rows; ++r) {
        for (int c = 0; c < out_cols; ++c) {
          for (int d = 0; d < width; ++d) {
            double expected = 0;
            for (int i = 0; i < rows; ++i) {
              for (int j = 0; j < cols; ++j) {
                expected += weight(rows, out_rows, r, i) * weight(cols, out_cols, c, j) *
                            x.data<float>()[((f * rows + i) * cols + j) * width + d];
              }
            }
            // Positions in f32 near 25 carry errors of 2e-6, which scale differences of values.
            ASSERT_NEAR(y.data<float>()[((f * out_rows + r) * out_cols + c) * width + d], expected,
                        2e-5)
                << rows << "x" << cols << " frame " << f << " at " << r << "," << c << "," << d;
          }
        }
      }
    }
  }
}

TEST(PoolingTest, EvenGridsAverageFourNeighbours) {
  ExecContext ctx({.num_threads = 1});
  const Tensor x = Random({4 * 4, 1}, 5);
  Tensor y(DType::kF32, {4, 1});
  BilinearPool(4, 4, 2, 2).Run(ctx, x, y);
  const float* v = x.data<float>();
  EXPECT_NEAR(y.data<float>()[3], (v[10] + v[11] + v[14] + v[15]) / 4, 1e-6);
}

TEST(PoolingTest, GridsOfAnotherSizeAreRefused) {
  ExecContext ctx({.num_threads = 1});
  const Tensor x = Random({26, 4}, 1);
  Tensor y(DType::kF32, {9, 4});
  EXPECT_THROW(BilinearPool(5, 5, 3, 3).Run(ctx, x, y), Error);
}

TEST(AveragePoolTest, TokensAreTheMeansOfWholeSquares) {
  ExecContext ctx({.num_threads = 2});
  for (const auto& [rows, cols, stride] :
       {std::tuple{24, 24, 2}, {5, 5, 2}, {6, 9, 3}, {7, 4, 3}, {2, 2, 2}, {3, 3, 1}}) {
    const int frames = 3, width = 17, out_rows = rows / stride, out_cols = cols / stride;
    const Tensor x = Random({frames * rows * cols, width}, rows * 100 + cols);
    Tensor y(DType::kF32, {frames * out_rows * out_cols, width});
    AveragePool(ctx, x, rows, cols, stride, y);
    for (int64_t i = 0; i < y.shape().NumElements(); ++i) {
      const int64_t d = i % width, c = i / width % out_cols, r = i / width / out_cols % out_rows;
      const int64_t f = i / width / out_cols / out_rows;
      double sum = 0;
      for (int64_t j = 0; j < stride * stride; ++j) {
        const int64_t row = r * stride + j / stride, col = c * stride + j % stride;
        sum += x.data<float>()[((f * rows + row) * cols + col) * width + d];
      }
      // Nine additions in f32 of values near 1.
      ASSERT_NEAR(y.data<float>()[i], sum / (stride * stride), 1e-6)
          << rows << "x" << cols << " by " << stride << " at " << f << "," << r << "," << c;
    }
  }
  Tensor y(DType::kF32, {9, 4});
  EXPECT_THROW(AveragePool(ctx, Random({25, 4}, 1), 5, 5, 2, y), Error);
  EXPECT_THROW(AveragePool(ctx, Random({35, 4}, 1), 6, 6, 2, y), Error);
}

}  // namespace
}  // namespace sluice
