// y = act(x W^T + b) in bf16 on AMX tiles, for two rows and more.
//
// 32 rows of x by 32 outputs are taken at a time: four sums, two tiles of x as it lies in memory
// and two of the packed weight (runtime/ops/cpu/linear.h), which is the B operand as it is.
// Rows of x pass in parts of kRowsBytes and, under each of them, the weight in chunks of
// kChunkBytes: both stay in the second-level cache meanwhile, and the chunk that comes next is
// prefetched. kBlockSteps * 32 inputs of 32 rows stay in the first-level cache under all outputs of
// a chunk. A K longer than kLongK is cut, and y in f32 takes the sums between.
// What follows a sum (bias, activation, rounding) is done for the tile before while the tiles of
// the next are multiplied. It is not free: next to tile instructions only one of the two ports for
// 512-bit vectors is left.
#include "runtime/ops/cpu/linear.h"

#if defined(__x86_64__)

// GCC 12 takes the undefined vectors inside its own intrinsics for ours (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "runtime/ops/cpu/amx.h"
#include "runtime/parallel.h"

namespace sluice {
namespace {

using cpu::AmxTiles;
using cpu::TileLoad;
using cpu::TileLoadPassing;
using cpu::TileMultiply;
using cpu::TileStore;
using cpu::TileZero;

constexpr int64_t kRows = 32;     // of x in a tile of sums
constexpr int64_t kOutputs = 32;  // in a tile of sums
constexpr int64_t kTileFloats = kRows * kOutputs;
constexpr int64_t kStep = 32;                       // inputs a tile product takes
constexpr int64_t kPairBytes = kPackedOutputs * 4;  // of a pair of inputs in the weight
constexpr int64_t kStepBytes = kStep / 2 * kPairBytes;
constexpr int64_t kBlockSteps = 18;         // 36 KB of x
constexpr int64_t kChunkBytes = 256 << 10;  // of weight
constexpr int64_t kRowsBytes = 896 << 10;   // of x
constexpr int64_t kLongK = 2048;

constexpr int64_t CeilDiv(int64_t value, int64_t by) { return (value + by - 1) / by; }

// What becomes of a sum.
enum class Result { kBF16, kF32, kAddF32 };

// 2^x; relative error 8e-5 (degree 3, enough before rounding to bf16) or 1e-7.
template <bool kPrecise>
SLUICE_AMX_INLINE __m512 Exp2(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, 0x9);  // x - floor(x)
  __m512 p;
  if (kPrecise) {
    p = _mm512_fmadd_ps(f, _mm512_set1_ps(2.1702255e-4f), _mm512_set1_ps(1.2439688e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6788410e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5483342e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022984e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314699e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  } else {
    p = _mm512_fmadd_ps(f, _mm512_set1_ps(7.80245226e-2f), _mm512_set1_ps(2.26067155e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9583354e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.99925219e-1f));
  }
  return _mm512_scalef_ps(p, x);
}

// x / (1 + 2^t).
template <bool kPrecise>
SLUICE_AMX_INLINE __m512 Sigmoid(__m512 x, __m512 t) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 e = _mm512_add_ps(Exp2<kPrecise>(_mm512_min_ps(t, _mm512_set1_ps(126.0f))), one);
  if (kPrecise) return _mm512_div_ps(x, e);
  return _mm512_mul_ps(x, _mm512_rcp14_ps(e));
}

template <Activation kActivation, bool kPrecise>
SLUICE_AMX_INLINE __m512 Activate(__m512 x) {
  if constexpr (kActivation == Activation::kGeluTanh) {
    // x (1 + tanh u) / 2 = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
    constexpr float kScale = -1.5957691216f * 1.44269504f;
    const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f * kScale),
                                         _mm512_set1_ps(kScale));
    return Sigmoid<kPrecise>(x, _mm512_mul_ps(x, cubic));
  } else if constexpr (kActivation == Activation::kQuickGelu) {
    return Sigmoid<kPrecise>(x, _mm512_mul_ps(x, _mm512_set1_ps(-1.702f * 1.44269504f)));
  } else if constexpr (kActivation == Activation::kGeluErf) {
    // x (1 + erf(x / sqrt 2)) / 2, erf after Abramowitz and Stegun 7.1.26 (1.5e-7).
    const __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f));
    const __m512 t = _mm512_div_ps(
        _mm512_set1_ps(1.0f), _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), _mm512_set1_ps(1.0f)));
    __m512 p = _mm512_fmadd_ps(t, _mm512_set1_ps(1.061405429f), _mm512_set1_ps(-1.453152027f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
    // Below 2^-100 the tail is nothing beside any sum it enters; subnormal products would cost a
    // hundred cycles each.
    const __m512 power = _mm512_max_ps(
        _mm512_mul_ps(_mm512_mul_ps(z, z), _mm512_set1_ps(-1.44269504f)), _mm512_set1_ps(-100.0f));
    // half = (1 - erf z) / 2, the weight of the tail; x is multiplied by it or by what is left.
    const __m512 half =
        _mm512_mul_ps(_mm512_mul_ps(p, t), _mm512_mul_ps(Exp2<true>(power), _mm512_set1_ps(0.5f)));
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    const __m512 left = _mm512_sub_ps(_mm512_set1_ps(1.0f), half);
    return _mm512_mul_ps(x, _mm512_mask_mov_ps(left, negative, half));
  } else {
    return x;
  }
}

