// Attention in f32 arithmetic on whatever vectors the machine has; bf16 inputs are widened once.
//
//   S^T[t, :] = sum over d of K[t, d] Q^T[d, :]       a key's element is broadcast, queries fill
//   O^T[d, :] += sum over t of V[t, d] P^T[t, :]      the lanes
//
// Both products are the same loop over a broadcast operand with two strides, so keys and values are
// read as they lie in the cache, for any D. The softmax over keys runs down the rows of S^T without
// horizontal steps. Scores live for kChunkKeys keys at a time; maxima and sums follow Milakov and
// Gimelshein 2018. Keys pass in spans of kSpanBlocks blocks under a group of query tiles that stays
// in the second-level cache, so that a long cache is read from memory once per group.
//
// SageAttention2 (arXiv 2411.10958; runtime/ops/cpu/attention_sage.h has the reference) differs in
// the first product alone:
//
//   S^T[t, :] = k_scale[t] q_scale[:] sum over quads of channels of K8[t] Q8^T
//
// four products of 8 bits a lane and instruction instead of one of f32. Every query and every key
// has a scale of its own, which costs two multiplications a score and needs no neighbours: a key is
// quantised when it is read, and the cache stays as it is.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "runtime/cpu_info.h"
#include "runtime/ops/cpu/attention.h"
#include "runtime/ops/cpu/attention_plan.h"
#include "runtime/ops/cpu/attention_sage.h"
#include "runtime/parallel.h"

// The kernels keep arrays of vectors in registers, which types of unknown size do not allow.
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "runtime/ops/cpu/attention_simd.cc"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include "runtime/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace sluice::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using sluice::HWY_NAMESPACE::DF;
using sluice::HWY_NAMESPACE::LoadFloats;
using sluice::HWY_NAMESPACE::StoreFloats;
using sluice::HWY_NAMESPACE::VF;

constexpr int kLanes = hn::MaxLanes(DF());
constexpr int kTileRows = 2 * kLanes;
// Rows of the broadcast operand taken together: as many sums as registers hold, and enough of them
// to cover the latency of an addition.
constexpr int kRegisterRows = kLanes >= 16 ? 8 : 4;
constexpr int kChunkKeys = 128;
constexpr int kSpanBlocks = 8;
constexpr int64_t kGroupBytes = 512 << 10;
constexpr float kLog2e = 1.44269504f;
// How far (in powers of two) scores may grow beyond the maximum in use before sums are rescaled.
constexpr float kSlack = 8.0f;
constexpr float kNothing = -1e30f;

// Keys and values of one head and block in f32: K[t, d] = k[t * D + d],
// V[t, d] = v[t * v_key + d * v_dim].
struct Block {
  const float* k;
  const float* v;
};

// The same with quantised keys; the rest of V as above.
struct SageBlock {
  const int32_t* k;        // [kKvBlockTokens, Quads(D)] words of four channels in int8
  const float* scales;     // of each key
  const int32_t* offsets;  // -128 times the sum of a key's channels: queries are stored 128 higher
  const float* v;
};

// Words of four channels that D of them take.
constexpr int64_t Quads(int64_t head_dim) { return CeilDiv(head_dim, 4); }

struct Values {
  int64_t v_key, v_dim;
};

// Where rows of queries and outputs are; see CausalPlan.
template <typename T>
struct RowMap {
  const T* q;
  int64_t q_stride;
  T* out;
  int64_t out_stride;
  int heads;
  int64_t count;
  const float* key_bias = nullptr;  // of the first key, or null
};

// Up to kTileRows queries on their way through the keys. The rows of the arrays are
// `width` = kLanes * vectors long.
struct QueryTile {
  float* q;        // [D, width], or quantised: [Quads(D), width] words of four channels in u8
  float* o;        // [D, width]
  float* max;      // [width] scores * scale * log2(e)
  float* sum;      // [width] of probabilities
  float* visible;  // [width] keys [0, visible) count; exact, positions are below 2^24
  float* scale;    // [width] of quantised queries
  const float* key_bias;
  int64_t first_row;
  int rows, vectors;
  bool started;
  int64_t min_visible, max_visible;

  static int64_t Floats(int64_t head_dim) { return kTileRows * (2 * head_dim + 4); }
  int width() const { return kLanes * vectors; }
  void Place(float* memory, int64_t head_dim) {
    q = memory;
    o = q + kTileRows * head_dim;
    max = o + kTileRows * head_dim;
    sum = max + kTileRows;
    visible = sum + kTileRows;
    scale = visible + kTileRows;
  }
  void SetRows(int64_t index, int64_t all_rows) {
    first_row = index * kTileRows;
    rows = static_cast<int>(std::min<int64_t>(kTileRows, all_rows - first_row));
    vectors = rows > kLanes ? 2 : 1;
  }
};

// 2^x for x <= 127, relative error 1e-7; below 2^-126 the result stays there, which is nothing.
HWY_INLINE VF Exp2(VF x) {
  const DF d;
  x = hn::Max(x, hn::Set(d, -126.0f));
  const VF whole = hn::Round(x);
  const VF f = hn::Sub(x, whole);
  VF p = hn::MulAdd(f, hn::Set(d, 1.5345811e-4f), hn::Set(d, 1.33999312e-3f));
  p = hn::MulAdd(p, f, hn::Set(d, 9.61848896e-3f));
  p = hn::MulAdd(p, f, hn::Set(d, 5.55032878e-2f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.240226469f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.693147206f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0f));
  const hn::RebindToSigned<DF> di;
  const auto exponent = hn::ShiftLeft<23>(hn::ConvertTo(di, whole));
  return hn::BitCast(d, hn::Add(hn::BitCast(di, p), exponent));
}

