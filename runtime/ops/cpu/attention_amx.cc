// Attention in bf16 on AMX tiles.
//
//   S^T = K Q^T      keys are the A operand as they lie in memory, Q^T is packed once per tile of
//                    16 or 32 queries
//   P^T = exp2(S^T * scale * log2(e) - m)    m: about the largest score of a query so far
//   O^T = V^T P^T    values are the A operand as the cache stores them, P^T comes out of the
//                    softmax packed as the B operand
//
// With queries across the lanes of a vector, the softmax over keys runs down the rows of S^T and
// needs no horizontal step. Scores live for kChunkKeys keys at a time (8 KB for 32 queries); the
// sums follow Milakov and Gimelshein 2018 / FlashAttention (Dao et al. 2022). Keys pass in spans of
// kSpanBlocks blocks that stay in the second-level cache while a group of query tiles, whose
// accumulators fit there too, goes over them: a long cache is read from memory once per group.
//
// Costs for one tile of 32 queries and 64 keys at D = 64: 32 tile products of 16 cycles and 128
// vectors of exponentials of about 5 cycles. Doing both at once (the exponentials of one chunk
// between the products of the next) gains nothing: measured, next to tile instructions only one of
// the two ports for 512-bit vectors is left.
#include "runtime/ops/cpu/attention.h"

#if defined(__x86_64__)

// GCC 12 takes the undefined vectors inside its own intrinsics for ours (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "runtime/ops/cpu/amx.h"
#include "runtime/ops/cpu/attention_plan.h"
#include "runtime/parallel.h"

namespace sluice::cpu {
namespace {

constexpr int kTileQueries = 32;
constexpr int kChunkKeys = 64;
constexpr int kMostChunkKeys = 96;  // rather than one more chunk for a few keys
constexpr int kSpanBlocks = 16;
constexpr int64_t kGroupBytes = 512 << 10;
constexpr float kLog2e = 1.44269504f;
// How far (in powers of two) scores may grow beyond m before the accumulators are rescaled.
// Probabilities stay far from overflow, and their relative precision does not depend on it.
constexpr float kSlack = 8.0f;
constexpr float kNothing = -1e30f;

// The keys and values of one head and block: K [64, k_stride] and V^T [>= D, 64].
struct BlockRef {
  const BFloat16* k;
  const BFloat16* v;
};

// Sizes padded to whole tiles: the depth of the first product and the rows of the second.
struct HeadShape {
  explicit HeadShape(int head_dim)
      : dim(head_dim), depth(RoundUp(head_dim, 32)), rows(RoundUp(head_dim, 16)) {}
  int dim;
  int64_t depth, rows;
  // A packed block: K [64, depth], V^T [rows, 64].
  int64_t PackedElements() const { return kKvBlockTokens * (depth + rows); }
};

// Rows of queries and outputs: row r belongs to position r / heads and to the (r % heads)-th of the
// heads that share keys and values.
struct RowMap {
  const BFloat16* q;
  int64_t q_stride;
  BFloat16* out;
  int64_t out_stride;
  int heads;
  int64_t count;                    // rows in all
  const float* key_bias = nullptr;  // of the first key, or null
};

// Walks over rows without a division for each.
class RowCursor {
 public:
  RowCursor(const RowMap& map, int64_t row)
      : heads_(map.heads), position_(row / map.heads), head_(row % map.heads) {}
  int64_t position() const { return position_; }
  int64_t head() const { return head_; }
  void Next() {
    if (++head_ < heads_) return;
    head_ = 0;
    ++position_;
  }

 private:
  int64_t heads_, position_, head_;
};

// 16 or 32 queries on their way through the keys. Everything is padded to whole vectors of queries;
// the rows of the arrays are `width` = 16 * vectors long.
struct QueryTile {
  uint32_t* q;       // [depth / 2, width] pairs of consecutive elements
  float* o;          // [rows, width]
  float* max;        // [width] m above
  float* sum;        // [width] of probabilities
  int32_t* visible;  // [width] keys [0, visible) count
  const float* key_bias;
  int64_t first_row;
  int vectors;
  int rows;
  bool started;
  int64_t min_visible, max_visible;

