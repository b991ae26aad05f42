// SageAttention2 (arXiv 2411.10958) for Hopper: scores in int8, values in fp8 (e4m3).
//
//   k' = k - mean(k)         softmax does not see a constant subtracted from all keys
//   S  = Q8 K8^T * (q_scale k_scale scale_log2)          int32 sums are exact
//   P8 = e4m3(exp2(S - max + log2(448))),  R = P8 V8     sums of one key tile
//   O  = O * exp2(old max - max) + R                     f32, outside the tensor cores
//
// The softmax, not the products, sets the speed here. So the sum of a row's probabilities comes
// from the tensor cores too: V8 has 8 more channels, in shared memory only, that are all 1.
//
// The second accumulator O is needed because the tensor cores keep 13 bits of an fp8 product's sum.
// Scales follow the layout of wgmma results, so that a thread needs one factor for a whole tile of
// scores: queries r and r + 8 of every 16 share a scale, and the keys j of a tile of 128 with equal
// (j % 8) / 2.
//
// Three kernels. SampleKv (attention_quantize.cuh) looks at some keys and values of each head.
// QuantizeKv writes int8 keys and transposed fp8 values. SageKernel has the structure of
// attention_bf16.cu, but one tile of queries ends before the next begins and its warpgroups take no
// turns, which costs time here. It quantises its queries itself: they are read once.
//
// Differs from the paper: values have a scale a tile besides one a channel (folded into O's
// rescaling, at no cost), and neither mean nor channel scales need all tokens.
//
// Bytes from memory: bf16 keys and values twice counting what is written, queries once.
#include <algorithm>

#include "runtime/ops/cuda/attention_hopper.cuh"
#include "runtime/ops/cuda/attention_quantize.cuh"

namespace sluice::cuda::hopper {
namespace {

constexpr int kTileKeys = QuantizedKvLayout::kTileKeys;
constexpr int kKeyScales = QuantizedKvLayout::kKeyScales;

// Pointers of QuantizedKvLayout.
struct QuantizedKv {
  float* key_mean;
  float* value_channels;
  float* key_scales;
  float* value_scales;
  int8_t* keys;
  uint8_t* values;
  int64_t padded_len, key_pitch;
  int tiles;
};

// ---- QuantizeKv: block (tile of 128 tokens, kv head) -----------------------------------------

constexpr int kQuantizeThreads = 256;

template <int kHeadDim>
__global__ void __launch_bounds__(kQuantizeThreads)
    QuantizeKv(const KvSource source, const QuantizedKv to) {
  constexpr int kPieces = kHeadDim / 8;  // of 16 bytes, in a row
  constexpr int kWarps = kQuantizeThreads / 32;
  __shared__ float key_max[kWarps], value_max[kWarps];
  // Words of four values that follow each other in the permuted order, a row a channel; one more
  // word a row keeps channels in different banks.
  __shared__ uint32_t transposed[kHeadDim][kTileKeys / 4 + 1];
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  LetNextKernelStart();
  const int tile = blockIdx.x, head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column = head % source.kv_heads * kHeadDim;
  const int64_t first = int64_t{head / source.kv_heads} * source.kv_len;
  const int len = source.kv_len - tile * kTileKeys;  // tokens from this tile on

  // Keys: warps w and w + 4 take the 32 tokens of scale w, 16 each.
  constexpr int kKeyItems = (16 * kPieces + 31) / 32;
  const int scale_index = warp % 4;
  const auto key_token = [&](int i) {
    const int token = (i * 32 + lane) / kPieces;  // of the warp's 16
    return 64 * (warp / 4) + token / 2 * 8 + 2 * scale_index + token % 2;
  };
  uint4 keys[kKeyItems];
#pragma unroll
  for (int i = 0; i < kKeyItems; ++i) {
    const int token = key_token(i), piece = (i * 32 + lane) % kPieces;
    if (i * 32 + lane < 16 * kPieces && token < len) {
      keys[i] =
          __ldg(reinterpret_cast<const uint4*>(
                    source.k + (first + tile * kTileKeys + token) * source.k_stride + column) +
                piece);
    }
  }
  // Values: an item is a word of four tokens by 8 channels. Position p of every 16 tokens holds
  // token [0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15][p]: then the probabilities that a thread holds
  // after the first product are what it must hold for the second.
  constexpr int kValueItems = (kTileKeys / 4 * kPieces + kQuantizeThreads - 1) / kQuantizeThreads;
  uint4 values[kValueItems][4];
#pragma unroll
  for (int i = 0; i < kValueItems; ++i) {
    const int item = i * kQuantizeThreads + threadIdx.x, word = item / kPieces;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int token = word / 4 * 16 + word % 4 * 2 + j % 2 + j / 2 * 8;
      values[i][j] = make_uint4(0, 0, 0, 0);
      if (token < min(len, kTileKeys)) {
        values[i][j] =
            __ldg(reinterpret_cast<const uint4*>(
                      source.v + (first + tile * kTileKeys + token) * source.v_stride + column) +
                  item % kPieces);
      }
    }
  }

