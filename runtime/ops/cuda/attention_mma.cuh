// Attention by products of single warps (mma.sync), after FlashAttention-2 (arXiv 2307.08691) and
// SageAttention2 (arXiv 2411.10958): one kernel for all precisions, for Ampere and later.
//
//   S = Q K^T, P = exp2(S * factor - max), O = P V / sum(P)        one pass over the keys
//
// A block of 4 warps computes 128 queries of one head, 32 a warp, over tiles of 64 keys. Keys and
// values have one buffer each: the next keys come while the softmax and the product with the values
// run, the next values while the scores and the softmax do. More blocks of the same multiprocessor
// hide the rest.
//
//   bf16        both products in bf16; the factor is the scale of the scores
//   int8, int4  scores in integers: exact sums. The factor is that of a group of queries times that
//               of a group of keys. Groups follow the layout of products in registers, so that a
//               thread needs one factor for all its scores of a tile: queries r, r + 8, r + 16 and
//               r + 24 of a warp, and the 16 keys j of a tile with equal (j % 8) / 2.
//   int4        the queries are quantised without the mean m of their tile; m K^T, the same for all
//               of them, is added to the scores in f32: before the maximum, which it can move
//   f16         values in units of their channel, sums in f32
//   fp8         probabilities up to 448; the tensor cores keep 13 bits of an fp8 product's sum, so
//               the sum of a tile is added to O outside of them. With half sums that of a tile is
//               f16: values reach 2.25 only, and 64 * 448 * 2.25 stays below 65504.
//
// Sizes: head_dim 64, 72, 80, 128; 72 runs as 80, padded with zeros in shared memory only.
// Products: 4 * q * keys * head_dim a head. Bytes from memory: queries and results once, keys and
// values once for each tile of queries, of which the second-level cache serves all but the first.
#ifndef SLUICE_RUNTIME_OPS_CUDA_ATTENTION_MMA_CUH_
#define SLUICE_RUNTIME_OPS_CUDA_ATTENTION_MMA_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "runtime/ops/cuda/attention.h"
#include "runtime/ops/cuda/attention_quantize.cuh"
#include "runtime/ops/cuda/attention_rows.cuh"

namespace sluice::cuda::mma {

// Launched by Attention (attention.cu) once the arguments are checked.
void FlashAttention(const AttentionArgs& args, cudaStream_t stream);
void SageAttention(const AttentionArgs& args, ScaleGroups groups, void* workspace,
                   cudaStream_t stream);

constexpr int kTileQueries = MmaKvLayout::kTileQueries, kTileKeys = MmaKvLayout::kTileKeys;
constexpr int kKeyScales = MmaKvLayout::kKeyScales;
constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kWarpRows = kTileQueries / kWarps;
constexpr int kRowTiles = kWarpRows / 16;   // products of 16 queries by 8 keys or channels
constexpr int kScores = kTileKeys / 8 * 4;  // of a row tile that a thread holds
constexpr float kLargestInt4 = 7;
constexpr float kLargestHalfSums = 2.25f;  // of fp8 values, see above

enum class Scores { kBf16, kInt8, kInt4 };
enum class Values { kBf16, kFp16, kFp8, kFp8HalfSums };
template <Values kV>
constexpr bool kIsFp8 = kV == Values::kFp8 || kV == Values::kFp8HalfSums;

// Whether the architecture that is compiled for has the products, or emulates them. The host asks
// ChooseAttentionVariant before it launches.
template <Scores kS, Values kV>
__device__ constexpr bool HasProducts() {
#ifdef __CUDA_ARCH__
  if (kIsFp8<kV> && __CUDA_ARCH__ < 890) return false;
  if (kS == Scores::kInt4 && __CUDA_ARCH__ > 900) return false;
#endif
  return true;
}

// Rows of one operand of one head in global memory, in order.
struct Operand {
  const uint8_t* data;
  int64_t batch_bytes, head_bytes, row_bytes;
  int rows, pieces;  // of a head, and of 16 bytes in a row; what lies beyond is zero
};

struct MmaShape {
  int q_len, kv_len, heads, group, head_dim;  // group: query heads that share a kv head
  int q_tiles, tiles;                         // of queries and keys
  bool causal;
  float scale_log2;  // of scores, in powers of two
  const __nv_bfloat16* q;
  int64_t q_stride;
  __nv_bfloat16* out;
  int64_t out_stride;
  Operand keys, values;
  // Of a paged cache, else null: {kv_len, numbers of blocks of 64 keys}. `keys` and `values` are
  // then of one block, and blocks are so many bytes apart.
  const int32_t* table;
  int64_t block_bytes;
  // Of quantised precisions, as in MmaKvLayout.
  bool warp_groups;
  const float *key_scales, *value_scales, *value_channels, *query_means, *mean_scores;
};

// ---- instructions ---------------------------------------------------------------------------

__device__ inline uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes to shared memory, zeros unless `inside`.
__device__ inline void CopyAsync(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}
__device__ inline void CopyCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ inline void CopyWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four matrices of 8 rows of 16 bytes; lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void LoadMatrices(uint32_t (&x)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at)
               : "memory");
}
__device__ inline void LoadTransposed(uint32_t (&x)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at)
               : "memory");
}

