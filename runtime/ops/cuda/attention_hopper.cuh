// What both attention kernels for Hopper share: how work is handed out, masks, the write-out, and
// tensor maps. A block has one warpgroup that copies and kGroups warpgroups that compute 64 query
// rows each; a piece of work is one tile of 64 * kGroups queries of one head.
#ifndef SLUICE_RUNTIME_OPS_CUDA_ATTENTION_HOPPER_CUH_
#define SLUICE_RUNTIME_OPS_CUDA_ATTENTION_HOPPER_CUH_

#include <cuda_bf16.h>

#include <string>
#include <type_traits>

#include "runtime/error.h"
#include "runtime/ops/cuda/attention.h"
#include "runtime/ops/cuda/hopper.cuh"
#include "runtime/ops/cuda/launch.cuh"
#include "runtime/ops/cuda/status.cuh"

#ifndef __CUDA_ARCH_FEAT_SM90_ALL
// Code for other architectures has empty kernels: constants and functions have no use there.
#pragma nv_diag_suppress 177
#endif

namespace sluice::cuda::hopper {

// Launched by Attention (attention.cu) once the arguments are checked.
void FlashAttention(const AttentionArgs& args, void* workspace, cudaStream_t stream);
void SageAttention(const AttentionArgs& args, void* workspace, cudaStream_t stream);

struct AttentionShape {
  int q_len = 0, kv_len = 0;
  int heads = 0, group = 1;  // group: query heads that share a kv head
  int q_tiles = 0;           // of a head
  int all_heads = 0;         // batch * heads
  int section = 1;           // heads whose keys and values stay in the second-level cache together
  float scale_log2 = 0;      // of scores, in powers of two
  // Over blocks only:
  const int32_t* table = nullptr;  // {kv_len, blocks...}
  int q_heads = 0;                 // where `heads` counts those that share a tile as one
  int together = 1;                // heads of a tile, whose rows are token by token
  int tokens = kMmaRows;           // of a warpgroup
  int parts = 1;                   // of the keys, each a piece of work
  float* partial = nullptr;        // [parts, q_len, heads, head_dim + 2]
  unsigned* counter = nullptr;     // pieces of work handed out so far
  __nv_bfloat16* out = nullptr;
  int64_t out_stride = 0;
};

// head: or which of the groups of heads that share a tile.
struct Work {
  int batch, head, first_row;
};

// Sections of heads one after another; within a section the longest rows of a causal problem come
// first, so that the short ones fill the gaps at the end.
__device__ inline Work WorkOf(const AttentionShape& shape, int index, int tile_rows) {
  const int per_section = shape.section * shape.q_tiles;
  const int section = index / per_section, rest = index - section * per_section;
  const int first = section * shape.section;
  const int heads = min(shape.section, shape.all_heads - first);
  const int tile = rest / heads, item = first + rest - tile * heads;
  return {item / shape.heads, item % shape.heads, (shape.q_tiles - 1 - tile) * tile_rows};
}

// Keys that the last of `rows` queries from first_row on sees.
template <bool kCausal>
__device__ inline int VisibleKeys(const AttentionShape& shape, int first_row, int rows) {
  if constexpr (!kCausal) return shape.kv_len;
  return min(shape.q_len, first_row + rows) + shape.kv_len - shape.q_len;
}

__device__ inline float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline uint32_t PackBf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Over the four lanes that share a row.
__device__ inline float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ inline float QuadSum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Sets scores of keys from first_key on that a row does not see to -infinity. limit0 and limit1:
// keys seen by rows lane / 4 and lane / 4 + 8.
template <int kCount>
__device__ inline void Mask(float (&s)[kCount], int first_key, int limit0, int limit1) {
  const int column = first_key + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (column + 8 * i + j >= limit0) s[4 * i + j] = -INFINITY;
      if (column + 8 * i + j >= limit1) s[4 * i + 2 + j] = -INFINITY;
    }
  }
}

// Fills shared memory with a pattern for the tensor cores to read: the ones that a row of
// probabilities is multiplied with to be summed, whatever the order of bytes in swizzled rows.
__device__ inline void FillShared(uint32_t to, int bytes, uint32_t pattern) {
  for (int i = 4 * threadIdx.x; i < bytes; i += 4 * blockDim.x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to + i), "r"(pattern) : "memory");
  }
  FenceAsyncProxy();
}

// Writes rows lane / 4 and lane / 4 + 8 of [64, kHeadDim] sums, scaled, as bf16. Lanes of a quad
// exchange pieces, so that each writes 16 bytes at once where four groups of 8 columns are full.
template <int kHeadDim, int kCount>
__device__ inline void StoreRows(const float (&o)[kCount], float scale0, float scale1,
                                 __nv_bfloat16* row0, __nv_bfloat16* row1, bool store0,
                                 bool store1) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float scale = half ? scale1 : scale0;
    __nv_bfloat16* row = half ? row1 : row0;
    const bool store = half ? store1 : store0;
