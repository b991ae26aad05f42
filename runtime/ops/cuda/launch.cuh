// What the .cu files share: reading and writing f32 and bf16, one warp's and one block's sums, and
// how to launch.
#ifndef SLUICE_RUNTIME_OPS_CUDA_LAUNCH_CUH_
#define SLUICE_RUNTIME_OPS_CUDA_LAUNCH_CUH_

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "runtime/dtype.h"
#include "runtime/ops/cuda/device.h"
#include "runtime/ops/cuda/status.cuh"

namespace sluice::cuda {

__device__ inline float ToFloat(float x) { return x; }
__device__ inline float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T>
__device__ T FromFloat(float x) {
  if constexpr (sizeof(T) == 2) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// Calls use(T()) with T the type of `dtype`, f32 or bf16.
template <typename Use>
void WithType(DType dtype, const Use& use) {
  dtype == DType::kBF16 ? use(__nv_bfloat16()) : use(float());
}

// Kernels launched by LaunchAhead may start while the last blocks of the kernel in front still run,
// on chips that can (9.0 and later). Before they read or write anything that other kernels write or
// read, all their threads call this.
__device__ inline void WaitForKernelInFront() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel start, and prepare itself, where blocks of this one have ended.
__device__ inline void LetNextKernelStart() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// config: without attributes.
template <typename... Params, typename... Given>
void LaunchAhead(void (*kernel)(Params...), cudaLaunchConfig_t config, const Given&... given) {
  cudaLaunchAttribute ahead;
  ahead.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  ahead.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &ahead;
  config.numAttrs = ComputeCapability() >= 90 ? 1 : 0;
  Check(cudaLaunchKernelEx(&config, kernel, Params(given)...), "a launch");
}
template <typename... Params, typename... Given>
void LaunchAhead(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream,
                 const Given&... given) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  LaunchAhead(kernel, config, given...);
}

inline int Multiprocessors() {
  int device = 0, count = 0;
  Check(cudaGetDevice(&device), "asking for the device");
  Check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "asking for the device's multiprocessors");
  return count;
}

constexpr int kThreads = 256;

// Blocks of kThreads for `count` items, a stride loop takes the rest: enough to fill any GPU.
inline unsigned BlocksFor(int64_t count) {
  return static_cast<unsigned>(
      std::clamp<int64_t>((count + kThreads - 1) / kThreads, 1, int64_t{1} << 16));
}

// The sum of `value` over the warp, for every lane.
template <typename T>
__device__ T WarpSum(T value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// The sum, or the largest, of `value` over the block, for every thread; all threads take part. The
// block has whole warps.
template <typename Join>
__device__ float BlockJoin(float value, float nothing, const Join& join) {
  __shared__ float of_warp[32];
  for (int offset = 16; offset > 0; offset /= 2) {
    value = join(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();  // of_warp of an earlier call has been read
  if (lane == 0) of_warp[warp] = value;
  __syncthreads();
  value = lane < blockDim.x / 32 ? of_warp[lane] : nothing;
  for (int offset = 16; offset > 0; offset /= 2) {
    value = join(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}
__device__ inline float BlockSum(float value) {
  return BlockJoin(value, 0.f, [](float a, float b) { return a + b; });
}
__device__ inline float BlockMax(float value) {
  return BlockJoin(value, -INFINITY, [](float a, float b) { return fmaxf(a, b); });
}

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_LAUNCH_CUH_
