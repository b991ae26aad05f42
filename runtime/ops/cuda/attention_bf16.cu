// Exact attention in bf16 for Hopper, after FlashAttention-3 (arXiv 2407.08608).
//
//   S = Q K^T, P = exp2(S * scale_log2 - max), O = P V / sum(P)        one pass over the keys
//
// A block takes tiles of 64 * kGroups queries of one head until none is left. One warp of the first
// warpgroup copies: queries once a tile, keys and values in tiles of kKeys through rings of kStages
// buffers. Each other warpgroup computes 64 queries. It starts the scores of one tile of keys, then
// the products of the last probabilities with their values, and computes exponentials while the
// others' products run: the warpgroups take turns at starting products. The first scores of the
// next tile of queries follow the last ones of this without a gap. Where tiles are too few for the
// device, they are smaller.
//
// Over blocks of a paged cache (kPaged) the copy engine fetches boxes of keys that lie in one
// block. There problems have few queries and many keys, so the keys are cut into parts, each a
// piece of work whose sums JoinKernel joins, and the query heads that share keys may share a tile:
// its rows are then (token, head) pairs, token by token. Nothing that the host computes depends on
// how many keys there are.
//
// Sizes: head_dim 64, 72, 80, 128; heads narrower than a multiple of 16 channels (64 for values)
// are padded with zeros by the copy engine in shared memory only. Products: 4 * q * keys * head_dim
// a head. Bytes from memory: each operand once, where keys and values of a section of heads stay in
// the second-level cache.
#include <algorithm>

#include "runtime/ops/cuda/attention_hopper.cuh"

namespace sluice::cuda::hopper {
namespace {

constexpr int kBlockKeys = 64;  // of a paged cache

template <int kHeadDim, int kOfBlock = MostGroups(kHeadDim)>
struct Config {
  // Channels of queries and keys: slabs of 64 (128 bytes), then of 16 (32 bytes), zeros included.
  static constexpr int kWideSlabs = kHeadDim / 64;
  static constexpr bool kNarrow = kHeadDim % 64 > 0;
  static constexpr int kRowBytes = kWideSlabs * kSwizzleBytes + (kNarrow ? kNarrowBytes : 0);
  static constexpr int kValueSlabs = (kHeadDim + 63) / 64;  // of 64 channels
  static constexpr int kGroups = kOfBlock;
  static constexpr int kRows = kMmaRows * kGroups;
  static constexpr int kKeys = kHeadDim == 80 ? 96 : 128;  // 96: to stay within 160 registers
  static constexpr int kStages = kHeadDim == 128 ? 2 : kHeadDim == 72 ? 3 : 4;
  static constexpr int kThreads = kWarpgroup * (1 + kGroups);
  static constexpr int kCopyRegisters = kGroups == 3 ? 32 : 24;
  static constexpr int kComputeRegisters = kGroups == 3 ? 160 : 240;

  static constexpr int kQueryStages = 2;  // the next tile's queries come while this one's compute
  // Heads of 64 are bound by instructions, not by products: there the tensor cores also sum the
  // probabilities, by 8 more columns of values that are all 1, in a slab that all stages share.
  static constexpr int kSumColumns = kHeadDim == 64 ? 8 : 0;
  static constexpr int kColumns = kHeadDim + kSumColumns;

  static constexpr int kQueryBytes = kMmaRows * kRowBytes;  // of one warpgroup
  static constexpr int kKeyBytes = kKeys * kRowBytes;
  static constexpr int kValueSlabBytes = kKeys * kSwizzleBytes;
  static constexpr int kValueBytes = kValueSlabBytes * kValueSlabs;
  static constexpr int kOnesBytes = kSumColumns > 0 ? kValueSlabBytes : 0;
  static constexpr int kSharedBytes = 1024 + kQueryStages * kGroups * kQueryBytes +
                                      kStages * (kKeyBytes + kValueBytes) +
                                      kOnesBytes;  // 1024: to align
  static_assert(kQueryBytes % 1024 == 0 && kKeyBytes % 1024 == 0);
};

// Keys that are copied at once, all in one block of a paged cache.
template <int kHeadDim>
constexpr int kBoxKeys = Config<kHeadDim>::kKeys % kBlockKeys == 0 ? kBlockKeys : 32;

// Of queries, keys and values, for the copy engine. `narrow`: of channels behind the wide slabs,
// where there are some.
struct Maps {
  CUtensorMap q, q_narrow, k, k_narrow, v;
};

// What a warpgroup computes next.
struct Piece {
  int index;  // negative: nothing is left
  Work work;
};

template <int kQueries, int kStages>
struct Barriers {
  uint64_t q_full[kQueries], q_empty[kQueries];  // of each stage and warpgroup
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  Piece pieces[kQueries];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// What one warpgroup carries along the keys for its 64 queries.
template <int kHeadDim>
struct Rows {
  float max0, max1;          // of rows lane / 4 and lane / 4 + 8, unscaled
  float sum0 = 0, sum1 = 0;  // of this lane's columns, without kSumColumns

