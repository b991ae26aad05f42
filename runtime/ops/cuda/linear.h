// Products with a weight on a CUDA device, through cuBLASLt; the contract is that of
// runtime/ops/linear.h.
#ifndef SLUICE_RUNTIME_OPS_CUDA_LINEAR_H_
#define SLUICE_RUNTIME_OPS_CUDA_LINEAR_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#include "runtime/dtype.h"
#include "runtime/ops/cuda/device.h"

namespace sluice::cuda {

// What an activation kernel behind a product computes, in f32.
enum class Gelu { kErf, kQuick };

// y = gelu_tanh?(x W^T + bias) (+ y). All pointers are device memory.
struct ProductArgs {
  int64_t m = 0, n = 0, k = 0;
  const void* x = nullptr;  // [M, K] of dtype, rows x_stride elements apart
  int64_t x_stride = 0;
  const void* weight = nullptr;  // [N, K] of dtype
  DType dtype = DType::kF32;     // f32 (multiplied in f32, not TF32) or bf16
  const void* bias = nullptr;    // [N] of y_dtype, or null
  void* y = nullptr;             // [M, N] contiguous
  DType y_dtype = DType::kF32;   // f32 or dtype
  bool gelu_tanh = false;
  bool accumulate = false;  // not with gelu_tanh
};

// The library and the algorithms it chose, by size. Belongs to one context.
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

// y = gelu(x), x: [count] f32, y: [count] f32 or bf16, on the device.
void Activate(Gelu kind, const float* x, int64_t count, void* y, DType y_dtype, Stream stream);

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_LINEAR_H_
