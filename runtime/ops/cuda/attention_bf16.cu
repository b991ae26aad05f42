// Exact attention in bf16 for Hopper, after FlashAttention-3 (arXiv 2407.08608).
//
//   S = Q K^T, P = exp2(S * scale_log2 - max), O = P V / sum(P)        one pass over the keys
//
// A block takes tiles of 64 * kGroups queries of one head until none is left. One warp of the first
// warpgroup copies: queries once a tile, keys and values in tiles of 128 through rings of kStages
// buffers. Each other warpgroup computes 64 queries. While the tensor cores multiply the
// probabilities of one key tile with its values, the warpgroup computes the exponentials of the
// next tile, and the warpgroups take turns at starting products, so that one's exponentials hide
// behind the other's products.
//
// Over blocks of a paged cache (kPaged) the copy engine fetches boxes of keys that lie in one
// block. There problems have few queries and many keys, so the keys are cut into parts, each a
// piece of work whose sums JoinKernel joins, and the query heads that share keys may share a tile:
// its rows are then (token, head) pairs, token by token. Nothing that the host computes depends on
// how many keys there are.
//
// Sizes: head_dim 64, 72, 80, 128; heads narrower than a multiple of 64 channels are padded with
// zeros by the copy engine in shared memory only. Products: 4 * q * keys * head_dim a head.
// Bytes from memory: each operand once, where keys and values of a section of heads stay in the
// second-level cache.
#include <algorithm>

#include "runtime/ops/cuda/attention_hopper.cuh"

namespace sluice::cuda::hopper {
namespace {

constexpr int kBlockKeys = 64;  // of a paged cache

template <int kHeadDim>
struct Config {
  static constexpr int kSlabs = (kHeadDim + 63) / 64;  // of 64 channels, 128 bytes
  // Registers of a computing thread: scores 64, probabilities 32, sums kHeadDim / 2. Three
  // warpgroups share less traffic of keys and values, but leave each thread 160 registers only.
  static constexpr int kGroups = kHeadDim <= 80 ? 3 : 2;
  static constexpr int kRows = kMmaRows * kGroups;
  static constexpr int kKeys = kHeadDim == 80 ? 96 : 128;  // 96: to stay within 160 registers
  static constexpr int kStages = kSlabs == 1 ? 4 : 2;
  static constexpr int kBoxKeys = kKeys % kBlockKeys == 0 ? kBlockKeys : 32;  // within a block
  static constexpr int kThreads = kWarpgroup * (1 + kGroups);
  static constexpr int kCopyRegisters = kGroups == 3 ? 32 : 24;
  static constexpr int kComputeRegisters = kGroups == 3 ? 160 : 240;

  static constexpr int kQueryStages = 2;  // the next tile's queries come while this one's compute
  // Heads of 64 are bound by instructions, not by products: there the tensor cores also sum the
  // probabilities, by 8 more columns of values that are all 1, in a slab that all stages share.
  static constexpr int kSumColumns = kHeadDim == 64 ? 8 : 0;
  static constexpr int kColumns = kHeadDim + kSumColumns;

  static constexpr int kQueryBytes = kMmaRows * kSlabs * kSwizzleBytes;  // of one warpgroup
  static constexpr int kKeySlabBytes = kKeys * kSwizzleBytes;
  static constexpr int kKeyBytes = kKeySlabBytes * kSlabs;
  static constexpr int kOnesBytes = kSumColumns > 0 ? kKeySlabBytes : 0;
  static constexpr int kSharedBytes = 1024 + kQueryStages * kGroups * kQueryBytes +
                                      2 * kStages * kKeyBytes + kOnesBytes;  // 1024: to align
};

template <int kQueries, int kStages>
struct Barriers {
  uint64_t q_full[kQueries], q_empty[kQueries];  // of each stage and warpgroup
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  int work[kQueries];  // what each warpgroup computes next; negative: nothing is left
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// What one warpgroup carries along the keys for its 64 queries.
template <int kHeadDim>
struct Rows {
  float max0 = -INFINITY, max1 = -INFINITY;  // of rows lane / 4 and lane / 4 + 8, unscaled
  float sum0 = 0, sum1 = 0;                  // of this lane's columns, without kSumColumns