  // With the scores of the first tile of keys.
  template <int kCount>
  __device__ explicit Rows(const float (&s)[kCount]) : max0(s[0]), max1(s[2]) {
    Raise(s, max0, max1);
  }
  // With the scores of a further tile. Where a maximum has grown by more than 2^kSlack, tells by
  // what to scale what was summed before, and returns true; below that the old one serves as well,
  // since bf16 and f32 have exponents.
  template <int kCount>
  __device__ bool Grow(const float (&s)[kCount], float scale_log2, float& keep0, float& keep1) {
    constexpr float kSlack = 8;
    float new0 = max0, new1 = max1;
    Raise(s, new0, new1);
    keep0 = keep1 = 1;
    const bool grown =
        __any_sync(0xffffffffu, fmaxf(new0 - max0, new1 - max1) * scale_log2 > kSlack);
    if (grown) {
      // Where nothing has been seen yet, nothing was summed.
      keep0 = new0 == -INFINITY ? 1 : Exp2((max0 - new0) * scale_log2);
      keep1 = new1 == -INFINITY ? 1 : Exp2((max1 - new1) * scale_log2);
      max0 = new0;
      max1 = new1;
      sum0 *= keep0;
      sum1 *= keep1;
    }
    return grown;
  }
  // Turns scores into probabilities.
  template <int kCount>
  __device__ void Weigh(float (&s)[kCount], float scale_log2) {
    const float base0 = max0 == -INFINITY ? 0 : max0 * scale_log2;
    const float base1 = max1 == -INFINITY ? 0 : max1 * scale_log2;
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      s[i] = Exp2(s[i] * scale_log2 - base0);
      s[i + 1] = Exp2(s[i + 1] * scale_log2 - base0);
      s[i + 2] = Exp2(s[i + 2] * scale_log2 - base1);
      s[i + 3] = Exp2(s[i + 3] * scale_log2 - base1);
      if constexpr (Config<kHeadDim>::kSumColumns == 0) {
        sum0 += s[i] + s[i + 1];
        sum1 += s[i + 2] + s[i + 3];
      }
    }
  }

 private:
  template <int kCount>
  __device__ static void Raise(const float (&s)[kCount], float& to0, float& to1) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      to0 = fmaxf(to0, fmaxf(s[i], s[i + 1]));
      to1 = fmaxf(to1, fmaxf(s[i + 2], s[i + 3]));
    }
    to0 = QuadMax(to0);
    to1 = QuadMax(to1);
  }
};
#endif

// The tiles of keys of a piece of work: all that its queries see, or a part of them.
struct Tiles {
  int begin, end;
};
template <bool kPaged>
__device__ inline Tiles TilesOf(const AttentionShape& shape, int keys, int tile_keys, int index) {
  const int all = (keys + tile_keys - 1) / tile_keys;
  if constexpr (!kPaged) return {0, all};
  const int each = (all + shape.parts - 1) / shape.parts, begin = index % shape.parts * each;
  return {min(begin, all), min(begin + each, all)};
}

// One row of a tile: where it stands and what it sees.
struct RowPlace {
  int token, head, limit;  // limit: of keys
  bool used;               // else nothing is stored
};