  const float* mean = to.key_mean + head * kHeadDim;
  const float* channels = to.value_channels + head * kHeadDim;
  // Element j of key item i without the mean.
  const auto centred = [&](int i, float(&x)[8]) {
    const int piece = (i * 32 + lane) % kPieces;
    Unpack(keys[i], x);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] -= mean[8 * piece + j];
  };
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kKeyItems; ++i) {
    if (i * 32 + lane < 16 * kPieces && key_token(i) < len) {
      float x[8];
      centred(i, x);
#pragma unroll
      for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fabsf(x[j]));
    }
  }
  largest = WarpMax(largest);
  if (lane == 0) key_max[warp] = largest;

  largest = 0;
#pragma unroll
  for (int i = 0; i < kValueItems; ++i) {
    const int piece = (i * kQuantizeThreads + threadIdx.x) % kPieces;
    float even[8] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float x[8];
      Unpack(values[i][j], x);
#pragma unroll
      for (int c = 0; c < 8; ++c) even[c] = fmaxf(even[c], fabsf(x[c]));
    }
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      largest = fmaxf(largest, __fdividef(even[c], channels[8 * piece + c]));
    }
  }
  largest = WarpMax(largest);
  if (lane == 0) value_max[warp] = largest;
  __syncthreads();

  const float of_keys = fmaxf(fmaxf(key_max[warp], key_max[warp ^ 4]), kFloor);
  float of_values = kFloor;
  for (float x : value_max) of_values = fmaxf(of_values, x);
  if (warp < kKeyScales && lane == 0) {
    to.key_scales[(head * to.tiles + tile) * kKeyScales + warp] = of_keys / kLargestInt8;
  }
  if (threadIdx.x == 0) to.value_scales[head * to.tiles + tile] = of_values / kLargestFp8;

  const float to_int = kLargestInt8 / of_keys;
#pragma unroll
  for (int i = 0; i < kKeyItems; ++i) {
    if (i * 32 + lane < 16 * kPieces) {
      const int token = key_token(i), piece = (i * 32 + lane) % kPieces;
      float x[8];
      centred(i, x);
      uint32_t packed[2] = {};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int rounded = token < len ? __float2int_rn(x[j] * to_int) : 0;
        packed[j / 4] |= static_cast<uint32_t>(rounded & 0xff) << (j % 4 * 8);
      }
      *reinterpret_cast<uint2*>(
          to.keys + (head * to.padded_len + tile * kTileKeys + token) * to.key_pitch + 8 * piece) =
          make_uint2(packed[0], packed[1]);
    }
  }
  const float to_fp8 = kLargestFp8 / of_values;
#pragma unroll
  for (int i = 0; i < kValueItems; ++i) {
    const int item = i * kQuantizeThreads + threadIdx.x, word = item / kPieces;
    const int piece = item % kPieces;
    if (word < kTileKeys / 4) {
      float x[4][8];
#pragma unroll
      for (int j = 0; j < 4; ++j) Unpack(values[i][j], x[j]);
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const float factor = __fdividef(to_fp8, channels[8 * piece + c]);
        transposed[8 * piece + c][word ^ (piece / 4)] =
            PackFp8(x[0][c] * factor, x[1][c] * factor, x[2][c] * factor, x[3][c] * factor);
      }
    }
  }
  __syncthreads();
  for (int channel = warp; channel < kHeadDim; channel += kWarps) {
    uint32_t* row = reinterpret_cast<uint32_t*>(
        to.values + (int64_t{head} * kHeadDim + channel) * to.padded_len + tile * kTileKeys);
    row[lane] = transposed[channel][lane ^ (channel / 32)];
  }