  // Turns scores into probabilities. Where a maximum has grown by more than 2^kSlack, tells by what
  // to scale what was summed before, and returns true; below that the old one serves as well, since
  // bf16 and f32 have exponents.
  template <int kCount>
  __device__ bool Update(float (&s)[kCount], float scale_log2, float& keep0, float& keep1) {
    constexpr float kSlack = 8;
    float new0 = max0, new1 = max1;
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      new0 = fmaxf(new0, fmaxf(s[i], s[i + 1]));
      new1 = fmaxf(new1, fmaxf(s[i + 2], s[i + 3]));
    }
    new0 = QuadMax(new0);
    new1 = QuadMax(new1);
    keep0 = keep1 = 1;
    const bool grown =
        __any_sync(0xffffffffu, fmaxf(new0 - max0, new1 - max1) * scale_log2 > kSlack);
    if (grown) {
      // Where nothing has been seen yet, nothing was summed.
      keep0 = new0 == -INFINITY ? 1 : Exp2((max0 - new0) * scale_log2);
      keep1 = new1 == -INFINITY ? 1 : Exp2((max1 - new1) * scale_log2);
      max0 = new0;
      max1 = new1;
    }
    const float base0 = max0 == -INFINITY ? 0 : max0 * scale_log2;
    const float base1 = max1 == -INFINITY ? 0 : max1 * scale_log2;
    float add0 = 0, add1 = 0;
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      s[i] = Exp2(s[i] * scale_log2 - base0);
      s[i + 1] = Exp2(s[i + 1] * scale_log2 - base0);
      s[i + 2] = Exp2(s[i + 2] * scale_log2 - base1);
      s[i + 3] = Exp2(s[i + 3] * scale_log2 - base1);
      if constexpr (Config<kHeadDim>::kSumColumns == 0) {
        add0 += s[i] + s[i + 1];
        add1 += s[i + 2] + s[i + 3];
      }
    }
    sum0 = sum0 * keep0 + add0;
    sum1 = sum1 * keep1 + add1;
    return grown;
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
    for (int slab = 0; slab < C::kSlabs; ++slab) {
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(
                       values + slab * C::kKeySlabBytes + 16 * i),
                   "r"(0)
                   : "memory");
    }
  }
  FenceAsyncProxy();
  NamedSync(8 + warpgroup, kWarpgroup);
}