// Sets values from `first` on of a tile to zero: whatever lies behind the last key of a block, NaN
// included, is multiplied with probabilities of 0. Called by all threads of a warpgroup; others may
// do the same at once.
template <int kHeadDim>
__device__ inline void ClearValues(uint32_t values, int first, int warpgroup) {
  using C = Config<kHeadDim>;
  constexpr int kPieces = kSwizzleBytes / 16;  // of a row
  for (int i = first * kPieces + threadIdx.x % kWarpgroup; i < C::kKeys * kPieces;
       i += kWarpgroup) {
    for (int slab = 0; slab < C::kValueSlabs; ++slab) {
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(
                       values + slab * C::kValueSlabBytes + 16 * i),
                   "r"(0)
                   : "memory");
    }
  }
  FenceAsyncProxy();
  NamedSync(8 + warpgroup, kWarpgroup);
}

template <int kHeadDim, int kOfBlock, bool kCausal, bool kPaged>
__global__ void __launch_bounds__(Config<kHeadDim, kOfBlock>::kThreads, 1)
    FlashKernel(const __grid_constant__ Maps maps, const AttentionShape given) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using C = Config<kHeadDim, kOfBlock>;
  AttentionShape shape = given;
  constexpr int kGroups = C::kGroups, kStages = C::kStages, kKeys = C::kKeys;
  extern __shared__ uint8_t shared[];
  __shared__ Barriers<C::kQueryStages * kGroups, kStages> barriers;
  const uint32_t q_shared = (SharedAddress(shared) + 1023) / 1024 * 1024;
  const uint32_t k_shared = q_shared + C::kQueryStages * kGroups * C::kQueryBytes;
  const uint32_t v_shared = k_shared + kStages * C::kKeyBytes;
  const uint32_t ones_shared = v_shared + kStages * C::kValueBytes;
  const uint32_t q_full = SharedAddress(barriers.q_full), q_empty = SharedAddress(barriers.q_empty);
  const uint32_t k_full = SharedAddress(barriers.k_full), k_empty = SharedAddress(barriers.k_empty);
  const uint32_t v_full = SharedAddress(barriers.v_full), v_empty = SharedAddress(barriers.v_empty);
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);

  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kQueryStages * kGroups; ++i) {
      InitBarrier(q_full + 8 * i, 1);
      InitBarrier(q_empty + 8 * i, 4);  // one arrival a warp
    }
    for (int s = 0; s < kStages; ++s) {
      InitBarrier(k_full + 8 * s, 1);
      InitBarrier(v_full + 8 * s, 1);
      InitBarrier(k_empty + 8 * s, 4 * kGroups);
      InitBarrier(v_empty + 8 * s, 4 * kGroups);
    }
    FenceBarrierInit();
  }
  FillShared(ones_shared, C::kOnesBytes, 0x3f803f80);  // pairs of 1 in bf16
  __syncthreads();
  WaitForKernelInFront();
  LetNextKernelStart();
  if constexpr (kPaged) shape.kv_len = __ldg(shape.table);
  const int group_rows = kPaged ? shape.tokens : kMmaRows;  // of q_len, of a warpgroup
  const int tile_rows = group_rows * kGroups;

  if (warpgroup == 0) {
    FewerRegisters<C::kCopyRegisters>();
    if (threadIdx.x == 0) {
      PrefetchMap(maps.q);
      PrefetchMap(maps.k);
      PrefetchMap(maps.v);
      if (C::kNarrow) {
        PrefetchMap(maps.q_narrow);
        PrefetchMap(maps.k_narrow);
      }
      // Rows from `row` on of an area of `rows` at `to`; y, z and w tell where from.
      const auto load = [](const CUtensorMap& wide, const CUtensorMap& narrow, uint32_t to,
                           int rows, int row, uint32_t bar, int y, int z, int w) {
        for (int slab = 0; slab < C::kWideSlabs; ++slab) {
          Load4(wide, to + (slab * rows + row) * kSwizzleBytes, bar, 64 * slab, y, z, w);
        }
        if constexpr (C::kNarrow) {
          Load4(narrow, to + C::kWideSlabs * rows * kSwizzleBytes + row * kNarrowBytes, bar,
                64 * C::kWideSlabs, y, z, w);
        }
      };
      const auto load_values = [&](uint32_t to, int row, uint32_t bar, int y, int z, int w) {
        for (int slab = 0; slab < C::kValueSlabs; ++slab) {
          Load4(maps.v, to + slab * C::kValueSlabBytes + row * kSwizzleBytes, bar, 64 * slab, y, z,
                w);
        }
      };
      const int query_bytes =
          kPaged ? shape.together * shape.tokens * C::kRowBytes : C::kQueryBytes;
      const int pieces = shape.q_tiles * shape.all_heads * (kPaged ? shape.parts : 1);
      Ring<kStages> ring;
      Ring<C::kQueryStages> queries;
      for (int next = blockIdx.x;; next += gridDim.x, queries.Next()) {
        // Tiles of a causal problem take different times, so the next free block takes the next;
        // over blocks most keys are seen by all.
        const int index =
            kCausal && !kPaged ? static_cast<int>(atomicAdd(shape.counter, 1u)) : next;
        const bool none = index >= pieces;
        const Work work = WorkOf(shape, none ? 0 : kPaged ? index / shape.parts : index, tile_rows);
        for (int g = 0; g < kGroups; ++g) {
          const int slot = queries.stage * kGroups + g;
          Wait(q_empty + 8 * slot, queries.parity ^ 1);
          barriers.pieces[slot] = {none ? -1 : index, work};
          if (none) {
            Arrive(q_full + 8 * slot);
            continue;
          }
          ArriveExpecting(q_full + 8 * slot, query_bytes);
          load(maps.q, maps.q_narrow, q_shared + slot * C::kQueryBytes, kMmaRows, 0,
               q_full + 8 * slot, kPaged ? work.head * shape.together : work.head,
               work.first_row + g * group_rows, work.batch);
        }
        if (none) break;
        const int keys = VisibleKeys<kCausal>(shape, work.first_row, tile_rows);
        const Tiles tiles = TilesOf<kPaged>(shape, keys, kKeys, index);
        const int kv_head = work.head / shape.group;
#pragma unroll 1  // to stay within kCopyRegisters
        for (int tile = tiles.begin; tile < tiles.end; ++tile, ring.Next()) {
          const int key = tile * kKeys;
          const uint32_t k_at = k_shared + ring.stage * C::kKeyBytes;
          const uint32_t v_at = v_shared + ring.stage * C::kValueBytes;
          const uint32_t k_bar = k_full + 8 * ring.stage, v_bar = v_full + 8 * ring.stage;
          if constexpr (kPaged) {
            constexpr int kBoxes = kKeys / kBoxKeys<kHeadDim>;
            int block[kBoxes];
#pragma unroll
            for (int b = 0; b < kBoxes; ++b) {
              // Behind the last key that block once more.
              const int first = min(key + b * kBoxKeys<kHeadDim>, keys - 1);
              block[b] = __ldg(shape.table + 1 + first / kBlockKeys);
            }
            Wait(k_empty + 8 * ring.stage, ring.parity ^ 1);
            ArriveExpecting(k_bar, C::kKeyBytes);
#pragma unroll
            for (int b = 0; b < kBoxes; ++b) {
              load(maps.k, maps.k_narrow, k_at, kKeys, b * kBoxKeys<kHeadDim>, k_bar,
                   (key + b * kBoxKeys<kHeadDim>) % kBlockKeys, kv_head, 2 * block[b]);
            }
            Wait(v_empty + 8 * ring.stage, ring.parity ^ 1);
            ArriveExpecting(v_bar, C::kValueBytes);
#pragma unroll
            for (int b = 0; b < kBoxes; ++b) {
              load_values(v_at, b * kBoxKeys<kHeadDim>, v_bar,
                          (key + b * kBoxKeys<kHeadDim>) % kBlockKeys, kv_head, 2 * block[b] + 1);
            }
            continue;
          }
          Wait(k_empty + 8 * ring.stage, ring.parity ^ 1);
          ArriveExpecting(k_bar, C::kKeyBytes);
          load(maps.k, maps.k_narrow, k_at, kKeys, 0, k_bar, kv_head, key, work.batch);
          Wait(v_empty + 8 * ring.stage, ring.parity ^ 1);
          ArriveExpecting(v_bar, C::kValueBytes);
          load_values(v_at, 0, v_bar, kv_head, key, work.batch);
        }
      }
    }
  } else {
    MoreRegisters<C::kComputeRegisters>();
    const int g = warpgroup - 1;
    const int thread = threadIdx.x % kWarpgroup, lane = threadIdx.x % 32;
    const int row = thread / 32 * 16 + lane / 4;  // and row + 8, of the warpgroup
    // Named barrier 1 + g hands warpgroup g the turn to start products.
    const int my_turn = 1 + g, next_turn = 1 + (g + 1) % kGroups;
    if (g == kGroups - 1) NamedArrive(next_turn, 2 * kWarpgroup);

    Ring<kStages> k_ring, v_ring;
    Ring<C::kQueryStages> queries;
    const auto slot = [&] { return queries.stage * kGroups + g; };
    const auto start_scores = [&](float(&s)[kKeys / 2]) {
      const uint32_t q_at = q_shared + slot() * C::kQueryBytes;
      const uint32_t k_at = k_shared + k_ring.stage * C::kKeyBytes;
#pragma unroll
      for (int step = 0; step < 4 * C::kWideSlabs; ++step) {
        const int slab = step / 4, within = step % 4 * 32;
        Mma<kKeys>::Bf16(s, Describe(q_at + slab * kMmaRows * kSwizzleBytes + within),
                         Describe(k_at + slab * kKeys * kSwizzleBytes + within), step > 0);
      }
      if constexpr (C::kNarrow) {
        Mma<kKeys>::Bf16(s, DescribeNarrow(q_at + C::kWideSlabs * kMmaRows * kSwizzleBytes),
                         DescribeNarrow(k_at + C::kWideSlabs * kKeys * kSwizzleBytes), true);
      }
      MmaCommit();
    };
    const auto start_values = [&](float(&o)[C::kColumns / 2], const uint32_t(&p)[kKeys / 4]) {
      const uint32_t v_at = v_shared + v_ring.stage * C::kValueBytes;
      const uint32_t slab_bytes = C::kSumColumns > 0 ? ones_shared - v_at : C::kValueSlabBytes;
#pragma unroll
      for (int step = 0; step < kKeys / 16; ++step) {
        Mma<C::kColumns>::Bf16P(o, &p[4 * step],
                                Describe(v_at + step * 16 * kSwizzleBytes, slab_bytes),
                                /*add=*/1);
      }
      MmaCommit();
    };
    const auto release = [&](uint32_t empty, Ring<kStages>& ring) {
      if (lane == 0) Arrive(empty + 8 * ring.stage);
      ring.Next();
    };

    // Lane 0 alone reads it: it is written anew once that lane has freed it.
    const auto piece_of_slot = [&] {
      Piece piece = {};
      if (lane == 0) piece = barriers.pieces[slot()];
      for (int* const x :
           {&piece.index, &piece.work.batch, &piece.work.head, &piece.work.first_row}) {
        *x = __shfl_sync(0xffffffffu, *x, 0);
      }
      return piece;
    };
    const auto place_of = [&](const Work& work, int row) {  // of the warpgroup
      const int first_row = work.first_row + g * group_rows;
      RowPlace place{first_row + row, work.head, shape.kv_len, true};
      if constexpr (kPaged) {
        place.token = first_row + row / shape.together;
        place.head = work.head * shape.together + row % shape.together;
        place.used = row < shape.together * shape.tokens;
      }
      if (kCausal) place.limit = min(shape.kv_len, place.token + shape.kv_len - shape.q_len + 1);
      place.used = place.used && place.token < shape.q_len;
      return place;
    };
    // Of a part: where the results of a row go.
    const auto partial_of = [&](const Piece& piece, const RowPlace& row) {
      const int64_t part = piece.index % shape.parts;
      return shape.partial +
             ((part * shape.q_len + row.token) * shape.q_heads + row.head) * (kHeadDim + 2);
    };
    // Nothing of the piece of work in front is read from shared memory any more.
    const auto free = [&] {
      __syncwarp();
      if (lane == 0) Arrive(q_empty + 8 * slot());
      queries.Next();
    };

    // What this warpgroup computes: tiles of keys from `tile` to `end`, of which those from `whole`
    // on are not seen whole by all rows.
    int tile, end, whole, limit0, limit1;
    // Waits for a piece of work that has keys; false: nothing is left.
    const auto take = [&] {
      while (true) {
        Wait(q_full + 8 * slot(), queries.parity);
        const Piece piece = piece_of_slot();
        if (piece.index < 0) return false;
        const RowPlace row0 = place_of(piece.work, row), row1 = place_of(piece.work, row + 8);
        limit0 = row0.limit;
        limit1 = row1.limit;
        whole = (kCausal ? place_of(piece.work, 0).limit : shape.kv_len) / kKeys;
        const int keys = VisibleKeys<kCausal>(shape, piece.work.first_row, tile_rows);
        const Tiles tiles = TilesOf<kPaged>(shape, keys, kKeys, piece.index);
        tile = tiles.begin;
        end = tiles.end;
        if (!kPaged || tile < end) return true;
        if (lane % 4 == 0) {
          if (row0.used) partial_of(piece, row0)[kHeadDim] = -INFINITY;
          if (row1.used) partial_of(piece, row1)[kHeadDim] = -INFINITY;
        }
        free();
      }
    };
    // Writes the results of a piece of work.
    const auto finish = [&](const Piece& piece, const float(&o)[C::kColumns / 2],
                            const Rows<kHeadDim>& rows) {
      const RowPlace row0 = place_of(piece.work, row), row1 = place_of(piece.work, row + 8);
      float sum0, sum1;
      if constexpr (C::kSumColumns > 0) {
        sum0 = o[kHeadDim / 2];
        sum1 = o[kHeadDim / 2 + 2];
      } else {
        sum0 = QuadSum(rows.sum0);
        sum1 = QuadSum(rows.sum1);
      }
      if (kPaged && shape.parts > 1) {
        float* const partial0 = partial_of(piece, row0);
        float* const partial1 = partial_of(piece, row1);
#pragma unroll
        for (int i = 0; i < kHeadDim / 8; ++i) {
          const int column = 8 * i + 2 * (lane % 4);
          if (row0.used) {
            *reinterpret_cast<float2*>(partial0 + column) = make_float2(o[4 * i], o[4 * i + 1]);
          }
          if (row1.used) {
            *reinterpret_cast<float2*>(partial1 + column) = make_float2(o[4 * i + 2], o[4 * i + 3]);
          }
        }
        if (lane % 4 == 0) {
          const float2 end0 = make_float2(rows.max0 * shape.scale_log2, sum0);
          const float2 end1 = make_float2(rows.max1 * shape.scale_log2, sum1);
          if (row0.used) *reinterpret_cast<float2*>(partial0 + kHeadDim) = end0;
          if (row1.used) *reinterpret_cast<float2*>(partial1 + kHeadDim) = end1;
        }
      } else {
        const auto out_of = [&](const RowPlace& row) {
          return shape.out +
                 (int64_t{piece.work.batch} * shape.q_len + row.token) * shape.out_stride +
                 row.head * kHeadDim;
        };
        StoreRows<kHeadDim>(o, 1 / sum0, 1 / sum1, out_of(row0), out_of(row1), row0.used,
                            row1.used);
      }
    };
    // Before the last values of a piece of work are multiplied.
    const auto clear_values = [&] {
      if (!kPaged || end * kKeys <= shape.kv_len) return;
      Wait(v_full + 8 * v_ring.stage, v_ring.parity);
      ClearValues<kHeadDim>(v_shared + v_ring.stage * C::kValueBytes,
                            shape.kv_len - (end - 1) * kKeys, g);
    };

    // Scores of a tile of keys, and the probabilities that the tensor cores multiply with values.
    float s[kKeys / 2], o[C::kColumns / 2] = {};
    uint32_t p[kKeys / 4];
    const auto weigh = [&](Rows<kHeadDim>& rows) {
      rows.Weigh(s, shape.scale_log2);
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) p[i] = PackBf16(s[2 * i], s[2 * i + 1]);
    };
    const auto mask = [&] {
      if (tile >= whole) Mask(s, tile * kKeys, limit0, limit1);
    };
    // Starts the scores of `tile`, then the products of p with the values in front, and returns
    // when the scores are there. The tensor cores read p from registers while the warpgroup issues
    // those products, so that little of them is left to wait for.
    const auto turn = [&] {
      Wait(k_full + 8 * k_ring.stage, k_ring.parity);
      NamedSync(my_turn, 2 * kWarpgroup);
      MmaFence();
      start_scores(s);
      Wait(v_full + 8 * v_ring.stage, v_ring.parity);
      start_values(o, p);
      NamedArrive(next_turn, 2 * kWarpgroup);
      MmaWait<1>();
      release(k_empty, k_ring);
      mask();
    };
    const auto end_values = [&] {
      MmaWait<0>();
      release(v_empty, v_ring);
    };

    if (!take()) return;
    Wait(k_full + 8 * k_ring.stage, k_ring.parity);
    MmaFence();
    start_scores(s);
    MmaWait<0>();
    release(k_empty, k_ring);
    mask();
    Rows<kHeadDim> rows(s);
    weigh(rows);
    while (true) {
      while (++tile < end) {
        turn();
        float keep0, keep1;
        const bool grown = rows.Grow(s, shape.scale_log2, keep0, keep1);
        end_values();
        if (grown) {
#pragma unroll
          for (int i = 0; i < C::kColumns / 2; i += 4) {
            o[i] *= keep0;
            o[i + 1] *= keep0;
            o[i + 2] *= keep1;
            o[i + 3] *= keep1;
          }
        }
        weigh(rows);
      }
      clear_values();
      const Piece done = piece_of_slot();
      free();
      if (!take()) {
        Wait(v_full + 8 * v_ring.stage, v_ring.parity);
        MmaFence();
        start_values(o, p);
        end_values();
        finish(done, o, rows);
        return;
      }
      // The last values of one piece of work together with the first scores of the next.
      turn();
      const Rows<kHeadDim> rows_done = rows;
      rows = Rows<kHeadDim>(s);
      end_values();
      weigh(rows);
      finish(done, o, rows_done);
#pragma unroll
      for (float& x : o) x = 0;
    }
  }