#define SLUICE_MMA(NAME, SHAPE, D, REGISTER)                                                      \
  __device__ inline void NAME(D* d, const uint32_t* a, uint32_t b0, uint32_t b1) {                \
    asm volatile("mma.sync.aligned." SHAPE                                                        \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"               \
                 : "+" REGISTER(d[0]), "+" REGISTER(d[1]), "+" REGISTER(d[2]), "+" REGISTER(d[3]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                 \
  }
SLUICE_MMA(MmaFp16, "m16n8k16.row.col.f32.f16.f16.f32", float, "f")
SLUICE_MMA(MmaFp8, "m16n8k32.row.col.f32.e4m3.e4m3.f32", float, "f")
SLUICE_MMA(MmaInt8, "m16n8k32.row.col.s32.s8.s8.s32", int, "r")
SLUICE_MMA(MmaInt4, "m16n8k64.row.col.s32.s4.s4.s32", int, "r")
#undef SLUICE_MMA

// Sums in pairs of f16.
__device__ inline void MmaFp8Half(uint32_t* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f16.e4m3.e4m3.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, "
      "{%0, %1};"
      : "+r"(d[0]), "+r"(d[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline uint32_t PackFp16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ inline float2 UnpackFp16(uint32_t packed) {
  return __half22float2(*reinterpret_cast<const __half2*>(&packed));
}

// ---- shared memory --------------------------------------------------------------------------

// Rows of kPieces times 16 bytes. Eight rows' pieces of the same number lie in different banks, as
// ldmatrix wants: pieces are permuted by the row where a power of two of them makes a row, and rows
// are an odd number of pieces apart elsewhere.
template <int kPieces>
struct Area {
  static constexpr bool kPermuted = (kPieces & (kPieces - 1)) == 0;
  static constexpr int kPitch = 16 * (kPermuted ? kPieces : kPieces | 1);
  __device__ static uint32_t At(int row, int piece) {
    if constexpr (kPermuted) {
      constexpr int kDistinct = kPieces < 8 ? kPieces : 8;  // rows side by side: 8 / kDistinct
      piece ^= row / (8 / kDistinct) % kDistinct;
    }
    return row * kPitch + 16 * piece;
  }
};

template <int kDim, Scores kS, Values kV>
struct Config {
  // A product takes 32 bytes of a query and a key at once.
  static constexpr int kSteps = kS == Scores::kBf16   ? kDim / 16
                                : kS == Scores::kInt8 ? (kDim + 31) / 32
                                                      : (kDim + 63) / 64;
  static constexpr int kKeyPieces = 2 * kSteps;
  static constexpr int kValueRows = kIsFp8<kV> ? kDim : kTileKeys;
  static constexpr int kValuePieces = kIsFp8<kV> ? kTileKeys / 16 : kDim / 8;
  using Queries = Area<kKeyPieces>;
  using Keys = Area<kKeyPieces>;
  using Values = Area<kValuePieces>;
  static constexpr int kQueryBytes = kTileQueries * Queries::kPitch;
  static constexpr int kKeyBytes = kTileKeys * Keys::kPitch;
  static constexpr int kValueBytes = kValueRows * Values::kPitch;
  static constexpr int kMeanBytes = kS == Scores::kInt4 ? kTileKeys * sizeof(float) : 0;
  static constexpr int kSharedBytes = kQueryBytes + kKeyBytes + kValueBytes + 2 * kMeanBytes;
};

// Starts the copy of rows [first, first + kRows) of one head.
template <int kRows, int kPieces>
__device__ inline void CopyRows(const Operand& from, const uint8_t* head, int first, uint32_t to) {
#pragma unroll
  for (int i = threadIdx.x; i < kRows * kPieces; i += kThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    const bool inside = first + row < from.rows && piece < from.pieces;
    const uint8_t* source = head + (first + row) * from.row_bytes + 16 * piece;
    CopyAsync(to + Area<kPieces>::At(row, piece), inside ? source : head, inside);
  }
}

// Starts the copy of a tile of keys or values: the next rows of the head, or all of a block, where
// those behind the last key count as zeros, whatever they hold.
template <int kRows, int kPieces>
__device__ inline void CopyTile(const MmaShape& shape, bool paged, int kv_len, const Operand& from,
                                const uint8_t* head, int tile, uint32_t to) {
  if (!paged) return CopyRows<kRows, kPieces>(from, head, tile * kRows, to);
  Operand block = from;
  block.rows = kv_len - tile * kTileKeys;
  CopyRows<kRows, kPieces>(block, head + __ldg(shape.table + 1 + tile) * shape.block_bytes, 0, to);
}

// Turns the 32 queries of each warp, less `mean` where there is one, into integers in shared memory
// and returns the scale of this thread's rows. A thread takes every fourth piece of 8 channels.
template <Scores kS, int kKeyPieces>
__device__ inline float QuantizeQueries(const MmaShape& shape, const __nv_bfloat16* q,
                                        int first_row, const float* mean, uint32_t to) {
  constexpr float kLargest = kS == Scores::kInt8 ? kLargestInt8 : kLargestInt4;
  constexpr int kBytes = kS == Scores::kInt8 ? 8 : 4;  // of 8 channels
  constexpr int kItems = kKeyPieces * 16 / kBytes / 4, kRows = kWarpRows / 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint4 pieces[kRows][kItems];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int row = first_row + warp * kWarpRows + 8 * r + lane / 4, piece = 4 * i + lane % 4;
      pieces[r][i] = make_uint4(0, 0, 0, 0);
      if (row < shape.q_len && 8 * piece < shape.head_dim) {
        pieces[r][i] = __ldg(reinterpret_cast<const uint4*>(q + row * shape.q_stride) + piece);
      }
    }
  }
  const auto values = [&](int r, int i, float(&x)[8]) {
    Unpack(pieces[r][i], x);
    if constexpr (kS == Scores::kInt4) {
      const int row = first_row + warp * kWarpRows + 8 * r + lane / 4, piece = 4 * i + lane % 4;
      if (row >= shape.q_len || 8 * piece >= shape.head_dim) return;
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] -= __ldg(mean + 8 * piece + j);
    }
  };
  float largest = kFloor;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      float x[8];
      values(r, i, x);
#pragma unroll
      for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fabsf(x[j]));
    }
  }
  largest = shape.warp_groups ? WarpMax(largest) : QuadMax(largest);
  const float to_int = kLargest / largest;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      float x[8];
      values(r, i, x);
      uint32_t packed[2] = {};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const auto rounded = static_cast<uint32_t>(__float2int_rn(x[j] * to_int));
        if constexpr (kS == Scores::kInt8) {
          packed[j / 4] |= (rounded & 0xff) << (j % 4 * 8);
        } else {
          packed[0] |= (rounded & 0xf) << (j * 4);
        }
      }
      constexpr int kParts = 16 / kBytes;  // of a piece of integers
      const int row = warp * kWarpRows + 8 * r + lane / 4, piece = 4 * i + lane % 4;
      const uint32_t at = to + Area<kKeyPieces>::At(row, piece / kParts) + piece % kParts * kBytes;
      if constexpr (kS == Scores::kInt8) {
        asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(packed[0]), "r"(packed[1])
                     : "memory");
      } else {
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(packed[0]) : "memory");
      }
    }
  }
  return largest / kLargest;
}