  static int64_t Floats(const HeadShape& shape) {
    return kTileQueries * (shape.depth / 2 + shape.rows + 3);
  }
  void Place(float* memory, const HeadShape& shape) {
    q = reinterpret_cast<uint32_t*>(memory);
    o = memory + kTileQueries * shape.depth / 2;
    max = o + kTileQueries * shape.rows;
    sum = max + kTileQueries;
    visible = reinterpret_cast<int32_t*>(sum + kTileQueries);
  }
  void SetRows(int64_t index, int64_t all_rows) {
    first_row = index * kTileQueries;
    rows = static_cast<int>(std::min<int64_t>(kTileQueries, all_rows - first_row));
    vectors = rows > 16 ? 2 : 1;
  }
};

// 16 rows of 16 dwords become 16 columns.
SLUICE_AMX_INLINE void Transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// The mask of the first `count` words of a vector of 32.
SLUICE_AMX_INLINE __mmask32 FirstWords(int64_t count) {
  return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1u;
}

// Two rows of f32 as one row of bf16 pairs, rounded to nearest (halves up: all values are >= 0 or
// half an ulp does not matter). Four cheap instructions instead of a conversion and a permutation.
SLUICE_AMX_INLINE __m512i PackPairs(__m512 even, __m512 odd) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
  const __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd), half);
  return _mm512_mask_blend_epi16(0xaaaaaaaau, low, high);
}

// 2^x for x <= 126, relative error 8e-5: far below the rounding of probabilities to bf16 (2e-3).
// Very negative x gives 0.
SLUICE_AMX_INLINE __m512 Exp2(__m512 x) {
  const __m512 fraction = _mm512_reduce_ps(x, 0x9);  // x - floor(x)
  __m512 p = _mm512_fmadd_ps(fraction, _mm512_set1_ps(0.0780245226f), _mm512_set1_ps(0.226067155f));
  p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(0.69583354f));
  p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(0.999925219f));
  return _mm512_scalef_ps(p, x);  // p * 2^floor(x)
}

SLUICE_AMX_TARGET void LoadQueries(const RowMap& map, const HeadShape& shape, QueryTile& tile) {
  const int width = 16 * tile.vectors;
  for (int first = 0; first < width; first += 16) {
    const BFloat16* row[16];
    RowCursor at(map, tile.first_row + first);
    for (int i = 0; i < 16; ++i) {
      row[i] = map.q + at.position() * map.q_stride + at.head() * shape.dim;
      // The last row stands in for those that are not there.
      if (first + i < tile.rows - 1) at.Next();
    }
    for (int64_t d = 0; d < shape.depth; d += 32) {
      const __mmask32 mask = FirstWords(shape.dim - d);
      __m512i part[16];
      for (int i = 0; i < 16; ++i) part[i] = _mm512_maskz_loadu_epi16(mask, row[i] + d);
      Transpose16(part);
      uint32_t* to = tile.q + d / 2 * width + first;
      for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * width, part[i]);
    }
  }
}

// Writes O / sum, rounded to bf16.
SLUICE_AMX_TARGET void StoreOutputs(const RowMap& map, const HeadShape& shape,
                                    const QueryTile& tile) {
  const int width = 16 * tile.vectors;
  for (int first = 0; first < tile.rows; first += 16) {
    const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_load_ps(tile.sum + first));
    BFloat16* row[16];
    const int rows = std::min(16, tile.rows - first);
    RowCursor at(map, tile.first_row + first);
    for (int i = 0; i < rows; ++i, at.Next()) {
      row[i] = map.out + at.position() * map.out_stride + at.head() * shape.dim;
    }
    for (int64_t d = 0; d < shape.rows; d += 32) {
      __m512i part[16];
      const int64_t pairs = std::min<int64_t>(16, (shape.rows - d) / 2);
      const float* o = tile.o + d * width + first;
      for (int64_t i = 0; i < 16; ++i) {
        part[i] = i >= pairs
                      ? _mm512_setzero_si512()
                      : PackPairs(_mm512_mul_ps(_mm512_load_ps(o + 2 * i * width), inverse),
                                  _mm512_mul_ps(_mm512_load_ps(o + (2 * i + 1) * width), inverse));
      }
      Transpose16(part);
      const __mmask32 mask = FirstWords(shape.dim - d);
      for (int i = 0; i < rows; ++i) _mm512_mask_storeu_epi16(row[i] + d, mask, part[i]);
    }
  }
}

// `count` rows of D keys become 64 rows of `depth`, zeros around them.
SLUICE_AMX_TARGET void PackKeys(const BFloat16* k, int64_t stride, int64_t count,
                                const HeadShape& shape, BFloat16* to) {
  for (int64_t t = 0; t < kKvBlockTokens; ++t) {
    for (int64_t d = 0; d < shape.depth; d += 32) {
      const __mmask32 mask = t < count ? FirstWords(shape.dim - d) : 0;
      _mm512_store_si512(to + t * shape.depth + d,
                         _mm512_maskz_loadu_epi16(mask, k + t * stride + d));
    }
  }
}