// c[i, :] (+)= sum over j < count of a[i * a_row + j * a_step] * b[j, :] for kRows rows of c.
// The rows of b and c are kVectors vectors long.
// With kAhead, kRows elements of `ahead` are prefetched with every j.
template <int kRows, int kVectors, bool kAhead>
HWY_INLINE void MultiplyRows(const float* HWY_RESTRICT a, int64_t a_row, int64_t a_step,
                             const float* HWY_RESTRICT b, int64_t count, bool add,
                             float* HWY_RESTRICT c, const float* ahead) {
  const DF d;
  VF acc[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      acc[i][v] = add ? hn::Load(d, c + (i * kVectors + v) * kLanes) : hn::Zero(d);
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    if (kAhead && j * kRows % 16 == 0) hwy::Prefetch(ahead + j * kRows);
    VF row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = hn::Load(d, b + (j * kVectors + v) * kLanes);
    for (int i = 0; i < kRows; ++i) {
      const VF x = hn::Set(d, a[i * a_row + j * a_step]);
      for (int v = 0; v < kVectors; ++v) acc[i][v] = hn::MulAdd(x, row[v], acc[i][v]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) hn::Store(acc[i][v], d, c + (i * kVectors + v) * kLanes);
  }
}

// `ahead`: rows that will be read next, to be prefetched, as many as those of a; or null.
template <int kVectors>
void Multiply(const float* a, int64_t rows, int64_t a_row, int64_t a_step, const float* b,
              int64_t count, bool add, float* c, const float* ahead) {
  constexpr int kWidth = kVectors * kLanes;
  int64_t i = 0;
  for (; i + kRegisterRows <= rows; i += kRegisterRows) {
    const float* part = a + i * a_row;
    if (ahead) {
      MultiplyRows<kRegisterRows, kVectors, true>(part, a_row, a_step, b, count, add,
                                                  c + i * kWidth, ahead + i * a_row);
    } else {
      MultiplyRows<kRegisterRows, kVectors, false>(part, a_row, a_step, b, count, add,
                                                   c + i * kWidth, nullptr);
    }
  }
  for (; i < rows; ++i) {
    MultiplyRows<1, kVectors, false>(a + i * a_row, a_row, a_step, b, count, add, c + i * kWidth,
                                     nullptr);
  }
}

using DI = hn::RebindToSigned<DF>;
using VI = hn::Vec<DI>;

// Whether this instruction set, on this machine, has the int8 products of Dot.
bool HasInt8Dot() {
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
  static const bool has = CpuInfo::Detect().avx512_vnni;
#elif HWY_TARGET == HWY_AVX2
  static const bool has = CpuInfo::Detect().avx_vnni;
#else
  constexpr bool has = false;
#endif
  return has;
}

// acc + the sum of four products of a lane: its bytes of q, unsigned, with those of the word,
// signed. Highway has no such operation, and the functions of this file are compiled for sets
// without the instruction, hence the assembly. Without it: right, not fast.
template <bool kInt8Dot>
HWY_INLINE VI Dot(VI acc, VI q, const int32_t* word) {
  const DI d;
  if constexpr (kInt8Dot) {
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc.raw) : "v"(q.raw), "m"(*word));
#elif HWY_TARGET == HWY_AVX2
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc.raw) : "x"(q.raw), "x"(hn::Set(d, *word).raw));
#endif
    return acc;
  }
  int8_t k[4];
  std::memcpy(k, word, sizeof(k));
  const VI byte = hn::Set(d, 255);
  acc = hn::Add(acc, hn::Mul(hn::And(q, byte), hn::Set(d, k[0])));
  acc = hn::Add(acc, hn::Mul(hn::And(hn::ShiftRight<8>(q), byte), hn::Set(d, k[1])));
  acc = hn::Add(acc, hn::Mul(hn::And(hn::ShiftRight<16>(q), byte), hn::Set(d, k[2])));
  return hn::Add(acc, hn::Mul(hn::And(hn::ShiftRight<24>(q), byte), hn::Set(d, k[3])));
}

// Scores of kRows keys, the first of them `first` of its block.
template <int kRows, int kVectors, bool kInt8Dot>
HWY_INLINE void ScoreRows(const QueryTile& tile, const SageBlock& block, int64_t first,
                          int64_t quads, float* HWY_RESTRICT s) {
  const DF d;
  const DI di;
  const int32_t* k = block.k + first * quads;
  const auto* q = reinterpret_cast<const int32_t*>(tile.q);
  VI acc[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) acc[i][v] = hn::Set(di, block.offsets[first + i]);
  }
  for (int64_t j = 0; j < quads; ++j) {
    VI row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = hn::Load(di, q + (j * kVectors + v) * kLanes);
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        acc[i][v] = Dot<kInt8Dot>(acc[i][v], row[v], k + i * quads + j);
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    const VF scale = hn::Set(d, block.scales[first + i]);
    for (int v = 0; v < kVectors; ++v) {
      const VF factor = hn::Mul(scale, hn::Load(d, tile.scale + v * kLanes));
      hn::Store(hn::Mul(hn::ConvertTo(d, acc[i][v]), factor), d,
                s + ((first + i) * kVectors + v) * kLanes);
    }
  }
}

template <int kVectors, bool kInt8Dot>
void ScoreKeys(const QueryTile& tile, const SageBlock& block, int64_t keys, int64_t quads,
               float* s) {
  int64_t i = 0;
  for (; i + kRegisterRows <= keys; i += kRegisterRows) {
    ScoreRows<kRegisterRows, kVectors, kInt8Dot>(tile, block, i, quads, s);
  }
  for (; i < keys; ++i) ScoreRows<1, kVectors, kInt8Dot>(tile, block, i, quads, s);
}

// S^T of the first `keys` of a block; `prefetch`: its values, which are needed next.
template <int kVectors>
void Score(const QueryTile& tile, const Block& block, int64_t keys, int64_t head_dim, bool prefetch,
           float* s) {
  Multiply<kVectors>(block.k, keys, head_dim, 1, tile.q, head_dim, false, s,
                     prefetch ? block.v : nullptr);
}
template <int kVectors>
void Score(const QueryTile& tile, const SageBlock& block, int64_t keys, int64_t head_dim,
           bool /*prefetch*/, float* s) {
  if (HasInt8Dot()) {
    ScoreKeys<kVectors, true>(tile, block, keys, Quads(head_dim), s);
  } else {
    ScoreKeys<kVectors, false>(tile, block, keys, Quads(head_dim), s);
  }
}

