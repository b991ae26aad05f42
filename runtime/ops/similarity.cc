#include "runtime/ops/similarity.h"

#include <string>

#include "runtime/error.h"
#include "runtime/ops/cpu/similarity.h"
#include "runtime/ops/cuda/kv.h"
#include "runtime/ops/cuda/select.h"
#include "runtime/ops/rows.h"
#include "runtime/transfer.h"

namespace sluice {

void RowCosines(ExecContext& ctx, ConstTensorView a, ConstTensorView b, TensorView cosines,
                std::span<const float> center) {
  if (a.shape().rank() != 2 || a.dim(1) == 0 ||
      (a.dtype() != DType::kF32 && a.dtype() != DType::kBF16)) {
    throw Error("[row_cosines] a must be [M, D] f32 or bf16, got " + a.shape().ToString() + " " +
                Name(a.dtype()));
  }
  if (b.shape() != a.shape() || b.dtype() != a.dtype()) {
    throw Error("[row_cosines] b must be " + a.shape().ToString() + " " + Name(a.dtype()) +
                ", got " + b.shape().ToString() + " " + Name(b.dtype()));
  }
  if (cosines.shape() != Shape{a.dim(0)} || cosines.dtype() != DType::kF32) {
    throw Error("[row_cosines] cosines must be " + Shape{a.dim(0)}.ToString() + " f32, got " +
                cosines.shape().ToString() + " " + Name(cosines.dtype()));
  }
  if (!center.empty() && static_cast<int64_t>(center.size()) != a.dim(1)) {
    throw Error("[row_cosines] the center must hold " + std::to_string(a.dim(1)) + " values, got " +
                std::to_string(center.size()));
  }
  if (OnGpu("row_cosines", ctx, {a, b, cosines})) {
    const Workspace::Scope scope(ctx.workspace());
    const float* middle = nullptr;
    if (!center.empty()) {
      const Shape shape{static_cast<int64_t>(center.size())};
      const TensorView there = ctx.workspace().Allocate(DType::kF32, shape);
      Transfer(ctx, ConstTensorView(center.data(), DType::kF32, shape), there);
      middle = static_cast<const float*>(there.raw());
    }
    return ctx.Queue(cuda::RowCosines, a, b, middle, cosines);
  }
  if (ctx.reference_kernels()) {
    cpu::RowCosinesReference(a, b, cosines, center);
  } else {
    cpu::RowCosinesSimd(ctx, a, b, cosines, center);
  }
}

void MeanRow(ExecContext& ctx, ConstTensorView x, std::span<float> mean) {
  if (x.shape().rank() != 2 || x.dim(0) < 1 ||
      (x.dtype() != DType::kF32 && x.dtype() != DType::kBF16)) {
    throw Error("[mean_row] x must be [M, D] f32 or bf16 with M >= 1, got " + x.shape().ToString() +
                " " + Name(x.dtype()));
  }
  if (static_cast<int64_t>(mean.size()) != x.dim(1)) {
    throw Error("[mean_row] mean must hold " + std::to_string(x.dim(1)) + " values, got " +
                std::to_string(mean.size()));
  }
  if (OnGpu("mean_row", ctx, {x})) {
    const Workspace::Scope scope(ctx.workspace());
    const Shape shape{1, x.dim(1)};
    const TensorView wide = ctx.workspace().Allocate(DType::kF32, x.shape());
    const TensorView there = ctx.workspace().Allocate(DType::kF32, shape);
    Convert(ctx, x, wide);
    ctx.Queue(cuda::MeanOfRows, static_cast<const float*>(wide.raw()), 1, x.dim(0), x.dim(1),
              static_cast<float*>(there.raw()));
    return Transfer(ctx, there, TensorView(mean.data(), DType::kF32, shape));
  }
  if (ctx.reference_kernels()) {
    cpu::MeanRowReference(x, mean);
  } else {
    cpu::MeanRowSimd(x, mean);
  }
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
