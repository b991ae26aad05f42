#include "runtime/ops/similarity.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "runtime/ops/cpu/similarity.h"
#include "runtime/ops/cuda/select.h"
#include "runtime/parallel.h"
#include "runtime/transfer.h"

namespace sluice {

namespace {

void CheckRows(const char* op, const char* what, ConstTensorView x) {
  if (x.shape().rank() == 2 && x.dim(1) > 0 &&
      (x.dtype() == DType::kF32 || x.dtype() == DType::kBF16)) {
    return;
  }
  throw Error(std::string("[") + op + "] " + what + " must be [M, D] f32 or bf16, got " +
              x.shape().ToString() + " " + Name(x.dtype()));
}

void CheckSame(const char* op, const char* what, ConstTensorView x, Shape shape, DType dtype) {
  if (x.shape() == shape && x.dtype() == dtype) return;
  throw Error(std::string("[") + op + "] " + what + " must be " + shape.ToString() + " " +
              Name(dtype) + ", got " + x.shape().ToString() + " " + Name(x.dtype()));
}

}  // namespace

void RowCosines(ExecContext& ctx, std::span<const RowPairs> pairs, TensorView cosines) {
  constexpr char kOp[] = "row_cosines";
  if (pairs.empty()) return;
  const ConstTensorView& first = pairs[0].a;
  CheckRows(kOp, "a", first);
  for (const RowPairs& pair : pairs) {
    CheckSame(kOp, "a", pair.a, first.shape(), first.dtype());
    CheckSame(kOp, "b", pair.b, first.shape(), first.dtype());
    if (pair.center.empty() != pairs[0].center.empty()) {
      throw Error("[row_cosines] all pairs must have a center, or none");
    }
    if (!pair.center.empty()) {
      CheckSame(kOp, "the center", pair.center, {first.dim(1)}, DType::kF32);
    }
  }
  const Shape shape{static_cast<int64_t>(pairs.size()), first.dim(0)};
  CheckSame(kOp, "cosines", cosines, shape, DType::kF32);
  if (OnGpu(kOp, ctx, {cosines})) {
    for (const RowPairs& pair : pairs) OnGpu(kOp, ctx, {pair.a, pair.b, pair.center});
    return ctx.Queue(cuda::RowCosines, pairs, cosines);
  }
  for (size_t p = 0; p < pairs.size(); ++p) {
    const auto& [a, b, center] = pairs[p];
    const TensorView of_pair(cosines.data<float>() + static_cast<int64_t>(p) * cosines.stride0(),
                             DType::kF32, {a.dim(0)});
    const std::span<const float> middle =
        center.empty() ? std::span<const float>()
                       : std::span(center.data<float>(), static_cast<size_t>(a.dim(1)));
    if (ctx.reference_kernels()) {
      cpu::RowCosinesReference(a, b, of_pair, middle);
    } else {
      cpu::RowCosinesSimd(ctx, a, b, of_pair, middle);
    }
  }
}

void MeanRow(ExecContext& ctx, ConstTensorView x, TensorView mean) {
  CheckRows("mean_row", "x", x);
  if (x.dim(0) < 1) throw Error("[mean_row] x must have a row, got " + x.shape().ToString());
  CheckSame("mean_row", "mean", mean, {x.dim(1)}, DType::kF32);
  if (OnGpu("mean_row", ctx, {x, mean})) return ctx.Queue(cuda::MeanRow, x, mean);
  const std::span<float> values(mean.data<float>(), x.dim(1));
  if (ctx.reference_kernels()) {
    cpu::MeanRowReference(x, values);
  } else {
    cpu::MeanRowSimd(x, values);
  }
}

void LowestPlaces(ExecContext& ctx, ConstTensorView values, TensorView places) {
  constexpr char kOp[] = "lowest_places";
  constexpr int64_t kMost = 16384;
  if (values.shape().rank() != 2 || values.dtype() != DType::kF32 || values.dim(1) > kMost) {
    throw Error("[lowest_places] values must be [F, N] f32, N at most 16384, got " +
                values.shape().ToString() + " " + Name(values.dtype()));
  }
  const int64_t count = values.dim(1), k = places.shape().rank() == 2 ? places.dim(1) : 0;
  CheckSame(kOp, "places", places, {values.dim(0), k}, DType::kI32);
  if (k < 1 || k > count) {
    throw Error("[lowest_places] must choose between 1 and all of " + std::to_string(count) +
                " values, got " + std::to_string(k));
  }
  if (OnGpu(kOp, ctx, {values, places})) return ctx.Queue(cuda::LowestPlaces, values, places);
  ParallelFor(ctx, values.dim(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> row(count);
    std::vector<int32_t> order(count);
    for (int64_t f = begin; f < end; ++f) {
      const float* from = values.data<float>() + f * values.stride0();
      for (int64_t i = 0; i < count; ++i) {
        row[i] = std::isnan(from[i]) ? std::numeric_limits<float>::infinity() : from[i];
      }
      std::iota(order.begin(), order.end(), 0);
      std::nth_element(
          order.begin(), order.begin() + k - 1, order.end(),
          [&](int32_t a, int32_t b) { return row[a] != row[b] ? row[a] < row[b] : a < b; });
      std::sort(order.begin(), order.begin() + k);
      std::copy_n(order.begin(), k, places.data<int32_t>() + f * places.stride0());
    }
  });
}

void NearestRows(const ExecContext& ctx, ConstTensorView a, ConstTensorView b,
                 std::span<int32_t> nearest, std::span<float> cosines) {
  if (a.shape().rank() != 2 || a.dtype() != DType::kF32) {
    throw Error("[nearest_rows] a must be [M, D] f32, got " + a.shape().ToString() + " " +
                Name(a.dtype()));
  }
  if (b.shape().rank() != 2 || b.dim(0) < 1 || b.dim(1) != a.dim(1) || b.dtype() != DType::kF32) {
    throw Error("[nearest_rows] b must be [N, " + std::to_string(a.dim(1)) +
                "] f32 with N >= 1, got " + b.shape().ToString() + " " + Name(b.dtype()));
  }
  if (static_cast<int64_t>(nearest.size()) != a.dim(0) || cosines.size() != nearest.size()) {
    throw Error("[nearest_rows] nearest and cosines must hold " + std::to_string(a.dim(0)) +
                " values, got " + std::to_string(nearest.size()) + " and " +
                std::to_string(cosines.size()));
  }
  if (ctx.reference_kernels()) {
    cpu::NearestRowsReference(a, b, nearest, cosines);
  } else {
    cpu::NearestRowsSimd(a, b, nearest, cosines);
  }
}

}  // namespace sluice
