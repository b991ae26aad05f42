#include "runtime/ops/quantise.h"

#include <string>

#include "runtime/error.h"
#include "runtime/ops/cpu/quantise.h"
#include "runtime/ops/cuda/quantise.h"
#include "runtime/transfer.h"

namespace sluice {

void QuantiseRows(ExecContext& ctx, ConstTensorView x, WeightFormat format, TensorView q,
                  TensorView factors) {
  if (format == WeightFormat::kPlain) {
    throw Error("[quantise] format must be fp8 or int8, got plain");
  }
  if (x.shape().rank() != 2 || x.dtype() != DType::kBF16) {
    throw Error("[quantise] x must be [M, K] bf16, got " + x.shape().ToString() + " " +
                Name(x.dtype()));
  }
  if (q.shape().rank() != 2 || q.dim(0) != x.dim(0) || q.dim(1) < x.dim(1) ||
      q.dtype() != StorageOf(format) || !q.contiguous()) {
    throw Error("[quantise] q must be a contiguous [" + std::to_string(x.dim(0)) + ", at least " +
                std::to_string(x.dim(1)) + "] " + Name(StorageOf(format)) + ", got " +
                q.shape().ToString() + " " + Name(q.dtype()));
  }
  if (factors.shape() != Shape{x.dim(0)} || factors.dtype() != DType::kF32) {
    throw Error("[quantise] factors must be " + Shape{x.dim(0)}.ToString() + " f32, got " +
                factors.shape().ToString() + " " + Name(factors.dtype()));
  }
  if (OnGpu("quantise", ctx, {x, q, factors})) {
    return ctx.Queue(cuda::QuantiseRows, x, format, q, factors);
  }
  QuantiseReference(x, format, q, factors);
}

}  // namespace sluice