// Turns scores of keys [first_key, first_key + keys) into probabilities in place, keeping maximum
// and sum and rescaling O when the maximum has grown.
template <int kVectors>
void Softmax(QueryTile& tile, float* s, int64_t first_key, int64_t keys, int64_t head_dim,
             float scale) {
  constexpr int kWidth = kVectors * kLanes;
  const DF d;
  const VF c = hn::Set(d, scale * kLog2e), nothing = hn::Set(d, kNothing);
  // Hidden scores become "nothing" first; what follows needs no mask.
  for (int64_t t = std::max<int64_t>(0, tile.min_visible - first_key); t < keys; ++t) {
    const VF key = hn::Set(d, static_cast<float>(first_key + t));
    for (int v = 0; v < kVectors; ++v) {
      float* x = s + t * kWidth + v * kLanes;
      const auto sees = hn::Lt(key, hn::Load(d, tile.visible + v * kLanes));
      hn::Store(hn::IfThenElse(sees, hn::Load(d, x), nothing), d, x);
    }
  }
  VF largest[kVectors], max[kVectors], sum[kVectors];
  for (int v = 0; v < kVectors; ++v) largest[v] = nothing;
  for (int64_t t = 0; t < keys; ++t) {
    for (int v = 0; v < kVectors; ++v) {
      largest[v] = hn::Max(largest[v], hn::Load(d, s + t * kWidth + v * kLanes));
    }
  }
  bool grown = false;
  for (int v = 0; v < kVectors; ++v) {
    max[v] = hn::Load(d, tile.max + v * kLanes);
    sum[v] = hn::Load(d, tile.sum + v * kLanes);
    largest[v] = hn::Mul(largest[v], c);
    grown |= !hn::AllFalse(d, hn::Gt(largest[v], hn::Add(max[v], hn::Set(d, kSlack))));
  }
  if (grown) {
    for (int v = 0; v < kVectors; ++v) {
      const VF before = max[v];
      max[v] = hn::Max(before, largest[v]);
      hn::Store(max[v], d, tile.max + v * kLanes);
      const VF factor = Exp2(hn::Sub(before, max[v]));
      sum[v] = hn::Mul(sum[v], factor);
      for (int64_t i = 0; tile.started && i < head_dim; ++i) {
        float* o = tile.o + i * kWidth + v * kLanes;
        hn::Store(hn::Mul(hn::Load(d, o), factor), d, o);
      }
    }
  }
  const VF hidden = hn::Set(d, 0.5f * kNothing);
  for (int64_t t = 0; t < keys; ++t) {
    for (int v = 0; v < kVectors; ++v) {
      float* x = s + t * kWidth + v * kLanes;
      const VF score = hn::Load(d, x);
      // A row that has seen no key yet has max = nothing * c; its hidden scores must stay 0.
      const VF p = hn::IfThenElseZero(hn::Gt(score, hidden), Exp2(hn::MulSub(score, c, max[v])));
      sum[v] = hn::Add(sum[v], p);
      hn::Store(p, d, x);
    }
  }
  for (int v = 0; v < kVectors; ++v) hn::Store(sum[v], d, tile.sum + v * kLanes);
}

// Scores are scaled later.
template <int kVectors>
void AddBias(const float* bias, int64_t keys, float factor, float* s) {
  const DF d;
  for (int64_t t = 0; t < keys; ++t, s += kVectors * kLanes) {
    const VF more = hn::Set(d, bias[t] * factor);
    for (int v = 0; v < kVectors; ++v) {
      hn::Store(hn::Add(hn::Load(d, s + v * kLanes), more), d, s + v * kLanes);
    }
  }
}

// Takes one tile over keys [begin, end), which start with blocks[0].
template <int kVectors, typename AnyBlock>
void AttendRows(QueryTile& tile, const AnyBlock* blocks, Values values, int64_t begin, int64_t end,
                int64_t head_dim, float scale, float* s) {
  constexpr bool kExact = std::is_same_v<AnyBlock, Block>;
  constexpr int kWidth = kVectors * kLanes;
  for (int64_t first = begin; first < end; first += kChunkKeys) {
    const int64_t keys = std::min<int64_t>(kChunkKeys, end - first);
    const AnyBlock* chunk = blocks + (first - begin) / kKvBlockTokens;
    // A decoded token waits for memory: what is read next is asked for one product before. Wider
    // tiles, and those of an encoder, find keys and values in the cache.
    const bool prefetch = kExact && kVectors == 1 && values.v_dim == kKvBlockTokens;
    for (int64_t t = 0; t < keys; t += kKvBlockTokens) {
      Score<kVectors>(tile, chunk[t / kKvBlockTokens], std::min<int64_t>(kKvBlockTokens, keys - t),
                      head_dim, prefetch, s + t * kWidth);
    }
    if (tile.key_bias) AddBias<kVectors>(tile.key_bias + first, keys, 1 / scale, s);
    Softmax<kVectors>(tile, s, first, keys, head_dim, scale);
    for (int64_t t = 0; t < keys; t += kKvBlockTokens) {
      const AnyBlock* block = chunk + t / kKvBlockTokens;
      const float* ahead = nullptr;
      if constexpr (kExact) {
        const bool more = first + t + kChunkKeys < end;
        if (prefetch && more) ahead = block[kChunkKeys / kKvBlockTokens].k;
      }
      Multiply<kVectors>(block->v, head_dim, values.v_dim, values.v_key, s + t * kWidth,
                         std::min<int64_t>(kKvBlockTokens, keys - t), tile.started, tile.o, ahead);
      tile.started = true;
    }
  }
}

// What one thread works in.
struct Scratch {
  float* scores;  // [kChunkKeys, kTileRows]
  float* rows;    // [kTileRows, D + 4] a tile of queries or outputs, row by row
  float* packed;  // blocks of PackedFloats(D)
  float* tile_floats;
  QueryTile* tiles;
  int64_t group;

  static int64_t Group(int64_t head_dim, int64_t tiles) {
    const int64_t bytes = QueryTile::Floats(head_dim) * sizeof(float);
    return std::clamp<int64_t>(kGroupBytes / bytes, 1, tiles);
  }
  static int64_t RowsFloats(int64_t head_dim) { return kTileRows * RoundUp(head_dim + 4, 16); }
  // Keys and values in f32, or quantised keys (and what their last vector writes behind them) with
  // their scales and offsets.
  static int64_t PackedFloats(int64_t head_dim) {
    return 2 * kKvBlockTokens * head_dim + 2 * kKvBlockTokens + 16;
  }
  static int64_t Bytes(int64_t head_dim, int64_t group, int64_t packed_blocks) {
    const int64_t floats = kChunkKeys * kTileRows + RowsFloats(head_dim) +
                           packed_blocks * PackedFloats(head_dim) +
                           group * QueryTile::Floats(head_dim);
    return floats * 4 + RoundUp(group * sizeof(QueryTile), 64);
  }
  Scratch(TensorView memory, int64_t thread, int64_t head_dim, int64_t group, int64_t packed_blocks)
      : group(group) {
    scores = reinterpret_cast<float*>(memory.data<uint8_t>() + thread * memory.stride0());
    rows = scores + kChunkKeys * kTileRows;
    packed = rows + RowsFloats(head_dim);
    tile_floats = packed + packed_blocks * PackedFloats(head_dim);
    tiles = reinterpret_cast<QueryTile*>(tile_floats + group * QueryTile::Floats(head_dim));
  }
};