// The weights and rows of one call.
struct Job {
  const char* x;       // bf16 rows
  int64_t x_stride;    // bytes
  const char* x_tail;  // [rows, 32] bf16: the inputs of the last step, padded; null: they are in x
  int64_t m;           // rows of y
  int64_t x_rows;      // max(m, 16)
  const char* weight;
  int64_t block_bytes;  // of 64 outputs
  int64_t n;
  int64_t y_width;  // n, or half of it
  int64_t steps;    // over K
  const float* bias;
  void* y;
};

// Finished sums of one tile that wait to be written.
struct Pending {
  const float* sums = nullptr;  // of the next row, 32 of them
  int64_t rows = 0;             // still to write
  int64_t until_gap = 0;        // rows until `sums` leaps over rows that were written before
  int64_t gap = 0;              // in floats
  void* y = nullptr;            // of the next row
  const float* bias = nullptr;  // of the lower and the upper 16 sums; or null
  const float* upper_bias = nullptr;
  __mmask32 columns = 0;
};

// Writes up to `count` rows.
template <Result kResult, Activation kActivation>
SLUICE_AMX_INLINE void WriteRows(Pending& pending, int64_t count, int64_t y_stride) {
  count = std::min(count, pending.rows);
  pending.rows -= count;
  const __mmask16 low = static_cast<__mmask16>(pending.columns);
  // Gates and what they multiply are the same columns.
  const __mmask16 high =
      kActivation == Activation::kSiluMul ? low : static_cast<__mmask16>(pending.columns >> 16);
  __m512 bias = _mm512_setzero_ps(), upper_bias = _mm512_setzero_ps();
  if (pending.bias && count > 0) {
    bias = _mm512_maskz_loadu_ps(low, pending.bias);
    upper_bias = _mm512_maskz_loadu_ps(high, pending.upper_bias);
  }
  for (; count > 0; --count) {
    if (pending.until_gap-- == 0) pending.sums += pending.gap;
    __m512 a = _mm512_add_ps(bias, _mm512_load_ps(pending.sums));
    __m512 b = _mm512_add_ps(upper_bias, _mm512_load_ps(pending.sums + 16));
    pending.sums += kOutputs;
    if constexpr (kActivation == Activation::kSiluMul) {
      // a / (1 + e^-a) b
      const __m512 power = _mm512_mul_ps(a, _mm512_set1_ps(-1.44269504f));
      a = _mm512_mul_ps(Sigmoid<kResult != Result::kBF16>(a, power), b);
      if constexpr (kResult == Result::kBF16) {
        BFloat16* y = static_cast<BFloat16*>(pending.y);
        _mm256_mask_storeu_epi16(y, low, (__m256i)_mm512_cvtneps_pbh(a));
        pending.y = y + y_stride;
      } else {
        float* y = static_cast<float*>(pending.y);
        _mm512_mask_storeu_ps(y, low, a);
        pending.y = y + y_stride;
      }
      continue;
    }
    a = Activate<kActivation, kResult != Result::kBF16>(a);
    b = Activate<kActivation, kResult != Result::kBF16>(b);
    if constexpr (kResult == Result::kBF16) {
      BFloat16* y = static_cast<BFloat16*>(pending.y);
      _mm512_mask_storeu_epi16(y, pending.columns, (__m512i)_mm512_cvtne2ps_pbh(b, a));
      pending.y = y + y_stride;
    } else {
      float* y = static_cast<float*>(pending.y);
      if (kResult == Result::kAddF32) {
        a = _mm512_add_ps(a, _mm512_maskz_loadu_ps(low, y));
        b = _mm512_add_ps(b, _mm512_maskz_loadu_ps(high, y + 16));
      }
      _mm512_mask_storeu_ps(y, low, a);
      _mm512_mask_storeu_ps(y + 16, high, b);
      pending.y = y + y_stride;
    }
  }
}

