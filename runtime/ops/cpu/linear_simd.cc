// Products on vectors: y[m] = act(W x[m] + b). Few rows are limited by reading W once, many rows of
// bf16 by the arithmetic, which is f32 here: nothing but AMX and AVX512-BF16 multiplies bf16.
//
//   bf16: W is packed, a vector holds kLanes outputs of one input, and an input of x is broadcast.
//   A tile of up to 6 rows of x and 16 to 64 outputs keeps its sums in registers; weights are
//   widened there (a shift, a mask) as often as a tile is begun, which is hidden under the
//   multiply-adds. A group of rows goes over a block of 64 outputs, so that it is read from memory
//   once and stays in the second-level cache.
//   f32: W is plain, a vector holds kLanes inputs, read along with as many of a row of x.
//
// The sum of an output in bf16 is sum + w[k] x[k] for k = 0, 1, .. from 0, whatever the tile, its
// place, the rows beside it, the number of threads and the width of vectors are: the same bits
// alone and in every batch. Products of bf16 numbers are exact in f32 (but beyond its range), so
// fma changes nothing. Bytes moved: N * K * SizeOf(weight), plus x and y.
#include <cmath>
#include <cstring>

#include "runtime/ops/cpu/linear.h"
#include "runtime/parallel.h"

#ifndef SLUICE_RUNTIME_OPS_CPU_LINEAR_SIMD_CC_ONCE_
#define SLUICE_RUNTIME_OPS_CPU_LINEAR_SIMD_CC_ONCE_
namespace sluice {

inline constexpr int64_t kPlainRows = 4;   // f32: rows in one pass over the weight
inline constexpr int64_t kStrip = 32;      // outputs that stay on one thread
inline constexpr int64_t kTileRows = 6;    // bf16: rows whose sums fit into 16 registers
inline constexpr int64_t kGroupTiles = 8;  // bf16: tiles whose sums of a block stay near: 12 KB
// bf16: pairs of inputs in one pass over a block, 16 KB of weights. Tiles of a few outputs go over
// it several times and read memory page by page. Longer passes (512) save a twentieth of 64 x 896 x
// 896 from the caches, and take half as long again for 8 x 9728 x 896 from memory.
inline constexpr int64_t kPassPairs = 64;

// A product with its inputs as the kernels want them.
struct VectorJob {
  const LinearArgs* args = nullptr;
  const float* x = nullptr;  // rows of f32, `x_stride` apart; bf16: an even number, zero padded
  int64_t x_stride = 0;
  int64_t tiles = 0;      // bf16 only: of rows, [M t / tiles, M (t + 1) / tiles)
  float* sums = nullptr;  // f32 only: [M, sums_stride] scratch
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

// Adds pairs of inputs [0, pairs) to sums[m][0, kLanes * Vectors), or begins them. `lines`: a part
// of a packed block, prefetched `ahead` pairs ahead. x: rows of 2 * pairs f32, `x_stride` apart.
// sums: rows of kPackedOutputs.
template <int Rows, int Vectors>
HWY_INLINE void PackedTile(const BFloat16* HWY_RESTRICT lines, int64_t pairs, int64_t ahead,
                           const float* HWY_RESTRICT x, int64_t x_stride, bool begins,
                           float* HWY_RESTRICT sums) {
  const DF d;
  const DU32 du;
  VF acc[Rows][Vectors];
  for (int m = 0; m < Rows; ++m) {
    for (int v = 0; v < Vectors; ++v) {
      acc[m][v] = begins ? hn::Zero(d) : hn::LoadU(d, sums + m * kPackedOutputs + v * kLanes);
    }
  }
  const auto upper_half = hn::Set(du, 0xffff0000u);
  const uint32_t* HWY_RESTRICT line = reinterpret_cast<const uint32_t*>(lines);
  for (int64_t p = 0; p < pairs; ++p, line += kPackedOutputs, x += 2) {
    for (int v = 0; v < Vectors * kLanes; v += 16) {
      hwy::Prefetch(line + ahead * kPackedOutputs + v);
    }
    // The even inputs, then the odd ones: the weights of both would not fit beside the sums.
    VF w[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      w[v] = hn::BitCast(d, hn::ShiftLeft<16>(hn::LoadU(du, line + v * kLanes)));
    }
    for (int m = 0; m < Rows; ++m) {
      const VF xm = hn::Set(d, x[m * x_stride]);
      for (int v = 0; v < Vectors; ++v) acc[m][v] = hn::MulAdd(w[v], xm, acc[m][v]);
    }
    for (int v = 0; v < Vectors; ++v) {
      w[v] = hn::BitCast(d, hn::And(hn::LoadU(du, line + v * kLanes), upper_half));
    }
    for (int m = 0; m < Rows; ++m) {
      const VF xm = hn::Set(d, x[m * x_stride + 1]);
      for (int v = 0; v < Vectors; ++v) acc[m][v] = hn::MulAdd(w[v], xm, acc[m][v]);
    }
  }
  for (int m = 0; m < Rows; ++m) {
    for (int v = 0; v < Vectors; ++v) {
      hn::StoreU(acc[m][v], d, sums + m * kPackedOutputs + v * kLanes);
    }
  }
}

// The same for all `outputs` (32 or 64) from `lines` on, in tiles as wide as registers allow.
template <int Rows>
void PackedTiles(const BFloat16* lines, int64_t pairs, int64_t outputs, const float* x,
                 int64_t x_stride, bool begins, float* sums) {
  // Eight and more sums cover the latency of one; with 16 registers more than twelve do not fit.
  constexpr int kMost = kLanes >= 16 ? 4 : Rows == 1 ? 8 : Rows <= 3 ? 4 : 2;
  constexpr int kHalf = static_cast<int>(kStrip / kLanes);
  constexpr int kVectors = std::min(kMost, static_cast<int>(kPackedOutputs / kLanes));
  constexpr int kNarrow = std::min(kVectors, kHalf);
  // Hardware prefetch stops at every 4 KB; this runs 1.5 KB ahead (from 1 to 2 KB is alike). Where
  // several tiles make up a block, each fetches its part of the next pass.
  const int64_t ahead = kVectors * kLanes == outputs ? 6 : kPassPairs;
  int64_t n = 0;
  for (; n + kVectors * kLanes <= outputs; n += kVectors * kLanes) {
    PackedTile<Rows, kVectors>(lines + n * 2, pairs, ahead, x, x_stride, begins, sums + n);
  }
  for (; n < outputs; n += kNarrow * kLanes) {
    PackedTile<Rows, kNarrow>(lines + n * 2, pairs, ahead, x, x_stride, begins, sums + n);
  }
}

void PackedTilesOf(int64_t rows, const BFloat16* lines, int64_t pairs, int64_t outputs,
                   const float* x, int64_t x_stride, bool begins, float* sums) {
  switch (rows) {
    case 1:
      return PackedTiles<1>(lines, pairs, outputs, x, x_stride, begins, sums);
    case 2:
      return PackedTiles<2>(lines, pairs, outputs, x, x_stride, begins, sums);
    case 3:
      return PackedTiles<3>(lines, pairs, outputs, x, x_stride, begins, sums);
    case 4:
      return PackedTiles<4>(lines, pairs, outputs, x, x_stride, begins, sums);
    case 5:
      return PackedTiles<5>(lines, pairs, outputs, x, x_stride, begins, sums);
    default:
      return PackedTiles<6>(lines, pairs, outputs, x, x_stride, begins, sums);
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

// Puts `sums` of row m and outputs [begin, begin + count) where they belong.
HWY_INLINE void Finish(const LinearArgs& args, const float* sums, int64_t m, int64_t begin,
                       int64_t count) {
  const float* bias = args.bias ? args.bias + begin : nullptr;
  const int64_t at = m * args.n + begin;
  if (args.y.dtype() == DType::kBF16) {
    FinishRun(sums, bias, args.options, count, args.y.data<BFloat16>() + at);
  } else {
    FinishRun(sums, bias, args.options, count, args.y.data<float>() + at);
  }
}

// Tiles of rows [begin, end), at most kGroupTiles, and outputs [first, last) with bf16 weights.
// `first` is a multiple of kStrip, and so is `last`, but at the end of the matrix.
void PackedOutputs(const VectorJob& job, int64_t begin, int64_t end, int64_t first, int64_t last) {
  const LinearArgs& args = *job.args;
  const int64_t pairs = (args.k + 1) / 2;
  const auto row = [&](int64_t tile) { return args.m * tile / job.tiles; };
  const int64_t first_row = row(begin), last_row = row(end);
  alignas(64) float sums[kGroupTiles * kTileRows * kPackedOutputs];
  while (first < last) {
    const int64_t block_end = std::min(last, (first / kPackedOutputs + 1) * kPackedOutputs);
    // The padding of a block is multiplied as well; it is zero.
    const int64_t outputs = (block_end - first + kStrip - 1) / kStrip * kStrip;
    const BFloat16* block =
        static_cast<const BFloat16*>(args.weight) + PackedIndex(first, 0, args.k);
    for (int64_t p = 0; p < pairs; p += kPassPairs) {
      const int64_t count = std::min(kPassPairs, pairs - p);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t m = row(tile);
        PackedTilesOf(row(tile + 1) - m, block + p * 2 * kPackedOutputs, count, outputs,
                      job.x + m * job.x_stride + 2 * p, job.x_stride, p == 0,
                      sums + (m - first_row) * kPackedOutputs);
      }
    }
    for (int64_t m = first_row; m < last_row; ++m) {
      Finish(args, sums + (m - first_row) * kPackedOutputs, m, first, block_end - first);
    }
    first = block_end;
  }
}

// Outputs [begin, end) of all rows with f32 weights.
void PlainOutputsOf(const VectorJob& job, int64_t begin, int64_t end) {
  const LinearArgs& args = *job.args;
  // With more rows than one pass takes, passes go over a part of the weight that stays in the
  // second-level cache.
  const int64_t output_bytes = args.k * static_cast<int64_t>(sizeof(float));
  const int64_t part = args.m <= kPlainRows
                           ? end - begin
                           : std::max<int64_t>(1, (512 << 10) / (output_bytes * kStrip)) * kStrip;
  for (int64_t n = begin; n < end; n += part) {
    const int64_t n_end = std::min(n + part, end);
    for (int64_t m = 0; m < args.m; m += kPlainRows) {
      PlainRows(static_cast<const float*>(args.weight), args.k, n, n_end, job.x + m * job.x_stride,
                std::min<int64_t>(kPlainRows, args.m - m), job.sums + m * job.sums_stride,
                job.sums_stride);
    }
  }
  for (int64_t m = 0; m < args.m; ++m) {
    Finish(args, job.sums + m * job.sums_stride + begin, m, begin, end - begin);
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
HWY_EXPORT(PackedOutputs);
HWY_EXPORT(PlainOutputsOf);
HWY_EXPORT(PackRange);

namespace {

// Threads take whole strips; one needs some 64 KB of weight, each of them read for `rows`, to be
// worth waking.
int64_t StripGrain(const LinearArgs& args, int64_t rows) {
  const int64_t strip_bytes = kStrip * args.k * static_cast<int64_t>(SizeOf(args.dtype));
  return std::max<int64_t>(1, 65536 / (strip_bytes * rows));
}

void PackedProduct(ExecContext& ctx, const LinearArgs& args) {
  VectorJob job;
  job.args = &args;
  // A line more, lest rows a power of two apart meet in the same sets of a cache.
  job.x_stride = (args.k + 1) / 2 * 2 + 16;
  float* wide = ctx.workspace().Allocate(DType::kF32, {args.m, job.x_stride}).data<float>();
  job.x = wide;
  constexpr int64_t kFewRows = 16;  // not worth a thread
  ParallelFor(ctx, args.m, kFewRows, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      float* row = wide + m * job.x_stride;
      ConvertElements(args.x.data<BFloat16>() + m * args.k, DType::kBF16, row, DType::kF32, args.k);
      row[args.k] = 0;
    }
  });
  // Tiles and groups are of about the same size each: two tiles of four rows, not of six and two.
  job.tiles = (args.m + kTileRows - 1) / kTileRows;
  const int64_t groups = (job.tiles + kGroupTiles - 1) / kGroupTiles;
  if (groups == 1) {
    const int64_t strips = (args.n + kStrip - 1) / kStrip;
    ParallelFor(ctx, strips, StripGrain(args, args.m), [&](int64_t first, int64_t last) {
      HWY_DYNAMIC_DISPATCH(PackedOutputs)
      (job, 0, job.tiles, first * kStrip, std::min(last * kStrip, args.n));
    });
    return;
  }
  // Pieces are groups of tiles x blocks of outputs; a thread's share goes through the groups of
  // one block after the other.
  const int64_t blocks = (args.n + kPackedOutputs - 1) / kPackedOutputs;
  ParallelFor(ctx, blocks * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = piece / groups * kPackedOutputs, group = piece % groups;
      HWY_DYNAMIC_DISPATCH(PackedOutputs)
      (job, job.tiles * group / groups, job.tiles * (group + 1) / groups, first,
       std::min(first + kPackedOutputs, args.n));
    }
  });
}

void PlainProduct(ExecContext& ctx, const LinearArgs& args) {
  VectorJob job;
  job.args = &args;
  job.x = args.x.data<float>();
  job.x_stride = args.k;
  job.sums_stride = args.n;
  job.sums = ctx.workspace().Allocate(DType::kF32, {args.m, args.n}).data<float>();
  const int64_t strips = (args.n + kStrip - 1) / kStrip;
  ParallelFor(ctx, strips, StripGrain(args, 1), [&](int64_t first, int64_t last) {
    HWY_DYNAMIC_DISPATCH(PlainOutputsOf)
    (job, first * kStrip, std::min(last * kStrip, args.n));
  });
}

}  // namespace

void LinearVector(ExecContext& ctx, const LinearArgs& args) {
  const Workspace::Scope scope(ctx.workspace());
  args.dtype == DType::kBF16 ? PackedProduct(ctx, args) : PlainProduct(ctx, args);
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
