// Moving rows in and out of blocks: a thread takes an element, neighbours take neighbours; bound by
// memory. Attention: see at each kernel.
#include "runtime/ops/cuda/kv.h"
#include "runtime/ops/cuda/kv_blocks.cuh"
#include "runtime/ops/cuda/launch.cuh"
#include "runtime/ops/cuda/mma_bf16.cuh"
#include "runtime/ops/cuda/rope.cuh"

namespace sluice::cuda {
namespace {

constexpr int kWarp = 32;

template <bool kStore, typename T>
__global__ void MoveKvKernel(Blocks<T> blocks, const int32_t* where, T* keys, T* values,
                             int64_t keys_stride, int64_t values_stride, int64_t count) {
  const int64_t width = int64_t{blocks.heads} * blocks.head_dim;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  const int64_t offset = where[0];
  for (int64_t at = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; at < count * width;
       at += step) {
    const int64_t i = at / width;
    const int column = static_cast<int>(at % width), head = column / blocks.head_dim;
    T* const place = blocks.Key(where + 1, offset + i, head) + column % blocks.head_dim;
    T* const behind = place + blocks.ValuesBehindKeys();
    if constexpr (kStore) {
      *place = keys[i * keys_stride + column];
      *behind = values[i * values_stride + column];
    } else {
      keys[i * keys_stride + column] = *place;
      values[i * values_stride + column] = *behind;
    }
  }
}

template <typename T>
__global__ void GatherKvKernel(Blocks<T> blocks, const int32_t* from, const int32_t* rows,
                               int64_t count, const int32_t* to) {
  const int64_t width = int64_t{blocks.heads} * blocks.head_dim;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; at < count * width;
       at += step) {
    const int64_t i = at / width;
    const int column = static_cast<int>(at % width), head = column / blocks.head_dim;
    const T* const source = blocks.Key(from, rows[i], head) + column % blocks.head_dim;
    T* const target = blocks.Key(to, i, head) + column % blocks.head_dim;
    *target = *source;
    target[blocks.ValuesBehindKeys()] = source[blocks.ValuesBehindKeys()];
  }
}

template <bool kStore>
void MoveKv(KvBlocks kv, const int32_t* where, KvRows rows, Stream stream) {
  int64_t elements = rows.count * kv.kv_heads * kv.head_dim;
  if (elements == 0) return;
  // 16 bytes at once where everything lies at multiples of them: heads are then counted in pieces.
  const int piece = 16 / static_cast<int>(SizeOf(kv.dtype));
  const auto fits = [&](const void* p, int64_t stride) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % piece == 0;
  };
  if (kv.head_dim % piece == 0 && fits(rows.keys, rows.keys_stride) &&
      fits(rows.values, rows.values_stride)) {
    elements /= piece;
    MoveKvKernel<kStore><<<BlocksFor(elements), kThreads, 0, stream>>>(
        BlocksOf<uint4>(kv.base, kv.kv_heads, kv.head_dim / piece), where,
        static_cast<uint4*>(rows.keys), static_cast<uint4*>(rows.values), rows.keys_stride / piece,
        rows.values_stride / piece, rows.count);
    return CheckLaunch("move keys and values");
  }
  WithType(kv.dtype, [&](auto element) {
    using T = decltype(element);
    MoveKvKernel<kStore><<<BlocksFor(elements), kThreads, 0, stream>>>(
        BlocksOf<T>(kv.base, kv.kv_heads, kv.head_dim), where, static_cast<T*>(rows.keys),
        static_cast<T*>(rows.values), rows.keys_stride, rows.values_stride, rows.count);
  });
  CheckLaunch("move keys and values");
}