// ---- the kernel -----------------------------------------------------------------------------

template <int kDim, Scores kS, Values kV>
__global__ void __launch_bounds__(kThreads, 2) MmaKernel(const __grid_constant__ MmaShape shape) {
  if constexpr (!HasProducts<kS, kV>()) {
    __trap();
  } else {
    using C = Config<kDim, kS, kV>;
    constexpr bool kExact = kS == Scores::kBf16;
    extern __shared__ __align__(128) uint8_t shared[];
    const uint32_t q_shared = SharedAddress(shared), k_shared = q_shared + C::kQueryBytes;
    const uint32_t v_shared = k_shared + C::kKeyBytes, means_shared = v_shared + C::kValueBytes;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    // The longest rows of a causal problem come first, so that the short ones fill the gaps at the
    // end; tiles of one head follow each other and share its keys and values in the cache.
    const int item = blockIdx.x / shape.q_tiles;  // head of all batches
    const int q_tile = shape.q_tiles - 1 - blockIdx.x % shape.q_tiles;
    const int batch = item / shape.heads, head = item % shape.heads, kv_head = head / shape.group;
    const int first_row = q_tile * kTileQueries, warp_row = first_row + warp * kWarpRows;
    const bool paged = kExact && shape.table != nullptr;
    const int kv_len = paged ? __ldg(shape.table) : shape.kv_len, offset = kv_len - shape.q_len;
    // Keys that a row sees, and whole tiles that all rows of the warp see.
    const auto limit = [&](int row) {
      return shape.causal ? min(kv_len, row + offset + 1) : kv_len;
    };
    const int tiles = (limit(first_row + kTileQueries - 1) + kTileKeys - 1) / kTileKeys;
    const int whole = limit(warp_row) / kTileKeys;

    const __nv_bfloat16* q =
        shape.q + int64_t{batch} * shape.q_len * shape.q_stride + head * shape.head_dim;
    const auto head_of = [&](const Operand& x) {
      return x.data + batch * x.batch_bytes + kv_head * x.head_bytes;
    };
    const uint8_t *keys = head_of(shape.keys), *values = head_of(shape.values);
    const int kv_item = batch * (shape.heads / shape.group) + kv_head;
    const float* mean_scores = nullptr;
    if constexpr (kS == Scores::kInt4) {
      mean_scores =
          shape.mean_scores + (int64_t{item} * shape.q_tiles + q_tile) * shape.tiles * kTileKeys;
    }
    const auto copy_keys = [&](int tile) {
      CopyTile<kTileKeys, C::kKeyPieces>(shape, paged, kv_len, shape.keys, keys, tile, k_shared);
      if (C::kMeanBytes > 0 && threadIdx.x < C::kMeanBytes / 16) {
        CopyAsync(means_shared + tile % 2 * C::kMeanBytes + 16 * threadIdx.x,
                  mean_scores + tile * kTileKeys + 4 * threadIdx.x, true);
      }
    };

    copy_keys(0);
    float q_factor = shape.scale_log2;
    if constexpr (kExact) {
      const Operand queries = {nullptr, 0, 0, 2 * shape.q_stride, shape.q_len, shape.head_dim / 8};
      CopyRows<kTileQueries, C::kKeyPieces>(queries, reinterpret_cast<const uint8_t*>(q), first_row,
                                            q_shared);
    } else {
      const float* mean =
          kS == Scores::kInt4
              ? shape.query_means + (int64_t{item} * shape.q_tiles + q_tile) * shape.head_dim
              : nullptr;
      q_factor *= QuantizeQueries<kS, C::kKeyPieces>(shape, q, first_row, mean, q_shared);
    }
    CopyCommit();

    const float* key_scales = shape.key_scales + int64_t{kv_item} * shape.tiles * kKeyScales;
    const float* value_scales = shape.value_scales + int64_t{kv_item} * shape.tiles;
    float o[kRowTiles][kDim / 2] = {};
    float units = 1;  // of o
    // Of rows lane / 4 and lane / 4 + 8 of each row tile; maxima include the logarithm of the
    // largest probability, sums are of this lane's columns.
    constexpr float kLog2Largest = kIsFp8<kV> ? kLog2Fp8 : 0;
    float max[kRowTiles][2], sum[kRowTiles][2] = {};
    for (auto& rows : max) rows[0] = rows[1] = -INFINITY;

    for (int tile = 0; tile < tiles; ++tile) {
      CopyWait<0>();
      __syncthreads();  // the keys are there, and the last values have been read
      CopyTile<C::kValueRows, C::kValuePieces>(shape, paged, kv_len, shape.values, values, tile,
                                               v_shared);
      CopyCommit();
      float factor = q_factor, value_scale = 1;
      if constexpr (!kExact) factor *= __ldg(key_scales + tile * kKeyScales + lane % 4);
      if constexpr (kIsFp8<kV>) value_scale = __ldg(value_scales + tile);

      std::conditional_t<kExact, float, int> raw[kRowTiles][kScores] = {};
#pragma unroll
      for (int step = 0; step < C::kSteps; ++step) {
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          LoadMatrices(a[m], q_shared + C::Queries::At(warp * kWarpRows + 16 * m + lane % 16,
                                                       2 * step + lane / 16));
        }
#pragma unroll
        for (int n = 0; n < kTileKeys / 16; ++n) {
          uint32_t b[4];
          LoadMatrices(b, k_shared + C::Keys::At(16 * n + lane / 16 * 8 + lane % 8,
                                                 2 * step + lane / 8 % 2));
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              auto* s = raw[m] + 8 * n + 4 * half;
              if constexpr (kS == Scores::kBf16) {
                MmaBf16(s, a[m], b[2 * half], b[2 * half + 1]);
              } else if constexpr (kS == Scores::kInt8) {
                MmaInt8(s, a[m], b[2 * half], b[2 * half + 1]);
              } else {
                MmaInt4(s, a[m], b[2 * half], b[2 * half + 1]);
              }
            }
          }
        }
      }
      __syncthreads();  // the keys have been read
      if (tile + 1 < tiles) copy_keys(tile + 1);
      CopyCommit();

      // Scores to probabilities, packed as the second product takes them.
      constexpr int kWords = kIsFp8<kV> ? kScores / 4 : kScores / 2;
      uint32_t p[kRowTiles][kWords];
      float keep[kRowTiles][2];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        float s[kScores];