// Two (or, for at most 16 rows, one) tiles of x.
struct Operand {
  const char* upper;
  const char* lower;
  const char* upper_tail;
  const char* lower_tail;
};

// Two tiles of the weight, of the lower and the upper 16 outputs.
struct Panel {
  const char* lower;
  const char* upper;
};

template <bool kLower>
SLUICE_AMX_INLINE void MultiplyStep(const char* upper, const char* lower, int64_t stride,
                                    const Panel& b, int64_t offset) {
  TileLoad<4>(upper, stride);
  TileLoadPassing<6>(b.lower + offset, kPairBytes);
  TileMultiply<0, 4, 6>();
  if (kLower) {
    TileLoad<5>(lower, stride);
    TileMultiply<1, 5, 6>();
  }
  TileLoadPassing<7>(b.upper + offset, kPairBytes);
  TileMultiply<2, 4, 7>();
  if (kLower) TileMultiply<3, 5, 7>();
}

// What is prefetched meanwhile: the chunk of the weight that comes next, in the order in which it
// lies in memory (which is when memory is fastest), some lines with every step.
class Ahead {
 public:
  // `count` blocks from `first` on and, with SiLU, as many from `second` on: `bytes` of each.
  Ahead(const char* first, const char* second, int64_t count, int64_t block_bytes, int64_t bytes)
      : second_(second), count_(count), block_bytes_(block_bytes), bytes_(bytes), block_(first) {
    at_ = count > 0 ? first : nullptr;
    end_ = at_ + (count > 0 ? bytes : 0);
    left_ = count;
  }
  int64_t lines() const { return CeilDiv(bytes_, 64) * count_ * (second_ ? 2 : 1); }

  SLUICE_AMX_INLINE void Step(int64_t lines) {
    for (; lines > 0; --lines, at_ += 64) {
      if (at_ >= end_ && !NextBlock()) return;
      _mm_prefetch(at_, _MM_HINT_T1);
    }
  }

 private:
  bool NextBlock() {
    if (left_ > 1) {
      --left_;
      block_ += block_bytes_;
    } else if (left_ == 1 && second_) {
      left_ = count_;
      block_ = second_;
      second_ = nullptr;
    } else {
      left_ = 0;
      return false;
    }
    at_ = block_;
    end_ = at_ + bytes_;
    return true;
  }

  const char* second_;
  int64_t count_, block_bytes_, bytes_;
  const char* block_;
  int64_t left_;  // blocks, the one at hand included
  const char* at_;
  const char* end_;
};

// sums (+)= x W^T over steps [first, last) of 32 inputs.
template <bool kLower, Result kResult, Activation kActivation>
SLUICE_AMX_INLINE void MultiplyTile(const Job& job, const Operand& x, const Panel& b, int64_t first,
                                    int64_t last, bool add, float* sums, Ahead& ahead,
                                    int64_t lines, int64_t written, Pending& pending) {
  if (add) {
    TileLoad<0>(sums, 128);
    TileLoad<2>(sums + 16, 128);
    if (kLower) TileLoad<1>(sums + 16 * kOutputs, 128);
    if (kLower) TileLoad<3>(sums + 16 * kOutputs + 16, 128);
  } else {
    TileZero<0>();
    TileZero<2>();
    if (kLower) TileZero<1>();
    if (kLower) TileZero<3>();
  }
  const int64_t whole = job.x_tail && last == job.steps ? last - 1 : last;
  for (int64_t s = first; s < whole; ++s) {
    MultiplyStep<kLower>(x.upper + s * 64, x.lower + s * 64, job.x_stride, b, s * kStepBytes);
    ahead.Step(lines);
    WriteRows<kResult, kActivation>(pending, written, job.y_width);
  }
  if (whole < last) {
    MultiplyStep<kLower>(x.upper_tail, x.lower_tail, 64, b, whole * kStepBytes);
  }
  WriteRows<kResult, kActivation>(pending, pending.rows, job.y_width);
  TileStore<0>(sums, 128);
  TileStore<2>(sums + 16, 128);
  if (kLower) TileStore<1>(sums + 16 * kOutputs, 128);
  if (kLower) TileStore<3>(sums + 16 * kOutputs + 16, 128);
}