#else
  __trap();  // the host launches this on devices of capability 9.0 only
#endif
}

// Joins the parts of one query and head: a thread takes a channel. Reads all partial results once.
template <int kHeadDim>
__global__ void JoinKernel(const AttentionShape shape, int64_t rows) {
  constexpr int kPitch = kHeadDim + 2;
  WaitForKernelInFront();
  LetNextKernelStart();
  const int64_t row = blockIdx.x * int64_t{blockDim.y} + threadIdx.y;
  if (row >= rows) return;
  const float* const from = shape.partial + row * kPitch;
  const int64_t part = rows * kPitch;
  float most = -INFINITY, sum = 0, total = 0;
  for (int p = 0; p < shape.parts; ++p) most = fmaxf(most, from[p * part + kHeadDim]);
  for (int p = 0; p < shape.parts; ++p) {
    const float at = from[p * part + kHeadDim];
    if (at == -INFINITY) continue;  // no key of the part is seen, and nothing was written
    const float share = Exp2(at - most);
    sum += share * from[p * part + threadIdx.x];
    total += share * from[p * part + kHeadDim + 1];
  }
  shape.out[row / shape.q_heads * shape.out_stride + row % shape.q_heads * kHeadDim + threadIdx.x] =
      __float2bfloat16_rn(sum / total);
}