#pragma unroll
        for (int i = 0; i < kScores; ++i) s[i] = static_cast<float>(raw[m][i]);
        float scale = factor;
        if constexpr (kS == Scores::kInt4) {
          const float* of_mean =
              reinterpret_cast<const float*>(shared + (means_shared - q_shared)) +
              tile % 2 * kTileKeys + 2 * (lane % 4);
#pragma unroll
          for (int i = 0; i < kScores; i += 4) {
            const float2 add = *reinterpret_cast<const float2*>(of_mean + 2 * i);
            s[i] = s[i] * factor + add.x;
            s[i + 1] = s[i + 1] * factor + add.y;
            s[i + 2] = s[i + 2] * factor + add.x;
            s[i + 3] = s[i + 3] * factor + add.y;
          }
          scale = 1;
        }
        if (tile >= whole) {
          const int row = warp_row + 16 * m + lane / 4;
          Mask(s, tile * kTileKeys, limit(row), limit(row + 8));
        }
        float most[2] = {s[0], s[2]};
#pragma unroll
        for (int i = 0; i < kScores; i += 4) {
          most[0] = fmaxf(most[0], fmaxf(s[i], s[i + 1]));
          most[1] = fmaxf(most[1], fmaxf(s[i + 2], s[i + 3]));
        }
        // The lanes of a row have different factors. The first tile has the first key, which all
        // rows see: from there on maxima are finite.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float now = fmaxf(max[m][half], QuadMax(most[half] * scale) - kLog2Largest);
          keep[m][half] = Exp2(max[m][half] - now);
          max[m][half] = now;
        }
        float add[2] = {};
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
          s[i] = Exp2(s[i] * scale - max[m][i / 2 % 2]);
          add[i / 2 % 2] += s[i];
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          sum[m][half] = sum[m][half] * keep[m][half] + add[half];
        }
        if constexpr (kIsFp8<kV>) {
#pragma unroll
          for (int i = 0; i < kScores / 8; ++i) {  // groups of 16 keys
            const float* x = s + 8 * i;
            p[m][2 * i] = PackFp8(x[0], x[1], x[4], x[5]);
            p[m][2 * i + 1] = PackFp8(x[2], x[3], x[6], x[7]);
          }
        } else {
#pragma unroll
          for (int i = 0; i < kWords; ++i) {
            p[m][i] = kV == Values::kBf16 ? PackBf16(s[2 * i], s[2 * i + 1])
                                          : PackFp16(s[2 * i], s[2 * i + 1]);
          }
        }
      }

      CopyWait<1>();
      __syncthreads();  // the values are there
      if constexpr (kIsFp8<kV>) {
        const float ratio = __fdividef(units, value_scale);
        units = value_scale;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          uint32_t b[4];
          LoadMatrices(b, v_shared + C::Values::At(8 * n + lane % 8, lane / 8));
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            float r[4] = {};
            if constexpr (kV == Values::kFp8) {
              MmaFp8(r, p[m], b[0], b[1]);
              MmaFp8(r, p[m] + 4, b[2], b[3]);
            } else {
              uint32_t pairs[2] = {};
              MmaFp8Half(pairs, p[m], b[0], b[1]);
              MmaFp8Half(pairs, p[m] + 4, b[2], b[3]);
              const float2 low = UnpackFp16(pairs[0]), high = UnpackFp16(pairs[1]);
              r[0] = low.x, r[1] = low.y, r[2] = high.x, r[3] = high.y;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              o[m][4 * n + i] = o[m][4 * n + i] * (keep[m][i / 2] * ratio) + r[i];
            }
          }
        }
      } else {
        bool moved = false;
        for (const auto& rows : keep) moved = moved || rows[0] != 1 || rows[1] != 1;
        if (__any_sync(0xffffffffu, moved)) {
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
            for (int i = 0; i < kDim / 2; ++i) o[m][i] *= keep[m][i / 2 % 2];
          }
        }
