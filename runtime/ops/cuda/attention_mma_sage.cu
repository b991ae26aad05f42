// SageAttention2 (arXiv 2411.10958) by mma.sync: what comes before the kernel of attention_mma.cuh.
//
//   k' = k - mean(k)         softmax does not see a constant subtracted from all keys
//   K8 = k' / key scale      int8 or int4, a scale for each group of keys
//   V8 = v / channel / value scale         fp8, a value scale for each tile; or f16 of v / channel
//
// SampleKv (attention_quantize.cuh) looks at some keys and values of each head, QuantizeKv writes
// integers and values. For int4 MeanOfQueries and MeanScores compute what the kernel adds to the
// scores of queries without their mean.
//
// Differs from the paper as attention_sage.cu does, and in the values of f16, which are in units of
// their channel, so that no bf16 value is too large for them.
//
// Bytes from memory: bf16 keys and values twice counting what is written; of int4 queries once
// more, and 4 bytes for every tile of queries and key, written and read.
#include "runtime/ops/cuda/attention_mma.cuh"

namespace sluice::cuda::mma {
namespace {

// Pointers of MmaKvLayout, and the formats.
struct QuantizedKv {
  const float *key_mean, *value_channels;
  float *key_scales, *value_scales;
  uint8_t *keys, *values;
  int64_t key_pitch;
  int tiles, head_dim;
  bool int4, fp8, warp_groups;
  float largest_value;  // of fp8
};

constexpr int kQuantizeThreads = 32 * kKeyScales;

// A block takes a tile of 64 keys of one kv head, a warp the 16 keys of one scale.
template <int kDim>
__global__ void __launch_bounds__(kQuantizeThreads)
    QuantizeKv(const KvSource source, const QuantizedKv to) {
  constexpr int kPieces = kDim / 8;  // of 16 bytes, in a row
  constexpr int kWarpKeys = kTileKeys / kKeyScales;
  __shared__ float key_max[kKeyScales], value_max[kKeyScales];
  // Words of four values that follow each other in the permuted order, a row a channel; one more
  // word a row keeps channels in different banks.
  __shared__ uint32_t transposed[kDim][kTileKeys / 4 + 1];
  const int tile = blockIdx.x % to.tiles, head = blockIdx.x / to.tiles;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column = head % source.kv_heads * to.head_dim;
  const int64_t first = int64_t{head / source.kv_heads} * source.kv_len + int64_t{tile} * kTileKeys;
  const int len = source.kv_len - tile * kTileKeys;  // tokens from this tile on
  const float* mean = to.key_mean + head * to.head_dim;
  const float* channels = to.value_channels + head * to.head_dim;
  const auto load = [&](const __nv_bfloat16* x, int64_t stride, int token, int piece) {
    if (token >= len || 8 * piece >= to.head_dim) return make_uint4(0, 0, 0, 0);
    return __ldg(reinterpret_cast<const uint4*>(x + (first + token) * stride + column) + piece);
  };

  constexpr int kKeyItems = kWarpKeys * kPieces / 32;
  static_assert(kWarpKeys * kPieces % 32 == 0);
  const auto key_token = [&](int i) {
    const int token = (i * 32 + lane) / kPieces;  // of the warp's
    return token / 2 * 8 + 2 * warp + token % 2;
  };
  uint4 keys[kKeyItems];
#pragma unroll
  for (int i = 0; i < kKeyItems; ++i) {
    keys[i] = load(source.k, source.k_stride, key_token(i), (i * 32 + lane) % kPieces);
  }
  // Values: an item is a word of four tokens by 8 channels. Position p of every 16 tokens holds
  // token [0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15][p] in fp8: then the probabilities that a thread
  // holds after the first product are what it must hold for the second. f16 needs no such order.
  constexpr int kItems = kTileKeys / 4 * kPieces;
  constexpr int kValueItems = (kItems + kQuantizeThreads - 1) / kQuantizeThreads;
  const auto value_token = [&](int word, int j) {
    return word / 4 * 16 + word % 4 * 2 + j % 2 + j / 2 * 8;
  };
  uint4 values[kValueItems][4];
#pragma unroll
  for (int i = 0; i < kValueItems; ++i) {
    const int item = i * kQuantizeThreads + threadIdx.x;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      values[i][j] = make_uint4(0, 0, 0, 0);
      if (item < kItems) {
        values[i][j] =
            load(source.v, source.v_stride, value_token(item / kPieces, j), item % kPieces);
      }
    }
  }
  const auto channel = [&](int piece, int c) {
    return 8 * piece < to.head_dim ? __ldg(channels + 8 * piece + c) : 1.0f;
  };