// out[i, h] = softmax_t(q[i, h] . k[t, h / group] * scale + bias_t) v[t, h / group], any head size.
//
// A block of 4 warps takes one query and head; each warp every fourth key. A lane holds channels
// lane, lane + 32, ... A warp sums a dot product in 5 exchanges and keeps a running maximum; the
// four results are joined at the end. Reads all keys for every query: for sizes that the matrix
// kernels do not take.
constexpr int kPlainWarps = 4;
template <typename T, int kPer>
__global__ void PlainAttentionKernel(PlainAttentionArgs a, Blocks<T> blocks) {
  const int64_t query = blockIdx.x;
  const int head = blockIdx.y, kv_head = head / (a.heads / a.kv_heads);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, size = a.head_dim;
  const bool paged = a.base != nullptr;
  const int64_t sequence = paged ? 0 : query / a.q_len;
  const int64_t seen = paged ? a.table[0] - a.q_len + query + 1 : a.kv_len;
  const T* const q = static_cast<const T*>(a.q) + query * a.q_stride + int64_t{head} * size;
  float wanted[kPer], sum[kPer];
  for (int i = 0; i < kPer; ++i) {
    const int d = lane + kWarp * i;
    wanted[i] = d < size ? ToFloat(q[d]) * a.scale : 0;
    sum[i] = 0;
  }
  float most = -INFINITY, total = 0;
  for (int64_t t = warp; t < seen; t += kPlainWarps) {
    const T *key, *value;
    if (paged) {
      key = blocks.Key(a.table + 1, t, kv_head);
      value = key + blocks.ValuesBehindKeys();
    } else {
      const int64_t row = sequence * a.kv_len + t;
      key = static_cast<const T*>(a.k) + row * a.k_stride + int64_t{kv_head} * size;
      value = static_cast<const T*>(a.v) + row * a.v_stride + int64_t{kv_head} * size;
    }
    float dot = 0;
    for (int i = 0; i < kPer; ++i) {
      const int d = lane + kWarp * i;
      if (d < size) dot += wanted[i] * ToFloat(key[d]);
    }
    dot = WarpSum(dot);
    if (a.key_bias) dot += a.key_bias[sequence * a.kv_len + t];
    const float now = fmaxf(most, dot);
    const float keep = expf(most - now), weight = expf(dot - now);
    most = now;
    total = total * keep + weight;
    for (int i = 0; i < kPer; ++i) {
      const int d = lane + kWarp * i;
      sum[i] = sum[i] * keep + (d < size ? weight * ToFloat(value[d]) : 0);
    }
  }
  __shared__ float mosts[kPlainWarps], totals[kPlainWarps], sums[kPlainWarps][kPer * kWarp];
  if (lane == 0) {
    mosts[warp] = most;
    totals[warp] = total;
  }
  for (int i = 0; i < kPer; ++i) sums[warp][lane + kWarp * i] = sum[i];
  __syncthreads();
  if (warp > 0) return;
  float largest = mosts[0], all = 0;
  for (int w = 1; w < kPlainWarps; ++w) largest = fmaxf(largest, mosts[w]);
  float share[kPlainWarps];
  for (int w = 0; w < kPlainWarps; ++w) {
    share[w] = expf(mosts[w] - largest);
    all += share[w] * totals[w];
  }
  T* const out = static_cast<T*>(a.out) + (query * a.heads + head) * static_cast<int64_t>(size);
  for (int i = 0; i < kPer; ++i) {
    const int d = lane + kWarp * i;
    float value = 0;
    for (int w = 0; w < kPlainWarps; ++w) value += share[w] * sums[w][d];
    if (d < size) out[d] = FromFloat<T>(value / all);
  }
}

// Decoding: a block of some warps takes one sequence, kv head and part of the keys, for all query
// heads of the group, so that keys and values are read once. A warp takes chunks of keys in turn
// and multiplies them on the tensor cores (m16n8k16). The heads of the group, of which there are at
// most 8, are rows of the scores, half of which are zero, and columns of the sums; reading is what
// limits.
//
// Keys and values go from memory to the registers of the products, 16 bytes a load, without a turn
// through shared memory: the order of the channels that a product sums over is free, if queries and
// keys have the same, and so is the order of the rows of its result.
//   scores    lane (g, t) = (lane / 4, lane % 4) reads channels 8 t .. 8 t + 7 of every 32 of key g
//             of 8: the operands of two products, channel 8 t + 4 s + i being index 2 t + i % 2 +
//             8 (i / 2) of product s
//   values    it reads channels 8 g .. 8 g + 7 of every 64 of keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9
//             of 16: rows g and g + 8 of product j are channels 8 g + 2 j and 8 g + 2 j + 1
// Each warp keeps maxima and sums of its own; they are joined in shared memory, parts in a second
// kernel.
//
// With many pairs of sequence and kv head, two smaller blocks of a multiprocessor hide each other's
// waits. With inv_freq a row's own key and value go to the cache first. The first chunks, which
// else no kernel of the step writes, are then under way before the row is there; the row's own take
// their place in them.
constexpr int64_t kFewPairs = 16;
constexpr int kWarpsOfFew = 8, kWarpsOfMany = 4, kBlocksOfMany = 2;  // a multiprocessor