template <int kHeadDim>
void LaunchPaged(const AttentionArgs& args, void* workspace, cudaStream_t stream) {
  using C = Config<kHeadDim>;
  const PagedPlan plan = PlanPaged(args);
  AttentionShape shape = ShapeOf(args, 4 * kHeadDim);
  shape.table = args.table;
  shape.together = plan.heads_together;
  shape.tokens = plan.tokens;
  shape.q_tiles = plan.tiles;
  shape.parts = plan.parts;
  shape.partial = static_cast<float*>(workspace) + 64;  // behind 256 bytes
  // Heads that share a tile count as one.
  shape.heads /= plan.heads_together;
  shape.group /= plan.heads_together;
  shape.all_heads = shape.section = shape.heads;
  const auto u = [](int64_t x) { return static_cast<cuuint64_t>(x); };
  const auto map_queries = [&](cuuint32_t channels) {
    return MapTensor<4>(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, args.q,
                        {kHeadDim, u(args.heads), u(args.q_len), 1},
                        {2 * kHeadDim, u(2 * args.q_stride), u(2 * args.q_stride * args.q_len)},
                        {channels, static_cast<cuuint32_t>(plan.heads_together),
                         static_cast<cuuint32_t>(plan.tokens), 1});
  };
  // Halves of blocks, keys and values in turn: as many as there can be.
  constexpr cuuint64_t kHalves = cuuint64_t{1} << 24;
  const cuuint64_t head_bytes = 2 * kHeadDim * kBlockKeys;
  const auto map_blocks = [&](cuuint32_t channels) {
    return MapTensor<4>(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, args.blocks,
                        {kHeadDim, kBlockKeys, u(args.kv_heads), kHalves},
                        {2 * kHeadDim, head_bytes, head_bytes * args.kv_heads},
                        {channels, static_cast<cuuint32_t>(kBoxKeys<kHeadDim>), 1, 1});
  };
  const CUtensorMap q = map_queries(64), kv = map_blocks(64);
  const Maps maps = {q, C::kNarrow ? map_queries(16) : q, kv, C::kNarrow ? map_blocks(16) : kv, kv};
  LaunchPersistent(FlashKernel<kHeadDim, C::kGroups, true, true>, C::kThreads, C::kSharedBytes,
                   shape.q_tiles * shape.all_heads * shape.parts, stream, maps, shape);
  if (shape.parts == 1) return;
  constexpr int kRowsAtOnce = 4;
  const int64_t rows = args.q_len * args.heads;
  LaunchAhead(JoinKernel<kHeadDim>, static_cast<unsigned>((rows + kRowsAtOnce - 1) / kRowsAtOnce),
              dim3(kHeadDim, kRowsAtOnce), stream, shape, rows);
}

