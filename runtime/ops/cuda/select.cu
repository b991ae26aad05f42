#include "runtime/ops/cuda/launch.cuh"
#include "runtime/ops/cuda/select.h"

namespace sluice::cuda {
namespace {

constexpr int kMostPairs = 16;  // of a launch

struct PairTable {
  const void *a[kMostPairs], *b[kMostPairs];
  const float* center[kMostPairs];
  int64_t a_stride[kMostPairs], b_stride[kMostPairs];
};

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Piece {
  T v[kCount];
};

// A warp takes a row of a pair (blockIdx.y): lanes sum every 32nd piece of 16 bytes (an element
// where rows are not aligned to that), then exchange. Reads both rows once.
template <typename T, int kCount>
__global__ void RowCosinesKernel(PairTable pairs, int64_t rows, int64_t width, float* cosines,
                                 int64_t cosines_stride) {
  using Part = Piece<T, kCount>;
  const int64_t row = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / 32;
  if (row >= rows) return;
  const int pair = blockIdx.y, lane = threadIdx.x % 32;
  const auto* a = reinterpret_cast<const Part*>(static_cast<const T*>(pairs.a[pair]) +
                                                row * pairs.a_stride[pair]);
  const auto* b = reinterpret_cast<const Part*>(static_cast<const T*>(pairs.b[pair]) +
                                                row * pairs.b_stride[pair]);
  const float* center = pairs.center[pair];
  float dot = 0, first = 0, second = 0;
#pragma unroll 4
  for (int64_t at = lane; at < width / kCount; at += 32) {
    const Part u = a[at], v = b[at];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float middle = center ? center[at * kCount + i] : 0;
      const float x = ToFloat(u.v[i]) - middle, y = ToFloat(v.v[i]) - middle;
      dot += x * y;
      first += x * x;
      second += y * y;
    }
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    dot += __shfl_xor_sync(0xffffffffu, dot, offset);
    first += __shfl_xor_sync(0xffffffffu, first, offset);
    second += __shfl_xor_sync(0xffffffffu, second, offset);
  }
  if (lane == 0) {
    cosines[pair * cosines_stride + row] = dot / fmaxf(sqrtf(first) * sqrtf(second), 1e-8f);
  }
}

constexpr int kMeanThreads = 1024;

// A block takes 32 columns, a warp every 32nd row of them; then the warps' sums are joined.
template <typename T>
__global__ void MeanRowKernel(const T* x, int64_t stride, int64_t rows, int64_t width,
                              float* mean) {
  __shared__ float sums[32][33];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t column = blockIdx.x * int64_t{32} + lane;
  float sum = 0;
  if (column < width) {
#pragma unroll 4
    for (int64_t row = warp; row < rows; row += 32) sum += ToFloat(x[row * stride + column]);
  }
  sums[warp][lane] = sum;
  __syncthreads();
  sum = sums[lane][warp];  // of column `warp`
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  const int64_t of = blockIdx.x * int64_t{32} + warp;
  if (lane == 0 && of < width) mean[of] = sum / static_cast<float>(rows);
}

constexpr int kSelectThreads = 1024;

// Unsigned numbers in the order of the values; both zeros are equal.
__device__ uint32_t InOrder(float value) {
  const uint32_t bits = __float_as_uint(value != value ? INFINITY : value + 0.f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// A block takes a row and keeps it in registers, kKept values that follow each other a thread. The
// k-th lowest value is found bit by bit, the highest first: a bit is set if fewer than k values
// are below. Then every thread counts what is chosen before its values: all below the k-th, and of
// those equal to it as many of the first as are left. 32 barriers for each kept value.
template <int kKept>
__global__ void LowestPlacesKernel(const float* values, int64_t stride, int count, int k,
                                   int32_t* places, int64_t places_stride) {
  __shared__ uint32_t of_warp[32];
  const int begin = threadIdx.x * kKept, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t keys[kKept];
#pragma unroll
  for (int j = 0; j < kKept; ++j) {
    keys[j] = begin + j < count ? InOrder(values[blockIdx.x * stride + begin + j]) : 0xffffffffu;
  }
  uint32_t highest = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t candidate = highest | 1u << bit;
    int below = 0;
#pragma unroll
    for (int j = 0; j < kKept; ++j) below += __syncthreads_count(keys[j] < candidate);
    if (below < k) highest = candidate;
  }

  // Both counts in one number: values below in the upper half, equal ones in the lower.
  uint32_t own = 0;
#pragma unroll
  for (int j = 0; j < kKept; ++j) {
    if (begin + j < count) own += (keys[j] < highest ? 1u << 16 : keys[j] == highest);
  }
  const auto scan = [&](uint32_t sum) {  // of all lanes up to this one
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint32_t before = __shfl_up_sync(0xffffffffu, sum, offset);
      if (lane >= offset) sum += before;
    }
    return sum;
  };
  const uint32_t upto = scan(own);
  if (lane == 31) of_warp[warp] = upto;
  __syncthreads();
  const uint32_t warps = scan(of_warp[lane]);
  const uint32_t all = __shfl_sync(0xffffffffu, warps, 31);
  const uint32_t earlier = __shfl_sync(0xffffffffu, warps, warp > 0 ? warp - 1 : 0);
  const uint32_t before = upto - own + (warp > 0 ? earlier : 0);
  const int wanted = k - static_cast<int>(all >> 16);  // of the equal ones
  int below = static_cast<int>(before >> 16), equal = static_cast<int>(before & 0xffff);
#pragma unroll
  for (int j = 0; j < kKept; ++j) {
    if (begin + j >= count) break;
    const bool is_below = keys[j] < highest, is_equal = keys[j] == highest;
    if (is_below || (is_equal && equal < wanted)) {
      places[blockIdx.x * places_stride + below + min(equal, wanted)] = begin + j;
    }
    below += is_below;
    equal += is_equal;
  }
}

constexpr int kArgMaxThreads = 1024;

// A block takes a row: each thread the best of every 1024th value, then pairs are joined. Of equal
// values the first wins in every comparison, so the order does not matter.
__global__ void ArgMaxKernel(const float* x, int64_t stride, int64_t width, int32_t* ids) {
  __shared__ float values[kArgMaxThreads];
  __shared__ int32_t places[kArgMaxThreads];
  const float* const row = x + blockIdx.x * stride;
  float best = -INFINITY;
  int32_t place = -1;
  bool broken = false;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    const float value = row[i];
    broken |= value != value || value == INFINITY;
    if (value > best) {
      best = value;
      place = static_cast<int32_t>(i);
    }
  }
  values[threadIdx.x] = best;
  places[threadIdx.x] = place;
  broken = __syncthreads_or(broken);
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      const float other = values[threadIdx.x + half];
      const int32_t at = places[threadIdx.x + half];
      if (at >= 0 && (other > values[threadIdx.x] ||
                      (other == values[threadIdx.x] && at < places[threadIdx.x]))) {
        values[threadIdx.x] = other;
        places[threadIdx.x] = at;
      }
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) ids[blockIdx.x] = broken ? -1 : places[0];
}

}  // namespace