// Parts of a sequence of at most so many keys: for each of some 132 multiprocessors one block, or
// two of the smaller ones; of at least 128 keys.
constexpr int kMostParts = 128;
int PartsFor(const DecodeAttentionArgs& a) {
  const int64_t most_keys = (a.table_pitch - 1) * kBlock, pairs = a.sequences * a.kv_heads;
  const int64_t blocks = pairs <= kFewPairs ? 132 : kBlocksOfMany * 132;
  const int64_t wanted = blocks / std::max<int64_t>(1, pairs);
  return static_cast<int>(std::clamp<int64_t>(std::min(wanted, most_keys / 128), 1, kMostParts));
}

__device__ inline uint32_t Word(const uint4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

template <int kHeadDim, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarp, kWarps == kWarpsOfFew ? 1 : kBlocksOfMany)
    DecodeKernel(DecodeAttentionArgs a, Blocks<__nv_bfloat16> blocks, int parts, float* partial) {
  constexpr int kChunk = kHeadDim == 64 ? 32 : 16;  // keys of a warp at once, all in one block
  // Chunks under way at once. With few pairs the parts of small heads are no longer than one turn.
  constexpr int kChunks = kHeadDim == 64 && kWarps == kWarpsOfFew ? 1 : 2;
  constexpr int kSlices = kHeadDim / 32, kSpans = kHeadDim / 64;
  constexpr int kPairsOfHead = kHeadDim / 2;
  const int part = blockIdx.x, kv_head = blockIdx.y;
  const int64_t sequence = blockIdx.z;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int group = a.heads / a.kv_heads;
  LetNextKernelStart();
  // Tables are there when a step begins.
  const int32_t* const table = a.tables + sequence * a.table_pitch + 1;
  const int keys = table[-1];
  const int per_part = ((keys + parts - 1) / parts + kChunk - 1) / kChunk * kChunk;
  const int begin = part * per_part, end = min(keys, begin + per_part);
  const float to_log2 = a.scale * 1.44269504f;

  struct Chunk {
    uint4 key[kChunk / 8][kSlices], value[kChunk / 16][4][kSpans];
  } chunks[kChunks];
  // Of this lane, values are of these rows of a chunk.
  const auto value_row = [&](int n, int r) { return 16 * n + 2 * t + r % 2 + r / 2 * 8; };
  const auto read = [&](Chunk& chunk, int first) {
    const __nv_bfloat16* const at = blocks.Key(table, first, kv_head);
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
      for (int i = 0; i < kSlices; ++i) {
        chunk.key[n][i] =
            __ldcs(reinterpret_cast<const uint4*>(at + (8 * n + g) * kHeadDim + 32 * i + 8 * t));
      }
    }
#pragma unroll
    for (int n = 0; n < kChunk / 16; ++n) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = value_row(n, r);
#pragma unroll
        for (int i = 0; i < kSpans; ++i) {
          // What lies behind the end may be no number, which a weight of zero does not hide.
          chunk.value[n][r][i] = make_uint4(0, 0, 0, 0);
          if (first + row < end) {
            chunk.value[n][r][i] = __ldcs(reinterpret_cast<const uint4*>(
                at + blocks.ValuesBehindKeys() + row * kHeadDim + 64 * i + 8 * g));
          }
        }
      }
    }
  };
  const int first_of_warp = begin + warp * kChunk;
  constexpr int kStride = kWarps * kChunk;
  const auto read_first = [&] {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (first_of_warp + c * kStride < end) read(chunks[c], first_of_warp + c * kStride);
    }
  };
  const bool rotates = a.inv_freq != nullptr, stores = rotates && begin < end && end == keys;
  if (rotates) read_first();

  // The group's queries and, behind them, the row's own key and value.
  __shared__ __align__(16) __nv_bfloat16 heads[kMostDecodeGroup + 2][kHeadDim];
  __shared__ float sines[kPairsOfHead], cosines[kPairsOfHead];
  if (rotates) {
    for (int i = threadIdx.x; i < kPairsOfHead; i += kWarps * kWarp) {
      SineAndCosine(a.positions[sequence], a.inv_freq[i], sines[i], cosines[i]);
    }
    __syncthreads();
  }
  WaitForKernelInFront();
  if (!rotates) read_first();
  const auto* const row = static_cast<const __nv_bfloat16*>(a.q) + sequence * a.q_stride;
  for (int at = threadIdx.x; at < (group + (stores ? 2 : 0)) * kPairsOfHead; at += kWarps * kWarp) {
    const int head = at / kPairsOfHead, i = at % kPairsOfHead;
    const bool is_query = head < group;
    const bool is_value = head > group;
    const auto* const from = row + (is_query   ? kv_head * group + head
                                    : is_value ? a.heads + a.kv_heads + kv_head
                                               : a.heads + kv_head) *
                                       kHeadDim;
    __nv_bfloat16 low = from[i], high = from[i + kPairsOfHead];
    if (rotates && !is_value) Rotate(sines[i], cosines[i], low, high);
    __nv_bfloat16* const to = heads[is_query ? head : kMostDecodeGroup + is_value];
    to[i] = low;
    to[i + kPairsOfHead] = high;
    if (is_query) continue;
    __nv_bfloat16* const slot =
        blocks.Key(table, keys - 1, kv_head) + (is_value ? blocks.ValuesBehindKeys() : 0);
    slot[i] = low;
    slot[i + kPairsOfHead] = high;
  }
  __syncthreads();
  const auto piece = [&](int head, int channel) {
    return *reinterpret_cast<const uint4*>(&heads[head][channel]);
  };
  uint4 q[kSlices];