#pragma unroll
        for (int step = 0; step < kTileKeys / 16; ++step) {
#pragma unroll
          for (int n = 0; n < kDim / 16; ++n) {
            uint32_t b[4];
            LoadTransposed(b, v_shared + C::Values::At(16 * step + lane % 16, 2 * n + lane / 16));
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                float* to = o[m] + 8 * n + 4 * half;
                if constexpr (kV == Values::kBf16) {
                  MmaBf16(to, p[m] + 4 * step, b[2 * half], b[2 * half + 1]);
                } else {
                  MmaFp16(to, p[m] + 4 * step, b[2 * half], b[2 * half + 1]);
                }
              }
            }
          }
        }
      }
    }

    if constexpr (!kExact) {
      const float* channels = shape.value_channels + int64_t{kv_item} * shape.head_dim;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const int column = 8 * n + 2 * (lane % 4);
        if (column < shape.head_dim) {
          const float2 channel = __ldg(reinterpret_cast<const float2*>(channels + column));
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            o[m][4 * n] *= channel.x, o[m][4 * n + 1] *= channel.y;
            o[m][4 * n + 2] *= channel.x, o[m][4 * n + 3] *= channel.y;
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const int row0 = warp_row + 16 * m + lane / 4, row1 = row0 + 8;
      const float scale0 = units / QuadSum(sum[m][0]), scale1 = units / QuadSum(sum[m][1]);
      __nv_bfloat16* out0 = shape.out + (int64_t{batch} * shape.q_len + row0) * shape.out_stride +
                            head * shape.head_dim;
      __nv_bfloat16* out1 = out0 + 8 * shape.out_stride;
      const bool store0 = row0 < shape.q_len, store1 = row1 < shape.q_len;
      if (kDim == 80 && shape.head_dim == 72) {
        StoreRows<72>(o[m], scale0, scale1, out0, out1, store0, store1);
      } else {
        StoreRows<kDim>(o[m], scale0, scale1, out0, out1, store0, store1);
      }
    }
  }
}