template <typename T>
void WidenRow(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) StoreFloats(LoadFloats(from + i), to + i);
  if (i < count) {
    StoreFloats(sluice::HWY_NAMESPACE::LoadFloatsN(from + i, count - i), to + i);
  }
}

// A tile's queries in f32, row by row; the last one stands in for those that are not there.
template <typename T>
void GatherQueries(const RowMap<T>& map, int64_t head_dim, const QueryTile& tile, float* rows) {
  const int64_t stride = RoundUp(head_dim + 4, 16);
  for (int r = 0; r < tile.width(); ++r) {
    const int64_t row = tile.first_row + std::min(r, tile.rows - 1);
    const T* from = map.q + row / map.heads * map.q_stride + row % map.heads * head_dim;
    for (int64_t i = 0; i < head_dim; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        rows[r * stride + i] = from[i];
      } else {
        rows[r * stride + i] = from[i].ToFloat();
      }
    }
  }
}

// For rows of known slack: writes whole vectors.
template <typename T>
void LoadQueries(const RowMap<T>& map, int64_t head_dim, float* rows, QueryTile& tile) {
  const DF d;
  const int64_t stride = RoundUp(head_dim + 4, 16);
  const int width = tile.width();
  GatherQueries(map, head_dim, tile, rows);
  HWY_ALIGN float quads[4 * kLanes];
  for (int first = 0; first < width; first += kLanes) {
    for (int64_t i = 0; i < head_dim; i += 4) {
      for (int r = 0; r < kLanes; ++r) {
        std::copy_n(rows + (first + r) * stride + i, 4, quads + 4 * r);
      }
      VF part[4];
      hn::LoadInterleaved4(d, quads, part[0], part[1], part[2], part[3]);
      for (int64_t j = 0; j < std::min<int64_t>(4, head_dim - i); ++j) {
        hn::Store(part[j], d, tile.q + (i + j) * width + first);
      }
    }
  }
}

// By which numbers of at most `largest` are multiplied to become 8 bits, and the way back.
struct Int8Scale {
  explicit Int8Scale(float largest) {
    const float to = std::max(largest, kSageFloor);
    times = 127.0f / to;
    back = to / 127.0f;
  }
  float times, back;
};

// The largest magnitude of x[0, count), which is readable in whole vectors of zeros behind it.
float LargestOf(const float* x, int64_t count) {
  const DF d;
  VF largest = hn::Zero(d);
  for (int64_t i = 0; i < count; i += kLanes) {
    largest = hn::Max(largest, hn::Abs(hn::LoadU(d, x + i)));
  }
  return hn::GetLane(hn::MaxOfLanes(d, largest));
}

template <typename T>
void LoadQuantisedQueries(const RowMap<T>& map, int64_t head_dim, float* rows, QueryTile& tile) {
  const DF d;
  const DI di;
  const hn::Rebind<uint8_t, DF> d8;
  const int64_t stride = RoundUp(head_dim + 4, 16), quads = Quads(head_dim);
  const int width = tile.width();
  GatherQueries(map, head_dim, tile, rows);
  for (int r = 0; r < width; ++r) {
    float* row = rows + r * stride;
    std::fill(row + head_dim, row + stride, 0.0f);
    const Int8Scale scale(LargestOf(row, head_dim));
    tile.scale[r] = scale.back;
    // In place: bytes are written behind the floats that are still to be read.
    auto* bytes = reinterpret_cast<uint8_t*>(row);
    for (int64_t i = 0; i < 4 * quads; i += kLanes) {
      const VI x = hn::NearestInt(hn::Mul(hn::LoadU(d, row + i), hn::Set(d, scale.times)));
      hn::StoreU(hn::DemoteTo(d8, hn::Add(x, hn::Set(di, 128))), d8, bytes + i);
    }
    for (int64_t j = 0; j < quads; ++j) {
      std::memcpy(tile.q + j * width + r, bytes + 4 * j, 4);
    }
  }
}

// The mean of `keys` rows, zeros behind it up to a whole vector. row(t): where key t is.
template <typename Row>
void MeanKey(const Row& row, int64_t keys, int64_t head_dim, float* mean) {
  const DF d;
  std::fill_n(mean, RoundUp(head_dim, kLanes), 0.0f);
  for (int64_t t = 0; t < keys; ++t) {
    const auto* k = row(t);
    int64_t i = 0;
    for (; i + kLanes <= head_dim; i += kLanes) {
      hn::StoreU(hn::Add(hn::LoadU(d, mean + i), LoadFloats(k + i)), d, mean + i);
    }
    if (i < head_dim) {
      const VF last = sluice::HWY_NAMESPACE::LoadFloatsN(k + i, head_dim - i);
      hn::StoreU(hn::Add(hn::LoadU(d, mean + i), last), d, mean + i);
    }
  }
  const VF share = hn::Set(d, 1.0f / static_cast<float>(keys));
  for (int64_t i = 0; i < head_dim; i += kLanes) {
    hn::StoreU(hn::Mul(hn::LoadU(d, mean + i), share), d, mean + i);
  }
}

// Where quantised keys and their values go.
struct SageRoom {
  int32_t* k;
  float* scales;
  int32_t* offsets;
  float* v;

  // In `blocks` times PackedFloats(); more values may be written by `slack` floats.
  SageRoom(float* memory, int64_t blocks, int64_t head_dim, int64_t slack) {
    const int64_t keys = blocks * kKvBlockTokens;
    v = memory;
    scales = v + keys * head_dim + slack;
    offsets = reinterpret_cast<int32_t*>(scales + keys);
    k = offsets + keys;
  }
  SageBlock Block(int64_t block, int64_t head_dim) const {
    const int64_t first = block * kKvBlockTokens;
    return {k + first * Quads(head_dim), scales + first, offsets + first, v + first * head_dim};
  }
};