  // Element j of key item i without the mean.
  const auto centred = [&](int i, float(&x)[8]) {
    const int piece = (i * 32 + lane) % kPieces;
    Unpack(keys[i], x);
    if (key_token(i) >= len || 8 * piece >= to.head_dim) return;
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] -= __ldg(mean + 8 * piece + j);
  };
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kKeyItems; ++i) {
    float x[8];
    centred(i, x);
#pragma unroll
    for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fabsf(x[j]));
  }
  largest = WarpMax(largest);
  if (lane == 0) key_max[warp] = largest;

  largest = 0;
#pragma unroll
  for (int i = 0; i < kValueItems; ++i) {
    const int piece = (i * kQuantizeThreads + threadIdx.x) % kPieces;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float x[8];
      Unpack(values[i][j], x);
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        largest = fmaxf(largest, __fdividef(fabsf(x[c]), channel(piece, c)));
      }
    }
  }
  largest = WarpMax(largest);
  if (lane == 0) value_max[warp] = largest;
  __syncthreads();

  const float largest_int = to.int4 ? kLargestInt4 : kLargestInt8;
  float of_keys = fmaxf(key_max[warp], kFloor), of_values = kFloor;
  if (to.warp_groups) {
    for (float x : key_max) of_keys = fmaxf(of_keys, x);
  }
  for (float x : value_max) of_values = fmaxf(of_values, x);
  const int64_t tile_index = int64_t{head} * to.tiles + tile;
  if (lane == 0) to.key_scales[tile_index * kKeyScales + warp] = of_keys / largest_int;
  if (threadIdx.x == 0) to.value_scales[tile_index] = of_values / to.largest_value;

  const float to_int = largest_int / of_keys;
  uint8_t* const key_rows = to.keys + tile_index * kTileKeys * to.key_pitch;
#pragma unroll
  for (int i = 0; i < kKeyItems; ++i) {
    const int piece = (i * 32 + lane) % kPieces;
    float x[8];
    centred(i, x);
    uint32_t bytes[2] = {}, nibbles = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const auto rounded = static_cast<uint32_t>(__float2int_rn(x[j] * to_int));
      bytes[j / 4] |= (rounded & 0xff) << (j % 4 * 8);
      nibbles |= (rounded & 0xf) << (j * 4);
    }
    uint8_t* const row = key_rows + key_token(i) * to.key_pitch;
    if (to.int4) {
      *reinterpret_cast<uint32_t*>(row + 4 * piece) = nibbles;
    } else {
      *reinterpret_cast<uint2*>(row + 8 * piece) = make_uint2(bytes[0], bytes[1]);
    }
  }
  // Channels beyond kDim, up to what a product takes at once.
  const int used_words = kDim / (to.int4 ? 8 : 4), words = static_cast<int>(to.key_pitch / 4);
  for (int i = threadIdx.x; i < kTileKeys * (words - used_words); i += kQuantizeThreads) {
    const int row = i / (words - used_words), word = used_words + i % (words - used_words);
    *reinterpret_cast<uint32_t*>(key_rows + row * to.key_pitch + 4 * word) = 0;
  }

  if (!to.fp8) {
#pragma unroll
    for (int i = 0; i < kValueItems; ++i) {
      const int item = i * kQuantizeThreads + threadIdx.x, piece = item % kPieces;
      if (item >= kItems) break;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float x[8];
        Unpack(values[i][j], x);
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          constexpr float kLargestFp16 = 65504;
          x[c] = fminf(fmaxf(__fdividef(x[c], channel(piece, c)), -kLargestFp16), kLargestFp16);
        }
        uint4* const row = reinterpret_cast<uint4*>(
            to.values +
            (tile_index * kTileKeys + value_token(item / kPieces, j)) * kDim * sizeof(__half));
        row[piece] = make_uint4(PackFp16(x[0], x[1]), PackFp16(x[2], x[3]), PackFp16(x[4], x[5]),
                                PackFp16(x[6], x[7]));
      }
    }
    return;
  }
  const float to_fp8 = to.largest_value / of_values;