// ---- on the host ---------------------------------------------------------------------------

// What all precisions have in common; keys and values are the caller's.
inline MmaShape ShapeOf(const AttentionArgs& args) {
  MmaShape shape = {};
  shape.q_len = static_cast<int>(args.q_len);
  shape.kv_len = static_cast<int>(args.kv_len);
  shape.heads = args.heads;
  shape.group = args.heads / args.kv_heads;
  shape.head_dim = args.head_dim;
  shape.q_tiles = static_cast<int>((args.q_len + kTileQueries - 1) / kTileQueries);
  shape.tiles = static_cast<int>((args.kv_len + kTileKeys - 1) / kTileKeys);
  shape.causal = args.causal;
  shape.scale_log2 = args.scale * 1.44269504f;
  shape.q = static_cast<const __nv_bfloat16*>(args.q);
  shape.q_stride = args.q_stride;
  shape.out = static_cast<__nv_bfloat16*>(args.out);
  shape.out_stride = args.out_stride;
  return shape;
}

template <Scores kS, Values kV>
void LaunchMma(const AttentionArgs& args, const MmaShape& shape, cudaStream_t stream) {
  const auto launch = [&](auto dim) {
    const auto kernel = MmaKernel<dim(), kS, kV>;
    constexpr int kBytes = Config<dim(), kS, kV>::kSharedBytes;
    Check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
          "asking for shared memory");
    const auto blocks = static_cast<unsigned>(args.batch * args.heads * shape.q_tiles);
    kernel<<<blocks, kThreads, kBytes, stream>>>(shape);
    CheckLaunch("attention");
  };
  if (args.head_dim == 64) return launch(std::integral_constant<int, 64>());
  if (args.head_dim <= 80) return launch(std::integral_constant<int, 80>());
  launch(std::integral_constant<int, 128>());
}

}  // namespace sluice::cuda::mma

#endif  // SLUICE_RUNTIME_OPS_CUDA_ATTENTION_MMA_CUH_