// Quantises `from` - mean as key t. row: room for a key. Writes whole vectors: keys in order.
template <typename T>
void QuantiseKey(const T* from, const float* mean, int64_t head_dim, float* row,
                 const SageRoom& room, int64_t t) {
  const DF d;
  const DI di;
  const hn::Rebind<int8_t, DF> d8;
  const int64_t quads = Quads(head_dim);
  int64_t i = 0;
  for (; i + kLanes <= head_dim; i += kLanes) {
    hn::StoreU(hn::Sub(LoadFloats(from + i), hn::LoadU(d, mean + i)), d, row + i);
  }
  if (i < head_dim) {
    const VF last = sluice::HWY_NAMESPACE::LoadFloatsN(from + i, head_dim - i);
    hn::StoreU(hn::Sub(last, hn::LoadU(d, mean + i)), d, row + i);
  }
  const Int8Scale scale(LargestOf(row, head_dim));
  auto* bytes = reinterpret_cast<int8_t*>(room.k + t * quads);
  VI sum = hn::Zero(di);
  for (i = 0; i < head_dim; i += kLanes) {
    const VI x = hn::NearestInt(hn::Mul(hn::LoadU(d, row + i), hn::Set(d, scale.times)));
    sum = hn::Add(sum, x);
    hn::StoreU(hn::DemoteTo(d8, x), d8, bytes + i);
  }
  for (; i < 4 * quads; ++i) bytes[i] = 0;  // where vectors are shorter than a word
  room.scales[t] = scale.back;
  room.offsets[t] = -128 * hn::GetLane(hn::SumOfLanes(di, sum));
}

template <typename T>
void StoreOutputs(const RowMap<T>& map, int64_t head_dim, float* rows, const QueryTile& tile) {
  const DF d;
  const int64_t stride = RoundUp(head_dim + 4, 16);
  const int width = tile.width();
  HWY_ALIGN float quads[4 * kLanes];
  for (int first = 0; first < width; first += kLanes) {
    const VF inverse = hn::Div(hn::Set(d, 1.0f), hn::Load(d, tile.sum + first));
    for (int64_t i = 0; i < head_dim; i += 4) {
      VF part[4];
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t column = std::min(i + j, head_dim - 1);
        part[j] = hn::Mul(hn::Load(d, tile.o + column * width + first), inverse);
      }
      hn::StoreInterleaved4(part[0], part[1], part[2], part[3], d, quads);
      for (int r = 0; r < kLanes; ++r) {
        std::copy_n(quads + 4 * r, 4, rows + (first + r) * stride + i);
      }
    }
  }
  for (int r = 0; r < tile.rows; ++r) {
    const int64_t row = tile.first_row + r;
    T* to = map.out + row / map.heads * map.out_stride + row % map.heads * head_dim;
    const float* from = rows + r * stride;
    int64_t i = 0;
    for (; i + kLanes <= head_dim; i += kLanes) StoreFloats(hn::LoadU(d, from + i), to + i);
    if (i < head_dim) {
      sluice::HWY_NAMESPACE::StoreFloatsN(hn::LoadU(d, from + i), to + i, head_dim - i);
    }
  }
}