template <int kHeadDim, bool kCausal, bool kPaged>
__global__ void __launch_bounds__(Config<kHeadDim>::kThreads, 1)
    FlashKernel(const __grid_constant__ CUtensorMap q_map,
                const __grid_constant__ CUtensorMap k_map,
                const __grid_constant__ CUtensorMap v_map, const AttentionShape given) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using C = Config<kHeadDim>;
  AttentionShape shape = given;
  constexpr int kGroups = C::kGroups, kStages = C::kStages, kKeys = C::kKeys;
  extern __shared__ uint8_t shared[];
  __shared__ Barriers<C::kQueryStages * kGroups, kStages> barriers;
  const uint32_t q_shared = (SharedAddress(shared) + 1023) / 1024 * 1024;
  const uint32_t k_shared = q_shared + C::kQueryStages * kGroups * C::kQueryBytes;
  const uint32_t v_shared = k_shared + kStages * C::kKeyBytes;
  const uint32_t ones_shared = v_shared + kStages * C::kKeyBytes;
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
  const int query_bytes =
      kPaged ? shape.together * shape.tokens * C::kSlabs * kSwizzleBytes : C::kQueryBytes;

  if (warpgroup == 0) {
    FewerRegisters<C::kCopyRegisters>();
    if (threadIdx.x == 0) {
      PrefetchMap(q_map);
      PrefetchMap(k_map);
      PrefetchMap(v_map);
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
          barriers.work[slot] = none ? -1 : index;
          if (none) {
            Arrive(q_full + 8 * slot);
            continue;
          }
          ArriveExpecting(q_full + 8 * slot, query_bytes);
          for (int slab = 0; slab < C::kSlabs; ++slab) {
            Load4(q_map, q_shared + slot * C::kQueryBytes + slab * kMmaRows * kSwizzleBytes,
                  q_full + 8 * slot, 64 * slab, kPaged ? work.head * shape.together : work.head,
                  work.first_row + g * group_rows, work.batch);
          }
        }
        if (none) break;
        const int keys = VisibleKeys<kCausal>(shape, work.first_row, tile_rows);
        const Tiles tiles = TilesOf<kPaged>(shape, keys, kKeys, index);
        const int kv_head = work.head / shape.group;
        for (int tile = tiles.begin; tile < tiles.end; ++tile, ring.Next()) {
          const int key = tile * kKeys;
          const uint32_t at = ring.stage * C::kKeyBytes;
          if constexpr (kPaged) {
            constexpr int kBoxes = kKeys / C::kBoxKeys;
            int block[kBoxes];
#pragma unroll
            for (int b = 0; b < kBoxes; ++b) {
              // Behind the last key that block once more.
              const int first = min(key + b * C::kBoxKeys, keys - 1);
              block[b] = __ldg(shape.table + 1 + first / kBlockKeys);
            }
            const auto load = [&](const CUtensorMap& map, uint32_t to, uint32_t bar, int half) {
#pragma unroll
              for (int b = 0; b < kBoxes; ++b) {
                for (int slab = 0; slab < C::kSlabs; ++slab) {
                  Load4(map, to + slab * C::kKeySlabBytes + b * C::kBoxKeys * kSwizzleBytes, bar,
                        64 * slab, (key + b * C::kBoxKeys) % kBlockKeys, kv_head,
                        2 * block[b] + half);
                }
              }
            };
            Wait(k_empty + 8 * ring.stage, ring.parity ^ 1);
            ArriveExpecting(k_full + 8 * ring.stage, C::kKeyBytes);
            load(k_map, k_shared + at, k_full + 8 * ring.stage, 0);
            Wait(v_empty + 8 * ring.stage, ring.parity ^ 1);
            ArriveExpecting(v_full + 8 * ring.stage, C::kKeyBytes);
            load(k_map, v_shared + at, v_full + 8 * ring.stage, 1);
            continue;
          }
          Wait(k_empty + 8 * ring.stage, ring.parity ^ 1);
          ArriveExpecting(k_full + 8 * ring.stage, C::kKeyBytes);
          for (int slab = 0; slab < C::kSlabs; ++slab) {
            Load4(k_map, k_shared + at + slab * C::kKeySlabBytes, k_full + 8 * ring.stage,
                  64 * slab, kv_head, key, work.batch);
          }
          Wait(v_empty + 8 * ring.stage, ring.parity ^ 1);
          ArriveExpecting(v_full + 8 * ring.stage, C::kKeyBytes);
          for (int slab = 0; slab < C::kSlabs; ++slab) {
            Load4(v_map, v_shared + at + slab * C::kKeySlabBytes, v_full + 8 * ring.stage,
                  64 * slab, kv_head, key, work.batch);
          }
        }
      }
    }
  } else {
    MoreRegisters<C::kComputeRegisters>();
    const int g = warpgroup - 1;
    const int thread = threadIdx.x % kWarpgroup, lane = threadIdx.x % 32;
    // Named barrier 1 + g hands warpgroup g the turn to start products.
    const int my_turn = 1 + g, next_turn = 1 + (g + 1) % kGroups;
    if (g == kGroups - 1) NamedArrive(next_turn, 2 * kWarpgroup);

    const auto start_scores = [&](float(&s)[kKeys / 2], uint32_t q_at, int stage) {
      const uint32_t k_at = k_shared + stage * C::kKeyBytes;
#pragma unroll
      for (int step = 0; step < (kHeadDim + 15) / 16; ++step) {
        const int slab = step / 4, within = step % 4 * 32;
        Mma<kKeys>::Bf16(s, Describe(q_at + slab * kMmaRows * kSwizzleBytes + within),
                         Describe(k_at + slab * C::kKeySlabBytes + within), step > 0);
      }
    };
    const auto start_values = [&](float(&o)[C::kColumns / 2], const uint32_t(&p)[kKeys / 4],
                                  int stage, bool add) {
      const uint32_t v_at = v_shared + stage * C::kKeyBytes;
      const uint32_t slab_bytes = C::kSumColumns > 0 ? ones_shared - v_at : C::kKeySlabBytes;
#pragma unroll
      for (int step = 0; step < kKeys / 16; ++step) {
        Mma<C::kColumns>::Bf16P(o, &p[4 * step],
                                Describe(v_at + step * 16 * kSwizzleBytes, slab_bytes),
                                step > 0 || add);
      }
    };
    const auto pack = [&](const float(&s)[kKeys / 2], uint32_t(&p)[kKeys / 4]) {
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) p[i] = PackBf16(s[2 * i], s[2 * i + 1]);
    };

    Ring<kStages> k_ring, v_ring;
    for (Ring<C::kQueryStages> queries;; queries.Next()) {
      const int slot = queries.stage * kGroups + g;
      const uint32_t q_at = q_shared + slot * C::kQueryBytes;
      Wait(q_full + 8 * slot, queries.parity);
      const int index = barriers.work[slot];
      if (index < 0) break;
      const Work work = WorkOf(shape, kPaged ? index / shape.parts : index, tile_rows);
      const int first_row = work.first_row + g * group_rows;
      const int keys = VisibleKeys<kCausal>(shape, work.first_row, tile_rows);
      const auto [first, tiles] = TilesOf<kPaged>(shape, keys, kKeys, index);
      const int offset = shape.kv_len - shape.q_len;
      const auto place_of = [&](int row) {  // of the warpgroup
        RowPlace place{first_row + row, work.head, shape.kv_len, true};
        if constexpr (kPaged) {
          place.token = first_row + row / shape.together;
          place.head = work.head * shape.together + row % shape.together;
          place.used = row < shape.together * shape.tokens;
        }
        if (kCausal) place.limit = min(shape.kv_len, place.token + offset + 1);
        place.used = place.used && place.token < shape.q_len;
        return place;
      };
      const int row = thread / 32 * 16 + lane / 4;
      const RowPlace row0 = place_of(row), row1 = place_of(row + 8);
      const int limit0 = row0.limit, limit1 = row1.limit;
      // Tiles up to here are seen whole by all rows of the warpgroup.
      const int whole =
          (kCausal ? min(shape.kv_len, first_row + offset + 1) : shape.kv_len) / kKeys;

      // Of a part: where its rows' results go.
      float *partial0 = nullptr, *partial1 = nullptr;
      if constexpr (kPaged) {
        const auto partial_of = [&](const RowPlace& row) {
          const int64_t part = index % shape.parts;
          return shape.partial +
                 ((part * shape.q_len + row.token) * shape.q_heads + row.head) * (kHeadDim + 2);
        };
        partial0 = partial_of(row0);
        partial1 = partial_of(row1);
        if (first >= tiles) {
          if (lane == 0) Arrive(q_empty + 8 * slot);
          if (lane % 4 == 0) {
            if (row0.used) partial0[kHeadDim] = -INFINITY;
            if (row1.used) partial1[kHeadDim] = -INFINITY;
          }
          continue;
        }
      }

      float s[kKeys / 2], o[C::kColumns / 2], keep0, keep1;
      uint32_t p[kKeys / 4];
      Rows<kHeadDim> rows;

      Wait(k_full + 8 * k_ring.stage, k_ring.parity);
      MmaFence();
      start_scores(s, q_at, k_ring.stage);
      MmaCommit();
      MmaWait<0>();
      if (lane == 0) Arrive(k_empty + 8 * k_ring.stage);
      k_ring.Next();
      if (whole <= first) Mask(s, first * kKeys, limit0, limit1);
      rows.Update(s, shape.scale_log2, keep0, keep1);
      pack(s, p);

      for (int tile = first + 1; tile < tiles; ++tile) {
        Wait(k_full + 8 * k_ring.stage, k_ring.parity);
        NamedSync(my_turn, 2 * kWarpgroup);
        MmaFence();
        start_scores(s, q_at, k_ring.stage);
        MmaCommit();
        Wait(v_full + 8 * v_ring.stage, v_ring.parity);
        start_values(o, p, v_ring.stage, tile > first + 1);
        MmaCommit();
        NamedArrive(next_turn, 2 * kWarpgroup);
        MmaWait<1>();
        if (lane == 0) Arrive(k_empty + 8 * k_ring.stage);
        k_ring.Next();
        if (tile >= whole) Mask(s, tile * kKeys, limit0, limit1);
        const bool grown = rows.Update(s, shape.scale_log2, keep0, keep1);
        MmaWait<0>();
        if (lane == 0) Arrive(v_empty + 8 * v_ring.stage);
        v_ring.Next();
        if (grown) {
#pragma unroll
          for (int i = 0; i < C::kColumns / 2; i += 4) {
            o[i] *= keep0;
            o[i + 1] *= keep0;
            o[i + 2] *= keep1;
            o[i + 3] *= keep1;
          }
        }
        pack(s, p);
      }
      if (lane == 0) Arrive(q_empty + 8 * slot);
      Wait(v_full + 8 * v_ring.stage, v_ring.parity);
      if (kPaged && tiles * kKeys > shape.kv_len) {
        ClearValues<kHeadDim>(v_shared + v_ring.stage * C::kKeyBytes,
                              shape.kv_len - (tiles - 1) * kKeys, g);
      }
      MmaFence();
      start_values(o, p, v_ring.stage, tiles > first + 1);
      MmaCommit();
      MmaWait<0>();
      if (lane == 0) Arrive(v_empty + 8 * v_ring.stage);
      v_ring.Next();

      const auto out_of = [&](const RowPlace& row) {
        return shape.out + (int64_t{work.batch} * shape.q_len + row.token) * shape.out_stride +
               row.head * kHeadDim;
      };
      float sum0, sum1;
      if constexpr (C::kSumColumns > 0) {
        sum0 = o[kHeadDim / 2];
        sum1 = o[kHeadDim / 2 + 2];
      } else {
        sum0 = QuadSum(rows.sum0);
        sum1 = QuadSum(rows.sum1);
      }
      if (kPaged && shape.parts > 1) {
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
        continue;
      }
      StoreRows<kHeadDim>(o, 1 / sum0, 1 / sum1, out_of(row0), out_of(row1), row0.used, row1.used);
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
  const CUtensorMap q = MapTensor<4>(
      CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, args.q, {kHeadDim, u(args.heads), u(args.q_len), 1},
      {2 * kHeadDim, u(2 * args.q_stride), u(2 * args.q_stride * args.q_len)},
      {64, static_cast<cuuint32_t>(plan.heads_together), static_cast<cuuint32_t>(plan.tokens), 1});
  // Halves of blocks, keys and values in turn: as many as there can be.
  constexpr cuuint64_t kHalves = cuuint64_t{1} << 24;
  const cuuint64_t head_bytes = 2 * kHeadDim * kBlockKeys;
  const CUtensorMap kv = MapTensor<4>(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, args.blocks,
                                      {kHeadDim, kBlockKeys, u(args.kv_heads), kHalves},
                                      {2 * kHeadDim, head_bytes, head_bytes * args.kv_heads},
                                      {64, static_cast<cuuint32_t>(C::kBoxKeys), 1, 1});
  LaunchPersistent(FlashKernel<kHeadDim, true, true>, C::kThreads, C::kSharedBytes,
                   shape.q_tiles * shape.all_heads * shape.parts, stream, q, kv, kv, shape);
  if (shape.parts == 1) return;
  constexpr int kRowsAtOnce = 4;
  const int64_t rows = args.q_len * args.heads;
  LaunchAhead(JoinKernel<kHeadDim>, static_cast<unsigned>((rows + kRowsAtOnce - 1) / kRowsAtOnce),
              dim3(kHeadDim, kRowsAtOnce), stream, shape, rows);
}