#pragma unroll
  for (int i = 0; i < kSlices; ++i) {
    q[i] = g < group ? piece(g, 32 * i + 8 * t) : make_uint4(0, 0, 0, 0);
  }
  float out[kSpans][4][4] = {}, most = -INFINITY, total = 0;  // most, total: of head g
  const auto attend = [&](Chunk& chunk, int first) {
    if (stores && first + kChunk >= keys) {
      const int last = keys - 1 - first;
#pragma unroll
      for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
        for (int i = 0; i < kSlices; ++i) {
          if (8 * n + g == last) chunk.key[n][i] = piece(kMostDecodeGroup, 32 * i + 8 * t);
        }
      }
#pragma unroll
      for (int n = 0; n < kChunk / 16; ++n) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
          for (int i = 0; i < kSpans; ++i) {
            if (value_row(n, r) == last) {
              chunk.value[n][r][i] = piece(kMostDecodeGroup + 1, 64 * i + 8 * g);
            }
          }
        }
      }
    }
    float score[kChunk / 8][4] = {}, now = most;
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
      for (int i = 0; i < kSlices; ++i) {
        const uint4& key = chunk.key[n][i];
        const uint32_t first_part[] = {q[i].x, 0, q[i].y, 0}, other[] = {q[i].z, 0, q[i].w, 0};
        MmaBf16(score[n], first_part, key.x, key.y);
        MmaBf16(score[n], other, key.z, key.w);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool there = first + 8 * n + 2 * t + i < end;
        score[n][i] = there ? score[n][i] * to_log2 : -INFINITY;
        now = fmaxf(now, score[n][i]);
      }
    }
    now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 1));
    now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2));
    const float keep = exp2f(most - now);
    most = now;
    total *= keep;
    // Of heads 2 t and 2 t + 1, the columns of this lane's sums.
    const float keep0 = __shfl_sync(0xffffffffu, keep, 8 * t);
    const float keep1 = __shfl_sync(0xffffffffu, keep, 8 * t + 4);
#pragma unroll
    for (int i = 0; i < kSpans; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        out[i][j][0] *= keep0;
        out[i][j][1] *= keep1;
        out[i][j][2] *= keep0;
        out[i][j][3] *= keep1;
      }
    }
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        score[n][i] = exp2f(score[n][i] - now);
        total += score[n][i];
      }
    }
#pragma unroll
    for (int n = 0; n < kChunk / 16; ++n) {
      const uint32_t p0 = PackBf16(score[2 * n][0], score[2 * n][1]);
      const uint32_t p1 = PackBf16(score[2 * n + 1][0], score[2 * n + 1][1]);
#pragma unroll
      for (int i = 0; i < kSpans; ++i) {
        const auto& value = chunk.value[n];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const auto pair = [&](int r, int halves) {
            return __byte_perm(Word(value[r][i], j), Word(value[r + 1][i], j), halves);
          };
          const uint32_t channels[] = {pair(0, 0x5410), pair(0, 0x7632), pair(2, 0x5410),
                                       pair(2, 0x7632)};
          MmaBf16(out[i][j], channels, p0, p1);
        }
      }
    }
  };
  for (int first = first_of_warp; first < end; first += kChunks * kStride) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int at = first + c * kStride, next = at + kChunks * kStride;
      if (at < end) attend(chunks[c], at);
      if (next < end) read(chunks[c], next);
    }
  }
  total += __shfl_xor_sync(0xffffffffu, total, 1);
  total += __shfl_xor_sync(0xffffffffu, total, 2);

  __shared__ float mosts[kWarps][kMostDecodeGroup], totals[kWarps][kMostDecodeGroup];
  __shared__ float sums[kWarps][kMostDecodeGroup][kHeadDim];
  if (t == 0) {
    mosts[warp][g] = most;
    totals[warp][g] = total;
  }