// Takes query tiles [first, last) over keys [key_begin, key_end), key_begin at the beginning of a
// block, and calls finish(tile) for each. visible(row): how many keys a row sees, growing with the
// row. block(i, slot): where block i is; it may be widened into scratch slot < kSpanBlocks.
template <typename T, typename Visible, typename BlockAt, typename Finish>
void AttendGroups(const RowMap<T>& map, int64_t head_dim, int64_t first, int64_t last,
                  int64_t key_begin, int64_t key_end, Values values, float scale,
                  const Scratch& scratch, const Visible& visible, const BlockAt& block,
                  const Finish& finish) {
  using AnyBlock = std::invoke_result_t<BlockAt, int64_t, int64_t>;
  for (; first < last; first += scratch.group) {
    const int64_t count = std::min(scratch.group, last - first);
    for (int64_t i = 0; i < count; ++i) {
      QueryTile& tile = scratch.tiles[i];
      tile.Place(scratch.tile_floats + i * QueryTile::Floats(head_dim), head_dim);
      tile.SetRows(first + i, map.count);
      tile.key_bias = map.key_bias;
      tile.started = false;
      for (int r = 0; r < tile.width(); ++r) {
        tile.visible[r] = static_cast<float>(visible(tile.first_row + std::min(r, tile.rows - 1)));
        tile.max[r] = kNothing;
        tile.sum[r] = 0;
      }
      tile.min_visible = visible(tile.first_row);
      tile.max_visible = visible(tile.first_row + tile.rows - 1);
      if constexpr (std::is_same_v<AnyBlock, Block>) {
        LoadQueries(map, head_dim, scratch.rows, tile);
      } else {
        LoadQuantisedQueries(map, head_dim, scratch.rows, tile);
      }
    }
    const int64_t end = std::min(key_end, scratch.tiles[count - 1].max_visible);
    for (int64_t begin = key_begin; begin < end; begin += kSpanBlocks * kKvBlockTokens) {
      const int64_t span_end = std::min<int64_t>(end, begin + kSpanBlocks * kKvBlockTokens);
      AnyBlock blocks[kSpanBlocks];
      for (int64_t i = 0; begin + i * kKvBlockTokens < span_end; ++i) {
        blocks[i] = block(begin / kKvBlockTokens + i, i);
      }
      for (int64_t i = 0; i < count; ++i) {
        QueryTile& tile = scratch.tiles[i];
        const int64_t tile_end = std::min(span_end, tile.max_visible);
        if (tile.vectors == 2) {
          AttendRows<2>(tile, blocks, values, begin, tile_end, head_dim, scale, scratch.scores);
        } else {
          AttendRows<1>(tile, blocks, values, begin, tile_end, head_dim, scale, scratch.scores);
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) finish(scratch.tiles[i]);
  }
}

// Adds up what the ranges of keys gave: partial[s] = O [D, width] | max | sum [kTileRows each].
void Combine(const float* partial, int64_t stride, int64_t ranges, int64_t head_dim,
             QueryTile& tile) {
  const DF d;
  const int width = tile.width();
  for (int first = 0; first < width; first += kLanes) {
    const float* stats = partial + kTileRows * head_dim + first;
    VF max = hn::Set(d, kNothing), sum = hn::Zero(d);
    for (int64_t s = 0; s < ranges; ++s) max = hn::Max(max, hn::Load(d, stats + s * stride));
    for (int64_t s = 0; s < ranges; ++s) {
      const VF weight = Exp2(hn::Sub(hn::Load(d, stats + s * stride), max));
      sum = hn::MulAdd(hn::Load(d, stats + s * stride + kTileRows), weight, sum);
      for (int64_t i = 0; i < head_dim; ++i) {
        float* o = tile.o + i * width + first;
        const VF before = s == 0 ? hn::Zero(d) : hn::Load(d, o);
        const VF more = hn::Load(d, partial + s * stride + i * width + first);
        hn::Store(hn::MulAdd(more, weight, before), d, o);
      }
    }
    hn::Store(sum, d, tile.sum + first);
  }
}

template <typename T, bool kSage>
void Encoder(ExecContext& ctx, ConstTensorView q, ConstTensorView k, ConstTensorView v,
             int64_t batch, int heads, int head_dim, float scale, TensorView out,
             ConstTensorView key_bias) {
  const int64_t queries = q.dim(0) / batch, keys = k.dim(0) / batch;
  const int64_t num_blocks = CeilDiv(keys, kKvBlockTokens), tiles = CeilDiv(queries, kTileRows);
  const int64_t group = Scratch::Group(head_dim, tiles);
  const int64_t threads = ctx.num_threads(), units = batch * heads * tiles;

  Workspace::Scope scope(ctx.workspace());
  // One block more: rows are widened in whole vectors.
  const TensorView memory = ctx.workspace().Allocate(
      DType::kU8, {threads, Scratch::Bytes(head_dim, group, num_blocks + 1)});
  ParallelFor(ctx, threads, 1, [&](int64_t thread, int64_t last_thread) {
    const Scratch scratch(memory, thread, head_dim, group, num_blocks + 1);
    const int64_t area = kKvBlockTokens * head_dim;
    const int64_t end = units * last_thread / threads;
    for (int64_t unit = units * thread / threads; unit < end;) {
      const int64_t item = unit / tiles, frame = item / heads, head = item % heads;
      const int64_t last = std::min(end, (item + 1) * tiles);
      const int64_t column = head * head_dim, first_key = frame * keys;
      const auto key = [&](int64_t t) {
        return k.data<T>() + (first_key + t) * k.stride0() + column;
      };
      const SageRoom room(scratch.packed, num_blocks, head_dim, area);
      float* const packed_v = kSage ? room.v : scratch.packed + num_blocks * area;
      // Keys first, row by row upwards: what a row writes behind its end is overwritten.
      if constexpr (kSage) {
        float* const mean = scratch.rows + scratch.RowsFloats(head_dim) / 2;
        MeanKey(key, keys, head_dim, mean);
        for (int64_t t = 0; t < keys; ++t) {
          QuantiseKey(key(t), mean, head_dim, scratch.rows, room, t);
        }
      } else {
        for (int64_t t = 0; t < keys; ++t) {
          WidenRow(key(t), head_dim, scratch.packed + t * head_dim);
        }
      }
      for (int64_t t = 0; t < keys; ++t) {
        WidenRow(v.data<T>() + (first_key + t) * v.stride0() + column, head_dim,
                 packed_v + t * head_dim);
      }
      const RowMap<T> map = {q.data<T>() + frame * queries * q.stride0() + column,
                             q.stride0(),
                             out.data<T>() + frame * queries * out.stride0() + column,
                             out.stride0(),
                             1,
                             queries,
                             key_bias.empty() ? nullptr : key_bias.data<float>() + first_key};
      AttendGroups(
          map, head_dim, unit - item * tiles, last - item * tiles, 0, keys, Values{head_dim, 1},
          scale, scratch, [&](int64_t) { return keys; },
          [&](int64_t b, int64_t) {
            if constexpr (kSage) {
              return room.Block(b, head_dim);
            } else {
              return Block{scratch.packed + b * area, packed_v + b * area};
            }
          },
          [&](const QueryTile& tile) { StoreOutputs(map, head_dim, scratch.rows, tile); });
      unit = last;
    }
  });
}

template <typename T, bool kSage>
void Causal(ExecContext& ctx, ConstTensorView q, int64_t begin, int heads, float scale,
            const KvLayerView& kv, TensorView out) {
  constexpr bool kInPlace = std::is_same_v<T, float>;
  const int64_t head_dim = kv.head_dim, area = kKvBlockTokens * head_dim;
  const int64_t threads = ctx.num_threads();
  const CausalPlan plan(begin, q.dim(0), heads, kv.kv_heads, kTileRows, ctx.num_threads());
  const int64_t group = Scratch::Group(head_dim, plan.tiles);
  const int64_t packed_blocks = kInPlace && !kSage ? 0 : kSpanBlocks;
  const int64_t partial_floats = kTileRows * (head_dim + 2);
  const auto map_of = [&](int64_t kv_head) {
    const int64_t column = kv_head * plan.heads_per_kv * head_dim;
    return RowMap<T>{q.data<T>() + column, q.stride0(),       out.data<T>() + column,
                     heads * head_dim,     plan.heads_per_kv, plan.rows};
  };

  Workspace::Scope scope(ctx.workspace());
  const TensorView memory = ctx.workspace().Allocate(
      DType::kU8, {threads, Scratch::Bytes(head_dim, group, packed_blocks)});
  // [kv head, tile, range] of O [D, width] | max | sum [kTileRows each].
  float* partials = nullptr;
  if (plan.ranges > 1) {
    partials = ctx.workspace().Allocate(DType::kF32, {plan.units, partial_floats}).data<float>();
  }
  TensorView means;  // of each kv head's keys, where they are quantised
  if constexpr (kSage) {
    means = ctx.workspace().Allocate(DType::kF32, {kv.kv_heads, RoundUp(head_dim, 16)});
    ParallelFor(ctx, kv.kv_heads, 1, [&](int64_t first, int64_t last) {
      for (int64_t head = first; head < last; ++head) {
        const auto key = [&](int64_t t) {
          return static_cast<const T*>(kv.blocks[t / kKvBlockTokens]) + head * area +
                 t % kKvBlockTokens * head_dim;
        };
        MeanKey(key, plan.keys, head_dim, means.data<float>() + head * means.dim(1));
      }
    });
  }
  ParallelFor(ctx, threads, 1, [&](int64_t thread, int64_t last_thread) {
    const Scratch scratch(memory, thread, head_dim, group, packed_blocks);
    const int64_t end = plan.FirstUnit(last_thread);
    for (int64_t index = plan.FirstUnit(thread); index < end;) {
      const CausalPlan::Unit unit = plan.At(index);
      const int64_t last = std::min(plan.tiles, unit.tile + end - index);
      const RowMap<T> map = map_of(unit.kv_head);
      AttendGroups(
          map, head_dim, unit.tile, last, plan.RangeBegin(unit.range),
          plan.RangeBegin(unit.range + 1), Values{1, kKvBlockTokens}, scale, scratch,
          [&](int64_t row) { return begin + row / plan.heads_per_kv + 1; },
          [&](int64_t b, int64_t slot) {
            const T* k = static_cast<const T*>(kv.blocks[b]) + unit.kv_head * area;
            const T* v = k + kv.kv_heads * area;
            if constexpr (kSage) {
              const SageRoom room(scratch.packed + slot * Scratch::PackedFloats(head_dim), 1,
                                  head_dim, 0);
              const float* mean = means.data<float>() + unit.kv_head * means.dim(1);
              // What lies behind the last key may be NaN.
              const int64_t count =
                  std::min<int64_t>(kKvBlockTokens, plan.keys - b * kKvBlockTokens);
              for (int64_t t = 0; t < count; ++t) {
                QuantiseKey(k + t * head_dim, mean, head_dim, scratch.rows, room, t);
              }
              SageBlock block = room.Block(0, head_dim);
              if constexpr (kInPlace) {
                block.v = v;
              } else {
                WidenRow(v, area, room.v);
              }
              return block;
            } else if constexpr (kInPlace) {
              return Block{k, v};
            } else {
              float* to = scratch.packed + slot * Scratch::PackedFloats(head_dim);
              WidenRow(k, area, to);
              WidenRow(v, area, to + area);
              return Block{to, to + area};
            }
          },
          [&](const QueryTile& tile) {
            if (partials == nullptr) return StoreOutputs(map, head_dim, scratch.rows, tile);
            const int64_t place =
                (unit.kv_head * plan.tiles + tile.first_row / kTileRows) * plan.ranges + unit.range;
            float* to = partials + place * partial_floats;
            if (tile.started) {
              std::copy_n(tile.o, tile.width() * head_dim, to);
            } else {
              std::fill_n(to, tile.width() * head_dim, 0.0f);
            }
            std::copy_n(tile.max, tile.width(), to + kTileRows * head_dim);
            std::copy_n(tile.sum, tile.width(), to + kTileRows * (head_dim + 1));
          });
      index += last - unit.tile;
    }
  });
  if (partials == nullptr) return;
  const int64_t all_tiles = kv.kv_heads * plan.tiles;
  ParallelFor(ctx, threads, 1, [&](int64_t thread, int64_t last_thread) {
    const Scratch scratch(memory, thread, head_dim, group, packed_blocks);
    QueryTile& tile = scratch.tiles[0];
    tile.Place(scratch.tile_floats, head_dim);
    const int64_t end = all_tiles * last_thread / threads;
    for (int64_t i = all_tiles * thread / threads; i < end; ++i) {
      tile.SetRows(i % plan.tiles, plan.rows);
      Combine(partials + i * plan.ranges * partial_floats, partial_floats, plan.ranges, head_dim,
              tile);
      StoreOutputs(map_of(i / plan.tiles), head_dim, scratch.rows, tile);
    }
  });
}

template <bool kSage>
void AnyEncoder(ExecContext& ctx, ConstTensorView q, ConstTensorView k, ConstTensorView v,
                int64_t batch, int heads, int head_dim, float scale, TensorView out,
                ConstTensorView key_bias) {
  if (q.dtype() == DType::kF32) {
    Encoder<float, kSage>(ctx, q, k, v, batch, heads, head_dim, scale, out, key_bias);
  } else {
    Encoder<BFloat16, kSage>(ctx, q, k, v, batch, heads, head_dim, scale, out, key_bias);
  }
}

void EncoderAttention(ExecContext& ctx, ConstTensorView q, ConstTensorView k, ConstTensorView v,
                      int64_t batch, int heads, int head_dim, float scale, TensorView out,
                      ConstTensorView key_bias) {
  AnyEncoder<false>(ctx, q, k, v, batch, heads, head_dim, scale, out, key_bias);
}

void EncoderSage(ExecContext& ctx, ConstTensorView q, ConstTensorView k, ConstTensorView v,
                 int64_t batch, int heads, int head_dim, float scale, TensorView out,
                 ConstTensorView key_bias) {
  AnyEncoder<true>(ctx, q, k, v, batch, heads, head_dim, scale, out, key_bias);
}

// Queries across the lanes, as above: S^T for kTileRows of them and all keys, softmax down its
// rows, and one sum over lanes a key.
template <typename T>
void Received(ExecContext& ctx, ConstTensorView q, ConstTensorView k, int64_t batch, int heads,
              int64_t head_dim, float scale, ConstTensorView key_bias, TensorView received) {
  const DF d;
  const int64_t queries = q.dim(0) / batch, keys = k.dim(0) / batch;
  const int64_t tiles = CeilDiv(queries, kTileRows), threads = ctx.num_threads();
  const int64_t units = batch * heads, key_floats = RoundUp(keys * head_dim + 4 * kLanes, 16);
  const int64_t rows_floats = kTileRows * RoundUp(head_dim + 4, 16);
  Workspace::Scope scope(ctx.workspace());
  const TensorView memory = ctx.workspace().Allocate(
      DType::kF32, {threads, key_floats + rows_floats + keys * kTileRows +
                                 RoundUp(QueryTile::Floats(head_dim), 16)});
  ParallelFor(ctx, threads, 1, [&](int64_t thread, int64_t last_thread) {
    float* packed = memory.data<float>() + thread * memory.stride0();
    float* rows = packed + key_floats;
    float* s = rows + rows_floats;
    QueryTile tile;
    tile.Place(s + keys * kTileRows, head_dim);
    const int64_t end = units * last_thread / threads;
    for (int64_t unit = units * thread / threads; unit < end; ++unit) {
      const int64_t frame = unit / heads, column = unit % heads * head_dim;
      const T* first_key = k.data<T>() + frame * keys * k.stride0() + column;
      for (int64_t t = 0; t < keys; ++t) {
        WidenRow(first_key + t * k.stride0(), head_dim, packed + t * head_dim);
      }
      const RowMap<T> map = {q.data<T>() + frame * queries * q.stride0() + column,
                             q.stride0(),
                             nullptr,
                             0,
                             1,
                             queries};
      float* sums = received.data<float>() + unit * keys;
      std::fill_n(sums, keys, 0.0f);
      for (int64_t i = 0; i < tiles; ++i) {
        tile.SetRows(i, queries);
        LoadQueries(map, head_dim, rows, tile);
        const int width = tile.width();
        if (tile.vectors == 2) {
          Multiply<2>(packed, keys, head_dim, 1, tile.q, head_dim, false, s, nullptr);
        } else {
          Multiply<1>(packed, keys, head_dim, 1, tile.q, head_dim, false, s, nullptr);
        }
        for (int first = 0; first < width; first += kLanes) {
          const VF factor = hn::Set(d, scale * kLog2e);
          VF max = hn::Set(d, kNothing), sum = hn::Zero(d);
          for (int64_t t = 0; t < keys; ++t) {
            float* at = s + t * width + first;
            const float bias = key_bias.empty() ? 0 : key_bias.data<float>()[frame * keys + t];
            const VF x = hn::MulAdd(hn::Load(d, at), factor, hn::Set(d, bias * kLog2e));
            hn::Store(x, d, at);
            max = hn::Max(max, x);
          }
          for (int64_t t = 0; t < keys; ++t) {
            float* at = s + t * width + first;
            const VF p = Exp2(hn::Sub(hn::Load(d, at), max));
            hn::Store(p, d, at);
            sum = hn::Add(sum, p);
          }
          // Lanes without a query count nothing.
          const VF lane = hn::Add(hn::Iota(d, 0), hn::Set(d, static_cast<float>(first)));
          const VF share =
              hn::IfThenElseZero(hn::Lt(lane, hn::Set(d, static_cast<float>(tile.rows))),
                                 hn::Div(hn::Set(d, 1.0f / static_cast<float>(queries)), sum));
          for (int64_t t = 0; t < keys; ++t) {
            const VF p = hn::Mul(hn::Load(d, s + t * width + first), share);
            sums[t] += hn::GetLane(hn::SumOfLanes(d, p));
          }
        }
      }
    }
  });
}

void AttentionReceived(ExecContext& ctx, ConstTensorView q, ConstTensorView k, int64_t batch,
                       int heads, int head_dim, float scale, ConstTensorView key_bias,
                       TensorView received) {
  if (q.dtype() == DType::kF32) {
    Received<float>(ctx, q, k, batch, heads, head_dim, scale, key_bias, received);
  } else {
    Received<BFloat16>(ctx, q, k, batch, heads, head_dim, scale, key_bias, received);
  }
}

template <bool kSage>
void AnyCausal(ExecContext& ctx, ConstTensorView q, int64_t begin, int heads, float scale,
               const KvLayerView& kv, TensorView out) {
  if (kv.dtype == DType::kF32) {
    Causal<float, kSage>(ctx, q, begin, heads, scale, kv, out);
  } else {
    Causal<BFloat16, kSage>(ctx, q, begin, heads, scale, kv, out);
  }
}

void CausalAttention(ExecContext& ctx, ConstTensorView q, int64_t begin, int heads, float scale,
                     const KvLayerView& kv, TensorView out) {
  AnyCausal<false>(ctx, q, begin, heads, scale, kv, out);
}

void CausalSage(ExecContext& ctx, ConstTensorView q, int64_t begin, int heads, float scale,
                const KvLayerView& kv, TensorView out) {
  AnyCausal<true>(ctx, q, begin, heads, scale, kv, out);
}

}  // namespace HWY_NAMESPACE
}  // namespace sluice::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice::cpu {

