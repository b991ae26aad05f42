// Matrix-vector products: y[m] = act(W x[m] + b) for few rows m, limited by reading W once.
// A row of x is broadcast (packed bf16: a vector holds 16 outputs) or read along with the weight's
// row (f32: a vector holds 16 inputs). Bytes moved: N * K * SizeOf(weight), plus x and y.
#include <cmath>
#include <cstring>

#include "runtime/ops/cpu/linear.h"
#include "runtime/parallel.h"

#ifndef SLUICE_RUNTIME_OPS_CPU_LINEAR_SIMD_CC_ONCE_
#define SLUICE_RUNTIME_OPS_CPU_LINEAR_SIMD_CC_ONCE_
namespace sluice {

inline constexpr int64_t kRowsAtOnce = 4;
inline constexpr int64_t kStrip = 32;  // outputs that stay on one thread

// A product with its inputs as the kernels want them.
struct VectorJob {
  const LinearArgs* args = nullptr;
  const float* x = nullptr;  // rows of f32, `x_stride` apart; packed: an even number, zero padded
  int64_t x_stride = 0;
  float* sums = nullptr;  // [M, sums_stride] scratch
  int64_t sums_stride = 0;
};

}  // namespace sluice
#endif  // seen by every instruction set, defined by the first

// The kernels keep arrays of vectors in registers, which types of unknown size do not allow.
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "runtime/ops/cpu/linear_simd.cc"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include <hwy/cache_control.h>
#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include "runtime/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace sluice {
namespace HWY_NAMESPACE {

constexpr int64_t kLanes = hn::MaxLanes(DF());

// sums[m][0, 16 * Vectors) = sum over k of W[n, k] x[m][k], for the outputs of one packed block
// that begin at `block`. x: rows of 2 * pairs f32, `x_stride` apart.
template <int Rows, int Vectors>
HWY_INLINE void PackedStrip(const BFloat16* HWY_RESTRICT block, int64_t pairs,
                            const float* HWY_RESTRICT x, int64_t x_stride, float* HWY_RESTRICT sums,
                            int64_t sums_stride) {
  const DF d;
  const DU32 du;
  // Two chains of additions for each sum where registers allow, to cover the latency of one.
  constexpr int kChains = Rows * Vectors * 2 <= 16 && kLanes >= 16 ? 2 : 1;
  VF acc[Rows][Vectors][kChains];
  for (int m = 0; m < Rows; ++m) {
    for (int v = 0; v < Vectors; ++v) {
      for (int c = 0; c < kChains; ++c) acc[m][v][c] = hn::Zero(d);
    }
  }
  const auto upper_half = hn::Set(du, 0xffff0000u);
  for (int64_t p = 0; p < pairs; ++p) {
    const uint32_t* line = reinterpret_cast<const uint32_t*>(block + p * 2 * kPackedOutputs);
    // Hardware prefetch stops at every 4 KB; this runs 1.5 KB ahead (from 1 to 2 KB is alike).
    for (int v = 0; v < Vectors; v += 16 / kLanes) hwy::Prefetch(line + v * kLanes + 384);
    for (int v = 0; v < Vectors; ++v) {
      const auto both = hn::LoadU(du, line + v * kLanes);
      const VF even = hn::BitCast(d, hn::ShiftLeft<16>(both));
      const VF odd = hn::BitCast(d, hn::And(both, upper_half));
      for (int m = 0; m < Rows; ++m) {
        const float* xm = x + m * x_stride + 2 * p;
        acc[m][v][0] = hn::MulAdd(even, hn::Set(d, xm[0]), acc[m][v][0]);
        acc[m][v][kChains - 1] = hn::MulAdd(odd, hn::Set(d, xm[1]), acc[m][v][kChains - 1]);
      }
    }
  }
  for (int m = 0; m < Rows; ++m) {
    for (int v = 0; v < Vectors; ++v) {
      VF sum = acc[m][v][0];
      if (kChains == 2) sum = hn::Add(sum, acc[m][v][kChains - 1]);
      hn::StoreU(sum, d, sums + m * sums_stride + v * kLanes);
    }
  }
}

// Outputs [begin, end) of a packed weight for `Rows` rows; begin and end lie on multiples of the
// strip (32 outputs) or at the end of the matrix. sums: rows of `sums_stride` f32, from output 0.
template <int Rows>
void PackedOutputs(const BFloat16* weight, int64_t k, int64_t begin, int64_t end, const float* x,
                   int64_t x_stride, float* sums, int64_t sums_stride) {
  constexpr int kWide = kPackedOutputs / kLanes;
  // Vectors at once: as many as the registers of the instruction set hold sums for.
  constexpr int kVectors = kLanes >= 16 ? kWide : (Rows <= 2 ? 4 : 2);
  const int64_t pairs = (k + 1) / 2;
  for (int64_t n = begin; n < end;) {
    const BFloat16* block = weight + PackedIndex(n, 0, k);
    const int64_t left = kPackedOutputs - n % kPackedOutputs;
    if (kVectors * kLanes <= std::min(left, end - n + kLanes - 1)) {
      PackedStrip<Rows, kVectors>(block, pairs, x, x_stride, sums + n, sums_stride);
      n += kVectors * kLanes;
    } else {
      PackedStrip<Rows, 1>(block, pairs, x, x_stride, sums + n, sums_stride);
      n += kLanes;
    }
  }
}

void PackedRows(const BFloat16* weight, int64_t k, int64_t begin, int64_t end, const float* x,
                int64_t x_stride, int64_t rows, float* sums, int64_t sums_stride) {
  switch (rows) {
    case 1:
      return PackedOutputs<1>(weight, k, begin, end, x, x_stride, sums, sums_stride);
    case 2:
      return PackedOutputs<2>(weight, k, begin, end, x, x_stride, sums, sums_stride);
    case 3:
      return PackedOutputs<3>(weight, k, begin, end, x, x_stride, sums, sums_stride);
    default:
      return PackedOutputs<4>(weight, k, begin, end, x, x_stride, sums, sums_stride);
  }
}

// Outputs [n, n + Outputs) of a plain f32 weight.
template <int Rows, int Outputs>
HWY_INLINE void PlainStrip(const float* HWY_RESTRICT weight, int64_t k, const float* HWY_RESTRICT x,
                           float* HWY_RESTRICT sums, int64_t sums_stride) {
  const DF d;
  VF acc[Rows][Outputs];
  for (int m = 0; m < Rows; ++m) {
    for (int n = 0; n < Outputs; ++n) acc[m][n] = hn::Zero(d);
  }
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    VF w[Outputs];
    for (int n = 0; n < Outputs; ++n) {
      w[n] = hn::LoadU(d, weight + n * k + i);
      // The rows of the next strip: streams this short are over before hardware finds them.
      hwy::Prefetch(weight + (n + Outputs) * k + i);
    }
    for (int m = 0; m < Rows; ++m) {
      const VF xm = hn::LoadU(d, x + m * k + i);
      for (int n = 0; n < Outputs; ++n) acc[m][n] = hn::MulAdd(w[n], xm, acc[m][n]);
    }
  }
  if (i < k) {
    for (int n = 0; n < Outputs; ++n) {
      const VF w = LoadFloatsN(weight + n * k + i, k - i);
      for (int m = 0; m < Rows; ++m) {
        acc[m][n] = hn::MulAdd(w, LoadFloatsN(x + m * k + i, k - i), acc[m][n]);
      }
    }
  }
  for (int m = 0; m < Rows; ++m) {
    for (int n = 0; n < Outputs; ++n) {
      sums[m * sums_stride + n] = hn::GetLane(hn::SumOfLanes(d, acc[m][n]));
    }
  }
}