#pragma unroll
  for (int i = 0; i < kValueItems; ++i) {
    const int item = i * kQuantizeThreads + threadIdx.x, word = item / kPieces;
    const int piece = item % kPieces;
    if (item >= kItems) break;
    float x[4][8];
#pragma unroll
    for (int j = 0; j < 4; ++j) Unpack(values[i][j], x[j]);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const float factor = __fdividef(to_fp8, channel(piece, c));
      transposed[8 * piece + c][word] =
          PackFp8(x[0][c] * factor, x[1][c] * factor, x[2][c] * factor, x[3][c] * factor);
    }
  }
  __syncthreads();
  uint32_t* const out = reinterpret_cast<uint32_t*>(to.values + tile_index * kTileKeys * kDim);
  for (int i = threadIdx.x; i < kDim * kTileKeys / 4; i += kQuantizeThreads) {
    out[i] = transposed[i / (kTileKeys / 4)][i % (kTileKeys / 4)];
  }
}

// Block: a tile of 128 queries of one head; a thread takes two channels.
__global__ void MeanOfQueries(const MmaShape shape, float* means) {
  const int item = blockIdx.x / shape.q_tiles, tile = blockIdx.x % shape.q_tiles;
  const int batch = item / shape.heads, head = item % shape.heads;
  const int rows = min(kTileQueries, shape.q_len - tile * kTileQueries);
  const __nv_bfloat16* q = shape.q +
                           (int64_t{batch} * shape.q_len + tile * kTileQueries) * shape.q_stride +
                           head * shape.head_dim + 2 * threadIdx.x;
  float2 sum = make_float2(0, 0);
#pragma unroll 16
  for (int row = 0; row < rows; ++row) {
    const float2 x =
        __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(q + row * shape.q_stride));
    sum.x += x.x;
    sum.y += x.y;
  }
  reinterpret_cast<float2*>(means + int64_t{blockIdx.x} * shape.head_dim)[threadIdx.x] =
      make_float2(sum.x / rows, sum.y / rows);
}

// m (k - mean(k))^T in powers of two, m the mean of a tile of queries: the kernel's `mean_scores`.
// A block takes a tile of 64 keys of one kv head and all tiles of queries that see some of them,
// four threads a key.
constexpr int kMeanThreads = 4 * kTileKeys;
template <int kDim>
__global__ void __launch_bounds__(kMeanThreads)
    MeanScores(const MmaShape shape, const KvSource source, const float* key_mean, float* to) {
  constexpr int kPieces = (kDim / 8 + 3) / 4;  // of a thread: every fourth
  const int tile = blockIdx.x % shape.tiles, kv_item = blockIdx.x / shape.tiles;
  const int batch = kv_item / source.kv_heads, kv_head = kv_item % source.kv_heads;
  const int quarter = threadIdx.x % 4, key = tile * kTileKeys + threadIdx.x / 4;
  float k[kPieces][8] = {};
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int piece = 4 * i + quarter;
    if (key < shape.kv_len && 8 * piece < shape.head_dim) {
      const __nv_bfloat16* row = source.k +
                                 (int64_t{batch} * shape.kv_len + key) * source.k_stride +
                                 kv_head * shape.head_dim;
      Unpack(__ldg(reinterpret_cast<const uint4*>(row) + piece), k[i]);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        k[i][j] -= __ldg(key_mean + kv_item * shape.head_dim + 8 * piece + j);
      }
    }
  }
  int first = 0;  // tile of queries whose last row sees the first of the keys
  if (shape.causal) {
    first = max(0, tile * kTileKeys - (shape.kv_len - shape.q_len)) / kTileQueries;
  }
  for (int h = 0; h < shape.group; ++h) {
    const int64_t item = int64_t{batch} * shape.heads + kv_head * shape.group + h;
    for (int q_tile = first; q_tile < shape.q_tiles; ++q_tile) {
      const int64_t at = item * shape.q_tiles + q_tile;
      const float4* m = reinterpret_cast<const float4*>(shape.query_means + at * shape.head_dim);
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int piece = 4 * i + quarter;
        if (8 * piece < shape.head_dim) {
          const float4 low = __ldg(m + 2 * piece), high = __ldg(m + 2 * piece + 1);
          sum += low.x * k[i][0] + low.y * k[i][1] + low.z * k[i][2] + low.w * k[i][3];
          sum += high.x * k[i][4] + high.y * k[i][5] + high.z * k[i][6] + high.w * k[i][7];
        }
      }
      sum = QuadSum(sum) * shape.scale_log2;
      if (quarter == 0) to[at * shape.tiles * kTileKeys + key] = sum;
    }
  }
}