SLUICE_AMX_INLINE __m512i WidenWords(__mmask16 mask, const BFloat16* from) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
}

// `count` rows of D values become V^T [rows, 64], zeros around them.
SLUICE_AMX_TARGET void PackValues(const BFloat16* v, int64_t stride, int64_t count,
                                  const HeadShape& shape, BFloat16* to) {
  for (int64_t t = 0; t < kKvBlockTokens; t += 32) {
    for (int64_t d = 0; d < shape.rows; d += 16) {
      const __mmask16 mask =
          static_cast<__mmask16>(FirstWords(std::min<int64_t>(16, shape.dim - d)));
      __m512i part[16];  // part[i]: pairs of keys (t + 2i, t + 2i + 1)
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t even = t + 2 * i;
        const __m512i low = WidenWords(even < count ? mask : 0, v + even * stride + d);
        const __m512i high = WidenWords(even + 1 < count ? mask : 0, v + (even + 1) * stride + d);
        part[i] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
      }
      Transpose16(part);
      for (int64_t i = 0; i < 16; ++i) {
        _mm512_store_si512(to + (d + i) * kKvBlockTokens + t, part[i]);
      }
    }
  }
}

// A block of the cache as it is, but padded: needed when D does not fill tiles, and for the last
// block, whose values beyond `count` keys may be NaN.
SLUICE_AMX_TARGET BlockRef PackCacheBlock(const BFloat16* k, const BFloat16* v, int64_t count,
                                          const HeadShape& shape, BFloat16* to) {
  BFloat16* packed_v = to + kKvBlockTokens * shape.depth;
  PackKeys(k, shape.dim, count, shape, to);
  for (int64_t d = 0; d < shape.rows; ++d) {
    for (int64_t t = 0; t < kKvBlockTokens; t += 32) {
      const __mmask32 mask = d < shape.dim ? FirstWords(count - t) : 0;
      _mm512_store_si512(packed_v + d * kKvBlockTokens + t,
                         _mm512_maskz_loadu_epi16(mask, v + d * kKvBlockTokens + t));
    }
  }
  return {to, packed_v};
}

// S^T of `keys` keys (rounded up to 32) of one block.
template <int kVectors>
SLUICE_AMX_INLINE void Scores(const QueryTile& tile, const BFloat16* k, int64_t k_stride,
                              int64_t depth, int64_t keys, float* s) {
  constexpr int kWidth = 16 * kVectors;
  constexpr int64_t kRowBytes = kWidth * 4;
  const int64_t stride = k_stride * 2;
  for (int64_t t = 0; t < keys; t += 32, s += 32 * kWidth) {
    TileZero<0>();
    TileZero<1>();
    if constexpr (kVectors == 2) {
      TileZero<2>();
      TileZero<3>();
    }
    const BFloat16* a = k + t * k_stride;
    const uint32_t* b = tile.q;
    for (int64_t d = 0; d < depth; d += 32, a += 32, b += 16 * kWidth) {
      TileLoad<4>(a, stride);
      TileLoad<6>(b, kRowBytes);
      TileMultiply<0, 4, 6>();
      TileLoad<5>(a + 16 * k_stride, stride);
      TileMultiply<1, 5, 6>();
      if constexpr (kVectors == 2) {
        TileLoad<7>(b + 16, kRowBytes);
        TileMultiply<2, 4, 7>();
        TileMultiply<3, 5, 7>();
      }
    }
    TileStore<0>(s, kRowBytes);
    TileStore<1>(s + 16 * kWidth, kRowBytes);
    if constexpr (kVectors == 2) {
      TileStore<2>(s + 16, kRowBytes);
      TileStore<3>(s + 16 * kWidth + 16, kRowBytes);
    }
  }
}