void RowCosines(std::span<const RowPairs> pairs, TensorView cosines, Stream stream) {
  const int64_t rows = cosines.dim(1), width = pairs[0].a.dim(1);
  if (rows == 0) return;
  const DType dtype = pairs[0].a.dtype();
  const int64_t in_piece = 16 / static_cast<int64_t>(SizeOf(dtype));
  bool aligned = width % in_piece == 0;
  for (const RowPairs& pair : pairs) {
    for (const ConstTensorView& x : {pair.a, pair.b}) {
      aligned &= reinterpret_cast<uintptr_t>(x.raw()) % 16 == 0 && x.stride0() % in_piece == 0;
    }
  }
  for (size_t begin = 0; begin < pairs.size(); begin += kMostPairs) {
    const size_t some = std::min<size_t>(kMostPairs, pairs.size() - begin);
    PairTable table = {};
    for (size_t p = 0; p < some; ++p) {
      const RowPairs& pair = pairs[begin + p];
      table.a[p] = pair.a.raw();
      table.b[p] = pair.b.raw();
      table.center[p] = static_cast<const float*>(pair.center.raw());
      table.a_stride[p] = pair.a.stride0();
      table.b_stride[p] = pair.b.stride0();
    }
    const dim3 grid(static_cast<unsigned>((rows * 32 + kThreads - 1) / kThreads),
                    static_cast<unsigned>(some));
    float* to = static_cast<float*>(cosines.raw()) + begin * cosines.stride0();
    WithType(dtype, [&](auto element) {
      using T = decltype(element);
      const auto kernel = aligned ? RowCosinesKernel<T, 16 / sizeof(T)> : RowCosinesKernel<T, 1>;
      kernel<<<grid, kThreads, 0, stream>>>(table, rows, width, to, cosines.stride0());
    });
  }
  CheckLaunch("cosines");
}

void MeanRow(ConstTensorView x, TensorView mean, Stream stream) {
  WithType(x.dtype(), [&](auto element) {
    using T = decltype(element);
    MeanRowKernel<<<static_cast<unsigned>((x.dim(1) + 31) / 32), kMeanThreads, 0, stream>>>(
        static_cast<const T*>(x.raw()), x.stride0(), x.dim(0), x.dim(1),
        static_cast<float*>(mean.raw()));
  });
  CheckLaunch("mean of rows");
}

void LowestPlaces(ConstTensorView values, TensorView places, Stream stream) {
  if (values.dim(0) == 0) return;
  const auto count = static_cast<int>(values.dim(1));
  const auto kernel = count <= kSelectThreads       ? LowestPlacesKernel<1>
                      : count <= 4 * kSelectThreads ? LowestPlacesKernel<4>
                                                    : LowestPlacesKernel<16>;
  kernel<<<static_cast<unsigned>(values.dim(0)), kSelectThreads, 0, stream>>>(
      static_cast<const float*>(values.raw()), values.stride0(), count,
      static_cast<int>(places.dim(1)), static_cast<int32_t*>(places.raw()), places.stride0());
  CheckLaunch("lowest places");
}

void ArgMax(ConstTensorView x, TensorView ids, Stream stream) {
  if (x.dim(0) == 0) return;
  ArgMaxKernel<<<static_cast<unsigned>(x.dim(0)), kArgMaxThreads, 0, stream>>>(
      static_cast<const float*>(x.raw()), x.stride0(), x.dim(1), static_cast<int32_t*>(ids.raw()));
  CheckLaunch("argmax");
}

}  // namespace sluice::cuda