// One thread's share: rows [row_begin, row_end), tiles of outputs [tile_begin, tile_end).
struct Share {
  int64_t row_begin, row_end, tile_begin, tile_end;
};

// Tiles of outputs in a chunk of the weight: as many as stay in the second-level cache. Few rows
// are over before the next chunk has come from memory; they take small chunks, to begin early with
// it.
int64_t ChunkTiles(const Share& share, int64_t steps) {
  const int64_t fit = std::max<int64_t>(1, kChunkBytes / (steps * kStep * kOutputs * 2));
  const int64_t rows = share.row_end - share.row_begin;
  return std::min(share.tile_end - share.tile_begin, rows > 4 * kRows ? fit : int64_t{2});
}

// Steps [step_begin, step_end) of K for one thread. memory: 2 + ChunkTiles tiles of sums.
template <Result kResult, Activation kActivation>
SLUICE_AMX_TARGET void RunShare(const Job& job, const Share& share, int64_t step_begin,
                                int64_t step_end, float* memory) {
  const AmxTiles use_tiles;
  float* const finished[2] = {memory, memory + kTileFloats};
  float* const waiting = memory + 2 * kTileFloats;
  constexpr int64_t y_bytes = kResult == Result::kBF16 ? 2 : 4;
  const int64_t blocks = CeilDiv(step_end - step_begin, kBlockSteps);
  const int64_t chunk_tiles = ChunkTiles(share, step_end - step_begin);
  const int64_t share_row_tiles = CeilDiv(share.row_end - share.row_begin, kRows);
  const auto first_step = [&](int64_t block) {
    return step_begin + (step_end - step_begin) * block / blocks;
  };
  // With SiLU a tile is 16 gates and the 16 values they multiply, which lie n / 2 outputs further.
  constexpr bool kPaired = kActivation == Activation::kSiluMul;
  constexpr int64_t kColumns = kPaired ? kOutputs / 2 : kOutputs;
  const auto outputs_from = [&](int64_t output) {
    return job.weight + output / kPackedOutputs * job.block_bytes + output % kPackedOutputs * 4;
  };
  const auto panel = [&](int64_t tile) {
    const int64_t output = tile * kColumns;
    return Panel{outputs_from(output), outputs_from(kPaired ? job.n / 2 + output : output + 16)};
  };
  int turn = 0;
  Pending pending;
  const int64_t most_rows =
      std::max(4 * kRows, kRowsBytes / ((step_end - step_begin) * kStep * 2) / kRows * kRows);
  const int64_t row_parts = CeilDiv(share.row_end - share.row_begin, most_rows);
  for (int64_t part = 0; part < row_parts; ++part) {
    const int64_t row_begin = share.row_begin + share_row_tiles * part / row_parts * kRows;
    const int64_t row_end =
        std::min(share.row_end, share.row_begin + share_row_tiles * (part + 1) / row_parts * kRows);
    for (int64_t chunk = share.tile_begin; chunk < share.tile_end; chunk += chunk_tiles) {
      const int64_t chunk_end = std::min(share.tile_end, chunk + chunk_tiles);
      // The chunk after the last is the first one, for the next rows.
      const bool last_chunk = chunk_end == share.tile_end;
      const int64_t next = last_chunk ? share.tile_begin : chunk_end;
      const int64_t next_end = std::min(share.tile_end, next + chunk_tiles);
      const bool prefetch = !last_chunk || row_end < share.row_end;
      const auto block_of = [&](int64_t output) { return output / kPackedOutputs; };
      const int64_t next_block = block_of(next * kColumns);
      const int64_t next_blocks = block_of(next_end * kColumns - 1) + 1 - next_block;
      const char* from = job.weight + step_begin * kStepBytes;
      Ahead ahead(
          from + next_block * job.block_bytes,
          kPaired ? from + block_of(job.n / 2 + next * kColumns) * job.block_bytes : nullptr,
          prefetch ? next_blocks : 0, job.block_bytes, (step_end - step_begin) * kStepBytes);
      const int64_t lines =
          CeilDiv(ahead.lines(), CeilDiv(row_end - row_begin, kRows) * (chunk_end - chunk) *
                                     (step_end - step_begin));
      for (int64_t r = row_begin; r < row_end; r += kRows) {
        const int64_t rows = std::min(kRows, row_end - r);
        // Tiles are whole: at the end they reach back over rows that are already done.
        const int64_t upper = rows > 16 ? r : std::min(r, job.x_rows - 16);
        const int64_t lower = rows > 16 ? std::min(r + 16, job.x_rows - 16) : upper;
        Operand x = {job.x + upper * job.x_stride, job.x + lower * job.x_stride, nullptr, nullptr};
        if (job.x_tail) {
          x.upper_tail = job.x_tail + upper * 64;
          x.lower_tail = job.x_tail + lower * 64;
        }
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t first = first_step(block), last = first_step(block + 1);
          const int64_t written = CeilDiv(kRows, last - first);
          for (int64_t tile = chunk; tile < chunk_end; ++tile) {
            float* sums = blocks > 1 ? waiting + (tile - chunk) * kTileFloats : finished[turn];
            const Panel b = panel(tile);
            if (rows > 16) {
              MultiplyTile<true, kResult, kActivation>(job, x, b, first, last, block > 0, sums,
                                                       ahead, lines, written, pending);
            } else {
              MultiplyTile<false, kResult, kActivation>(job, x, b, first, last, block > 0, sums,
                                                        ahead, lines, written, pending);
            }
            if (block + 1 < blocks) continue;
            turn ^= 1;
            const int64_t column = tile * kColumns;
            const int64_t columns = std::min(kColumns, job.y_width - column);
            pending.sums = sums + (r - upper) * kOutputs;
            pending.rows = std::min(r + rows, job.m) - r;
            pending.until_gap = rows > 16 ? 16 : rows;
            pending.gap = (r + 16 - lower) * kOutputs;
            pending.y = static_cast<char*>(job.y) + (r * job.y_width + column) * y_bytes;
            if (job.bias) {
              pending.bias = job.bias + column;
              pending.upper_bias = pending.bias + (kPaired ? job.n / 2 : 16);
            }
            pending.columns = static_cast<__mmask32>((uint64_t{1} << columns) - 1);
          }
        }
      }
    }
  }
  WriteRows<kResult, kActivation>(pending, pending.rows, job.y_width);
}

