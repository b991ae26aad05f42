// Products with a weight on a CUDA device, through cuBLASLt; the contract is that of
// runtime/ops/linear.h.
#ifndef SLUICE_RUNTIME_OPS_CUDA_LINEAR_H_
#define SLUICE_RUNTIME_OPS_CUDA_LINEAR_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#include "runtime/dtype.h"
#include "runtime/ops/cuda/device.h"
#include "runtime/ops/linear_options.h"

namespace sluice::cuda {

// y = gelu_tanh?(x W^T + bias) (+ y). All pointers are device memory.
//
// dtype, of x and weight: f32 (multiplied in f32, not TF32) or bf16, y f32 or dtype; u8, the bits
// of e4m3 (without the library's fast accumulation, which loses eight times as much), y f32 or
// bf16; i8, y i32, with nothing behind the product. Of 8 bits N and K are multiples of 16, and all
// lies at such.
struct ProductArgs {
  int64_t m = 0, n = 0, k = 0;
  const void* x = nullptr;  // [M, K] of dtype, rows x_stride elements apart
  int64_t x_stride = 0;
  const void* weight = nullptr;  // [N, K] of dtype
  DType dtype = DType::kF32;
  // Of e4m3: x W^T is multiplied with row_factors[m] * factors[n]; both or neither.
  const float* row_factors = nullptr;  // [M]
  const float* factors = nullptr;      // [N]
  const void* bias = nullptr;          // [N] of y_dtype, of e4m3 always bf16; or null
  void* y = nullptr;                   // [M, N], rows y_stride elements apart
  int64_t y_stride = 0;
  DType y_dtype = DType::kF32;
  bool gelu_tanh = false;
  bool accumulate = false;  // not with gelu_tanh
};

// The library. For every size it is asked once for its algorithms, and large products are timed
// with each of them, in the first run that is not captured: the choice holds for the process, but
// another process may add up in another order. Belongs to one context.
class Products {
 public:
  static constexpr size_t kWorkspaceBytes = size_t{32} << 20;

  Products();
  ~Products();
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;

  // Queues the product. workspace: kWorkspaceBytes at a multiple of 256 bytes. Throws Error with
  // what the library reported.
  void Run(const ProductArgs& args, void* workspace, Stream stream);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// What a product leaves to be done: y = act(row_factors[m] * factors[n] * sums[m, n] + bias[n])
// (+ y), in f32. Of kSiluMul's sums the first N / 2 are gates, the others ups.
struct FinishArgs {
  int64_t m = 0, n = 0;
  const void* sums = nullptr;  // [M, N] f32 or i32, rows sums_stride elements apart
  DType sums_dtype = DType::kF32;
  int64_t sums_stride = 0;
  const float* row_factors = nullptr;  // [M]; both or neither
  const float* factors = nullptr;      // [N]
  const float* bias = nullptr;         // [N], or null
  Activation activation = Activation::kNone;
  void* y = nullptr;            // [M, N], or [M, N / 2] with kSiluMul, contiguous
  DType y_dtype = DType::kF32;  // f32 or bf16
  bool accumulate = false;      // y f32
};
void Finish(const FinishArgs& args, Stream stream);

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_LINEAR_H_