template <int Rows>
void PlainOutputs(const float* weight, int64_t k, int64_t begin, int64_t end, const float* x,
                  float* sums, int64_t sums_stride) {
  constexpr int kOutputs = kLanes >= 16 || Rows == 1 ? 4 : 2;
  int64_t n = begin;
  for (; n + kOutputs <= end; n += kOutputs) {
    PlainStrip<Rows, kOutputs>(weight + n * k, k, x, sums + n, sums_stride);
  }
  for (; n < end; ++n) PlainStrip<Rows, 1>(weight + n * k, k, x, sums + n, sums_stride);
}

void PlainRows(const float* weight, int64_t k, int64_t begin, int64_t end, const float* x,
               int64_t rows, float* sums, int64_t sums_stride) {
  switch (rows) {
    case 1:
      return PlainOutputs<1>(weight, k, begin, end, x, sums, sums_stride);
    case 2:
      return PlainOutputs<2>(weight, k, begin, end, x, sums, sums_stride);
    case 3:
      return PlainOutputs<3>(weight, k, begin, end, x, sums, sums_stride);
    default:
      return PlainOutputs<4>(weight, k, begin, end, x, sums, sums_stride);
  }
}

template <typename T>
HWY_INLINE void FinishRun(const float* sums, const float* bias, const LinearOptions& options,
                          int64_t count, T* y) {
  const DF d;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t left = count - i;
    const bool whole = left >= kLanes;
    VF v = whole ? LoadFloats(sums + i) : LoadFloatsN(sums + i, left);
    if (bias) v = hn::Add(v, whole ? LoadFloats(bias + i) : LoadFloatsN(bias + i, left));
    if (options.activation == Activation::kGeluTanh) {
      // x (1 + tanh u) / 2 = x / (1 + e^-2u), which loses nothing where tanh is near -1.
      const VF cubic = hn::MulAdd(hn::Mul(v, v), hn::Set(d, 0.044715f), hn::Set(d, 1.f));
      const VF u = hn::Mul(hn::Mul(v, cubic), hn::Set(d, -1.5957691216057308f));
      // e^88 is the last finite one; x / (1 + e^88) is 0 in f32 as it is beyond.
      const VF e = hn::Exp(d, hn::Min(u, hn::Set(d, 88.f)));
      v = hn::Div(v, hn::Add(e, hn::Set(d, 1.f)));
    } else if (options.activation == Activation::kQuickGelu) {
      const VF e = hn::Exp(d, hn::Min(hn::Mul(v, hn::Set(d, -1.702f)), hn::Set(d, 88.f)));
      v = hn::Div(v, hn::Add(e, hn::Set(d, 1.f)));
    } else if (options.activation == Activation::kGeluErf) {
      // Rare with few rows, so the library's erf will do.
      HWY_ALIGN float part[hn::MaxLanes(DF())];
      hn::Store(v, d, part);
      for (float& value : part) value = 0.5f * value * std::erfc(value * -0.70710678f);
      v = hn::Load(d, part);
    }
    if (options.accumulate) v = hn::Add(v, whole ? LoadFloats(y + i) : LoadFloatsN(y + i, left));
    if (whole) {
      StoreFloats(v, y + i);
    } else {
      StoreFloatsN(v, y + i, left);
    }
  }
}

