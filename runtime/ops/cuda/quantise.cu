// factors[m] = amax / largest; q[m, i] = round(x[m, i] * (largest / amax)), amax = max_i |x[m, i]|
//
// One block a row. Thread t takes pieces t, t + threads, ... of the row, each of kVector values (16
// bytes where rows are aligned), once for the largest and, from the first-level cache, once more to
// round. Sizes: any M up to 2^31 - 1, any K. Bytes moved: M * K * 3.
#include <cuda_fp8.h>

#include "runtime/ops/cuda/launch.cuh"
#include "runtime/ops/cuda/quantise.h"
#include "runtime/ops/quantise.h"

namespace sluice::cuda {
namespace {

template <typename T, int kVector>
struct alignas(sizeof(T) * kVector) Pieces {
  T v[kVector];
};

template <bool kFp8>
__device__ inline uint8_t Round(float x) {
  if constexpr (kFp8) {
    return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
  } else {
    const float whole = fminf(fmaxf(rintf(x), -127.f), 127.f);
    return static_cast<uint8_t>(static_cast<int8_t>(whole));
  }
}

template <bool kFp8, int kVector>
__global__ void QuantiseKernel(const __nv_bfloat16* x, int64_t x_stride, int64_t k, uint8_t* q,
                               int64_t q_stride, float least, float largest, float* factors) {
  using In = Pieces<__nv_bfloat16, kVector>;
  using Out = Pieces<uint8_t, kVector>;
  const auto* const from = reinterpret_cast<const In*>(x + blockIdx.x * x_stride);
  auto* const to = reinterpret_cast<Out*>(q + blockIdx.x * q_stride);
  const int64_t pieces = k / kVector;
  float amax = least;
  for (int64_t at = threadIdx.x; at < pieces; at += blockDim.x) {
    const In piece = from[at];
#pragma unroll
    for (int i = 0; i < kVector; ++i) amax = fmaxf(amax, fabsf(__bfloat162float(piece.v[i])));
  }
  amax = BlockMax(amax);
  const float inverse = __fdiv_rn(largest, amax);
  if (threadIdx.x == 0) factors[blockIdx.x] = __fdiv_rn(amax, largest);
  for (int64_t at = threadIdx.x; at < q_stride / kVector; at += blockDim.x) {
    Out piece = {};
    if (at < pieces) {
      const In values = from[at];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        piece.v[i] = Round<kFp8>(__bfloat162float(values.v[i]) * inverse);
      }
    }
    to[at] = piece;
  }
}

}  // namespace

void QuantiseRows(ConstTensorView x, WeightFormat format, TensorView q, TensorView factors,
                  Stream stream) {
  if (x.dim(0) == 0) return;
  constexpr int kWide = 8;
  const bool wide = x.dim(1) % kWide == 0 && x.stride0() % kWide == 0 && q.dim(1) % kWide == 0 &&
                    reinterpret_cast<uintptr_t>(x.raw()) % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(q.raw()) % 8 == 0;
  const int64_t pieces = q.dim(1) / (wide ? kWide : 1);
  const auto threads = static_cast<unsigned>(std::clamp<int64_t>((pieces + 31) / 32 * 32, 32, 512));
  const auto run = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(x.dim(0)), threads, 0, stream>>>(
        static_cast<const __nv_bfloat16*>(x.raw()), x.stride0(), x.dim(1),
        static_cast<uint8_t*>(q.raw()), q.dim(1), kLeastAmax, LargestOf(format),
        static_cast<float*>(factors.raw()));
  };
  if (format == WeightFormat::kFp8) {
    wide ? run(QuantiseKernel<true, kWide>) : run(QuantiseKernel<true, 1>);
  } else {
    wide ? run(QuantiseKernel<false, kWide>) : run(QuantiseKernel<false, 1>);
  }
  CheckLaunch("quantise");
}

}  // namespace sluice::cuda