template <Scores kS, Values kV>
void Launch(const AttentionArgs& args, ScaleGroups groups, void* workspace, cudaStream_t stream) {
  const MmaKvLayout layout = LayOutMmaKv(args);
  uint8_t* base = static_cast<uint8_t*>(workspace);
  const auto floats = [&](size_t at) { return reinterpret_cast<float*>(base + at); };
  MmaShape shape = ShapeOf(args);
  shape.warp_groups = groups == ScaleGroups::kWarp;
  shape.key_scales = floats(layout.key_scales);
  shape.value_scales = floats(layout.value_scales);
  shape.value_channels = floats(layout.value_channels);
  const QuantizedKv kv = {floats(layout.key_mean),
                          floats(layout.value_channels),
                          floats(layout.key_scales),
                          floats(layout.value_scales),
                          base + layout.keys,
                          base + layout.values,
                          layout.key_pitch,
                          shape.tiles,
                          args.head_dim,
                          kS == Scores::kInt4,
                          kIsFp8<kV>,
                          shape.warp_groups,
                          kV == Values::kFp8HalfSums ? kLargestHalfSums : kLargestFp8};
  const int64_t key_bytes = layout.padded_len * layout.key_pitch;
  shape.keys = {kv.keys,
                key_bytes * args.kv_heads,
                key_bytes,
                layout.key_pitch,
                static_cast<int>(layout.padded_len),
                static_cast<int>(layout.key_pitch / 16)};
  // A row of fp8 values is a channel of a tile; one of f16 values, a key.
  const int64_t value_bytes = layout.padded_len * layout.channels * (kIsFp8<kV> ? 1 : 2);
  const int64_t row_bytes = kIsFp8<kV> ? kTileKeys : 2 * layout.channels;
  shape.values = {kv.values,
                  value_bytes * args.kv_heads,
                  value_bytes,
                  row_bytes,
                  static_cast<int>(value_bytes / row_bytes),
                  static_cast<int>(row_bytes / 16)};

  const KvSource source = SourceOf(args);
  const auto kv_heads = static_cast<unsigned>(args.batch * args.kv_heads);
  WithHeadDim(args.head_dim, [&](auto head_dim) {
    SampleKv<head_dim()><<<dim3(kv_heads, 2), kSampleThreads, 0, stream>>>(
        source, floats(layout.key_mean), floats(layout.value_channels), nullptr);
    CheckLaunch("sampling keys and values");
    constexpr int kDim = head_dim() == 72 ? 80 : head_dim();
    QuantizeKv<kDim><<<kv_heads * shape.tiles, kQuantizeThreads, 0, stream>>>(source, kv);
    CheckLaunch("quantising keys and values");
    if constexpr (kS == Scores::kInt4) {
      float *means = floats(layout.query_means), *scores = floats(layout.mean_scores);
      shape.query_means = means;
      shape.mean_scores = scores;
      MeanOfQueries<<<static_cast<unsigned>(args.batch * args.heads * shape.q_tiles),
                      args.head_dim / 2, 0, stream>>>(shape, means);
      CheckLaunch("means of queries");
      MeanScores<kDim>
          <<<kv_heads * shape.tiles, kMeanThreads, 0, stream>>>(shape, source, kv.key_mean, scores);
      CheckLaunch("scores of means");
    }
  });
  LaunchMma<kS, kV>(args, shape, stream);
}

}  // namespace

void SageAttention(const AttentionArgs& args, ScaleGroups groups, void* workspace,
                   cudaStream_t stream) {
  switch (args.precision) {
    case AttentionPrecision::kBF16:
      break;
    case AttentionPrecision::kInt8Fp8:
      return Launch<Scores::kInt8, Values::kFp8>(args, groups, workspace, stream);
    case AttentionPrecision::kInt8Fp8HalfSums:
      return Launch<Scores::kInt8, Values::kFp8HalfSums>(args, groups, workspace, stream);
    case AttentionPrecision::kInt8Fp16:
      return Launch<Scores::kInt8, Values::kFp16>(args, groups, workspace, stream);
    case AttentionPrecision::kInt4Fp8:
      return Launch<Scores::kInt4, Values::kFp8>(args, groups, workspace, stream);
    case AttentionPrecision::kInt4Fp16:
      return Launch<Scores::kInt4, Values::kFp16>(args, groups, workspace, stream);
  }
}

}  // namespace sluice::cuda::mma
