#include "runtime/ops/norm.h"

#include <algorithm>
#include <string>

#include "runtime/error.h"
#include "runtime/ops/cpu/norm.h"
#include "runtime/ops/cuda/norm.h"
#include "runtime/transfer.h"

namespace sluice {
namespace {

void CheckVector(const char* place, const char* what, const ConstTensorView& v, int64_t d) {
  if (v.shape() != Shape{d} || v.dtype() != DType::kF32) {
    throw Error("[" + std::string(place) + "] " + what + " must be " + Shape{d}.ToString() +
                " f32, got " + v.shape().ToString() + " " + Name(v.dtype()));
  }
}

void CheckRows(const char* place, const ConstTensorView& x, const TensorView& y) {
  if (x.shape().rank() != 2 || x.dim(1) == 0 || x.dtype() != DType::kF32) {
    throw Error("[" + std::string(place) + "] x must be [M, D] f32, got " + x.shape().ToString() +
                " " + Name(x.dtype()));
  }
  if (y.shape() != x.shape() || (y.dtype() != DType::kF32 && y.dtype() != DType::kBF16)) {
    throw Error("[" + std::string(place) + "] y must be " + x.shape().ToString() +
                " f32 or bf16, got " + y.shape().ToString() + " " + Name(y.dtype()));
  }
}

void Run(ExecContext& ctx, const NormArgs& args) {
  if (ctx.reference_kernels()) {
    NormReference(args);
  } else {
    NormSimd(ctx, args);
  }
}

}  // namespace

void LayerNorm(ExecContext& ctx, ConstTensorView x, ConstTensorView weight, ConstTensorView bias,
               float eps, TensorView y, ConstTensorView more) {
  LayerNorm(ctx, {&x, 1}, weight, bias, eps, y, more);
}

void LayerNorm(ExecContext& ctx, std::span<const ConstTensorView> x, ConstTensorView weight,
               ConstTensorView bias, float eps, TensorView y, ConstTensorView more) {
  constexpr char kOp[] = "layer_norm";
  if (x.empty()) return;
  const Shape& shape = x[0].shape();
  const auto count = static_cast<int64_t>(x.size());
  CheckRows(kOp, x[0], {nullptr, y.dtype(), shape});
  for (const ConstTensorView& matrix : x) {
    if (matrix.shape() == shape && matrix.dtype() == DType::kF32) continue;
    throw Error("[layer_norm] x must be " + shape.ToString() + " f32 in all matrices, got " +
                matrix.shape().ToString() + " " + Name(matrix.dtype()));
  }
  const int64_t rows = shape[0], d = shape[1];
  const Shape all{count * rows, d};
  if (y.shape() != all) {
    throw Error("[layer_norm] y must be " + all.ToString() + " f32 or bf16, got " +
                y.shape().ToString() + " " + Name(y.dtype()));
  }
  // How many of the matrices have rows in `more`.
  const int64_t covered = more.empty() || rows == 0 ? 0 : more.dim(0) / rows;
  if (!more.empty() && (more.shape() != Shape{covered * rows, d} || covered > count ||
                        more.dtype() != DType::kF32)) {
    throw Error("[layer_norm] more must be " + all.ToString() +
                " f32, or the rows of the first matrices, got " + more.shape().ToString() + " " +
                Name(more.dtype()));
  }
  CheckVector(kOp, "weight", weight, d);
  CheckVector(kOp, "bias", bias, d);
  const auto rows_of = [&](auto view, int64_t begin, int64_t end) {
    return view.Slice(begin * rows, end * rows);
  };
  if (OnGpu(kOp, ctx, {weight, bias, y, more})) {
    for (const ConstTensorView& matrix : x) OnGpu(kOp, ctx, {matrix});
    for (int64_t begin = 0; begin < count; begin += cuda::LayerNormArgs::kMostMatrices) {
      const int64_t end = std::min(begin + cuda::LayerNormArgs::kMostMatrices, count);
      cuda::LayerNormArgs args = {.weight = static_cast<const float*>(weight.raw()),
                                  .bias = static_cast<const float*>(bias.raw()),
                                  .y = rows_of(y, begin, end).raw(),
                                  .y_dtype = y.dtype(),
                                  .matrices = end - begin,
                                  .m = rows,
                                  .d = d,
                                  .more_stride = more.stride0(),
                                  .y_stride = y.stride0(),
                                  .eps = eps};
      for (int64_t i = begin; i < end; ++i) {
        args.x[i - begin] = static_cast<const float*>(x[i].raw());
        args.x_stride[i - begin] = x[i].stride0();
      }
      if (begin < covered) {
        const int64_t covered_end = std::min(end, covered);
        args.more = static_cast<const float*>(rows_of(more, begin, covered_end).raw());
        args.more_matrices = covered_end - begin;
      }
      ctx.Queue(cuda::LayerNorm, args);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    Run(ctx, {.x = x[i],
              .more = i < covered ? rows_of(more, i, i + 1) : ConstTensorView(),
              .weight = weight.data<float>(),
              .bias = bias.data<float>(),
              .eps = eps,
              .y = rows_of(y, i, i + 1),
              .centre = true});
  }
}

void RmsNorm(ExecContext& ctx, ConstTensorView x, ConstTensorView weight, float eps, TensorView y) {
  CheckRows("rms_norm", x, y);
  CheckVector("rms_norm", "weight", weight, x.dim(1));
  if (OnGpu("rms_norm", ctx, {x, weight, y})) {
    return ctx.Queue(cuda::RmsNorm,
                     cuda::RmsNormArgs{.x = static_cast<const float*>(x.raw()),
                                       .weight = static_cast<const float*>(weight.raw()),
                                       .y = y.raw(),
                                       .y_dtype = y.dtype(),
                                       .m = x.dim(0),
                                       .d = x.dim(1),
                                       .x_stride = x.stride0(),
                                       .y_stride = y.stride0(),
                                       .eps = eps});
  }
  Run(ctx, {.x = x, .weight = weight.data<float>(), .eps = eps, .y = y});
}

}  // namespace sluice
