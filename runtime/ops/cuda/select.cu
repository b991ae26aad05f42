#include "runtime/ops/cuda/launch.cuh"
#include "runtime/ops/cuda/select.h"

namespace sluice::cuda {
namespace {

// A warp takes a row: lanes sum every 32nd channel, then exchange. Reads both rows once.
template <typename T>
__global__ void RowCosinesKernel(const T* a, int64_t a_stride, const T* b, int64_t b_stride,
                                 const float* center, int64_t rows, int64_t width, float* cosines) {
  const int64_t row = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / 32;
  if (row >= rows) return;
  const int lane = threadIdx.x % 32;
  float dot = 0, first = 0, second = 0;
  for (int64_t d = lane; d < width; d += 32) {
    const float middle = center ? center[d] : 0;
    const float x = ToFloat(a[row * a_stride + d]) - middle;
    const float y = ToFloat(b[row * b_stride + d]) - middle;
    dot += x * y;
    first += x * x;
    second += y * y;
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    dot += __shfl_xor_sync(0xffffffffu, dot, offset);
    first += __shfl_xor_sync(0xffffffffu, first, offset);
    second += __shfl_xor_sync(0xffffffffu, second, offset);
  }
  if (lane == 0) cosines[row] = dot / fmaxf(sqrtf(first) * sqrtf(second), 1e-8f);
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

void RowCosines(ConstTensorView a, ConstTensorView b, const float* center, TensorView cosines,
                Stream stream) {
  if (a.dim(0) == 0) return;
  const auto blocks = static_cast<unsigned>((a.dim(0) * 32 + kThreads - 1) / kThreads);
  WithType(a.dtype(), [&](auto element) {
    using T = decltype(element);
    RowCosinesKernel<<<blocks, kThreads, 0, stream>>>(
        static_cast<const T*>(a.raw()), a.stride0(), static_cast<const T*>(b.raw()), b.stride0(),
        center, a.dim(0), a.dim(1), static_cast<float*>(cosines.raw()));
  });
  CheckLaunch("cosines");
}

void ArgMax(ConstTensorView x, TensorView ids, Stream stream) {
  if (x.dim(0) == 0) return;
  ArgMaxKernel<<<static_cast<unsigned>(x.dim(0)), kArgMaxThreads, 0, stream>>>(
      static_cast<const float*>(x.raw()), x.stride0(), x.dim(1), static_cast<int32_t*>(ids.raw()));
  CheckLaunch("argmax");
}

}  // namespace sluice::cuda
