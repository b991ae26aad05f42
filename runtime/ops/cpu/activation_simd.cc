// SiluMul and Softmax. Bytes moved: SiluMul reads gate and up once and writes y once; Softmax
// reads and writes its row three times, of which all but the first read hit the cache.
#include "runtime/ops/cpu/activation.h"
#include "runtime/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "runtime/ops/cpu/activation_simd.cc"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "runtime/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace sluice {
namespace HWY_NAMESPACE {

// e^x with a relative error of 1e-5, for x in [-87, 87]: 2^n 2^f with f in [-1/2, 1/2]. The
// polynomial is good to 3e-6, the rounding of x / ln 2 to 8e-6.
HWY_INLINE VF RoughExp(VF x) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const VF t = hn::Mul(x, hn::Set(d, 1.44269504f));
  const auto n = hn::NearestInt(t);
  const VF f = hn::Sub(t, hn::ConvertTo(d, n));
  VF p = hn::Set(d, 9.57008e-3f);
  p = hn::MulAdd(p, f, hn::Set(d, 5.591781e-2f));
  p = hn::MulAdd(p, f, hn::Set(d, 2.4024745e-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 6.9312182e-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 9.9999926e-1f));
  return hn::BitCast(d, hn::Add(hn::BitCast(di, p), hn::ShiftLeft<23>(n)));
}

// gate / (1 + e^-gate) * up. e^-gate is kept finite; beyond e^87 the quotient is 0 in f32 anyway.
// A result that is rounded to bf16 (4e-3) is told nothing by an exponential and a quotient beyond
// 1e-5, and they are most of the work: rows take three quarters of the time.
template <typename To>
HWY_INLINE VF SiluTimes(VF gate, VF up) {
  const DF d;
  const VF minus = hn::Min(hn::Max(hn::Neg(gate), hn::Set(d, -87.f)), hn::Set(d, 87.f));
  if constexpr (std::is_same_v<To, BFloat16>) {
    const VF sum = hn::Add(RoughExp(minus), hn::Set(d, 1.f));
    // One Newton step: 12 bits become 23.
    const VF rough = hn::ApproximateReciprocal(sum);
    const VF reciprocal = hn::Mul(rough, hn::NegMulAdd(sum, rough, hn::Set(d, 2.f)));
    return hn::Mul(hn::Mul(gate, reciprocal), up);
  } else {
    return hn::Mul(hn::Div(gate, hn::Add(hn::Exp(d, minus), hn::Set(d, 1.f))), up);
  }
}

template <typename From, typename To>
HWY_INLINE void SiluRow(const From* HWY_RESTRICT gate, const From* HWY_RESTRICT up, int64_t width,
                        To* HWY_RESTRICT y) {
  const int64_t lanes = hn::Lanes(DF());
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes) {
    StoreFloats(SiluTimes<To>(LoadFloats(gate + i), LoadFloats(up + i)), y + i);
  }
  if (i < width) {
    const int64_t left = width - i;
    StoreFloatsN(SiluTimes<To>(LoadFloatsN(gate + i, left), LoadFloatsN(up + i, left)), y + i,
                 left);
  }
}

template <typename From, typename To>
void SiluRows(ConstTensorView gate_up, TensorView y, int64_t begin, int64_t end) {
  const int64_t width = y.dim(1);
  for (int64_t m = begin; m < end; ++m) {
    const From* gate = gate_up.data<From>() + m * gate_up.stride0();
    SiluRow(gate, gate + width, width, y.data<To>() + m * y.stride0());
  }
}

void SiluAny(ConstTensorView gate_up, TensorView y, int64_t begin, int64_t end) {
  const bool from_bf16 = gate_up.dtype() == DType::kBF16, to_bf16 = y.dtype() == DType::kBF16;
  if (from_bf16 && to_bf16) return SiluRows<BFloat16, BFloat16>(gate_up, y, begin, end);
  if (from_bf16) return SiluRows<BFloat16, float>(gate_up, y, begin, end);
  if (to_bf16) return SiluRows<float, BFloat16>(gate_up, y, begin, end);
  return SiluRows<float, float>(gate_up, y, begin, end);
}

void SoftmaxRow(float* x, int64_t width) {
  const DF d;
  const int64_t lanes = hn::Lanes(d);
  const int64_t whole = width / lanes * lanes, left = width - whole;
  VF top = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < whole; i += lanes) top = hn::Max(top, LoadFloats(x + i));
  float largest = hn::GetLane(hn::MaxOfLanes(d, top));
  for (int64_t i = whole; i < width; ++i) largest = std::max(largest, x[i]);

  const VF offset = hn::Set(d, largest);
  VF sum = hn::Zero(d);
  for (int64_t i = 0; i < whole; i += lanes) {
    const VF e = hn::Exp(d, hn::Sub(LoadFloats(x + i), offset));
    StoreFloats(e, x + i);
    sum = hn::Add(sum, e);
  }
  float total = hn::GetLane(hn::SumOfLanes(d, sum));
  if (left > 0) {
    StoreFloatsN(hn::Exp(d, hn::Sub(LoadFloatsN(x + whole, left), offset)), x + whole, left);
    for (int64_t i = whole; i < width; ++i) total += x[i];
  }
  const VF scale = hn::Set(d, 1 / total);
  for (int64_t i = 0; i < whole; i += lanes) StoreFloats(hn::Mul(LoadFloats(x + i), scale), x + i);
  for (int64_t i = whole; i < width; ++i) x[i] /= total;
}

void SoftmaxRows(TensorView x, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    SoftmaxRow(x.data<float>() + m * x.stride0(), x.dim(1));
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sluice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice {
HWY_EXPORT(SiluAny);
HWY_EXPORT(SoftmaxRows);

void SiluMulSimd(ExecContext& ctx, ConstTensorView gate_up, TensorView y) {
  if (y.dim(1) == 0) return;
  // Waking a thread costs about as much as 4 K exponentials.
  ParallelFor(ctx, y.dim(0), 1 + 4096 / y.dim(1), [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(SiluAny)(gate_up, y, begin, end);
  });
}

void SoftmaxSimd(ExecContext& ctx, TensorView x) {
  ParallelFor(ctx, x.dim(0), 1 + 4096 / x.dim(1), [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(SoftmaxRows)(x, begin, end);
  });
}

}  // namespace sluice
#endif  // HWY_ONCE
