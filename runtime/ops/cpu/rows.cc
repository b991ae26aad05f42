#include "runtime/ops/cpu/rows.h"

namespace sluice::cpu {
namespace {

float Get(ConstTensorView x, int64_t row, int64_t column) {
  const int64_t at = row * x.stride0() + column;
  return x.dtype() == DType::kF32 ? x.data<float>()[at] : x.data<BFloat16>()[at].ToFloat();
}

void Set(TensorView y, int64_t row, int64_t column, float value) {
  const int64_t at = row * y.stride0() + column;
  if (y.dtype() == DType::kF32) {
    y.data<float>()[at] = value;
  } else {
    y.data<BFloat16>()[at] = BFloat16::From(value);
  }
}

}  // namespace

void SubtractReference(ConstTensorView a, ConstTensorView b, TensorView y, int64_t begin,
                       int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    for (int64_t d = 0; d < y.dim(1); ++d) Set(y, m, d, Get(a, m, d) - Get(b, m, d));
  }
}

void AddReference(ConstTensorView a, ConstTensorView b, TensorView y, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    for (int64_t d = 0; d < y.dim(1); ++d) Set(y, m, d, Get(a, m, d) + Get(b, m, d));
  }
}

}  // namespace sluice::cpu
