// y = act(x W^T + b), optionally added to what y holds: every projection of every model.
// Products of several rows go through oneDNN in the weight's dtype with f32 accumulation; one to
// few rows (decoding) through our own bandwidth-bound matrix-vector product.
#ifndef SLUICE_RUNTIME_OPS_LINEAR_H_
#define SLUICE_RUNTIME_OPS_LINEAR_H_

#include <memory>
#include <string>

#include "runtime/exec_context.h"
#include "runtime/tensor.h"

namespace sluice {

// A matrix that somebody keeps alive: our own copy, or a file's mapped pages.
struct SharedMatrix {
  ConstTensorView view;
  std::shared_ptr<const void> keeper;
};

enum class WeightUse {
  kManyRows,  // only ever multiplied with many rows (encoder): packed for that
  kAnyRows,   // also multiplied with single rows (decoder)
};

// The weight [N, K] and bias [N] of one projection, prepared for this machine. Immutable, shareable
// between threads and contexts. Holds the weight exactly once.
class LinearWeight {
 public:
  LinearWeight() = default;
  // weight: [N, K] f32 or bf16 (= the dtype the product is computed in); bias: [N] f32 or empty.
  LinearWeight(SharedMatrix weight, Tensor bias, WeightUse use);
  // The rows of several weights with the same K below each other, as one product (q, k, v; gate,
  // up).
  static LinearWeight Stack(std::initializer_list<SharedMatrix> weights,
                            std::initializer_list<const Tensor*> biases, WeightUse use);

  int64_t n() const { return n_; }
  int64_t k() const { return k_; }
  DType dtype() const { return dtype_; }
  bool has_bias() const { return !bias_.empty(); }
  size_t SizeBytes() const;

 private:
  friend class LinearImpl;
  int64_t n_ = 0, k_ = 0;
  DType dtype_ = DType::kF32;
  SharedMatrix weight_;  // [N, K] row-major, or packed (packed_)
  bool packed_ = false;
  Tensor bias_;
};

enum class Activation { kNone, kGeluTanh, kGeluErf };

struct LinearOptions {
  Activation activation = Activation::kNone;
  bool accumulate = false;  // y += instead of y =; y must be f32; not with an activation
};

// x: [M, K] in the weight's dtype (rows may be strided); y: [M, N] f32 or the weight's dtype,
// contiguous. Throws Error naming shapes or dtypes that do not fit.
void Linear(ExecContext& ctx, ConstTensorView x, const LinearWeight& weight, TensorView y,
            const LinearOptions& options = {});

// Which implementation Linear takes, as a pure function that can be printed and tested.
enum class LinearKernel { kReference, kVector, kOneDnn };
const char* Name(LinearKernel kernel);
LinearKernel ChooseLinear(int64_t m, int64_t n, int64_t k, DType dtype, bool packed,
                          bool reference);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_LINEAR_H_