#pragma unroll
  for (int i = 0; i < kSpans; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int channel = 64 * i + 8 * g + 2 * j;
      sums[warp][2 * t][channel] = out[i][j][0];
      sums[warp][2 * t + 1][channel] = out[i][j][1];
      sums[warp][2 * t][channel + 1] = out[i][j][2];
      sums[warp][2 * t + 1][channel + 1] = out[i][j][3];
    }
  }
  __syncthreads();
  float* const rows =
      partial + ((sequence * a.kv_heads + kv_head) * group * parts + part) * (kHeadDim + 2);
  for (int at = threadIdx.x; at < group * (kHeadDim + 2); at += blockDim.x) {
    const int head = at / (kHeadDim + 2), d = at % (kHeadDim + 2);
    float largest = -INFINITY, all = 0;
    for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, mosts[w][head]);
    for (int w = 0; w < kWarps && d <= kHeadDim; ++w) {
      if (mosts[w][head] == -INFINITY) continue;
      all += exp2f(mosts[w][head] - largest) * (d < kHeadDim ? sums[w][head][d] : totals[w][head]);
    }
    rows[static_cast<int64_t>(head) * parts * (kHeadDim + 2) + d] = d <= kHeadDim ? all : largest;
  }
}

// Joins the parts of one sequence and head. A thread takes a part's maximum and total, and, one of
// a group of D threads, its channel of every so manieth part, all read before any is needed.
constexpr int kJoinThreads = 256;
template <int kHeadDim>
__global__ void JoinPartsKernel(const float* partial, int parts, __nv_bfloat16* out) {
  constexpr int kPitch = kHeadDim + 2, kGroups = kJoinThreads / kHeadDim;
  constexpr int kHeld = kMostParts / kGroups;
  __shared__ float shares[kJoinThreads], sums[kGroups][kHeadDim];
  const int64_t row = blockIdx.x;
  const float* const from = partial + row * parts * kPitch;
  const int thread = threadIdx.x, group = thread / kHeadDim, channel = thread % kHeadDim;
  LetNextKernelStart();
  WaitForKernelInFront();
  float2 end = make_float2(0, -INFINITY);
  if (thread < parts) end = *reinterpret_cast<const float2*>(from + thread * kPitch + kHeadDim);
  float held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int part = group + i * kGroups;
    held[i] = part < parts ? from[part * kPitch + channel] : 0;
  }
  // 0 where there are no keys: one part has some.
  const float share = exp2f(end.y - BlockMax(end.y));
  shares[thread] = share;
  const float total = BlockSum(share * end.x);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) sum += shares[group + i * kGroups] * held[i];
  sums[group][channel] = sum;
  __syncthreads();
  if (group > 0) return;
  for (int g = 1; g < kGroups; ++g) sum += sums[g][channel];
  out[row * kHeadDim + channel] = __float2bfloat16_rn(sum / total);
}

template <int kHeadDim>
void LaunchDecode(const DecodeAttentionArgs& a, float* partial, Stream stream) {
  const int parts = PartsFor(a);
  const dim3 grid(parts, a.kv_heads, static_cast<unsigned>(a.sequences));
  const auto launch = [&](auto kernel, int warps) {
    LaunchAhead(kernel, grid, warps * kWarp, stream, a,
                BlocksOf<__nv_bfloat16>(a.base, a.kv_heads, a.head_dim), parts, partial);
  };
  if (a.sequences * a.kv_heads <= kFewPairs) {
    launch(DecodeKernel<kHeadDim, kWarpsOfFew>, kWarpsOfFew);
  } else {
    launch(DecodeKernel<kHeadDim, kWarpsOfMany>, kWarpsOfMany);
  }
  LaunchAhead(JoinPartsKernel<kHeadDim>, static_cast<unsigned>(a.sequences * a.heads), kJoinThreads,
              stream, partial, parts, static_cast<__nv_bfloat16*>(a.out));
}

