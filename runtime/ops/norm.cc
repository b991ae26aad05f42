#include "runtime/ops/norm.h"

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
  CheckRows("layer_norm", x, y);
  if (!more.empty() && (more.shape() != x.shape() || more.dtype() != DType::kF32)) {
    throw Error("[layer_norm] more must be " + x.shape().ToString() + " f32, got " +
                more.shape().ToString() + " " + Name(more.dtype()));
  }
  CheckVector("layer_norm", "weight", weight, x.dim(1));
  CheckVector("layer_norm", "bias", bias, x.dim(1));
  if (OnGpu("layer_norm", ctx, {x, weight, bias, y, more})) {
    return ctx.Queue(cuda::LayerNorm,
                     cuda::LayerNormArgs{.x = static_cast<const float*>(x.raw()),
                                         .more = static_cast<const float*>(more.raw()),
                                         .weight = static_cast<const float*>(weight.raw()),
                                         .bias = static_cast<const float*>(bias.raw()),
                                         .y = y.raw(),
                                         .y_dtype = y.dtype(),
                                         .m = x.dim(0),
                                         .d = x.dim(1),
                                         .x_stride = x.stride0(),
                                         .more_stride = more.stride0(),
                                         .y_stride = y.stride0(),
                                         .eps = eps});
  }
  Run(ctx, {.x = x,
            .more = more,
            .weight = weight.data<float>(),
            .bias = bias.data<float>(),
            .eps = eps,
            .y = y,
            .centre = true});
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