#else
  __trap();  // the host launches this on devices of capability 9.0 only
#endif
}

// ---- SageKernel ------------------------------------------------------------------------------

template <int kHeadDim>
struct Config {
  static constexpr int kSlabs = (kHeadDim + 63) / 64;  // of 64 bf16 channels
  static constexpr int kGroups = 2;
  static constexpr int kRows = kMmaRows * kGroups;
  static constexpr int kStages = 4;
  static constexpr int kThreads = kWarpgroup * (1 + kGroups);
  static constexpr int kCopyRegisters = 24;
  static constexpr int kComputeRegisters = 240;
  static constexpr int kQuerySlabBytes = kMmaRows * kSwizzleBytes;
  static constexpr int kQueryBytes = kQuerySlabBytes * kSlabs;      // bf16, of one warpgroup
  static constexpr int kQuantizedBytes = kMmaRows * kSwizzleBytes;  // int8, of one warpgroup
  static constexpr int kKeyBytes = kTileKeys * kSwizzleBytes;
  static constexpr int kValueBytes = kHeadDim * kTileKeys;  // as copied
  static constexpr int kSumColumns = 8;
  static constexpr int kColumns = kHeadDim + kSumColumns;
  static constexpr int kValueStageBytes = kColumns * kTileKeys;
  static constexpr int kSharedBytes = 1024 + kGroups * (kQueryBytes + kQuantizedBytes) +
                                      kStages * (kKeyBytes + kValueStageBytes);  // 1024: to align
  static_assert(kTileKeys == kSwizzleBytes && kValueBytes % 1024 == 0);
};

template <int kGroups, int kStages>
struct Barriers {
  uint64_t q_full[kGroups], q_empty[kGroups];
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  int work[kGroups];  // what each warpgroup computes next; negative: nothing is left
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
__device__ inline uint4 LoadShared(uint32_t at) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(at));
  return x;
}
__device__ inline void StoreShared(uint32_t at, uint32_t x, uint32_t y) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(x), "r"(y) : "memory");
}

// Turns the warpgroup's 64 bf16 queries into int8, both in swizzled rows, and returns the scale of
// this thread's rows lane / 4 and lane / 4 + 8 of its warp's 16. A thread takes every fourth piece
// of 8 channels of both rows.
template <int kHeadDim>
__device__ inline float QuantizeQueries(uint32_t from, uint32_t to) {
  constexpr int kSlabs = Config<kHeadDim>::kSlabs;
  const int row = threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4;
  const int quarter = threadIdx.x % 4;
  uint4 pieces[2][2 * kSlabs];
  float largest = kFloor;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 2 * kSlabs; ++i) {
      const int r = row + 8 * half, piece = quarter + 4 * (i % 2);
      pieces[half][i] = LoadShared(from + i / 2 * Config<kHeadDim>::kQuerySlabBytes +
                                   r * kSwizzleBytes + ((piece ^ (r % 8)) << 4));
      float x[8];
      Unpack(pieces[half][i], x);
#pragma unroll
      for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fabsf(x[j]));
    }
  }
  largest = QuadMax(largest);
  const float to_int = kLargestInt8 / largest;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 2 * kSlabs; ++i) {
      const int r = row + 8 * half, piece = quarter + 4 * i;  // of 8 bytes, of all slabs
      float x[8];
      Unpack(pieces[half][i], x);
      uint32_t packed[2] = {};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        packed[j / 4] |= static_cast<uint32_t>(__float2int_rn(x[j] * to_int) & 0xff) << (j % 4 * 8);
      }
      StoreShared(to + r * kSwizzleBytes + ((piece / 2 ^ (r % 8)) << 4) + piece % 2 * 8, packed[0],
                  packed[1]);
    }
  }
  return largest / kLargestInt8;
}

// The tensor cores add scores to this number: the bits of the sum are those of the float kOffset +
// score, exactly, since scores are below 2^22. So no conversion is needed.
constexpr int kOffsetBits = 0x4b400000;
constexpr float kOffset = 12582912;

// What a warpgroup carries along the keys, as in attention_bf16.cu; max includes -log2(448).
struct Rows {
  float max0 = -INFINITY, max1 = -INFINITY;