// A thread takes one key and query head.
template <typename T>
__global__ void KeyScoresKernel(KeyScoreArgs a, Blocks<T> blocks) {
  const int64_t all = a.row_count + a.keys, rows = a.batch * a.queries * a.heads;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; at < rows * all; at += step) {
    const int64_t i = at % all, row = at / all, query = row / a.heads;
    const int head = static_cast<int>(row % a.heads), kv_head = head / (a.heads / a.kv_heads);
    const int64_t sequence = query / a.queries;
    const T* const q = static_cast<const T*>(a.q) + query * a.q_stride + int64_t{head} * a.head_dim;
    const T* const k = i < a.row_count ? blocks.Key(a.table, a.rows[i], kv_head)
                                       : static_cast<const T*>(a.k) +
                                             (sequence * a.keys + i - a.row_count) * a.k_stride +
                                             int64_t{kv_head} * a.head_dim;
    float dot = 0;
    for (int d = 0; d < a.head_dim; ++d) dot += ToFloat(q[d]) * ToFloat(k[d]);
    a.scores[at] = dot * a.scale + (a.key_bias ? a.key_bias[sequence * a.keys + i] : 0);
  }
}

// A thread takes one column.
__global__ void MeanOfRowsKernel(const float* x, int64_t batch, int64_t rows, int64_t width,
                                 float* mean) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; at < batch * width;
       at += step) {
    const float* from = x + at / width * rows * width + at % width;
    float sum = 0;
    for (int64_t r = 0; r < rows; ++r) sum += from[r * width];
    mean[at] = sum / static_cast<float>(rows);
  }
}

// Rotates query and key heads of rows and puts keys and values into blocks. A thread takes 8 pairs
// of channels of a query or key head, or 16 channels of a value head: two loads and two or four
// stores of 16 bytes. Sines and cosines are computed for each head: there are few, and it leaves
// more threads. Bytes: the rows read and written once, keys and values written once more.
constexpr int kPairs = 8;  // of a thread

__global__ void RotateAndStoreKernel(__nv_bfloat16* x, int64_t stride, int64_t rows, int heads,
                                     Blocks<__nv_bfloat16> blocks, const int32_t* positions,
                                     const int32_t* slots, const float* inv_freq) {
  const int size = blocks.head_dim, pieces = size / (2 * kPairs);
  const int all_heads = heads + 2 * blocks.heads;
  const int64_t at = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  WaitForKernelInFront();
  LetNextKernelStart();
  if (at >= rows * all_heads * pieces) return;
  const int piece = static_cast<int>(at % pieces);
  const int head = static_cast<int>(at / pieces % all_heads);
  const int64_t row = at / pieces / all_heads;
  const bool is_value = head >= heads + blocks.heads;
  // The two runs of 8 channels.
  const int first = is_value ? 2 * kPairs * piece : kPairs * piece;
  const int second = is_value ? first + kPairs : first + size / 2;
  __nv_bfloat16* const from = x + row * stride + int64_t{head} * size;
  uint4 low = *reinterpret_cast<const uint4*>(from + first);
  uint4 high = *reinterpret_cast<const uint4*>(from + second);
  if (!is_value) {
    auto* const a = reinterpret_cast<__nv_bfloat16*>(&low);
    auto* const b = reinterpret_cast<__nv_bfloat16*>(&high);
    const int position = positions[row];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      float sine, cosine;
      SineAndCosine(position, inv_freq[first + i], sine, cosine);
      Rotate(sine, cosine, a[i], b[i]);
    }
    *reinterpret_cast<uint4*>(from + first) = low;
    *reinterpret_cast<uint4*>(from + second) = high;
    if (head < heads) return;
  }
  const int slot = slots[row];
  const int kv_head = is_value ? head - heads - blocks.heads : head - heads;
  __nv_bfloat16* const to = blocks.base + slot / kBlock * blocks.BlockElements() +
                            (int64_t{kv_head} * kBlock + slot % kBlock) * size +
                            (is_value ? blocks.ValuesBehindKeys() : 0);
  *reinterpret_cast<uint4*>(to + first) = low;
  *reinterpret_cast<uint4*>(to + second) = high;
}

}  // namespace

