// RowCosines: one pass over both rows. Bytes moved: 2 D SizeOf(T) read a row, MeanRow half of that.
#include "runtime/ops/cpu/similarity.h"
#include "runtime/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "runtime/ops/cpu/similarity_simd.cc"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include <hwy/aligned_allocator.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>

#include "runtime/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace sluice {
namespace HWY_NAMESPACE {

// kCentered: less the values at `center`.
template <typename T, bool kCentered>
void CosinesOf(ConstTensorView a, ConstTensorView b, int64_t begin, int64_t end, float* cosines,
               const float* center) {
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
    for (; i + lanes <= width; i += lanes) {
      VF u = LoadFloats(x + i), v = LoadFloats(y + i);
      if constexpr (kCentered) {
        const VF middle = LoadFloats(center + i);
        u = hn::Sub(u, middle);
        v = hn::Sub(v, middle);
      }
      add(u, v);
    }
    if (i < width) {
      VF u = LoadFloatsN(x + i, width - i), v = LoadFloatsN(y + i, width - i);
      if constexpr (kCentered) {
        const VF middle = LoadFloatsN(center + i, width - i);
        u = hn::Sub(u, middle);
        v = hn::Sub(v, middle);
      }
      add(u, v);
    }
    const float norms = std::sqrt(hn::GetLane(hn::SumOfLanes(d, xx))) *
                        std::sqrt(hn::GetLane(hn::SumOfLanes(d, yy)));
    cosines[m] = hn::GetLane(hn::SumOfLanes(d, xy)) / std::max(norms, 1e-8f);
  }
}

void Cosines(ConstTensorView a, ConstTensorView b, int64_t begin, int64_t end, float* cosines,
             const float* center) {
  const bool f32 = a.dtype() == DType::kF32;
  if (center == nullptr) {
    f32 ? CosinesOf<float, false>(a, b, begin, end, cosines, center)
        : CosinesOf<BFloat16, false>(a, b, begin, end, cosines, center);
  } else {
    f32 ? CosinesOf<float, true>(a, b, begin, end, cosines, center)
        : CosinesOf<BFloat16, true>(a, b, begin, end, cosines, center);
  }
}

template <typename T>
void MeanOf(ConstTensorView x, std::span<float> mean) {
  const DF d;
  const int64_t lanes = hn::Lanes(d), width = x.dim(1);
  const VF share = hn::Set(d, 1.0f / static_cast<float>(x.dim(0)));
  for (int64_t i = 0; i < width; i += lanes) {
    const int64_t count = std::min(lanes, width - i);
    VF sum = hn::Zero(d);
    for (int64_t m = 0; m < x.dim(0); ++m) {
      const T* from = x.data<T>() + m * x.stride0() + i;
      sum = hn::Add(sum, count == lanes ? LoadFloats(from) : LoadFloatsN(from, count));
    }
    StoreFloatsN(hn::Mul(sum, share), mean.data() + i, count);
  }
}

void Mean(ConstTensorView x, std::span<float> mean) {
  if (x.dtype() == DType::kF32) {
    MeanOf<float>(x, mean);
  } else {
    MeanOf<BFloat16>(x, mean);
  }
}

// Rows of b across the lanes, so that no product ends with a sum over lanes.
void Nearest(ConstTensorView a, ConstTensorView b, std::span<int32_t> nearest,
             std::span<float> cosines) {
  constexpr int kRows = 4;  // of a at once, to cover the latency of an addition
  const DF d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t width = a.dim(1), count = b.dim(0), padded = (count + lanes - 1) / lanes * lanes;
  const auto transposed = hwy::AllocateAligned<float>(width * padded);
  const auto dots = hwy::AllocateAligned<float>(kRows * padded);
  for (int64_t j = 0; j < padded; ++j) {
    const float* y = b.data<float>() + std::min(j, count - 1) * b.stride0();
    for (int64_t i = 0; i < width; ++i) transposed[i * padded + j] = y[i];
  }
  for (int64_t m = 0; m < a.dim(0); m += kRows) {
    const float* x[kRows];
    for (int64_t r = 0; r < kRows; ++r) {
      x[r] = a.data<float>() + std::min(m + r, a.dim(0) - 1) * a.stride0();
    }
    for (int64_t j = 0; j < padded; j += lanes) {
      VF sum[kRows];
      for (int r = 0; r < kRows; ++r) sum[r] = hn::Zero(d);
      for (int64_t i = 0; i < width; ++i) {
        const VF y = hn::Load(d, &transposed[i * padded + j]);
        for (int r = 0; r < kRows; ++r) sum[r] = hn::MulAdd(hn::Set(d, x[r][i]), y, sum[r]);
      }
      for (int r = 0; r < kRows; ++r) hn::Store(sum[r], d, &dots[r * padded + j]);
    }
    for (int64_t r = 0; r < std::min<int64_t>(kRows, a.dim(0) - m); ++r) {
      const float* row = &dots[r * padded];
      const float* best = std::max_element(row, row + count);
      nearest[m + r] = static_cast<int32_t>(best - row);
      cosines[m + r] = *best;
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sluice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice {
HWY_EXPORT(Cosines);
HWY_EXPORT(Mean);
HWY_EXPORT(Nearest);

namespace cpu {

void RowCosinesSimd(ExecContext& ctx, ConstTensorView a, ConstTensorView b, TensorView cosines,
                    std::span<const float> center) {
  // Waking a thread costs about as much as reading 64 KB.
  ParallelFor(ctx, a.dim(0), 1 + 16384 / a.dim(1), [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(Cosines)
    (a, b, begin, end, cosines.data<float>(), center.empty() ? nullptr : center.data());
  });
}

void MeanRowSimd(ConstTensorView x, std::span<float> mean) { HWY_DYNAMIC_DISPATCH(Mean)(x, mean); }

void NearestRowsSimd(ConstTensorView a, ConstTensorView b, std::span<int32_t> nearest,
                     std::span<float> cosines) {
  HWY_DYNAMIC_DISPATCH(Nearest)(a, b, nearest, cosines);
}

}  // namespace cpu
}  // namespace sluice
#endif  // HWY_ONCE
