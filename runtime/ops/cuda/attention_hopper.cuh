// What both attention kernels for Hopper share: how work is handed out and tensor maps. A block has
// one warpgroup that copies and kGroups warpgroups that compute 64 query rows each; a piece of work
// is one tile of 64 * kGroups queries of one head.
#ifndef SLUICE_RUNTIME_OPS_CUDA_ATTENTION_HOPPER_CUH_
#define SLUICE_RUNTIME_OPS_CUDA_ATTENTION_HOPPER_CUH_

#include <cuda_bf16.h>

#include <string>

#include "runtime/error.h"
#include "runtime/ops/cuda/attention.h"
#include "runtime/ops/cuda/attention_rows.cuh"
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

// Fills shared memory with a pattern for the tensor cores to read: the ones that a row of
// probabilities is multiplied with to be summed, whatever the order of bytes in swizzled rows.
__device__ inline void FillShared(uint32_t to, int bytes, uint32_t pattern) {
  for (int i = 4 * threadIdx.x; i < bytes; i += 4 * blockDim.x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to + i), "r"(pattern) : "memory");
  }
  FenceAsyncProxy();
}

// ---- on the host ---------------------------------------------------------------------------

// Describes a tensor to the copy engine: `sizes` innermost first, `strides` in bytes between items
// of all dimensions but the innermost. What a box has outside the tensor is filled with zeros.
// Rows of a box have 128 or 32 bytes and are permuted accordingly (hopper.cuh).
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
  const cuuint32_t row_bytes = box[0] * (type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? 2 : 1);
  const CUresult result = reinterpret_cast<Encode>(function)(
      &map, type, kRank, const_cast<void*>(data), sizes, strides, box, ones,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      row_bytes == kNarrowBytes ? CU_TENSOR_MAP_SWIZZLE_32B : CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw Error("[cuda attention] the driver refused a tensor map with error " +
                std::to_string(static_cast<int>(result)));
  }
  return map;
}

// [batch * len, heads, head_dim] bf16 in boxes of `rows` tokens and 64 or 16 channels of one head.
inline CUtensorMap MapHeads(const void* data, int64_t batch, int64_t len, int heads, int head_dim,
                            int64_t stride, int rows, int channels = 64) {
  const auto u = [](int64_t x) { return static_cast<cuuint64_t>(x); };
  return MapTensor<4>(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, data,
                      {u(head_dim), u(heads), u(len), u(batch)},
                      {u(2 * head_dim), u(2 * stride), u(2 * stride * len)},
                      {static_cast<cuuint32_t>(channels), 1, static_cast<cuuint32_t>(rows), 1});
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
  // Sections are for the order of causal problems; in others all blocks read the same few heads.
  const int64_t kv_heads =
      args.causal ? kCacheBytes / (std::max<int64_t>(args.kv_len, 1) * kv_bytes) : 1;
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
  Check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "taking shared memory for attention");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(std::min(Multiprocessors(), pieces));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  LaunchAhead(kernel, config, given...);
}

}  // namespace sluice::cuda::hopper

#endif  // SLUICE_RUNTIME_OPS_CUDA_ATTENTION_HOPPER_CUH_
