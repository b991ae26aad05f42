// Moving rows in and out of blocks: a thread takes an element, neighbours take neighbours; bound by
// memory. Attention: see at each kernel.
#include "runtime/ops/cuda/kv.h"
#include "runtime/ops/cuda/launch.cuh"

namespace sluice::cuda {
namespace {

constexpr int kBlock = 64;  // positions of a block
constexpr int kWarp = 32;

// Finds rows in blocks.
template <typename T>
struct Blocks {
  T* base;
  int heads, head_dim;
  __device__ int64_t BlockElements() const { return int64_t{2} * heads * kBlock * head_dim; }
  __device__ T* Key(const int32_t* table, int64_t position, int head) const {
    return base + table[position / kBlock] * BlockElements() +
           (int64_t{head} * kBlock + position % kBlock) * head_dim;
  }
  __device__ int64_t ValuesBehindKeys() const { return int64_t{heads} * kBlock * head_dim; }
};

template <typename T>
Blocks<T> BlocksOf(const void* base, int kv_heads, int head_dim) {
  return {static_cast<T*>(const_cast<void*>(base)), kv_heads, head_dim};
}

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

__device__ inline float WarpSum(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
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

// Decoding: a block of 4 warps takes one sequence, kv head and part of the keys, for all query
// heads of the group, so that keys and values are read once. Lanes of a warp form teams of D / 8, a
// team takes a key: each lane 8 channels, one load of 16 bytes of the key and one of the value.
// Each team keeps maxima and sums of its own; they are joined in shared memory, parts in a second
// kernel.
constexpr int kDecodeWarps = 4;
constexpr int kMostGroup = 8;
constexpr int kLaneChannels = 8;

// Parts of a sequence of at most so many keys: about two blocks for each of some 132
// multiprocessors, of at least 128 keys, at most 128 parts.
int PartsFor(const DecodeAttentionArgs& a) {
  const int64_t most_keys = (a.table_pitch - 1) * kBlock;
  const int64_t wanted = 264 / std::max<int64_t>(1, a.sequences * a.kv_heads) + 1;
  return static_cast<int>(std::clamp<int64_t>(std::min(wanted, most_keys / 128), 1, 128));
}

__device__ inline void Widen(const uint4& packed, float (&x)[kLaneChannels]) {
  const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(&packed);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = __bfloat1622float2(pairs[i]);
    x[2 * i] = two.x;
    x[2 * i + 1] = two.y;
  }
}

template <int kHeadDim, int kGroup>
__global__ void __launch_bounds__(kDecodeWarps* kWarp)
    DecodeKernel(DecodeAttentionArgs a, Blocks<__nv_bfloat16> blocks, int parts, float* partial) {
  constexpr int kTeam = kHeadDim / kLaneChannels, kTeams = kDecodeWarps * kWarp / kTeam;
  constexpr int kAhead = 4;  // keys of a team whose loads are in flight together
  const int part = blockIdx.x, kv_head = blockIdx.y;
  const int64_t sequence = blockIdx.z;
  const int team = threadIdx.x / kTeam, lane = threadIdx.x % kTeam;
  const int32_t* const table = a.tables + sequence * a.table_pitch + 1;
  const int keys = table[-1];
  const int per_part = (keys + parts - 1) / parts;
  const int begin = part * per_part, end = min(keys, begin + per_part);

  float wanted[kGroup][kLaneChannels], sum[kGroup][kLaneChannels], most[kGroup], total[kGroup];
  const float to_log2 = a.scale * 1.44269504f;
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    const auto* q = static_cast<const __nv_bfloat16*>(a.q) + sequence * a.q_stride +
                    (int64_t{kv_head} * kGroup + g) * kHeadDim + lane * kLaneChannels;
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      wanted[g][i] = ToFloat(q[i]) * to_log2;
      sum[g][i] = 0;
    }
    most[g] = -INFINITY;
    total[g] = 0;
  }
  // The same number of turns for all teams of a warp: they exchange values inside.
  for (int first = begin; first < end; first += kTeams * kAhead) {
    uint4 key[kAhead], value[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      // Past the end the last key once more, with no weight: what lies behind may be no number.
      const int t = min(first + j * kTeams + team, end - 1);
      const __nv_bfloat16* at = blocks.Key(table, t, kv_head) + lane * kLaneChannels;
      key[j] = *reinterpret_cast<const uint4*>(at);
      value[j] = *reinterpret_cast<const uint4*>(at + blocks.ValuesBehindKeys());
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const bool there = first + j * kTeams + team < end;
      float k[kLaneChannels], v[kLaneChannels];
      Widen(key[j], k);
      Widen(value[j], v);
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        float dot = 0;
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) dot += wanted[g][i] * k[i];
#pragma unroll
        for (int offset = kTeam / 2; offset > 0; offset /= 2) {
          dot += __shfl_xor_sync(0xffffffffu, dot, offset);
        }
        if (!there) dot = -INFINITY;
        const float now = fmaxf(most[g], dot);
        // A team's first turn may have no key: then nothing is known yet.
        const float keep = now == -INFINITY ? 0 : exp2f(most[g] - now);
        const float weight = now == -INFINITY ? 0 : exp2f(dot - now);
        most[g] = now;
        total[g] = total[g] * keep + weight;
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) sum[g][i] = sum[g][i] * keep + weight * v[i];
      }
    }
  }

  __shared__ float mosts[kTeams], totals[kTeams], sums[kTeams][kHeadDim + 1];
  float* const to_row =
      partial + ((sequence * a.kv_heads + kv_head) * kGroup * parts + part) * (kHeadDim + 2);
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    __syncthreads();
    if (lane == 0) {
      mosts[team] = most[g];
      totals[team] = total[g];
    }
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) sums[team][lane * kLaneChannels + i] = sum[g][i];
    __syncthreads();
    float largest = -INFINITY;
    for (int i = 0; i < kTeams; ++i) largest = fmaxf(largest, mosts[i]);
    float* const row = to_row + static_cast<int64_t>(g) * parts * (kHeadDim + 2);
    for (int d = threadIdx.x; d < kHeadDim + 1; d += blockDim.x) {
      float all = 0;
      for (int i = 0; i < kTeams; ++i) {
        if (mosts[i] == -INFINITY) continue;
        all += exp2f(mosts[i] - largest) * (d < kHeadDim ? sums[i][d] : totals[i]);
      }
      row[d] = all;
    }
    if (threadIdx.x == 0) row[kHeadDim + 1] = largest;
  }
}

