// RowCosines: one pass over both rows. Bytes moved: 2 D SizeOf(T) read a row.
#include "runtime/ops/cpu/similarity.h"
#include "runtime/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "runtime/ops/cpu/similarity_simd.cc"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>

#include "runtime/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace sluice {
namespace HWY_NAMESPACE {

template <typename T>
void CosinesOf(ConstTensorView a, ConstTensorView b, int64_t begin, int64_t end, float* cosines) {
  const DF d;
  const int64_t lanes = hn::Lanes(d), width = a.dim(1);
  for (int64_t m = begin; m < end; ++m) {
    const T* x = a.data<T>() + m * a.stride0();
    const T* y = b.data<T>() + m * b.stride0();
    VF xy = hn::Zero(d), xx = hn::Zero(d), yy = hn::Zero(d);
    const auto add = [&](VF u, VF v) {
      xy = hn::MulAdd(u, v, xy);
      xx = hn::MulAdd(u, u, xx);
      yy = hn::MulAdd(v, v, yy);
    };
    int64_t i = 0;
    for (; i + lanes <= width; i += lanes) add(LoadFloats(x + i), LoadFloats(y + i));
    if (i < width) add(LoadFloatsN(x + i, width - i), LoadFloatsN(y + i, width - i));
    const float norms = std::sqrt(hn::GetLane(hn::SumOfLanes(d, xx))) *
                        std::sqrt(hn::GetLane(hn::SumOfLanes(d, yy)));
    cosines[m] = hn::GetLane(hn::SumOfLanes(d, xy)) / std::max(norms, 1e-8f);
  }
}

void Cosines(ConstTensorView a, ConstTensorView b, int64_t begin, int64_t end, float* cosines) {
  if (a.dtype() == DType::kF32) {
    CosinesOf<float>(a, b, begin, end, cosines);
  } else {
    CosinesOf<BFloat16>(a, b, begin, end, cosines);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sluice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice {
HWY_EXPORT(Cosines);

namespace cpu {

void RowCosinesSimd(ExecContext& ctx, ConstTensorView a, ConstTensorView b, TensorView cosines) {
  // Waking a thread costs about as much as reading 64 KB.
  ParallelFor(ctx, a.dim(0), 1 + 16384 / a.dim(1), [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(Cosines)(a, b, begin, end, cosines.data<float>());
  });
}

}  // namespace cpu
}  // namespace sluice
#endif  // HWY_ONCE