  // s: kOffset + scores, which `factor` dequantises into powers of two; becomes probabilities
  // between 0 and 448. Rounding kOffset * factor moves all of a row by the same small factor.
  __device__ void Update(float (&s)[kTileKeys / 2], float factor, float& keep0, float& keep1) {
    float new0 = s[0], new1 = s[2];
#pragma unroll
    for (int i = 0; i < kTileKeys / 2; i += 4) {
      new0 = fmaxf(new0, fmaxf(s[i], s[i + 1]));
      new1 = fmaxf(new1, fmaxf(s[i + 2], s[i + 3]));
    }
    new0 = fmaxf(max0, QuadMax((new0 - kOffset) * factor) - kLog2Fp8);
    new1 = fmaxf(max1, QuadMax((new1 - kOffset) * factor) - kLog2Fp8);
    keep0 = Exp2(max0 - new0);
    keep1 = Exp2(max1 - new1);
    max0 = new0;
    max1 = new1;
    const float base0 = fmaf(kOffset, factor, new0), base1 = fmaf(kOffset, factor, new1);
#pragma unroll
    for (int i = 0; i < kTileKeys / 2; i += 4) {
      s[i] = Exp2(s[i] * factor - base0);
      s[i + 1] = Exp2(s[i + 1] * factor - base0);
      s[i + 2] = Exp2(s[i + 2] * factor - base1);
      s[i + 3] = Exp2(s[i + 3] * factor - base1);
    }
  }
};
#endif

