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
  WaitForKernelInFront();
  LetNextKernelStart();

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

// Calls run with how many vectors a thread keeps as a constant.
template <typename Run>
void WithKept(const NormLaunch& launch, const Run& run) {
  switch (launch.kept_vectors) {
    case 0:
      return run(std::integral_constant<int, 0>());
    case 1:
      return run(std::integral_constant<int, 1>());
    case 2:
      return run(std::integral_constant<int, 2>());
    case 3:
      return run(std::integral_constant<int, 3>());
    case 4:
      return run(std::integral_constant<int, 4>());
    default:
      return run(std::integral_constant<int, 8>());
  }
}

template <typename Out, int kVector>
void Launch(const RmsNormArgs& args, const NormLaunch& launch, cudaStream_t stream) {
  WithKept(launch, [&](auto kept) {
    LaunchAhead(RmsNormKernel<Out, kVector, kept()>, static_cast<unsigned>(args.m), launch.threads,
                stream, args);
  });
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
  const NormLaunch launch = ChooseRmsNorm(args.d, aligned);
  const bool bf16 = args.y_dtype == DType::kBF16;
  if (launch.vector == 4) {
    bf16 ? Launch<__nv_bfloat16, 4>(args, launch, stream) : Launch<float, 4>(args, launch, stream);
  } else {
    bf16 ? Launch<__nv_bfloat16, 1>(args, launch, stream) : Launch<float, 1>(args, launch, stream);
  }
}

namespace {

// y[m, i] = (x[m, i] + more[m, i] - mean) / sqrt(var + eps) * weight[i] + bias[i]
//
// One block a row (blockIdx.x) of a matrix (blockIdx.y), laid out as above; the row stays in
// registers for its mean, the squares about it (a single pass over x and x^2 would cancel where
// |mean| is large) and the result, or is read again for each. Bytes moved: M * D * (4 + SizeOf(y))
// + 8 * D, and M * D * 4 with `more`.
template <typename Out, int kVector, int kKept>
__global__ void LayerNormKernel(LayerNormArgs args) {
  using Vector = Floats<kVector>;
  const int matrix = blockIdx.y;
  const int64_t row = matrix * args.m + blockIdx.x;  // of y and of what is added
  const auto* x =
      reinterpret_cast<const Vector*>(args.x[matrix] + blockIdx.x * args.x_stride[matrix]);
  const auto* more = matrix < args.more_matrices
                         ? reinterpret_cast<const Vector*>(args.more + row * args.more_stride)
                         : nullptr;
  const auto* weight = reinterpret_cast<const Vector*>(args.weight);
  const auto* bias = reinterpret_cast<const Vector*>(args.bias);
  auto* y = reinterpret_cast<Outs<Out, kVector>*>(static_cast<Out*>(args.y) + row * args.y_stride);
  const int64_t vectors = args.d / kVector;
  const auto load = [&](int64_t at) {
    Vector v = x[at];
    if (more) {
      const Vector w = more[at];
#pragma unroll
      for (int i = 0; i < kVector; ++i) v.v[i] += w.v[i];
    }
    return v;
  };
  // Weight and bias are asked for together with the row, so that the end need not wait for them.
  constexpr int kEarly = kKept <= 4 ? kKept : 0;
  Vector kept[kKept > 0 ? kKept : 1], weights[kEarly > 0 ? kEarly : 1],
      biases[kEarly > 0 ? kEarly : 1];
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int64_t at = threadIdx.x + int64_t{k} * blockDim.x;
    if (at < vectors) {
      kept[k] = load(at);
      if constexpr (kEarly > 0) {
        weights[k] = weight[at];
        biases[k] = bias[at];
      }
    }
  }
  // Calls use(place, vector, which) for all vectors of the thread.
  const auto each = [&](const auto& use) {
    if constexpr (kKept > 0) {
#pragma unroll
      for (int k = 0; k < kKept; ++k) {
        const int64_t at = threadIdx.x + int64_t{k} * blockDim.x;
        if (at < vectors) use(at, kept[k], k);
      }
    } else {
      for (int64_t at = threadIdx.x; at < vectors; at += blockDim.x) use(at, load(at), 0);
    }
  };

  float sum = 0;
  each([&](int64_t, const Vector& v, int) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += v.v[i];
  });
  const float mean = BlockSum(sum) / static_cast<float>(args.d);
  float squares = 0;
  each([&](int64_t, const Vector& v, int) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) squares += (v.v[i] - mean) * (v.v[i] - mean);
  });
  const float scale = rsqrtf(BlockSum(squares) / static_cast<float>(args.d) + args.eps);
  each([&](int64_t at, const Vector& v, int k) {
    Vector w, b;
    if constexpr (kEarly > 0) {
      w = weights[k];
      b = biases[k];
    } else {
      w = weight[at];
      b = bias[at];
    }
    Outs<Out, kVector> out;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      out.v[i] = FromFloat<Out>((v.v[i] - mean) * scale * w.v[i] + b.v[i]);
    }
    y[at] = out;
  });
}

template <typename Out, int kVector>
void Launch(const LayerNormArgs& args, const NormLaunch& launch, cudaStream_t stream) {
  WithKept(launch, [&](auto kept) {
    const dim3 grid(static_cast<unsigned>(args.m), static_cast<unsigned>(args.matrices));
    LayerNormKernel<Out, kVector, kept()><<<grid, launch.threads, 0, stream>>>(args);
  });
}

}  // namespace

void LayerNorm(const LayerNormArgs& args, Stream stream) {
  if (args.m == 0) return;
  const auto at_four = [](const void* p, size_t element, int64_t stride) {
    return reinterpret_cast<uintptr_t>(p) % (4 * element) == 0 && stride % 4 == 0;
  };
  bool aligned = at_four(args.weight, 4, 0) && at_four(args.bias, 4, 0) &&
                 at_four(args.y, SizeOf(args.y_dtype), args.y_stride) &&
                 (args.more == nullptr || at_four(args.more, 4, args.more_stride));
  for (int64_t i = 0; i < args.matrices; ++i) aligned &= at_four(args.x[i], 4, args.x_stride[i]);
  const NormLaunch launch = ChooseLayerNorm(args.d, aligned);
  WithType(args.y_dtype, [&](auto out) {
    using Out = decltype(out);
    launch.vector == 4 ? Launch<Out, 4>(args, launch, stream)
                       : Launch<Out, 1>(args, launch, stream);
  });
  CheckLaunch("layer_norm");
}

}  // namespace sluice::cuda
