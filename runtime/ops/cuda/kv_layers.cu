// Moving rows of all layers: a thread takes an element, or 16 bytes where they lie together, and
// neighbours take neighbours; bound by memory. Quantising and means: see at each kernel.
#include "runtime/ops/cuda/kv_blocks.cuh"
#include "runtime/ops/cuda/kv_layers.h"
#include "runtime/ops/cuda/launch.cuh"
#include "runtime/ops/cuda/rope.cuh"

namespace sluice::cuda {
namespace {

// Packed rows are [layers, 2, rows, heads * head_dim], keys and values being the second axis.
template <bool kPack, typename T>
__global__ void MoveLayersKernel(Blocks<T> blocks, LayerRows at, T* packed) {
  const int64_t width = int64_t{blocks.heads} * blocks.head_dim;
  const int64_t all = at.layers * 2 * at.rows * width, step = int64_t{gridDim.x} * blockDim.x;
  const int64_t offset = at.table[0];
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < all; i += step) {
    const int column = static_cast<int>(i % width);
    const int64_t row = i / width % at.rows, half = i / width / at.rows;
    const int32_t* const table = at.table + 1 + half / 2 * at.blocks;
    T* const place = blocks.Key(table, offset + row, column / blocks.head_dim) +
                     column % blocks.head_dim + half % 2 * blocks.ValuesBehindKeys();
    if constexpr (kPack) {
      packed[i] = *place;
    } else {
      *place = packed[i];
    }
  }
}

template <bool kPack>
void MoveLayers(const KvBlocks& kv, const LayerRows& at, void* packed, Stream stream) {
  int64_t elements = at.layers * 2 * at.rows * kv.kv_heads * kv.head_dim;
  if (elements == 0) return;
  const int piece = 16 / static_cast<int>(SizeOf(kv.dtype));
  if (kv.head_dim % piece == 0 && reinterpret_cast<uintptr_t>(packed) % 16 == 0) {
    elements /= piece;
    MoveLayersKernel<kPack><<<BlocksFor(elements), kThreads, 0, stream>>>(
        BlocksOf<uint4>(kv.base, kv.kv_heads, kv.head_dim / piece), at,
        static_cast<uint4*>(packed));
    return CheckLaunch("move rows of layers");
  }
  WithType(kv.dtype, [&](auto element) {
    using T = decltype(element);
    MoveLayersKernel<kPack><<<BlocksFor(elements), kThreads, 0, stream>>>(
        BlocksOf<T>(kv.base, kv.kv_heads, kv.head_dim), at, static_cast<T*>(packed));
  });
  CheckLaunch("move rows of layers");
}

// scale = max |x| / 127, packed = round(x / scale), over the keys or the values of one head.
//
// A block takes one head's keys or values of one layer: a thread an element of a row, neighbours
// neighbours. Reads them twice, the second time mostly from the cache.
template <typename T>
__global__ void PackInt8Kernel(Blocks<T> blocks, LayerRows at, uint8_t* packed, int64_t bytes) {
  const int head = blockIdx.x % blocks.heads, half = blockIdx.x / blocks.heads;
  const int size = blocks.head_dim;
  const int64_t width = int64_t{blocks.heads} * size, all = at.rows * size;
  const int32_t* const table = at.table + 1 + int64_t{blockIdx.y} * at.blocks;
  const int64_t offset = at.table[0], behind = half * blocks.ValuesBehindKeys();
  const auto value = [&](int64_t i) {
    return ToFloat(blocks.Key(table, offset + i / size, head)[behind + i % size]);
  };
  float most = 0;
  for (int64_t i = threadIdx.x; i < all; i += blockDim.x) most = fmaxf(most, fabsf(value(i)));
  most = BlockMax(most);
  packed += int64_t{blockIdx.y} * bytes;
  if (threadIdx.x == 0) {
    const float scale = most / 127;
    // Layers may begin anywhere.
    memcpy(packed + (half * blocks.heads + head) * sizeof(float), &scale, sizeof(float));
  }
  const float inverse = most > 0 ? 127 / most : 0;
  auto* const rows = reinterpret_cast<int8_t*>(packed + 2 * blocks.heads * sizeof(float)) +
                     half * at.rows * width + int64_t{head} * size;
  for (int64_t i = threadIdx.x; i < all; i += blockDim.x) {
    const float rounded = roundf(value(i) * inverse);
    rows[i / size * width + i % size] = static_cast<int8_t>(fminf(fmaxf(rounded, -127), 127));
  }
}

template <typename T>
__global__ void DequantiseKernel(const int8_t* x, const int32_t* runs, const float* scales,
                                 int heads, int64_t count, int64_t width, T* y, int64_t y_stride) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; at < count * width;
       at += step) {
    const int64_t i = at / width, column = at % width;
    const float scale = scales[int64_t{runs[i]} * heads + column * heads / width];
    y[i * y_stride + column] = FromFloat<T>(scale * static_cast<float>(x[at]));
  }
}