// Joins the parts of one sequence and head, of which there are at most kJoinThreads. A thread first
// takes a part's maximum; then groups of D threads, one a channel, each take every so manieth part.
constexpr int kJoinThreads = 256;
template <int kHeadDim>
__global__ void JoinPartsKernel(const float* partial, int parts, __nv_bfloat16* out) {
  constexpr int kPitch = kHeadDim + 2, kGroups = kJoinThreads / kHeadDim;
  __shared__ float shares[kJoinThreads], sums[kGroups][kHeadDim], totals[kGroups];
  const int64_t row = blockIdx.x;
  const float* const from = partial + row * parts * kPitch;
  const int thread = threadIdx.x, group = thread / kHeadDim, channel = thread % kHeadDim;
  const float most = thread < parts ? from[thread * kPitch + kHeadDim + 1] : -INFINITY;
  const float largest = BlockMax(most);
  shares[thread] = exp2f(most - largest);  // 0 where there are no keys: one part has some
  __syncthreads();
  float sum = 0, total = 0;
#pragma unroll 8
  for (int p = group; p < parts; p += kGroups) {
    sum += shares[p] * from[p * kPitch + channel];
    total += shares[p] * from[p * kPitch + kHeadDim];
  }
  sums[group][channel] = sum;
  if (channel == 0) totals[group] = total;
  __syncthreads();
  if (group > 0) return;
  for (int g = 1; g < kGroups; ++g) {
    sum += sums[g][channel];
    total += totals[g];
  }
  out[row * kHeadDim + channel] = __float2bfloat16_rn(sum / total);
}

template <int kHeadDim, int kGroup>
void LaunchDecode(const DecodeAttentionArgs& a, float* partial, Stream stream) {
  const int parts = PartsFor(a);
  const dim3 grid(parts, a.kv_heads, static_cast<unsigned>(a.sequences));
  DecodeKernel<kHeadDim, kGroup><<<grid, kDecodeWarps * kWarp, 0, stream>>>(
      a, BlocksOf<__nv_bfloat16>(a.base, a.kv_heads, a.head_dim), parts, partial);
  JoinPartsKernel<kHeadDim>
      <<<static_cast<unsigned>(a.sequences * a.heads), kJoinThreads, 0, stream>>>(
          partial, parts, static_cast<__nv_bfloat16*>(a.out));
}

template <int kHeadDim>
void ChooseGroup(const DecodeAttentionArgs& a, float* partial, Stream stream) {
  switch (a.heads / a.kv_heads) {
    case 1:
      return LaunchDecode<kHeadDim, 1>(a, partial, stream);
    case 2:
      return LaunchDecode<kHeadDim, 2>(a, partial, stream);
    case 3:
      return LaunchDecode<kHeadDim, 3>(a, partial, stream);
    case 4:
      return LaunchDecode<kHeadDim, 4>(a, partial, stream);
    case 5:
      return LaunchDecode<kHeadDim, 5>(a, partial, stream);
    case 6:
      return LaunchDecode<kHeadDim, 6>(a, partial, stream);
    case 7:
      return LaunchDecode<kHeadDim, 7>(a, partial, stream);
    default:
      return LaunchDecode<kHeadDim, 8>(a, partial, stream);
  }
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

}  // namespace

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

bool CanDecode(int heads, int kv_heads, int head_dim, DType dtype) {
  return dtype == DType::kBF16 && (head_dim == 64 || head_dim == 128) &&
         heads / kv_heads <= kMostGroup;
}

size_t DecodeWorkspaceBytes(const DecodeAttentionArgs& a) {
  return a.sequences * a.heads * PartsFor(a) * (a.head_dim + 2) * sizeof(float);
}

void DecodeAttention(const DecodeAttentionArgs& a, void* workspace, Stream stream) {
  if (a.sequences == 0) return;
  auto* const partial = static_cast<float*>(workspace);
  if (a.head_dim == 64) {
    ChooseGroup<64>(a, partial, stream);
  } else {
    ChooseGroup<128>(a, partial, stream);
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