#pragma unroll
    for (int i = 0; i < kHeadDim / 32 * 4; i += 4) {
      uint32_t v[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        v[k] = PackBf16(o[4 * (i + k) + 2 * half] * scale, o[4 * (i + k) + 2 * half + 1] * scale);
      }
      // A transposition of 4 x 4 among the four lanes: pieces go to lane ^ 1, then to lane ^ 2.
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, lane & 1 ? v[k] : v[k + 1], 1);
        (lane & 1 ? v[k] : v[k + 1]) = got;
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, lane & 2 ? v[k] : v[k + 2], 2);
        (lane & 2 ? v[k] : v[k + 2]) = got;
      }
      if (store) {
        *reinterpret_cast<uint4*>(row + 8 * (i + lane)) = make_uint4(v[0], v[1], v[2], v[3]);
      }
    }
#pragma unroll
    for (int i = kHeadDim / 32 * 4; i < kHeadDim / 8; ++i) {
      if (store) {
        *reinterpret_cast<uint32_t*>(row + 8 * i + 2 * lane) =
            PackBf16(o[4 * i + 2 * half] * scale, o[4 * i + 2 * half + 1] * scale);
      }
    }
  }
}

// ---- on the host ---------------------------------------------------------------------------

// Calls use with the head size as a constant: one that CheckAttention lets pass.
template <typename Use>
void WithHeadDim(int head_dim, const Use& use) {
  switch (head_dim) {
    case 64:
      return use(std::integral_constant<int, 64>());
    case 72:
      return use(std::integral_constant<int, 72>());
    case 80:
      return use(std::integral_constant<int, 80>());
    default:
      return use(std::integral_constant<int, 128>());
  }
}

// Describes a tensor to the copy engine: `sizes` innermost first, `strides` in bytes between items
// of all dimensions but the innermost. What a box has outside the tensor is filled with zeros.
template <int kRank>
CUtensorMap MapTensor(CUtensorMapDataType type, const void* data, const cuuint64_t (&sizes)[kRank],
                      const cuuint64_t (&strides)[kRank - 1], const cuuint32_t (&box)[kRank]) {
  // The driver's own function, asked for at run time: nothing links against the driver.
  using Encode = decltype(&cuTensorMapEncodeTiled);
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  Check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &found),
        "asking for tensor maps");
  if (found != cudaDriverEntryPointSuccess) {
    throw Error("[cuda attention] the driver has no tensor maps; it must be of CUDA 12 or newer");
  }
  CUtensorMap map;
  cuuint32_t ones[kRank];
  for (cuuint32_t& one : ones) one = 1;
  const CUresult result = reinterpret_cast<Encode>(function)(
      &map, type, kRank, const_cast<void*>(data), sizes, strides, box, ones,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw Error("[cuda attention] the driver refused a tensor map with error " +
                std::to_string(static_cast<int>(result)));
  }
  return map;
}

// [batch * len, heads, head_dim] bf16 in boxes of `rows` tokens and 64 channels of one head.
inline CUtensorMap MapHeads(const void* data, int64_t batch, int64_t len, int heads, int head_dim,
                            int64_t stride, int rows) {
  const auto u = [](int64_t x) { return static_cast<cuuint64_t>(x); };
  return MapTensor<4>(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, data,
                      {u(head_dim), u(heads), u(len), u(batch)},
                      {u(2 * head_dim), u(2 * stride), u(2 * stride * len)},
                      {64, 1, static_cast<cuuint32_t>(rows), 1});
}

// kv_bytes: of a token's keys and values of one kv head as the kernel reads them.
inline AttentionShape ShapeOf(const AttentionArgs& args, int kv_bytes) {
  constexpr int64_t kCacheBytes = 20 << 20;  // of some 50 MB, which other traffic shares
  AttentionShape shape;
  shape.q_len = static_cast<int>(args.q_len);
  shape.kv_len = static_cast<int>(args.kv_len);
  shape.heads = shape.q_heads = args.heads;
  shape.group = args.heads / args.kv_heads;
  shape.all_heads = static_cast<int>(args.batch * args.heads);
  const int64_t kv_heads = kCacheBytes / (std::max<int64_t>(args.kv_len, 1) * kv_bytes);
  shape.section = static_cast<int>(
      std::min<int64_t>(shape.all_heads, std::max<int64_t>(kv_heads, 1) * shape.group));
  shape.scale_log2 = args.scale * 1.44269504f;
  shape.out = static_cast<__nv_bfloat16*>(args.out);
  shape.out_stride = args.out_stride;
  return shape;
}

// One block a multiprocessor (or fewer), each taking pieces of work until none is left. The blocks
// may start while the last ones of the kernel in front still run, and call WaitForKernelInFront.
template <typename... Params, typename... Given>
void LaunchPersistent(void (*kernel)(Params...), int threads, int shared_bytes, int pieces,
                      cudaStream_t stream, const Given&... given) {
  int device = 0, processors = 0;
  Check(cudaGetDevice(&device), "asking for the device");
  Check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        "asking for the device's multiprocessors");
  Check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "taking shared memory for attention");
  cudaLaunchAttribute ahead;
  ahead.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  ahead.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(std::min(processors, pieces));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &ahead;
  config.numAttrs = 1;
  Check(cudaLaunchKernelEx(&config, kernel, given...), "launching attention");
}

}  // namespace sluice::cuda::hopper

#endif  // SLUICE_RUNTIME_OPS_CUDA_ATTENTION_HOPPER_CUH_