using Run = void (*)(const Job&, const Share&, int64_t, int64_t, float*);

Run ChooseRun(Result result, Activation activation) {
  const bool narrow = result == Result::kBF16;
  switch (activation) {
    case Activation::kGeluTanh:
      return narrow ? RunShare<Result::kBF16, Activation::kGeluTanh>
                    : RunShare<Result::kF32, Activation::kGeluTanh>;
    case Activation::kGeluErf:
      return narrow ? RunShare<Result::kBF16, Activation::kGeluErf>
                    : RunShare<Result::kF32, Activation::kGeluErf>;
    case Activation::kQuickGelu:
      return narrow ? RunShare<Result::kBF16, Activation::kQuickGelu>
                    : RunShare<Result::kF32, Activation::kQuickGelu>;
    case Activation::kSiluMul:
      return narrow ? RunShare<Result::kBF16, Activation::kSiluMul>
                    : RunShare<Result::kF32, Activation::kSiluMul>;
    case Activation::kNone:
      break;
  }
  if (result == Result::kAddF32) return RunShare<Result::kAddF32, Activation::kNone>;
  return narrow ? RunShare<Result::kBF16, Activation::kNone>
                : RunShare<Result::kF32, Activation::kNone>;
}

// The shares of threads form a grid over rows and outputs.
struct Grid {
  int64_t rows = 1, outputs = 1;
};

// Rows are cut where that is nearly as even as anything: what comes before and after a product
// works row by row, and rows that stay with a thread stay in its cache. But every share reads all
// the weights of its outputs; so many rows have to use them while they pass: more of them when the
// weights come from memory.
Grid CutGrid(int64_t m, int64_t n, int64_t k, int64_t threads) {
  constexpr int64_t kInMemory = int64_t{4} << 20;  // bytes of one weight
  const int64_t fewest_rows = n * k * 2 >= kInMemory ? 256 : 96;
  const int64_t half_tiles = CeilDiv(m, kRows / 2), output_tiles = CeilDiv(n, kOutputs);
  Grid best;
  int64_t least = INT64_MAX;
  for (int64_t rows = std::clamp<int64_t>(m / fewest_rows, 1, threads); rows >= 1; --rows) {
    const int64_t outputs = std::min(threads / rows, output_tiles);
    const int64_t cost = CeilDiv(half_tiles, rows) * CeilDiv(output_tiles, outputs);
    if (cost < least - least / 16) {
      least = cost;
      best = {rows, outputs};
    }
  }
  return best;
}

}  // namespace