// O^T += V^T P^T over `keys` keys (rounded up to 32) in consecutive blocks; O^T = when `first`.
template <int kVectors>
SLUICE_AMX_INLINE void Accumulate(const uint32_t* p, const BlockRef* blocks, int64_t keys,
                                  int64_t rows, bool first, float* o) {
  constexpr int kWidth = 16 * kVectors;
  constexpr int64_t kRowBytes = kWidth * 4, kStride = kKvBlockTokens * 2;
  for (int64_t d = 0; d < rows; d += 32, o += 32 * kWidth) {
    const bool pair = d + 16 < rows;
    if (first) {
      TileZero<0>();
      TileZero<1>();
      TileZero<2>();
      TileZero<3>();
    } else {
      TileLoad<0>(o, kRowBytes);
      if (kVectors == 2) TileLoad<2>(o + 16, kRowBytes);
      if (pair) TileLoad<1>(o + 16 * kWidth, kRowBytes);
      if (pair && kVectors == 2) TileLoad<3>(o + 16 * kWidth + 16, kRowBytes);
    }
    for (int64_t t = 0; t < keys; t += 32) {
      const BFloat16* a = blocks[t / kKvBlockTokens].v + d * kKvBlockTokens + t % kKvBlockTokens;
      const uint32_t* b = p + t / 2 * kWidth;
      TileLoad<4>(a, kStride);
      TileLoad<6>(b, kRowBytes);
      TileMultiply<0, 4, 6>();
      if (kVectors == 2) {
        TileLoad<7>(b + 16, kRowBytes);
        TileMultiply<2, 4, 7>();
      }
      if (pair) {
        TileLoad<5>(a + 16 * kKvBlockTokens, kStride);
        TileMultiply<1, 5, 6>();
        if (kVectors == 2) TileMultiply<3, 5, 7>();
      }
    }
    TileStore<0>(o, kRowBytes);
    if (kVectors == 2) TileStore<2>(o + 16, kRowBytes);
    if (pair) TileStore<1>(o + 16 * kWidth, kRowBytes);
    if (pair && kVectors == 2) TileStore<3>(o + 16 * kWidth + 16, kRowBytes);
  }
}

// Which of 16 queries see `key`.
SLUICE_AMX_INLINE __mmask16 Sees(__m512i visible, int64_t key) {
  return _mm512_cmplt_epi32_mask(_mm512_set1_epi32(static_cast<int>(key)), visible);
}