HWY_EXPORT(EncoderAttention);
HWY_EXPORT(AttentionReceived);
HWY_EXPORT(CausalAttention);
HWY_EXPORT(EncoderSage);
HWY_EXPORT(CausalSage);
HWY_EXPORT(HasInt8Dot);

bool HasInt8Dot() { return HWY_DYNAMIC_DISPATCH(HasInt8Dot)(); }

void EncoderAttentionSimd(ExecContext& ctx, ConstTensorView q, ConstTensorView k, ConstTensorView v,
                          int64_t batch, int heads, int head_dim, float scale, TensorView out,
                          ConstTensorView key_bias) {
  HWY_DYNAMIC_DISPATCH(EncoderAttention)
  (ctx, q, k, v, batch, heads, head_dim, scale, out, key_bias);
}

void AttentionReceivedSimd(ExecContext& ctx, ConstTensorView q, ConstTensorView k, int64_t batch,
                           int heads, int head_dim, float scale, ConstTensorView key_bias,
                           TensorView received) {
  HWY_DYNAMIC_DISPATCH(AttentionReceived)
  (ctx, q, k, batch, heads, head_dim, scale, key_bias, received);
}

void CausalAttentionSimd(ExecContext& ctx, ConstTensorView q, int64_t begin, int heads, float scale,
                         const KvLayerView& kv, TensorView out) {
  HWY_DYNAMIC_DISPATCH(CausalAttention)(ctx, q, begin, heads, scale, kv, out);
}

void EncoderAttentionSage(ExecContext& ctx, ConstTensorView q, ConstTensorView k, ConstTensorView v,
                          int64_t batch, int heads, int head_dim, float scale, TensorView out,
                          ConstTensorView key_bias) {
  HWY_DYNAMIC_DISPATCH(EncoderSage)
  (ctx, q, k, v, batch, heads, head_dim, scale, out, key_bias);
}

void CausalAttentionSage(ExecContext& ctx, ConstTensorView q, int64_t begin, int heads, float scale,
                         const KvLayerView& kv, TensorView out) {
  HWY_DYNAMIC_DISPATCH(CausalSage)(ctx, q, begin, heads, scale, kv, out);
}

}  // namespace sluice::cpu
#endif  // HWY_ONCE