void LinearAmx(ExecContext& ctx, const LinearArgs& args) {
  Workspace::Scope scope(ctx.workspace());
  const int64_t row_bytes = args.k * 2, tail = args.k % kStep;
  Job job;
  job.x = static_cast<const char*>(args.x.raw());
  job.x_stride = row_bytes;
  job.x_tail = nullptr;
  job.m = args.m;
  job.x_rows = std::max<int64_t>(args.m, 16);
  job.weight = static_cast<const char*>(args.weight);
  job.steps = CeilDiv(args.k, kStep);
  job.block_bytes = job.steps * kStep * kPackedOutputs * 2;
  job.n = args.n;
  const bool paired = args.options.activation == Activation::kSiluMul;
  job.y_width = paired ? args.n / 2 : args.n;
  job.bias = args.bias;
  job.y = args.y.raw();
  // Tiles are read whole: rows and inputs that do not fill them are padded.
  if (args.m < 16) {
    const int64_t padded = job.steps * kStep * 2;
    char* to = static_cast<char*>(ctx.workspace().Allocate(DType::kU8, {16, padded}).raw());
    std::memset(to, 0, 16 * padded);
    for (int64_t i = 0; i < args.m; ++i) {
      std::memcpy(to + i * padded, job.x + i * row_bytes, row_bytes);
    }
    job.x = to;
    job.x_stride = padded;
  } else if (tail != 0) {
    char* to = static_cast<char*>(ctx.workspace().Allocate(DType::kU8, {args.m, 64}).raw());
    std::memset(to, 0, args.m * 64);
    const char* from = job.x + (args.k - tail) * 2;
    for (int64_t i = 0; i < args.m; ++i) std::memcpy(to + i * 64, from + i * row_bytes, tail * 2);
    job.x_tail = to;
  }

  // Waking a thread costs as much as some 20 tile products of the whole depth at K = 256.
  constexpr int64_t kStepsAThread = 128;
  const int64_t half_tiles = CeilDiv(args.m, kRows / 2), output_tiles = CeilDiv(args.n, kOutputs);
  const int64_t work = CeilDiv(args.m, kRows) * output_tiles * job.steps;
  const Grid grid = CutGrid(args.m, args.n, args.k,
                            std::clamp<int64_t>(work / kStepsAThread, 1, ctx.num_threads()));
  const int64_t shares = grid.rows * grid.outputs;
  const auto share_of = [&](int64_t index) {
    const int64_t i = index / grid.outputs, j = index % grid.outputs;
    return Share{half_tiles * i / grid.rows * (kRows / 2),
                 std::min(args.m, half_tiles * (i + 1) / grid.rows * (kRows / 2)),
                 output_tiles * j / grid.outputs, output_tiles * (j + 1) / grid.outputs};
  };
  // With sums in f32, a long K goes in parts, each added to the one before.
  const bool wide = args.y.dtype() == DType::kF32 && args.options.activation == Activation::kNone;
  const int64_t parts = wide ? CeilDiv(job.steps * kStep, kLongK) : 1;
  int64_t floats = 0;
  for (int64_t i = 0; i < shares; ++i) {
    const int64_t tiles = 2 + ChunkTiles(share_of(i), job.steps / parts);
    floats = std::max(floats, tiles * kTileFloats);
  }
  float* memory = ctx.workspace().Allocate(DType::kF32, {shares, floats}).data<float>();
  const Result result = args.y.dtype() == DType::kBF16 ? Result::kBF16
                        : args.options.accumulate      ? Result::kAddF32
                                                       : Result::kF32;
  const Run run = ChooseRun(result, args.options.activation);
  Job rest = job;
  rest.bias = nullptr;
  ParallelFor(ctx, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = job.steps * part / parts, last = job.steps * (part + 1) / parts;
        const Run add = RunShare<Result::kAddF32, Activation::kNone>;
        (part == 0 ? run : add)(part == 0 ? job : rest, share_of(i), first, last,
                                memory + i * floats);
      }
    }
  });
}

}  // namespace sluice

#else  // !__x86_64__

#include "runtime/error.h"

namespace sluice {

// Never chosen there.
void LinearAmx(ExecContext&, const LinearArgs&) {
  throw Error("[linear] the AMX kernel needs x86-64");
}

}  // namespace sluice

#endif  // __x86_64__