template <int kHeadDim, bool kCausal>
__global__ void __launch_bounds__(Config<kHeadDim>::kThreads, 1)
    SageKernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
               const __grid_constant__ CUtensorMap v_map, const AttentionShape shape,
               const QuantizedKv kv) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using C = Config<kHeadDim>;
  constexpr int kGroups = C::kGroups, kStages = C::kStages;
  extern __shared__ uint8_t shared[];
  __shared__ Barriers<kGroups, kStages> barriers;
  const uint32_t q_shared = (SharedAddress(shared) + 1023) / 1024 * 1024;
  const uint32_t q8_shared = q_shared + kGroups * C::kQueryBytes;
  const uint32_t k_shared = q8_shared + kGroups * C::kQuantizedBytes;
  const uint32_t v_shared = k_shared + kStages * C::kKeyBytes;
  const uint32_t q_full = SharedAddress(barriers.q_full), q_empty = SharedAddress(barriers.q_empty);
  const uint32_t k_full = SharedAddress(barriers.k_full), k_empty = SharedAddress(barriers.k_empty);
  const uint32_t v_full = SharedAddress(barriers.v_full), v_empty = SharedAddress(barriers.v_empty);
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);

  if (threadIdx.x == 0) {
    for (int g = 0; g < kGroups; ++g) {
      InitBarrier(q_full + 8 * g, 1);
      InitBarrier(q_empty + 8 * g, 4);  // one arrival a warp
    }
    for (int s = 0; s < kStages; ++s) {
      InitBarrier(k_full + 8 * s, 1);
      InitBarrier(v_full + 8 * s, 1);
      InitBarrier(k_empty + 8 * s, 4 * kGroups);
      InitBarrier(v_empty + 8 * s, 4 * kGroups);
    }
    FenceBarrierInit();
  }
  for (int s = 0; s < kStages; ++s) {
    FillShared(v_shared + s * C::kValueStageBytes + C::kValueBytes,
               C::kValueStageBytes - C::kValueBytes, 0x38383838);  // 1 in e4m3
  }
  __syncthreads();
  WaitForKernelInFront();
  LetNextKernelStart();

  if (warpgroup == 0) {
    FewerRegisters<C::kCopyRegisters>();
    if (threadIdx.x == 0) {
      PrefetchMap(q_map);
      PrefetchMap(k_map);
      PrefetchMap(v_map);
      const int pieces = shape.q_tiles * shape.all_heads;
      Ring<kStages> ring;
      for (uint32_t parity = 1;; parity ^= 1) {  // of empty barriers: the first wait passes
        const int index = static_cast<int>(atomicAdd(shape.counter, 1u));
        const bool none = index >= pieces;
        const Work work = WorkOf(shape, none ? 0 : index, C::kRows);
        for (int g = 0; g < kGroups; ++g) {
          Wait(q_empty + 8 * g, parity);
          barriers.work[g] = none ? -1 : index;
          if (none) {
            Arrive(q_full + 8 * g);
            continue;
          }
          ArriveExpecting(q_full + 8 * g, C::kQueryBytes);
          for (int slab = 0; slab < C::kSlabs; ++slab) {
            Load4(q_map, q_shared + g * C::kQueryBytes + slab * C::kQuerySlabBytes, q_full + 8 * g,
                  64 * slab, work.head, work.first_row + g * kMmaRows, work.batch);
          }
        }
        if (none) break;
        const int kv_head = (work.batch * shape.heads + work.head) / shape.group;
        const int keys = VisibleKeys<kCausal>(shape, work.first_row, C::kRows);
        for (int key = 0; key < keys; key += kTileKeys, ring.Next()) {
          Wait(k_empty + 8 * ring.stage, ring.parity ^ 1);
          ArriveExpecting(k_full + 8 * ring.stage, C::kKeyBytes);
          Load3(k_map, k_shared + ring.stage * C::kKeyBytes, k_full + 8 * ring.stage, 0, key,
                kv_head);
          Wait(v_empty + 8 * ring.stage, ring.parity ^ 1);
          ArriveExpecting(v_full + 8 * ring.stage, C::kValueBytes);
          Load3(v_map, v_shared + ring.stage * C::kValueStageBytes, v_full + 8 * ring.stage, key, 0,
                kv_head);
        }
      }
    }
  } else {
    MoreRegisters<C::kComputeRegisters>();
    const int g = warpgroup - 1;
    const int thread = threadIdx.x % kWarpgroup, lane = threadIdx.x % 32;
    const uint32_t q8_at = q8_shared + g * C::kQuantizedBytes;
    const int own = 1 + g;  // a named barrier of the warpgroup

    const auto start_scores = [&](int(&s)[kTileKeys / 2], int stage) {
#pragma unroll
      for (int i = 0; i < kTileKeys / 2; ++i) s[i] = kOffsetBits;
      MmaFence();
#pragma unroll
      for (int step = 0; step < (kHeadDim + 31) / 32; ++step) {
        Mma<kTileKeys>::S8(s, Describe(q8_at + 32 * step),
                           Describe(k_shared + stage * C::kKeyBytes + 32 * step), /*add=*/1);
      }
    };
    const auto start_values = [&](float(&r)[C::kColumns / 2], const uint32_t(&p)[kTileKeys / 4],
                                  int stage) {
#pragma unroll
      for (int step = 0; step < kTileKeys / 32; ++step) {
        Mma<C::kColumns>::Fp8P(r, &p[4 * step],
                               Describe(v_shared + stage * C::kValueStageBytes + 32 * step),
                               step > 0);
      }
    };
    const auto pack = [&](const float(&s)[kTileKeys / 2], uint32_t(&p)[kTileKeys / 4]) {
#pragma unroll
      for (int i = 0; i < kTileKeys / 16; ++i) {  // groups of 16 keys
        const float* x = s + 8 * i;
        p[2 * i] = PackFp8(x[0], x[1], x[4], x[5]);
        p[2 * i + 1] = PackFp8(x[2], x[3], x[6], x[7]);
      }
    };

    Ring<kStages> k_ring, v_ring;
    for (uint32_t parity = 0;; parity ^= 1) {
      Wait(q_full + 8 * g, parity);
      // The lane that tells the copying thread, by q_empty, that a new number may be written reads
      // it.
      const int index = __shfl_sync(0xffffffffu, lane == 0 ? barriers.work[g] : 0, 0);
      if (index < 0) break;
      const Work work = WorkOf(shape, index, C::kRows);
      const int kv_head = (work.batch * shape.heads + work.head) / shape.group;
      const int first_row = work.first_row + g * kMmaRows;
      const int keys = VisibleKeys<kCausal>(shape, work.first_row, C::kRows);
      const int tiles = (keys + kTileKeys - 1) / kTileKeys;
      const int row0 = first_row + thread / 32 * 16 + lane / 4, row1 = row0 + 8;
      const int offset = shape.kv_len - shape.q_len;
      const int limit0 = kCausal ? min(shape.kv_len, row0 + offset + 1) : shape.kv_len;
      const int limit1 = kCausal ? min(shape.kv_len, row1 + offset + 1) : shape.kv_len;
      // Tiles up to here are seen whole by all rows of the warpgroup.
      const int whole =
          (kCausal ? min(shape.kv_len, first_row + offset + 1) : shape.kv_len) / kTileKeys;

      const float* key_scales = kv.key_scales + int64_t{kv_head} * kv.tiles * kKeyScales + lane % 4;
      const float* value_scales = kv.value_scales + int64_t{kv_head} * kv.tiles;
      float key_scale = __ldg(key_scales), value_scale = __ldg(value_scales);

      NamedSync(own, kWarpgroup);  // no warp's product reads the old queries any more
      const float q_factor =
          QuantizeQueries<kHeadDim>(q_shared + g * C::kQueryBytes, q8_at) * shape.scale_log2;
      FenceAsyncProxy();
      NamedSync(own, kWarpgroup);
      if (lane == 0) Arrive(q_empty + 8 * g);

      float o[kHeadDim / 2] = {}, r[C::kColumns / 2];
      float sum0 = 0, sum1 = 0;  // in units of 1, unlike o
      float sum_keep0 = 0, sum_keep1 = 0;
      float keep0 = 0, keep1 = 0;  // what O is multiplied with when R is added
      float units = value_scale;   // of R, and of O once R is added
      uint32_t p[kTileKeys / 4];
      Rows rows;

      // Scores of a tile to probabilities.
      const auto exponentials = [&](const int(&raw)[kTileKeys / 2], int tile,
                                    float(&s)[kTileKeys / 2], float& factor0, float& factor1) {
        const float factor = q_factor * key_scale;
        const int next = min(tile + 1, tiles - 1);
        key_scale = __ldg(key_scales + next * kKeyScales);
#pragma unroll
        for (int i = 0; i < kTileKeys / 2; ++i) s[i] = __int_as_float(raw[i]);
        if (tile >= whole) Mask(s, tile * kTileKeys, limit0, limit1);
        rows.Update(s, factor, factor0, factor1);
      };

      int raw[kTileKeys / 2];
      float s[kTileKeys / 2];
      Wait(k_full + 8 * k_ring.stage, k_ring.parity);
      start_scores(raw, k_ring.stage);
      MmaCommit();
      MmaWait<0>();
      if (lane == 0) Arrive(k_empty + 8 * k_ring.stage);
      k_ring.Next();
      exponentials(raw, 0, s, keep0, keep1);
      pack(s, p);

      for (int tile = 1; tile < tiles; ++tile) {
        value_scale = __ldg(value_scales + tile);
        Wait(k_full + 8 * k_ring.stage, k_ring.parity);
        start_scores(raw, k_ring.stage);
        MmaCommit();
        Wait(v_full + 8 * v_ring.stage, v_ring.parity);
        start_values(r, p, v_ring.stage);
        MmaCommit();
        MmaWait<1>();
        if (lane == 0) Arrive(k_empty + 8 * k_ring.stage);
        k_ring.Next();
        float next0, next1;
        exponentials(raw, tile, s, next0, next1);
        MmaWait<0>();
        if (lane == 0) Arrive(v_empty + 8 * v_ring.stage);
        v_ring.Next();
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; i += 4) {
          o[i] = o[i] * keep0 + r[i];
          o[i + 1] = o[i + 1] * keep0 + r[i + 1];
          o[i + 2] = o[i + 2] * keep1 + r[i + 2];
          o[i + 3] = o[i + 3] * keep1 + r[i + 3];
        }
        sum0 = sum0 * sum_keep0 + r[kHeadDim / 2];
        sum1 = sum1 * sum_keep1 + r[kHeadDim / 2 + 2];
        sum_keep0 = next0;
        sum_keep1 = next1;
        const float ratio = __fdividef(units, value_scale);
        keep0 = next0 * ratio;
        keep1 = next1 * ratio;
        units = value_scale;
        pack(s, p);
      }
      Wait(v_full + 8 * v_ring.stage, v_ring.parity);
      MmaFence();
      start_values(r, p, v_ring.stage);
      MmaCommit();
      MmaWait<0>();
      if (lane == 0) Arrive(v_empty + 8 * v_ring.stage);
      v_ring.Next();
      const float* channels = kv.value_channels + kv_head * kHeadDim + 2 * (lane % 4);
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; i += 4) {
        const float2 channel = __ldg(reinterpret_cast<const float2*>(channels + 2 * i));
        o[i] = (o[i] * keep0 + r[i]) * channel.x;
        o[i + 1] = (o[i + 1] * keep0 + r[i + 1]) * channel.y;
        o[i + 2] = (o[i + 2] * keep1 + r[i + 2]) * channel.x;
        o[i + 3] = (o[i + 3] * keep1 + r[i + 3]) * channel.y;
      }
      __nv_bfloat16* out = shape.out +
                           (int64_t{work.batch} * shape.q_len + row0) * shape.out_stride +
                           work.head * kHeadDim;
      sum0 = sum0 * sum_keep0 + r[kHeadDim / 2];
      sum1 = sum1 * sum_keep1 + r[kHeadDim / 2 + 2];
      StoreRows<kHeadDim>(o, units / sum0, units / sum1, out, out + 8 * shape.out_stride,
                          row0 < shape.q_len, row1 < shape.q_len);
    }
  }
