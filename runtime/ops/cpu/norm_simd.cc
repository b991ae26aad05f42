// LayerNorm and RmsNorm: a row is read from memory once and stays in the first-level cache for its
// second and third pass. Bytes moved a row: 4 D read, SizeOf(y) D written.
#include "runtime/ops/cpu/norm.h"
#include "runtime/parallel.h"

// The kernels keep arrays of vectors in registers, which types of unknown size do not allow.
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "runtime/ops/cpu/norm_simd.cc"
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

HWY_INLINE float SumRow(const float* x, int64_t width) {
  const DF d;
  const int64_t lanes = hn::Lanes(d);
  VF a = hn::Zero(d), b = hn::Zero(d);
  int64_t i = 0;
  for (; i + 2 * lanes <= width; i += 2 * lanes) {
    a = hn::Add(a, LoadFloats(x + i));
    b = hn::Add(b, LoadFloats(x + i + lanes));
  }
  for (; i + lanes <= width; i += lanes) a = hn::Add(a, LoadFloats(x + i));
  if (i < width) b = hn::Add(b, LoadFloatsN(x + i, width - i));
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(a, b)));
}

HWY_INLINE float SumSquares(const float* x, int64_t width, float mean) {
  const DF d;
  const int64_t lanes = hn::Lanes(d);
  const VF centre = hn::Set(d, mean);
  VF a = hn::Zero(d), b = hn::Zero(d);
  int64_t i = 0;
  for (; i + 2 * lanes <= width; i += 2 * lanes) {
    const VF u = hn::Sub(LoadFloats(x + i), centre);
    const VF v = hn::Sub(LoadFloats(x + i + lanes), centre);
    a = hn::MulAdd(u, u, a);
    b = hn::MulAdd(v, v, b);
  }
  for (; i + lanes <= width; i += lanes) {
    const VF u = hn::Sub(LoadFloats(x + i), centre);
    a = hn::MulAdd(u, u, a);
  }
  float sum = hn::GetLane(hn::SumOfLanes(d, hn::Add(a, b)));
  for (; i < width; ++i) sum += (x[i] - mean) * (x[i] - mean);
  return sum;
}

template <typename T>
HWY_INLINE void NormRow(const float* HWY_RESTRICT x, const float* HWY_RESTRICT weight,
                        const float* HWY_RESTRICT bias, float eps, bool centre, int64_t width,
                        T* HWY_RESTRICT y) {
  const DF d;
  const int64_t lanes = hn::Lanes(d);
  const float mean = centre ? SumRow(x, width) / width : 0;
  const float scale = 1 / std::sqrt(SumSquares(x, width, mean) / width + eps);
  const VF vmean = hn::Set(d, mean), vscale = hn::Set(d, scale);
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes) {
    const VF u = hn::Mul(hn::Sub(LoadFloats(x + i), vmean), vscale);
    const VF w = LoadFloats(weight + i);
    StoreFloats(bias ? hn::MulAdd(u, w, LoadFloats(bias + i)) : hn::Mul(u, w), y + i);
  }
  if (i < width) {
    const int64_t left = width - i;
    const VF u = hn::Mul(hn::Sub(LoadFloatsN(x + i, left), vmean), vscale);
    const VF w = LoadFloatsN(weight + i, left);
    const VF v = bias ? hn::MulAdd(u, w, LoadFloatsN(bias + i, left)) : hn::Mul(u, w);
    StoreFloatsN(v, y + i, left);
  }
}

