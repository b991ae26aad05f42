// How attention quantises keys and values (SageAttention2, arXiv 2411.10958): what is the same for
// all families of kernels.
#ifndef SLUICE_RUNTIME_OPS_CUDA_ATTENTION_QUANTIZE_CUH_
#define SLUICE_RUNTIME_OPS_CUDA_ATTENTION_QUANTIZE_CUH_

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "runtime/ops/cuda/attention.h"

namespace sluice::cuda {

constexpr float kLargestFp8 = 448;
constexpr float kLargestInt8 = 127;
constexpr float kFloor = 1e-7f;     // of a group's largest magnitude: groups of zeros stay finite
constexpr float kLog2Fp8 = 8.807f;  // 2^8.807 = 447.9: probabilities fill the range of e4m3

// Keys and values as AttentionArgs has them.
struct KvSource {
  const __nv_bfloat16 *k, *v;
  int64_t k_stride, v_stride;
  int kv_len, kv_heads;
};

// The bf16 elements 8 * i .. 8 * i + 7 of a row as floats.
__device__ inline void Unpack(uint4 packed, float (&x)[8]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ inline float WarpMax(float x) {
  for (int offset = 16; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  }
  return x;
}

// Chips before Ada have no fp8: the host launches nothing there that comes here.
__device__ inline uint32_t PackFp8(float x0, float x1, float x2, float x3) {
  uint32_t packed = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  __trap();
#else
  asm("{\n"
      ".reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n"
      "}\n"
      : "=r"(packed)
      : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
#endif
  return packed;
}

inline KvSource SourceOf(const AttentionArgs& args) {
  return {static_cast<const __nv_bfloat16*>(args.k),
          static_cast<const __nv_bfloat16*>(args.v),
          args.k_stride,
          args.v_stride,
          static_cast<int>(args.kv_len),
          args.kv_heads};
}

// Block (kv head, 0 for keys or 1 for values): the mean of up to kSamples keys of each head, and
// the largest magnitude of each channel of as many values. Sets *counter to 0, unless it is null.
//
// Any constant vector may stand for the mean of the keys, so a sample of the tokens will do, and
// the channels' magnitudes only have to be roughly even, since fp8 and f16 have an exponent. That
// saves a pass over keys and values.
constexpr int kSampleThreads = 512;
constexpr int kSamples = 512;

template <int kHeadDim>
static __global__ void SampleKv(KvSource source, float* key_mean, float* value_channels,
                                unsigned* counter) {
  constexpr int kPieces = kHeadDim / 8, kRows = kSampleThreads / kPieces;
  __shared__ float partial[kRows][kHeadDim];
  const int head = blockIdx.x, thread = threadIdx.x;
  const bool values = blockIdx.y == 1;
  if (head == 0 && !values && thread == 0 && counter != nullptr) *counter = 0;
  const __nv_bfloat16* x = (values ? source.v : source.k) + head % source.kv_heads * kHeadDim;
  const int64_t stride = values ? source.v_stride : source.k_stride;
  const int64_t first = int64_t{head / source.kv_heads} * source.kv_len;
  const int step = (source.kv_len + kSamples - 1) / kSamples;
  const int samples = (source.kv_len + step - 1) / step;
  const int piece = thread % kPieces, row = thread / kPieces;
  if (row < kRows) {
    float acc[8] = {};
#pragma unroll 16
    for (int i = row; i < samples; i += kRows) {
      const int64_t token = first + i * step;
      float at[8];
      Unpack(__ldg(reinterpret_cast<const uint4*>(x + token * stride) + piece), at);
#pragma unroll
      for (int j = 0; j < 8; ++j) acc[j] = values ? fmaxf(acc[j], fabsf(at[j])) : acc[j] + at[j];
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) partial[row][8 * piece + j] = acc[j];
  }
  __syncthreads();
  __shared__ float of_warp[kSampleThreads / 32];
  float result = 0;
  if (thread < kHeadDim) {
    for (int r = 0; r < kRows; ++r) {
      result = values ? fmaxf(result, partial[r][thread]) : result + partial[r][thread];
    }
  }
  if (!values) {
    if (thread < kHeadDim) key_mean[head * kHeadDim + thread] = result / samples;
    return;
  }
  const float largest = WarpMax(result);
  if (thread % 32 == 0) of_warp[thread / 32] = largest;
  __syncthreads();
  float of_head = 0;
  for (float x : of_warp) of_head = fmaxf(of_head, x);
  // A channel that looks silent in the sample must not amplify what it says elsewhere.
  if (thread < kHeadDim) {
    value_channels[head * kHeadDim + thread] = of_head > 0 ? fmaxf(result, of_head / 1024) : 1.0f;
  }
}

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_ATTENTION_QUANTIZE_CUH_
