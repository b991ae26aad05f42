// y[m, n] = sum_k x[m, k] W[n, k]
//
// A warp takes an output (with silu_mul: a gate and its up): lanes read 16 bytes of the weight's
// row in turn, four such reads in flight, multiply with as many values of each row of x, which
// stays in the first-level cache, and exchange their sums at the end. Reads the weight once: bound
// by that, N * K * 2 bytes.
#include "runtime/ops/cuda/launch.cuh"
#include "runtime/ops/cuda/linear_few.h"

namespace sluice::cuda {
namespace {

constexpr int kLane = 8;      // values a lane reads at once
constexpr int kInFlight = 4;  // reads of a row
constexpr int kWarps = 8;     // of a block

__device__ inline void Widen(const uint4& packed, float (&x)[kLane]) {
  const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(&packed);
#pragma unroll
  for (int i = 0; i < kLane / 2; ++i) {
    const float2 two = __bfloat1622float2(pairs[i]);
    x[2 * i] = two.x;
    x[2 * i + 1] = two.y;
  }
}

template <int kRows, bool kSiluMul, typename Y>
__global__ void __launch_bounds__(32 * kWarps) FewRowsKernel(FewRowsArgs a) {
  constexpr int kOutputs = kSiluMul ? 2 : 1;
  const int64_t outputs = kSiluMul ? a.n / 2 : a.n;
  const int64_t n = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  if (n >= outputs) return;
  const int lane = threadIdx.x % 32;
  const auto* const weight = static_cast<const __nv_bfloat16*>(a.weight) + n * a.k;
  const auto* const x = static_cast<const __nv_bfloat16*>(a.x);
  float sum[kOutputs][kRows] = {};
  for (int64_t first = lane * kLane; first < a.k; first += kInFlight * 32 * kLane) {
    uint4 w[kOutputs][kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t at = first + j * 32 * kLane;
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        w[o][j] = make_uint4(0, 0, 0, 0);
        if (at < a.k)
          w[o][j] = __ldcs(reinterpret_cast<const uint4*>(weight + o * outputs * a.k + at));
      }
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t at = first + j * 32 * kLane;
      if (at >= a.k) break;
      float of_weight[kOutputs][kLane];
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) Widen(w[o][j], of_weight[o]);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        float values[kLane];
        Widen(*reinterpret_cast<const uint4*>(x + m * a.x_stride + at), values);
#pragma unroll
        for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
          for (int i = 0; i < kLane; ++i) sum[o][m] += of_weight[o][i] * values[i];
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      for (int offset = 16; offset > 0; offset /= 2) {
        sum[o][m] += __shfl_xor_sync(0xffffffffu, sum[o][m], offset);
      }
      if (a.bias) sum[o][m] += a.bias[n + o * outputs];
    }
    if (lane != m) continue;
    Y& y = static_cast<Y*>(a.y)[m * outputs + n];
    if constexpr (kSiluMul) {
      y = FromFloat<Y>(sum[0][m] / (1.f + expf(-sum[0][m])) * sum[1][m]);
    } else {
      y = FromFloat<Y>(a.accumulate ? ToFloat(y) + sum[0][m] : sum[0][m]);
    }
  }
}

template <int kRows>
void Launch(const FewRowsArgs& a, Stream stream) {
  const int64_t outputs = a.silu_mul ? a.n / 2 : a.n;
  const auto blocks = static_cast<unsigned>((outputs + kWarps - 1) / kWarps);
  WithType(a.y_dtype, [&](auto out) {
    using Y = decltype(out);
    if (a.silu_mul) {
      FewRowsKernel<kRows, true, Y><<<blocks, 32 * kWarps, 0, stream>>>(a);
    } else {
      FewRowsKernel<kRows, false, Y><<<blocks, 32 * kWarps, 0, stream>>>(a);
    }
  });
}

}  // namespace

bool TakesFewRows(int64_t m, int64_t k, int64_t x_stride, DType weight) {
  return m >= 1 && m <= 4 && k % kLane == 0 && x_stride % kLane == 0 && weight == DType::kBF16;
}

void FewRows(const FewRowsArgs& a, Stream stream) {
  switch (a.m) {
    case 1:
      Launch<1>(a, stream);
      break;
    case 2:
      Launch<2>(a, stream);
      break;
    case 3:
      Launch<3>(a, stream);
      break;
    default:
      Launch<4>(a, stream);
      break;
  }
  CheckLaunch("product of few rows");
}

}  // namespace sluice::cuda