// kRows rows at once, for widths of whole vectors: the additions of one row wait for each other,
// those of several rows do not. Every row gets the bits that NormRow gives it.
template <int kRows, typename T>
HWY_INLINE void NormWholeRows(const float* HWY_RESTRICT x, int64_t x_stride, const NormArgs& args,
                              int64_t width, T* HWY_RESTRICT y, int64_t y_stride) {
  const DF d;
  const int64_t lanes = hn::Lanes(d);
  float mean[kRows] = {}, scale[kRows];
  if (args.centre) {
    VF sum[kRows][2];
    for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = hn::Zero(d);
    int64_t i = 0;
    for (; i + 2 * lanes <= width; i += 2 * lanes) {
      for (int r = 0; r < kRows; ++r) {
        const float* at = x + r * x_stride + i;
        sum[r][0] = hn::Add(sum[r][0], LoadFloats(at));
        sum[r][1] = hn::Add(sum[r][1], LoadFloats(at + lanes));
      }
    }
    for (int r = 0; r < kRows; ++r) {
      if (i < width) sum[r][0] = hn::Add(sum[r][0], LoadFloats(x + r * x_stride + i));
      mean[r] = hn::GetLane(hn::SumOfLanes(d, hn::Add(sum[r][0], sum[r][1]))) / width;
    }
  }
  VF sum[kRows][2];
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = hn::Zero(d);
  int64_t k = 0;
  for (; k + 2 * lanes <= width; k += 2 * lanes) {
    for (int r = 0; r < kRows; ++r) {
      const float* at = x + r * x_stride + k;
      const VF u = hn::Sub(LoadFloats(at), hn::Set(d, mean[r]));
      const VF v = hn::Sub(LoadFloats(at + lanes), hn::Set(d, mean[r]));
      sum[r][0] = hn::MulAdd(u, u, sum[r][0]);
      sum[r][1] = hn::MulAdd(v, v, sum[r][1]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    if (k < width) {
      const VF u = hn::Sub(LoadFloats(x + r * x_stride + k), hn::Set(d, mean[r]));
      sum[r][0] = hn::MulAdd(u, u, sum[r][0]);
    }
    const float squares = hn::GetLane(hn::SumOfLanes(d, hn::Add(sum[r][0], sum[r][1])));
    scale[r] = 1 / std::sqrt(squares / width + args.eps);
  }
  for (int64_t i = 0; i < width; i += lanes) {
    const VF w = LoadFloats(args.weight + i);
    const VF b = args.bias ? LoadFloats(args.bias + i) : hn::Zero(d);
    for (int r = 0; r < kRows; ++r) {
      const VF u = hn::Mul(hn::Sub(LoadFloats(x + r * x_stride + i), hn::Set(d, mean[r])),
                           hn::Set(d, scale[r]));
      StoreFloats(hn::MulAdd(u, w, b), y + r * y_stride + i);
    }
  }
}

// The sums stay in the first-level cache until their rows are normalised.
template <typename T>
void NormSumsTo(const NormArgs& args, int64_t begin, int64_t end) {
  constexpr int kRows = 4;
  const DF d;
  const int64_t width = args.x.dim(1), lanes = hn::Lanes(d), y_stride = args.y.stride0();
  const auto sums = hwy::AllocateAligned<float>(kRows * width);
  for (int64_t m = begin; m < end; m += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, end - m);
    for (int64_t r = 0; r < rows; ++r) {
      const float* x = args.x.data<float>() + (m + r) * args.x.stride0();
      const float* more = args.more.data<float>() + (m + r) * args.more.stride0();
      float* sum = sums.get() + r * width;
      int64_t i = 0;
      for (; i + lanes <= width; i += lanes) {
        StoreFloats(hn::Add(LoadFloats(x + i), LoadFloats(more + i)), sum + i);
      }
      for (; i < width; ++i) sum[i] = x[i] + more[i];
    }
    T* y = args.y.data<T>() + m * y_stride;
    if (rows == kRows && width % lanes == 0) {
      NormWholeRows<kRows>(sums.get(), width, args, width, y, y_stride);
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) {
      NormRow(sums.get() + r * width, args.weight, args.bias, args.eps, args.centre, width,
              y + r * y_stride);
    }
  }
}

template <typename T>
void NormRowsTo(const NormArgs& args, int64_t begin, int64_t end) {
  if (!args.more.empty()) return NormSumsTo<T>(args, begin, end);
  const int64_t width = args.x.dim(1), x_stride = args.x.stride0(), y_stride = args.y.stride0();
  const float* x = args.x.data<float>() + begin * x_stride;
  T* y = args.y.data<T>() + begin * y_stride;
  constexpr int kRows = 4;
  int64_t m = begin;
  if (width % hn::Lanes(DF()) == 0) {
    for (; m + kRows <= end; m += kRows, x += kRows * x_stride, y += kRows * y_stride) {
      NormWholeRows<kRows>(x, x_stride, args, width, y, y_stride);
    }
  }
  for (; m < end; ++m, x += x_stride, y += y_stride) {
    NormRow(x, args.weight, args.bias, args.eps, args.centre, width, y);
  }
}

void NormRows(const NormArgs& args, int64_t begin, int64_t end) {
  if (args.y.dtype() == DType::kBF16) {
    NormRowsTo<BFloat16>(args, begin, end);
  } else {
    NormRowsTo<float>(args, begin, end);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sluice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice {
HWY_EXPORT(NormRows);

void NormSimd(ExecContext& ctx, const NormArgs& args) {
  // Waking a thread costs about as much as 16 K elements.
  ParallelFor(ctx, args.x.dim(0), 1 + 16384 / args.x.dim(1), [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(NormRows)(args, begin, end);
  });
}

}  // namespace sluice
#endif  // HWY_ONCE
