// Subtract and Add, bound by memory: every element is read and written once.
#include "runtime/ops/cpu/rows.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "runtime/ops/cpu/rows_simd.cc"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include <hwy/highway.h>

#include "runtime/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace sluice {
namespace HWY_NAMESPACE {

template <typename T>
void SubtractRows(ConstTensorView a, ConstTensorView b, TensorView y, int64_t begin, int64_t end) {
  const int64_t lanes = hn::Lanes(DF()), width = y.dim(1);
  for (int64_t m = begin; m < end; ++m) {
    const float* from = a.data<float>() + m * a.stride0();
    const float* less = b.data<float>() + m * b.stride0();
    T* to = y.data<T>() + m * y.stride0();
    int64_t i = 0;
    for (; i + lanes <= width; i += lanes) {
      StoreFloats(hn::Sub(LoadFloats(from + i), LoadFloats(less + i)), to + i);
    }
    if (i == width) continue;
    const int64_t left = width - i;
    StoreFloatsN(hn::Sub(LoadFloatsN(from + i, left), LoadFloatsN(less + i, left)), to + i, left);
  }
}

template <typename T>
void AddRows(ConstTensorView a, ConstTensorView b, TensorView y, int64_t begin, int64_t end) {
  const int64_t lanes = hn::Lanes(DF()), width = y.dim(1);
  for (int64_t m = begin; m < end; ++m) {
    const float* from = a.data<float>() + m * a.stride0();
    const T* more = b.data<T>() + m * b.stride0();
    float* to = y.data<float>() + m * y.stride0();
    int64_t i = 0;
    for (; i + lanes <= width; i += lanes) {
      StoreFloats(hn::Add(LoadFloats(from + i), LoadFloats(more + i)), to + i);
    }
    if (i == width) continue;
    const int64_t left = width - i;
    StoreFloatsN(hn::Add(LoadFloatsN(from + i, left), LoadFloatsN(more + i, left)), to + i, left);
  }
}

void SubtractAny(ConstTensorView a, ConstTensorView b, TensorView y, int64_t begin, int64_t end) {
  if (y.dtype() == DType::kF32) return SubtractRows<float>(a, b, y, begin, end);
  SubtractRows<BFloat16>(a, b, y, begin, end);
}

void AddAny(ConstTensorView a, ConstTensorView b, TensorView y, int64_t begin, int64_t end) {
  if (b.dtype() == DType::kF32) return AddRows<float>(a, b, y, begin, end);
  AddRows<BFloat16>(a, b, y, begin, end);
}

}  // namespace HWY_NAMESPACE
}  // namespace sluice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice {
HWY_EXPORT(SubtractAny);
HWY_EXPORT(AddAny);

namespace cpu {

void SubtractSimd(ConstTensorView a, ConstTensorView b, TensorView y, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(SubtractAny)(a, b, y, begin, end);
}

void AddSimd(ConstTensorView a, ConstTensorView b, TensorView y, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(AddAny)(a, b, y, begin, end);
}

}  // namespace cpu
}  // namespace sluice
#endif  // HWY_ONCE