// Turns scores of keys [first_key, first_key + keys) into packed probabilities, keeping max and sum
// and rescaling O when the maximum has grown. `next`: the block behind these keys, or null.
template <int kVectors, bool kMasked>
SLUICE_AMX_INLINE void Softmax(QueryTile& tile, const float* s, int64_t first_key, int64_t keys,
                               int64_t rows, float scale, const BlockRef& next, uint32_t* p) {
  constexpr int kWidth = 16 * kVectors;
  const __m512 c = _mm512_set1_ps(scale * kLog2e);
  __m512i visible[kVectors];
  __m512 largest[kVectors][2];
  for (int v = 0; v < kVectors; ++v) {
    visible[v] = _mm512_load_si512(tile.visible + 16 * v);
    largest[v][0] = largest[v][1] = _mm512_set1_ps(kNothing);
  }
  for (int64_t t = 0; t < keys; t += 2) {
    for (int v = 0; v < kVectors; ++v) {
      for (int odd = 0; odd < 2; ++odd) {
        const __m512 x = _mm512_load_ps(s + (t + odd) * kWidth + 16 * v);
        __m512& y = largest[v][odd];
        y = kMasked ? _mm512_mask_max_ps(y, Sees(visible[v], first_key + t + odd), y, x)
                    : _mm512_max_ps(y, x);
      }
    }
  }

  __m512 max[kVectors], sum[kVectors];
  bool grown = false;
  for (int v = 0; v < kVectors; ++v) {
    max[v] = _mm512_load_ps(tile.max + 16 * v);
    sum[v] = _mm512_load_ps(tile.sum + 16 * v);
    largest[v][0] = _mm512_mul_ps(_mm512_max_ps(largest[v][0], largest[v][1]), c);
    grown |= _mm512_cmp_ps_mask(largest[v][0], _mm512_add_ps(max[v], _mm512_set1_ps(kSlack)),
                                _CMP_GT_OQ) != 0;
  }
  if (grown) {
    for (int v = 0; v < kVectors; ++v) {
      const __m512 before = max[v];
      max[v] = _mm512_max_ps(max[v], largest[v][0]);
      _mm512_store_ps(tile.max + 16 * v, max[v]);
      const __m512 factor = Exp2(_mm512_sub_ps(before, max[v]));
      sum[v] = _mm512_mul_ps(sum[v], factor);
      if (!tile.started) continue;
      for (int64_t d = 0; d < rows; ++d) {
        float* o = tile.o + d * kWidth + 16 * v;
        _mm512_store_ps(o, _mm512_mul_ps(_mm512_load_ps(o), factor));
      }
    }
  }

  for (int64_t t = 0; t < keys; t += 2) {
    if (kVectors == 1 && next.k) {
      // A decoded token waits for memory, and hardware prefetch stops at every 4 KB: the block that
      // comes next is asked for meanwhile, all of its lines spread over the pairs of 64 keys. Read
      // on one core from memory: 12.4 instead of 10 GB/s.
      for (int64_t d = 0; d < rows; d += 16) {
        _mm_prefetch(next.k + (t / 2 * rows + d) * 2, _MM_HINT_T1);
        _mm_prefetch(next.v + (t / 2 * rows + d) * 2, _MM_HINT_T1);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const float* from = s + t * kWidth + 16 * v;
      __m512 even = Exp2(_mm512_fmsub_ps(_mm512_load_ps(from), c, max[v]));
      __m512 odd = Exp2(_mm512_fmsub_ps(_mm512_load_ps(from + kWidth), c, max[v]));
      if (kMasked) {
        even = _mm512_maskz_mov_ps(Sees(visible[v], first_key + t), even);
        odd = _mm512_maskz_mov_ps(Sees(visible[v], first_key + t + 1), odd);
      }
      sum[v] = _mm512_add_ps(sum[v], _mm512_add_ps(even, odd));
      _mm512_store_si512(p + t / 2 * kWidth + 16 * v, PackPairs(even, odd));
    }
  }
  for (int64_t t = RoundUp(keys, 2); t < RoundUp(keys, 32); t += 2) {
    for (int v = 0; v < kVectors; ++v) {
      _mm512_store_si512(p + t / 2 * kWidth + 16 * v, _mm512_setzero_si512());
    }
  }
  for (int v = 0; v < kVectors; ++v) _mm512_store_ps(tile.sum + 16 * v, sum[v]);
}

// Scores are scaled later.
template <int kVectors>
SLUICE_AMX_INLINE void AddBias(const float* bias, int64_t keys, float factor, float* s) {
  for (int64_t t = 0; t < keys; ++t, s += 16 * kVectors) {
    const __m512 more = _mm512_set1_ps(bias[t] * factor);
    for (int v = 0; v < kVectors; ++v) {
      _mm512_store_ps(s + 16 * v, _mm512_add_ps(_mm512_load_ps(s + 16 * v), more));
    }
  }
}

// Takes one tile over keys [begin, end), which start with blocks[0].
template <int kVectors>
SLUICE_AMX_TARGET void AttendRows(QueryTile& tile, const BlockRef* blocks, int64_t k_stride,
                                  int64_t begin, int64_t end, const HeadShape& shape, float scale,
                                  float* s, uint32_t* p) {
  for (int64_t first = begin, keys = 0; first < end; first += keys) {
    keys = end - first <= kMostChunkKeys ? end - first : kChunkKeys;
    const BlockRef* chunk = blocks + (first - begin) / kKvBlockTokens;
    for (int64_t t = 0; t < keys; t += kKvBlockTokens) {
      Scores<kVectors>(tile, chunk[t / kKvBlockTokens].k, k_stride, shape.depth,
                       std::min<int64_t>(kKvBlockTokens, keys - t), s + t * 16 * kVectors);
    }
    if (tile.key_bias) AddBias<kVectors>(tile.key_bias + first, keys, 1 / scale, s);
    BlockRef next = {nullptr, nullptr};
    if (first + keys < end) next = chunk[1];
    if (first + keys <= tile.min_visible && keys % 2 == 0) {
      Softmax<kVectors, false>(tile, s, first, keys, shape.rows, scale, next, p);
    } else {
      Softmax<kVectors, true>(tile, s, first, keys, shape.rows, scale, next, p);
    }
    Accumulate<kVectors>(p, chunk, keys, shape.rows, !tile.started, tile.o);
    tile.started = true;
  }
}

// What one thread works in.
struct Scratch {
  float* scores;       // [kMostChunkKeys, kTileQueries]
  uint32_t* probs;     // [kMostChunkKeys / 2, kTileQueries]
  BFloat16* packed;    // blocks of shape.PackedElements()
  QueryTile* tiles;    // a group of query tiles
  float* tile_floats;  // [group, QueryTile::Floats()]
  int64_t group;

  static int64_t Group(const HeadShape& shape, int64_t tiles) {
    const int64_t bytes = QueryTile::Floats(shape) * sizeof(float);
    return std::clamp<int64_t>(kGroupBytes / bytes, 1, tiles);
  }
  static int64_t Bytes(const HeadShape& shape, int64_t group, int64_t packed_blocks) {
    return kMostChunkKeys * kTileQueries * 6 + packed_blocks * shape.PackedElements() * 2 +
           group * QueryTile::Floats(shape) * 4 + RoundUp(group * sizeof(QueryTile), 64);
  }
  Scratch(TensorView memory, int64_t thread, const HeadShape& shape, int64_t group,
          int64_t packed_blocks)
      : group(group) {
    uint8_t* at = memory.data<uint8_t>() + thread * memory.stride0();
    scores = reinterpret_cast<float*>(at);
    probs = reinterpret_cast<uint32_t*>(scores + kMostChunkKeys * kTileQueries);
    packed = reinterpret_cast<BFloat16*>(probs + kMostChunkKeys / 2 * kTileQueries);
    tile_floats = reinterpret_cast<float*>(packed + packed_blocks * shape.PackedElements());
    tiles = reinterpret_cast<QueryTile*>(tile_floats + group * QueryTile::Floats(shape));
  }
};

SLUICE_AMX_TARGET void Attend(QueryTile& tile, const BlockRef* blocks, int64_t k_stride,
                              int64_t begin, int64_t end, const HeadShape& shape, float scale,
                              const Scratch& scratch) {
  if (begin >= end) return;
  if (tile.vectors == 2) {
    AttendRows<2>(tile, blocks, k_stride, begin, end, shape, scale, scratch.scores, scratch.probs);
  } else {
    AttendRows<1>(tile, blocks, k_stride, begin, end, shape, scale, scratch.scores, scratch.probs);
  }
}

// Takes query tiles [first, last) over keys [key_begin, key_end), key_begin at the beginning of a
// block, and calls finish(tile) for each. visible(position): how many keys a query sees, growing
// with the position. block(i, slot): where block i is; it may be packed into scratch slot <
// kSpanBlocks.
template <typename Visible, typename Block, typename Finish>
void AttendGroups(const RowMap& map, const HeadShape& shape, int64_t first, int64_t last,
                  int64_t key_begin, int64_t key_end, int64_t k_stride, float scale,
                  const Scratch& scratch, const Visible& visible, const Block& block,
                  const Finish& finish) {
  for (; first < last; first += scratch.group) {
    const int64_t count = std::min(scratch.group, last - first);
    for (int64_t i = 0; i < count; ++i) {
      QueryTile& tile = scratch.tiles[i];
      tile.Place(scratch.tile_floats + i * QueryTile::Floats(shape), shape);
      tile.SetRows(first + i, map.count);
      tile.key_bias = map.key_bias;
      tile.started = false;
      RowCursor at(map, tile.first_row);
      for (int r = 0; r < 16 * tile.vectors; ++r) {
        tile.visible[r] = static_cast<int32_t>(visible(at.position()));
        tile.max[r] = kNothing;
        tile.sum[r] = 0;
        if (r < tile.rows - 1) at.Next();
      }
      tile.min_visible = tile.visible[0];
      tile.max_visible = tile.visible[tile.rows - 1];
      LoadQueries(map, shape, tile);
    }
    const int64_t end = std::min(key_end, scratch.tiles[count - 1].max_visible);
    for (int64_t begin = key_begin; begin < end; begin += kSpanBlocks * kKvBlockTokens) {
      const int64_t span_end = std::min<int64_t>(end, begin + kSpanBlocks * kKvBlockTokens);
      BlockRef blocks[kSpanBlocks];
      for (int64_t i = 0; begin + i * kKvBlockTokens < span_end; ++i) {
        blocks[i] = block(begin / kKvBlockTokens + i, i);
      }
      for (int64_t i = 0; i < count; ++i) {
        QueryTile& tile = scratch.tiles[i];
        Attend(tile, blocks, k_stride, begin, std::min(span_end, tile.max_visible), shape, scale,
               scratch);
      }
    }
    for (int64_t i = 0; i < count; ++i) finish(scratch.tiles[i]);
  }
}

// Adds up what the ranges of keys gave: partial[s] = O [rows, width] | max [32] | sum [32].
SLUICE_AMX_TARGET void Combine(const float* partial, int64_t stride, int64_t ranges,
                               const HeadShape& shape, QueryTile& tile) {
  const int width = 16 * tile.vectors;
  for (int first = 0; first < width; first += 16) {
    const float* stats = partial + kTileQueries * shape.rows + first;
    __m512 max = _mm512_set1_ps(kNothing), sum = _mm512_setzero_ps();
    for (int64_t s = 0; s < ranges; ++s) {
      max = _mm512_max_ps(max, _mm512_load_ps(stats + s * stride));
    }
    for (int64_t d = 0; d < shape.rows; ++d) {
      _mm512_store_ps(tile.o + d * width + first, _mm512_setzero_ps());
    }
    for (int64_t s = 0; s < ranges; ++s) {
      const __m512 weight = Exp2(_mm512_sub_ps(_mm512_load_ps(stats + s * stride), max));
      sum = _mm512_fmadd_ps(_mm512_load_ps(stats + s * stride + kTileQueries), weight, sum);
      const float* from = partial + s * stride + first;
      for (int64_t d = 0; d < shape.rows; ++d) {
        float* o = tile.o + d * width + first;
        _mm512_store_ps(
            o, _mm512_fmadd_ps(_mm512_load_ps(from + d * width), weight, _mm512_load_ps(o)));
      }
    }
    _mm512_store_ps(tile.sum + first, sum);
  }
}

}  // namespace