template <int kHeadDim, int kGroups, bool kCausal>
void LaunchTiles(const AttentionArgs& args, void* workspace, cudaStream_t stream) {
  using C = Config<kHeadDim, kGroups>;
  AttentionShape shape = ShapeOf(args, 4 * kHeadDim);
  shape.q_tiles = static_cast<int>((args.q_len + C::kRows - 1) / C::kRows);
  shape.counter = static_cast<unsigned*>(workspace);
  const auto map_queries = [&](int channels) {
    return MapHeads(args.q, args.batch, args.q_len, args.heads, kHeadDim, args.q_stride, kMmaRows,
                    channels);
  };
  const auto map_keys = [&](const void* data, int64_t stride, int channels) {
    return MapHeads(data, args.batch, args.kv_len, args.kv_heads, kHeadDim, stride, C::kKeys,
                    channels);
  };
  const CUtensorMap q = map_queries(64), k = map_keys(args.k, args.k_stride, 64);
  const Maps maps = {q, C::kNarrow ? map_queries(16) : q, k,
                     C::kNarrow ? map_keys(args.k, args.k_stride, 16) : k,
                     map_keys(args.v, args.v_stride, 64)};
  if (kCausal) {
    Check(cudaMemsetAsync(shape.counter, 0, sizeof(unsigned), stream), "clearing a counter");
  }
  LaunchPersistent(FlashKernel<kHeadDim, kGroups, kCausal, false>, C::kThreads, C::kSharedBytes,
                   shape.q_tiles * shape.all_heads, stream, maps, shape);
}

template <int kHeadDim>
void Launch(const AttentionArgs& args, void* workspace, cudaStream_t stream) {
  constexpr int kMost = MostGroups(kHeadDim);
  if (args.blocks) return LaunchPaged<kHeadDim>(args, workspace, stream);
  if (args.causal) return LaunchTiles<kHeadDim, kMost, true>(args, workspace, stream);
  if constexpr (kMost == 3) {  // of towers, whose frames may come one by one
    const int groups = PlanGroups(args, Multiprocessors());
    if (groups == 1) return LaunchTiles<kHeadDim, 1, false>(args, workspace, stream);
    if (groups == 2) return LaunchTiles<kHeadDim, 2, false>(args, workspace, stream);
  }
  LaunchTiles<kHeadDim, kMost, false>(args, workspace, stream);
}

}  // namespace

void FlashAttention(const AttentionArgs& args, void* workspace, cudaStream_t stream) {
  WithHeadDim(args.head_dim, [&](auto head_dim) { Launch<head_dim()>(args, workspace, stream); });
}

}  // namespace sluice::cuda::hopper
