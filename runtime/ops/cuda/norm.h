// Normalisation on a CUDA device; the contracts are those of runtime/ops/norm.h.
#ifndef SLUICE_RUNTIME_OPS_CUDA_NORM_H_
#define SLUICE_RUNTIME_OPS_CUDA_NORM_H_

#include <cstdint>
#include <string>

#include "runtime/dtype.h"
#include "runtime/ops/cuda/device.h"

namespace sluice::cuda {

// y = x / sqrt(mean(x^2) + eps) * weight. All pointers are device memory.
struct RmsNormArgs {
  const float* x = nullptr;       // [M, D] f32, rows x_stride elements apart
  const float* weight = nullptr;  // [D] f32
  void* y = nullptr;              // [M, D] f32 or bf16 (y_dtype), rows y_stride elements apart
  DType y_dtype = DType::kF32;
  int64_t m = 0, d = 0;
  int64_t x_stride = 0, y_stride = 0;
  float eps = 0;
};

// Queues the kernel in `stream` and returns. Throws Error when the arguments do not fit or the
// launch is refused; what goes wrong on the device appears at the next Synchronize.
void RmsNorm(const RmsNormArgs& args, Stream stream);

// y = (x + more - mean) / sqrt(var + eps) * weight + bias. All pointers are device memory.
struct LayerNormArgs {
  static constexpr int64_t kMostMatrices = 16;
  const float* x[kMostMatrices] = {};  // [M, D] f32 each, rows x_stride elements apart
  int64_t x_stride[kMostMatrices] = {};
  const float* more = nullptr;  // [more_matrices * M, D] f32, added to the first; or null
  const float *weight = nullptr, *bias = nullptr;  // [D] f32
  void* y = nullptr;                               // [matrices * M, D] f32 or bf16
  DType y_dtype = DType::kF32;
  int64_t matrices = 1, more_matrices = 0;
  int64_t m = 0, d = 0;  // M < 2^31
  int64_t more_stride = 0, y_stride = 0;
  float eps = 0;
};
// As RmsNorm; its caller has checked the sizes.
void LayerNorm(const LayerNormArgs& args, Stream stream);

// How the kernel is launched: one block a row.
struct NormLaunch {
  int threads = 0;       // of a block, a multiple of 32
  int vector = 1;        // elements a thread reads at once: 4 where rows are aligned to 16 bytes
  int kept_vectors = 0;  // vectors a thread keeps in registers; 0: the row is read again
};

// Pure functions, so that they can be printed and tested. `aligned`: all operands begin, and their
// rows follow, at multiples of four elements.
NormLaunch ChooseRmsNorm(int64_t d, bool aligned);
NormLaunch ChooseLayerNorm(int64_t d, bool aligned);

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_NORM_H_
