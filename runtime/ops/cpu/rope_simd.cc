// Rope: the cosines and sines of a row are computed once and used by all its heads, so rotating q
// and k in one call (neighbouring columns of one product) halves their cost.
// Bytes moved: x read and written once.
#include <cmath>

#include "runtime/ops/cpu/rope.h"
#include "runtime/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "runtime/ops/cpu/rope_simd.cc"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include "runtime/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace sluice {
namespace HWY_NAMESPACE {

template <typename T>
HWY_INLINE void RotateHead(T* first, T* second, const float* cosines, const float* sines,
                           int64_t half) {
  const int64_t lanes = hn::Lanes(DF());
  int64_t i = 0;
  for (; i + lanes <= half; i += lanes) {
    const VF a = LoadFloats(first + i), b = LoadFloats(second + i);
    const VF c = LoadFloats(cosines + i), s = LoadFloats(sines + i);
    StoreFloats(hn::Sub(hn::Mul(a, c), hn::Mul(b, s)), first + i);
    StoreFloats(hn::MulAdd(b, c, hn::Mul(a, s)), second + i);
  }
  if (i < half) {
    const int64_t left = half - i;
    const VF a = LoadFloatsN(first + i, left), b = LoadFloatsN(second + i, left);
    const VF c = LoadFloatsN(cosines + i, left), s = LoadFloatsN(sines + i, left);
    StoreFloatsN(hn::Sub(hn::Mul(a, c), hn::Mul(b, s)), first + i, left);
    StoreFloatsN(hn::MulAdd(b, c, hn::Mul(a, s)), second + i, left);
  }
}

template <typename T>
HWY_INLINE void RotateRow(T* row, int64_t heads, int64_t half, const float* cosines,
                          const float* sines) {
  for (int64_t head = 0; head < heads; ++head, row += 2 * half) {
    RotateHead(row, row + half, cosines, sines, half);
  }
}

// cosines, sines of position * inv_freq[i]: [half] each.
void Angles(int32_t position, const float* inv_freq, int64_t half, float* cosines, float* sines) {
  // Highway reduces arguments exactly up to here (3 ulp); positions beyond take the library's
  // slower functions. inv_freq is at most 1, so the position bounds the angle.
  constexpr int32_t kExactUpTo = 39000;
  const DF d;
  const int64_t lanes = hn::Lanes(d);
  if (position > kExactUpTo || position < -kExactUpTo) {
    for (int64_t i = 0; i < half; ++i) {
      const double angle = RopeAngle(position, inv_freq[i]);
      cosines[i] = static_cast<float>(std::cos(angle));
      sines[i] = static_cast<float>(std::sin(angle));
    }
    return;
  }
  for (int64_t i = 0; i < half; i += lanes) {
    const int64_t left = half - i;
    const VF freq = left >= lanes ? LoadFloats(inv_freq + i) : LoadFloatsN(inv_freq + i, left);
    const VF angle = hn::Mul(hn::Set(d, static_cast<float>(position)), freq);
    const VF c = hn::Cos(d, angle), s = hn::Sin(d, angle);
    if (left >= lanes) {
      StoreFloats(c, cosines + i);
      StoreFloats(s, sines + i);
    } else {
      StoreFloatsN(c, cosines + i, left);
      StoreFloatsN(s, sines + i, left);
    }
  }
}

// Rows [begin, end). tables: [S, 2 * half] f32 of scratch, a row for each row of x.
void RotateRows(TensorView x, int64_t half, std::span<const int32_t> positions,
                const float* inv_freq, float* tables, int64_t begin, int64_t end) {
  const int64_t heads = x.dim(1) / (2 * half);
  for (int64_t s = begin; s < end; ++s) {
    float* cosines = tables + s * 2 * half;
    float* sines = cosines + half;
    Angles(positions[s], inv_freq, half, cosines, sines);
    if (x.dtype() == DType::kBF16) {
      RotateRow(x.data<BFloat16>() + s * x.stride0(), heads, half, cosines, sines);
    } else {
      RotateRow(x.data<float>() + s * x.stride0(), heads, half, cosines, sines);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sluice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice {
HWY_EXPORT(RotateRows);

void RopeSimd(ExecContext& ctx, TensorView x, int head_dim, std::span<const int32_t> positions,
              const float* inv_freq) {
  if (x.dim(1) == 0) return;
  const int64_t half = head_dim / 2;
  Workspace::Scope scope(ctx.workspace());
  float* tables = ctx.workspace().Allocate(DType::kF32, {x.dim(0), 2 * half}).data<float>();
  ParallelFor(ctx, x.dim(0), 1 + 4096 / x.dim(1), [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(RotateRows)(x, half, positions, inv_freq, tables, begin, end);
  });
}

}  // namespace sluice
#endif  // HWY_ONCE