// means[r, l, h] = 1/n sum_i rot(k_i, -position_i) over the n keys of run r, layer l, head h.
//
// A block takes one head of one layer and one run, a lane a pair of channels that turn together, a
// warp every eighth key; sums of the warps are joined in shared memory, [warps, D] floats. Reads
// each key once; waiting for it and for the sine takes the time, hence the warps.
constexpr int kMeanWarps = 8;
template <typename T>
__global__ void MeanKeysKernel(Blocks<T> blocks, LayerRows from, const int32_t* ends, int32_t first,
                               const float* inv_freq, float* means) {
  extern __shared__ float sums[];
  const int head = blockIdx.x % blocks.heads, run = blockIdx.y;
  const int64_t layer = blockIdx.x / blocks.heads;
  const int size = blocks.head_dim, pairs = size / 2, warp = threadIdx.y;
  const int32_t begin = run > 0 ? ends[run - 1] : 0, end = ends[run];
  const int32_t* const table = from.table + 1 + layer * from.blocks;
  const int64_t offset = from.table[0];
  for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
    float sum_a = 0, sum_b = 0;
#pragma unroll 4
    for (int32_t row = begin + warp; row < end; row += kMeanWarps) {
      const T* const key = blocks.Key(table, offset + row, head);
      const float a = ToFloat(key[i]), b = ToFloat(key[i + pairs]);
      float sine, cosine;
      SineAndCosine(-(first + row), inv_freq[i], sine, cosine);
      sum_a += a * cosine - b * sine;
      sum_b += b * cosine + a * sine;
    }
    sums[warp * size + i] = sum_a;
    sums[warp * size + i + pairs] = sum_b;
  }
  __syncthreads();
  float* const mean = means + (run * from.layers * blocks.heads + blockIdx.x) * size;
  for (int c = warp * blockDim.x + threadIdx.x; c < size; c += kMeanWarps * blockDim.x) {
    float sum = 0;
    for (int w = 0; w < kMeanWarps; ++w) sum += sums[w * size + c];
    mean[c] = sum / static_cast<float>(end - begin);
  }
}

}  // namespace

void PackLayers(const KvBlocks& kv, const LayerRows& from, void* packed, Stream stream) {
  MoveLayers<true>(kv, from, packed, stream);
}

void UnpackLayers(const KvBlocks& kv, const LayerRows& to, const void* packed, Stream stream) {
  MoveLayers<false>(kv, to, const_cast<void*>(packed), stream);
}

void PackLayersInt8(const KvBlocks& kv, const LayerRows& from, uint8_t* packed, Stream stream) {
  const dim3 grid(2 * kv.kv_heads, static_cast<unsigned>(from.layers));
  const int64_t bytes =
      2 * kv.kv_heads * (static_cast<int64_t>(sizeof(float)) + from.rows * kv.head_dim);
  WithType(kv.dtype, [&](auto element) {
    using T = decltype(element);
    PackInt8Kernel<<<grid, 2 * kThreads, 0, stream>>>(
        BlocksOf<T>(kv.base, kv.kv_heads, kv.head_dim), from, packed, bytes);
  });
  CheckLaunch("quantise rows of layers");
}

void DequantiseKv(ConstTensorView x, ConstTensorView runs, ConstTensorView scales, TensorView y,
                  Stream stream) {
  if (x.dim(0) * x.dim(1) == 0) return;
  WithType(y.dtype(), [&](auto element) {
    using T = decltype(element);
    DequantiseKernel<<<BlocksFor(x.dim(0) * x.dim(1)), kThreads, 0, stream>>>(
        static_cast<const int8_t*>(x.raw()), static_cast<const int32_t*>(runs.raw()),
        static_cast<const float*>(scales.raw()), static_cast<int>(scales.dim(1)), x.dim(0),
        x.dim(1), static_cast<T*>(y.raw()), y.stride0());
  });
  CheckLaunch("dequantise keys and values");
}

void MeanKeys(const KvBlocks& kv, const LayerRows& from, const int32_t* ends, int64_t runs,
              int32_t first, const float* inv_freq, float* means, Stream stream) {
  constexpr int kLanes = 32;
  constexpr int64_t kMostRuns = 65535;  // of one grid
  const int64_t width = from.layers * kv.kv_heads * kv.head_dim;
  if (runs > kMostRuns) {
    throw Error("[cuda mean_keys] expected at most 65535 runs, got " + std::to_string(runs));
  }
  if (width == 0) return;
  const dim3 grid(static_cast<unsigned>(from.layers * kv.kv_heads), static_cast<unsigned>(runs));
  WithType(kv.dtype, [&](auto element) {
    using T = decltype(element);
    MeanKeysKernel<<<grid, dim3(kLanes, kMeanWarps), kMeanWarps * kv.head_dim * sizeof(float),
                     stream>>>(BlocksOf<T>(kv.base, kv.kv_heads, kv.head_dim), from, ends, first,
                               inv_freq, means);
  });
  CheckLaunch("means of keys");
}

}  // namespace sluice::cuda