void EncoderAttentionAmx(ExecContext& ctx, ConstTensorView q, ConstTensorView k, ConstTensorView v,
                         int64_t batch, int heads, int head_dim, float scale, TensorView out,
                         ConstTensorView key_bias) {
  const HeadShape shape(head_dim);
  const int64_t queries = q.dim(0) / batch, keys = k.dim(0) / batch;
  const int64_t num_blocks = (keys + kKvBlockTokens - 1) / kKvBlockTokens;
  const int64_t tiles = (queries + kTileQueries - 1) / kTileQueries;
  const int64_t group = Scratch::Group(shape, tiles);
  const int64_t threads = ctx.num_threads(), units = batch * heads * tiles;

  Workspace::Scope scope(ctx.workspace());
  const TensorView memory =
      ctx.workspace().Allocate(DType::kU8, {threads, Scratch::Bytes(shape, group, num_blocks)});
  ParallelFor(ctx, threads, 1, [&](int64_t thread, int64_t last_thread) {
    const AmxTiles use_tiles;
    const Scratch scratch(memory, thread, shape, group, num_blocks);
    const int64_t end = units * last_thread / threads;
    for (int64_t unit = units * thread / threads; unit < end;) {
      const int64_t item = unit / tiles, frame = item / heads, head = item % heads;
      const int64_t last = std::min(end, (item + 1) * tiles);
      const int64_t column = head * head_dim;
      for (int64_t b = 0; b < num_blocks; ++b) {
        const int64_t row = frame * keys + b * kKvBlockTokens;
        const int64_t count = std::min<int64_t>(kKvBlockTokens, keys - b * kKvBlockTokens);
        BFloat16* to = scratch.packed + b * shape.PackedElements();
        PackKeys(k.data<BFloat16>() + row * k.stride0() + column, k.stride0(), count, shape, to);
        PackValues(v.data<BFloat16>() + row * v.stride0() + column, v.stride0(), count, shape,
                   to + kKvBlockTokens * shape.depth);
      }
      const RowMap map = {q.data<BFloat16>() + frame * queries * q.stride0() + column,
                          q.stride0(),
                          out.data<BFloat16>() + frame * queries * out.stride0() + column,
                          out.stride0(),
                          1,
                          queries,
                          key_bias.empty() ? nullptr : key_bias.data<float>() + frame * keys};
      AttendGroups(
          map, shape, unit - item * tiles, last - item * tiles, 0, keys, shape.depth, scale,
          scratch, [&](int64_t) { return keys; },
          [&](int64_t b, int64_t) {
            const BFloat16* packed = scratch.packed + b * shape.PackedElements();
            return BlockRef{packed, packed + kKvBlockTokens * shape.depth};
          },
          [&](const QueryTile& tile) { StoreOutputs(map, shape, tile); });
      unit = last;
    }
  });
}