void Outputs(const VectorJob& job, int64_t begin, int64_t end) {
  const LinearArgs& args = *job.args;
  const bool packed = args.dtype == DType::kBF16;
  // With more rows than one pass takes, passes go over a part of the weight that stays in the
  // second-level cache.
  const int64_t output_bytes = args.k * static_cast<int64_t>(SizeOf(args.dtype));
  const int64_t part = args.m <= kRowsAtOnce
                           ? end - begin
                           : std::max<int64_t>(1, (512 << 10) / (output_bytes * kStrip)) * kStrip;
  for (int64_t n = begin; n < end; n += part) {
    const int64_t n_end = std::min(n + part, end);
    for (int64_t m = 0; m < args.m; m += kRowsAtOnce) {
      const int64_t rows = std::min<int64_t>(kRowsAtOnce, args.m - m);
      const float* x = job.x + m * job.x_stride;
      float* sums = job.sums + m * job.sums_stride;
      if (packed) {
        PackedRows(static_cast<const BFloat16*>(args.weight), args.k, n, n_end, x, job.x_stride,
                   rows, sums, job.sums_stride);
      } else {
        PlainRows(static_cast<const float*>(args.weight), args.k, n, n_end, x, rows, sums,
                  job.sums_stride);
      }
    }
  }
  for (int64_t m = 0; m < args.m; ++m) {
    const float* sums = job.sums + m * job.sums_stride + begin;
    const float* bias = args.bias ? args.bias + begin : nullptr;
    const int64_t at = m * args.n + begin;
    if (args.y.dtype() == DType::kBF16) {
      FinishRun(sums, bias, args.options, end - begin, args.y.data<BFloat16>() + at);
    } else {
      FinishRun(sums, bias, args.options, end - begin, args.y.data<float>() + at);
    }
  }
}

// Transposes 16 rows x 16 pairs of inputs: from rows `stride_bytes` apart to lines of
// kPackedOutputs pairs, in squares of 4 x 4 pairs.
HWY_INLINE void PackTile(const char* from, int64_t stride_bytes, uint32_t* to) {
#if HWY_TARGET == HWY_SCALAR
  for (int r = 0; r < 16; ++r) {
    for (int p = 0; p < 16; ++p) {
      std::memcpy(to + p * kPackedOutputs + r, from + r * stride_bytes + p * 4, 4);
    }
  }
#else
  const hn::FixedTag<uint32_t, 4> d;
  const hn::FixedTag<uint64_t, 2> d2;
  const hn::FixedTag<uint8_t, 16> bytes;
  const auto load = [&](const char* p) HWY_ATTR {
    return hn::BitCast(d, hn::LoadU(bytes, reinterpret_cast<const uint8_t*>(p)));
  };
  for (int r = 0; r < 16; r += 4) {
    for (int p = 0; p < 16; p += 4) {
      const char* corner = from + r * stride_bytes + p * 4;
      const auto r0 = load(corner), r1 = load(corner + stride_bytes);
      const auto r2 = load(corner + 2 * stride_bytes), r3 = load(corner + 3 * stride_bytes);
      const auto a = hn::BitCast(d2, hn::InterleaveLower(d, r0, r1));  // 00 10 01 11
      const auto b = hn::BitCast(d2, hn::InterleaveLower(d, r2, r3));
      const auto c = hn::BitCast(d2, hn::InterleaveUpper(d, r0, r1));  // 02 12 03 13
      const auto e = hn::BitCast(d2, hn::InterleaveUpper(d, r2, r3));
      uint32_t* line = to + p * kPackedOutputs + r;
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(d2, a, b)), d, line);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(d2, a, b)), d, line + kPackedOutputs);
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(d2, c, e)), d, line + 2 * kPackedOutputs);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(d2, c, e)), d, line + 3 * kPackedOutputs);
    }
  }