template <int kHeadDim>
void Launch(const AttentionArgs& args, void* workspace, cudaStream_t stream) {
  using C = Config<kHeadDim>;
  if (args.blocks) return LaunchPaged<kHeadDim>(args, workspace, stream);
  AttentionShape shape = ShapeOf(args, 4 * kHeadDim);
  shape.q_tiles = static_cast<int>((args.q_len + C::kRows - 1) / C::kRows);
  shape.counter = static_cast<unsigned*>(workspace);
  const CUtensorMap q =
      MapHeads(args.q, args.batch, args.q_len, args.heads, kHeadDim, args.q_stride, kMmaRows);
  const CUtensorMap k =
      MapHeads(args.k, args.batch, args.kv_len, args.kv_heads, kHeadDim, args.k_stride, C::kKeys);
  const CUtensorMap v =
      MapHeads(args.v, args.batch, args.kv_len, args.kv_heads, kHeadDim, args.v_stride, C::kKeys);
  if (args.causal) {
    Check(cudaMemsetAsync(shape.counter, 0, sizeof(unsigned), stream), "clearing a counter");
  }
  LaunchPersistent(
      args.causal ? FlashKernel<kHeadDim, true, false> : FlashKernel<kHeadDim, false, false>,
      C::kThreads, C::kSharedBytes, shape.q_tiles * shape.all_heads, stream, q, k, v, shape);
}

}  // namespace

void FlashAttention(const AttentionArgs& args, void* workspace, cudaStream_t stream) {
  WithHeadDim(args.head_dim, [&](auto head_dim) { Launch<head_dim()>(args, workspace, stream); });
}

}  // namespace sluice::cuda::hopper
