// Vectors of f32 read from and written to f32, bf16 or f16 memory, for the Highway files of
// runtime/. Included once for every instruction set, after <hwy/foreach_target.h>.
//
// Do not keep what HWY_DYNAMIC_DISPATCH gives: until the first dispatch of the process it is the
// function that examines the processor, which costs 20 us and more on virtual machines, and a kept
// pointer would examine it in every call.
#if defined(SLUICE_RUNTIME_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SLUICE_RUNTIME_SIMD_INL_H_
#undef SLUICE_RUNTIME_SIMD_INL_H_
#else
#define SLUICE_RUNTIME_SIMD_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>
#include <cstring>

#include "runtime/dtype.h"

HWY_BEFORE_NAMESPACE();
namespace sluice {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// All vectors have this shape; narrower types use the same number of lanes.
using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;
using DU32 = hn::Rebind<uint32_t, DF>;
using DU16 = hn::Rebind<uint16_t, DF>;
using DF16 = hn::Rebind<hwy::float16_t, DF>;

// Pointers need not be aligned to the vector.
HWY_INLINE VF LoadFloats(const float* p) { return hn::LoadU(DF(), p); }
HWY_INLINE VF LoadFloats(const BFloat16* p) {
  const auto half = hn::LoadU(DU16(), reinterpret_cast<const uint16_t*>(p));
  return hn::BitCast(DF(), hn::ShiftLeft<16>(hn::PromoteTo(DU32(), half)));
}
HWY_INLINE VF LoadFloats(const Float16* p) {
  return hn::PromoteTo(DF(), hn::LoadU(DF16(), reinterpret_cast<const hwy::float16_t*>(p)));
}

HWY_INLINE void StoreFloats(VF v, float* p) { hn::StoreU(v, DF(), p); }
// Rounds to nearest, ties to even; NaN stays NaN (as BFloat16::From).
HWY_INLINE void StoreFloats(VF v, BFloat16* p) {
  const DU32 du;
  const auto bits = hn::BitCast(du, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fff)));
  const auto quiet = hn::Or(bits, hn::Set(du, 0x400000));
  const auto nan = hn::RebindMask(du, hn::IsNaN(v));
  const auto upper = hn::ShiftRight<16>(hn::IfThenElse(nan, quiet, rounded));
  hn::StoreU(hn::TruncateTo(DU16(), upper), DU16(), reinterpret_cast<uint16_t*>(p));
}
// The first `count` < Lanes elements; the other lanes are zero, and nothing behind is touched.
template <typename T>
HWY_INLINE VF LoadFloatsN(const T* p, int64_t count) {
  HWY_ALIGN T part[hn::MaxLanes(DF())] = {};
  std::memcpy(part, p, count * sizeof(T));
  return LoadFloats(part);
}
template <typename T>
HWY_INLINE void StoreFloatsN(VF v, T* p, int64_t count) {
  HWY_ALIGN T part[hn::MaxLanes(DF())];
  StoreFloats(v, part);
  std::memcpy(p, part, count * sizeof(T));
}

}  // namespace HWY_NAMESPACE
}  // namespace sluice
HWY_AFTER_NAMESPACE();

#endif  // include guard that toggles with the target