#endif
}

// Rows [begin, end) of the packed matrix; `from` holds row `begin` and those after it.
void PackRange(const char* from, int64_t begin, int64_t end, int64_t k, BFloat16* packed) {
  const int64_t row_bytes = k * static_cast<int64_t>(sizeof(BFloat16));
  const int64_t padded_k = (k + kPackedInputs - 1) / kPackedInputs * kPackedInputs;
  const auto pack_columns = [&](int64_t n, int64_t first_k) {
    for (int64_t i = first_k; i < padded_k; ++i) {
      BFloat16 value = {0};
      if (i < k) std::memcpy(&value, from + (n - begin) * row_bytes + i * 2, sizeof(value));
      packed[PackedIndex(n, i, k)] = value;
    }
  };
  for (int64_t n = begin; n < end;) {
    if (n % 16 != 0 || n + 16 > end) {
      pack_columns(n++, 0);
      continue;
    }
    uint32_t* to = reinterpret_cast<uint32_t*>(packed + PackedIndex(n, 0, k));
    const int64_t whole_k = k / 32 * 32;
    for (int64_t i = 0; i < whole_k; i += 32) {
      PackTile(from + (n - begin) * row_bytes + i * 2, row_bytes, to + i / 2 * kPackedOutputs);
    }
    for (int64_t r = n; r < n + 16; ++r) pack_columns(r, whole_k);
    n += 16;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sluice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#include "runtime/convert.h"
#include "runtime/load_threads.h"

namespace sluice {
HWY_EXPORT(Outputs);
HWY_EXPORT(PackRange);

void LinearVector(ExecContext& ctx, const LinearArgs& args) {
  const bool packed = args.dtype == DType::kBF16;
  Workspace::Scope scope(ctx.workspace());
  const int64_t padded_n = (args.n + kPackedOutputs - 1) / kPackedOutputs * kPackedOutputs;
  VectorJob job;
  job.args = &args;
  job.sums_stride = padded_n;
  job.sums = ctx.workspace().Allocate(DType::kF32, {args.m, padded_n}).data<float>();
  job.x_stride = args.k;
  if (packed) {
    job.x_stride = (args.k + 1) / 2 * 2;
    float* wide = ctx.workspace().Allocate(DType::kF32, {args.m, job.x_stride}).data<float>();
    for (int64_t m = 0; m < args.m; ++m) {
      float* row = wide + m * job.x_stride;
      ConvertElements(args.x.data<BFloat16>() + m * args.k, DType::kBF16, row, DType::kF32, args.k);
      if (args.k < job.x_stride) row[args.k] = 0;
    }
    job.x = wide;
  } else {
    job.x = args.x.data<float>();
  }

  // Threads take whole strips; one needs some 64 KB of weight to be worth waking.
  const int64_t strip_bytes = kStrip * args.k * static_cast<int64_t>(SizeOf(args.dtype));
  const int64_t strips = (args.n + kStrip - 1) / kStrip;
  ParallelFor(ctx, strips, std::max<int64_t>(1, 65536 / strip_bytes),
              [&](int64_t first, int64_t last) {
                HWY_DYNAMIC_DISPATCH(Outputs)
                (job, first * kStrip, std::min(last * kStrip, args.n));
              });
}

void PackRows(const void* source, int64_t row, int64_t rows, int64_t k, BFloat16* packed) {
  const char* from = static_cast<const char*>(source);
  // Ranges follow the destination's blocks, so that no two threads write one line.
  const int64_t first_block = row / kPackedOutputs;
  const int64_t end_block = (row + rows + kPackedOutputs - 1) / kPackedOutputs;
  ParallelLoad(end_block - first_block, [&](int64_t begin_block, int64_t last_block) {
    const int64_t begin = std::max((first_block + begin_block) * kPackedOutputs, row);
    const int64_t end = std::min((first_block + last_block) * kPackedOutputs, row + rows);
    HWY_DYNAMIC_DISPATCH(PackRange)
    (from + (begin - row) * k * static_cast<int64_t>(sizeof(BFloat16)), begin, end, k, packed);
  });
}

}  // namespace sluice
#endif  // HWY_ONCE