#else
  __trap();  // the host launches this on devices of capability 9.0 only
#endif
}

template <int kHeadDim>
void Launch(const AttentionArgs& args, void* workspace, cudaStream_t stream) {
  using C = Config<kHeadDim>;
  const QuantizedKvLayout layout = LayOutQuantizedKv(args);
  uint8_t* base = static_cast<uint8_t*>(workspace);
  const auto floats = [&](size_t at) { return reinterpret_cast<float*>(base + at); };
  const QuantizedKv kv = {floats(layout.key_mean),
                          floats(layout.value_channels),
                          floats(layout.key_scales),
                          floats(layout.value_scales),
                          reinterpret_cast<int8_t*>(base + layout.keys),
                          base + layout.values,
                          layout.padded_len,
                          layout.key_pitch,
                          static_cast<int>(layout.padded_len / kTileKeys)};
  const KvSource source = SourceOf(args);
  unsigned* counter = reinterpret_cast<unsigned*>(base + layout.counter);
  const unsigned kv_heads = static_cast<unsigned>(args.batch * args.kv_heads);
  SampleKv<kHeadDim><<<dim3(kv_heads, 2), kSampleThreads, 0, stream>>>(source, kv.key_mean,
                                                                       kv.value_channels, counter);
  CheckLaunch("sampling keys and values");
  QuantizeKv<kHeadDim><<<dim3(kv.tiles, kv_heads), kQuantizeThreads, 0, stream>>>(source, kv);
  CheckLaunch("quantising keys and values");

  const auto u = [](int64_t x) { return static_cast<cuuint64_t>(x); };
  const CUtensorMap q =
      MapHeads(args.q, args.batch, args.q_len, args.heads, kHeadDim, args.q_stride, kMmaRows);
  const CUtensorMap k = MapTensor<3>(
      CU_TENSOR_MAP_DATA_TYPE_UINT8, kv.keys, {u(kv.key_pitch), u(kv.padded_len), kv_heads},
      {u(kv.key_pitch), u(kv.key_pitch * kv.padded_len)}, {kSwizzleBytes, kTileKeys, 1});
  const CUtensorMap v =
      MapTensor<3>(CU_TENSOR_MAP_DATA_TYPE_UINT8, kv.values, {u(kv.padded_len), kHeadDim, kv_heads},
                   {u(kv.padded_len), u(kv.padded_len * kHeadDim)}, {kTileKeys, kHeadDim, 1});
  AttentionShape shape = ShapeOf(args, 2 * kHeadDim);
  shape.q_tiles = static_cast<int>((args.q_len + C::kRows - 1) / C::kRows);
  shape.counter = counter;
  LaunchPersistent(args.causal ? SageKernel<kHeadDim, true> : SageKernel<kHeadDim, false>,
                   C::kThreads, C::kSharedBytes, shape.q_tiles * shape.all_heads, stream, q, k, v,
                   shape, kv);
}

}  // namespace

void SageAttention(const AttentionArgs& args, void* workspace, cudaStream_t stream) {
  WithHeadDim(args.head_dim, [&](auto head_dim) { Launch<head_dim()>(args, workspace, stream); });
}

}  // namespace sluice::cuda::hopper