bool CanRotateAndStore(int head_dim, int64_t stride, DType dtype) {
  return dtype == DType::kBF16 && head_dim % (2 * kPairs) == 0 && stride % kPairs == 0;
}

void RotateAndStore(const KvBlocks& kv, void* rows, int64_t stride, int64_t count, int heads,
                    const int32_t* positions, const int32_t* slots, const float* inv_freq,
                    Stream stream) {
  const int64_t threads = count * (heads + 2 * kv.kv_heads) * (kv.head_dim / (2 * kPairs));
  if (threads == 0) return;
  LaunchAhead(RotateAndStoreKernel, static_cast<unsigned>((threads + kThreads - 1) / kThreads),
              kThreads, stream, static_cast<__nv_bfloat16*>(rows), stride, count, heads,
              BlocksOf<__nv_bfloat16>(kv.base, kv.kv_heads, kv.head_dim), positions, slots,
              inv_freq);
}

void StoreKv(const KvBlocks& kv, const int32_t* where, const KvRows& rows, Stream stream) {
  MoveKv<true>(kv, where, rows, stream);
}

void LoadKv(const KvBlocks& kv, const int32_t* where, const KvRows& rows, Stream stream) {
  MoveKv<false>(kv, where, rows, stream);
}

void GatherKv(const KvBlocks& kv, const int32_t* from, const int32_t* rows, int64_t count,
              const int32_t* to, Stream stream) {
  const int64_t elements = count * kv.kv_heads * kv.head_dim;
  if (elements == 0) return;
  WithType(kv.dtype, [&](auto element) {
    using T = decltype(element);
    GatherKvKernel<<<BlocksFor(elements), kThreads, 0, stream>>>(
        BlocksOf<T>(kv.base, kv.kv_heads, kv.head_dim), from, rows, count, to);
  });
  CheckLaunch("gather keys and values");
}

void PlainAttention(const PlainAttentionArgs& a, Stream stream) {
  if (a.head_dim < 1 || a.head_dim > 256) {
    throw Error("[cuda attention] head_dim must be at most 256, got " + std::to_string(a.head_dim));
  }
  const int64_t queries = a.base ? a.q_len : a.batch * a.q_len;
  if (queries == 0) return;
  const dim3 grid(static_cast<unsigned>(queries), a.heads);
  WithType(a.dtype, [&](auto element) {
    using T = decltype(element);
    const Blocks<T> blocks = BlocksOf<T>(a.base, a.kv_heads, a.head_dim);
    const auto launch = [&](auto kernel) {
      kernel<<<grid, kPlainWarps * kWarp, 0, stream>>>(a, blocks);
    };
    if (a.head_dim <= 64) {
      launch(PlainAttentionKernel<T, 2>);
    } else if (a.head_dim <= 128) {
      launch(PlainAttentionKernel<T, 4>);
    } else {
      launch(PlainAttentionKernel<T, 8>);
    }
  });
  CheckLaunch("attention");
}

size_t DecodeWorkspaceBytes(const DecodeAttentionArgs& a) {
  return a.sequences * a.heads * PartsFor(a) * (a.head_dim + 2) * sizeof(float);
}

void DecodeAttention(const DecodeAttentionArgs& a, void* workspace, Stream stream) {
  if (a.sequences == 0) return;
  auto* const partial = static_cast<float*>(workspace);
  if (a.head_dim == 64) {
    LaunchDecode<64>(a, partial, stream);
  } else {
    LaunchDecode<128>(a, partial, stream);
  }
  CheckLaunch("decode attention");
}

void KeyScores(const KeyScoreArgs& a, Stream stream) {
  const int64_t elements = a.batch * a.queries * a.heads * (a.row_count + a.keys);
  if (elements == 0) return;
  WithType(a.dtype, [&](auto element) {
    using T = decltype(element);
    KeyScoresKernel<<<BlocksFor(elements), kThreads, 0, stream>>>(
        a, BlocksOf<T>(a.base, a.kv_heads, a.head_dim));
  });
  CheckLaunch("scores of keys");
}

void MeanOfRows(const float* x, int64_t batch, int64_t rows, int64_t width, float* mean,
                Stream stream) {
  if (batch * width == 0) return;
  MeanOfRowsKernel<<<BlocksFor(batch * width), kThreads, 0, stream>>>(x, batch, rows, width, mean);
  CheckLaunch("mean of rows");
}

}  // namespace sluice::cuda
