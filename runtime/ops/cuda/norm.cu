// y[m, i] = x[m, i] / sqrt(sum_j x[m, j]^2 / D + eps) * weight[i]
//
// One block a row. Thread t takes vectors t, t + threads, ... of the row, each of kVector floats
// (float4 where rows are aligned), so a warp reads 512 bytes in a row. The squares are summed over
// the warp by shuffles and over the block through shared memory. The row stays in registers between
// the two passes (kKept vectors a thread); rows too long for that (D > 16384) are read again, then
// from the second-level cache.
//
// Sizes: any M up to 2^31 - 1, any D >= 1. Bytes moved: M * D * (4 + SizeOf(y)) + 4 * D.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <limits>
#include <string>
#include <type_traits>

#include "runtime/error.h"
#include "runtime/ops/cuda/launch.cuh"
#include "runtime/ops/cuda/norm.h"

namespace sluice::cuda {
namespace {

template <int kVector>
struct alignas(4 * kVector) Floats {
  float v[kVector];
};

template <typename Out, int kVector>
struct alignas(sizeof(Out) * kVector) Outs {
  Out v[kVector];
};

template <typename Out, int kVector>
__device__ void Store(const Floats<kVector>& x, const Floats<kVector>& weight, float scale,
                      Out* to) {
  Outs<Out, kVector> y;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float value = x.v[i] * scale * weight.v[i];
    if constexpr (std::is_same_v<Out, __nv_bfloat16>) {
      y.v[i] = __float2bfloat16_rn(value);
    } else {
      y.v[i] = value;
    }
  }
  *reinterpret_cast<Outs<Out, kVector>*>(to) = y;
}

template <typename Out, int kVector, int kKept>
__global__ void RmsNormKernel(RmsNormArgs args) {
  using Vector = Floats<kVector>;
  const float* row = args.x + blockIdx.x * args.x_stride;
  const Vector* x = reinterpret_cast<const Vector*>(row);
  const Vector* weight = reinterpret_cast<const Vector*>(args.weight);
  Out* y = static_cast<Out*>(args.y) + blockIdx.x * args.y_stride;
  const int64_t vectors = args.d / kVector;

  float sum = 0;
  Vector kept[kKept > 0 ? kKept : 1];
  if constexpr (kKept > 0) {
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      const int64_t at = threadIdx.x + int64_t{k} * blockDim.x;
      if (at < vectors) {
        kept[k] = x[at];
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum += kept[k].v[i] * kept[k].v[i];
      }
    }
  } else {
    for (int64_t at = threadIdx.x; at < vectors; at += blockDim.x) {
      const Vector v = x[at];
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum += v.v[i] * v.v[i];
    }
  }
  const float scale = rsqrtf(BlockSum(sum) / static_cast<float>(args.d) + args.eps);

  if constexpr (kKept > 0) {
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      const int64_t at = threadIdx.x + int64_t{k} * blockDim.x;
      if (at < vectors) Store<Out, kVector>(kept[k], weight[at], scale, y + at * kVector);
    }
  } else {
    for (int64_t at = threadIdx.x; at < vectors; at += blockDim.x) {
      Store<Out, kVector>(x[at], weight[at], scale, y + at * kVector);
    }
  }
}

template <typename Out, int kVector>
void Launch(const RmsNormArgs& args, const RmsNormLaunch& launch, cudaStream_t stream) {
  const auto run = [&](auto kept) {
    RmsNormKernel<Out, kVector, kept()>
        <<<static_cast<unsigned>(args.m), launch.threads, 0, stream>>>(args);
  };
  switch (launch.kept_vectors) {
    case 0:
      return run(std::integral_constant<int, 0>());
    case 1:
      return run(std::integral_constant<int, 1>());
    case 2:
      return run(std::integral_constant<int, 2>());
    case 4:
      return run(std::integral_constant<int, 4>());
    default:
      return run(std::integral_constant<int, 8>());
  }
}

}  // namespace

void RmsNorm(const RmsNormArgs& args, Stream stream) {
  if (args.d < 1 || args.m < 0 || args.m > std::numeric_limits<int>::max() ||
      args.x_stride < args.d || args.y_stride < args.d) {
    throw Error("[cuda rms_norm] sizes must be 0 <= M < 2^31 and 1 <= D <= strides, got M " +
                std::to_string(args.m) + ", D " + std::to_string(args.d) + ", strides " +
                std::to_string(args.x_stride) + " and " + std::to_string(args.y_stride));
  }
  if (args.y_dtype != DType::kF32 && args.y_dtype != DType::kBF16) {
    throw Error(std::string("[cuda rms_norm] y must be f32 or bf16, got ") + Name(args.y_dtype));
  }
  if (args.m == 0) return;
  const auto at_four = [](const void* p, size_t element) {
    return reinterpret_cast<uintptr_t>(p) % (4 * element) == 0;
  };
  const bool aligned = at_four(args.x, 4) && at_four(args.weight, 4) &&
                       at_four(args.y, SizeOf(args.y_dtype)) && args.x_stride % 4 == 0 &&
                       args.y_stride % 4 == 0;
  const RmsNormLaunch launch = ChooseRmsNorm(args.d, aligned);
  const bool bf16 = args.y_dtype == DType::kBF16;
  if (launch.vector == 4) {
    bf16 ? Launch<__nv_bfloat16, 4>(args, launch, stream) : Launch<float, 4>(args, launch, stream);
  } else {
    bf16 ? Launch<__nv_bfloat16, 1>(args, launch, stream) : Launch<float, 1>(args, launch, stream);
  }
  CheckLaunch("rms_norm");
}

namespace {

// One block a row, which comes from the second-level cache for the second and third pass: mean,
// squares about it (a single pass over x and x^2 would cancel where |mean| is large), result.
template <typename Out>
__global__ void LayerNormKernel(LayerNormArgs args) {
  const float* x = args.x + blockIdx.x * args.x_stride;
  const float* more = args.more ? args.more + blockIdx.x * args.more_stride : nullptr;
  Out* y = static_cast<Out*>(args.y) + blockIdx.x * args.y_stride;
  const auto at = [&](int64_t i) { return more ? x[i] + more[i] : x[i]; };
  float sum = 0;
  for (int64_t i = threadIdx.x; i < args.d; i += blockDim.x) sum += at(i);
  const float mean = BlockSum(sum) / static_cast<float>(args.d);
  float squares = 0;
  for (int64_t i = threadIdx.x; i < args.d; i += blockDim.x) {
    const float off = at(i) - mean;
    squares += off * off;
  }
  const float scale = rsqrtf(BlockSum(squares) / static_cast<float>(args.d) + args.eps);
  for (int64_t i = threadIdx.x; i < args.d; i += blockDim.x) {
    y[i] = FromFloat<Out>((at(i) - mean) * scale * args.weight[i] + args.bias[i]);
  }
}

}  // namespace

void LayerNorm(const LayerNormArgs& args, Stream stream) {
  if (args.m == 0) return;
  const int threads = static_cast<int>(std::clamp<int64_t>((args.d + 31) / 32 * 32, 32, 512));
  WithType(args.y_dtype, [&](auto out) {
    LayerNormKernel<decltype(out)><<<static_cast<unsigned>(args.m), threads, 0, stream>>>(args);
  });
  CheckLaunch("layer_norm");
}

}  // namespace sluice::cuda