void CausalAttentionAmx(ExecContext& ctx, ConstTensorView q, int64_t begin, int heads, float scale,
                        const KvLayerView& kv, TensorView out) {
  const HeadShape shape(kv.head_dim);
  const int64_t threads = ctx.num_threads(), area = int64_t{kKvBlockTokens} * kv.head_dim;
  const CausalPlan plan(begin, q.dim(0), heads, kv.kv_heads, kTileQueries, ctx.num_threads());
  const int64_t group = Scratch::Group(shape, plan.tiles);
  const bool padded = shape.depth != kv.head_dim;
  const int64_t packed_blocks = padded ? kSpanBlocks : 1;
  const int64_t partial_floats = kTileQueries * (shape.rows + 2);
  const auto map_of = [&](int64_t kv_head) {
    const int64_t column = kv_head * plan.heads_per_kv * kv.head_dim;
    return RowMap{q.data<BFloat16>() + column,  q.stride0(),       out.data<BFloat16>() + column,
                  int64_t{heads} * kv.head_dim, plan.heads_per_kv, plan.rows};
  };

  Workspace::Scope scope(ctx.workspace());
  const TensorView memory =
      ctx.workspace().Allocate(DType::kU8, {threads, Scratch::Bytes(shape, group, packed_blocks)});
  // [kv head, tile, range] of O [rows, width] | max [32] | sum [32].
  float* partials = nullptr;
  if (plan.ranges > 1) {
    partials = ctx.workspace().Allocate(DType::kF32, {plan.units, partial_floats}).data<float>();
  }
  ParallelFor(ctx, threads, 1, [&](int64_t thread, int64_t last_thread) {
    const AmxTiles use_tiles;
    const Scratch scratch(memory, thread, shape, group, packed_blocks);
    const int64_t end = plan.FirstUnit(last_thread);
    for (int64_t index = plan.FirstUnit(thread); index < end;) {
      const CausalPlan::Unit unit = plan.At(index);
      const int64_t last = std::min(plan.tiles, unit.tile + end - index);
      const RowMap map = map_of(unit.kv_head);
      AttendGroups(
          map, shape, unit.tile, last, plan.RangeBegin(unit.range), plan.RangeBegin(unit.range + 1),
          shape.depth, scale, scratch, [&](int64_t position) { return begin + position + 1; },
          [&](int64_t b, int64_t slot) {
            const BFloat16* k = static_cast<const BFloat16*>(kv.blocks[b]) + unit.kv_head * area;
            const BFloat16* v = k + kv.kv_heads * area;
            const int64_t count = std::min<int64_t>(kKvBlockTokens, plan.keys - b * kKvBlockTokens);
            if (!padded && count == kKvBlockTokens) return BlockRef{k, v};
            return PackCacheBlock(k, v, count, shape,
                                  scratch.packed + (padded ? slot : 0) * shape.PackedElements());
          },
          [&](const QueryTile& tile) {
            if (partials == nullptr) return StoreOutputs(map, shape, tile);
            const int64_t place =
                (unit.kv_head * plan.tiles + tile.first_row / kTileQueries) * plan.ranges +
                unit.range;
            float* to = partials + place * partial_floats;
            const int64_t width = 16 * tile.vectors;
            if (tile.started) {
              std::copy_n(tile.o, width * shape.rows, to);
            } else {
              std::fill_n(to, width * shape.rows, 0.0f);
            }
            std::copy_n(tile.max, width, to + kTileQueries * shape.rows);
            std::copy_n(tile.sum, width, to + kTileQueries * (shape.rows + 1));
          });
      index += last - unit.tile;
    }
  });
  if (partials == nullptr) return;
  const int64_t all_tiles = kv.kv_heads * plan.tiles;
  ParallelFor(ctx, threads, 1, [&](int64_t thread, int64_t last_thread) {
    const Scratch scratch(memory, thread, shape, group, packed_blocks);
    QueryTile& tile = scratch.tiles[0];
    tile.Place(scratch.tile_floats, shape);
    const int64_t end = all_tiles * last_thread / threads;
    for (int64_t i = all_tiles * thread / threads; i < end; ++i) {
      tile.SetRows(i % plan.tiles, plan.rows);
      Combine(partials + i * plan.ranges * partial_floats, partial_floats, plan.ranges, shape,
              tile);
      StoreOutputs(map_of(i / plan.tiles), shape, tile);
    }
  });
}

}  // namespace sluice::cpu

#else  // !__x86_64__

#include "runtime/error.h"

namespace sluice::cpu {

// Never chosen: AmxAllowed() is false here.
void EncoderAttentionAmx(ExecContext&, ConstTensorView, ConstTensorView, ConstTensorView, int64_t,
                         int, int, float, TensorView, ConstTensorView) {
  throw Error("[encoder_attention] the AMX kernel needs x86-64");
}
void CausalAttentionAmx(ExecContext&, ConstTensorView, int64_t, int, float, const KvLayerView&,
                        TensorView) {
  throw Error("[causal_attention] the AMX kernel needs x86-64");
}

}  // namespace sluice::cpu

#endif  // __x86_64__
