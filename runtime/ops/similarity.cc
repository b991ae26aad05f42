#include "runtime/ops/similarity.h"

#include <string>

#include "runtime/error.h"
#include "runtime/ops/cpu/similarity.h"

namespace sluice {

void RowCosines(ExecContext& ctx, ConstTensorView a, ConstTensorView b, TensorView cosines) {
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
  if (ctx.reference_kernels()) {
    cpu::RowCosinesReference(a, b, cosines);
  } else {
    cpu::RowCosinesSimd(ctx, a, b, cosines);
  }
}

}  // namespace sluice
