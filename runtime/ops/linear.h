// y = act(x W^T + b), optionally added to what y holds: every projection of every model.
// Products of several rows go through AMX tiles (bf16 where the machine has them), oneDNN, or,
// where bf16 is not the faster type (runtime/ops/bf16_rows.h), our own product on vectors, which
// one to few rows (decoding) take everywhere; sums are f32. On a GPU few rows go through a kernel
// of ours that reads the weight once, more of them through cuBLASLt. There a weight may be kept in
// 8 bits: few rows are multiplied with it in bf16, more of them are quantised as well, row by row.
#ifndef SLUICE_RUNTIME_OPS_LINEAR_H_
#define SLUICE_RUNTIME_OPS_LINEAR_H_

#include <functional>
#include <memory>
#include <vector>

#include "runtime/exec_context.h"
#include "runtime/ops/bf16_rows.h"
#include "runtime/ops/linear_options.h"
#include "runtime/tensor.h"
#include "runtime/weight_format.h"

namespace sluice {

// A matrix that somebody keeps alive: our own copy, or a file's mapped pages.
struct SharedMatrix {
  ConstTensorView view;
  std::shared_ptr<const void> keeper;
  // Set for mapped pages: gives their memory back to the system until they are read again. Called
  // by whoever has made a copy of `view`.
  std::function<void()> release;
};

// Where products with a weight run, and how it is kept there. A device alone is a place, too.
struct WeightPlace {
  WeightPlace(Device where = Device::kCpu, WeightFormat how = WeightFormat::kPlain)
      : device(where), format(how) {}
  Device device;
  WeightFormat format;
};

// The weight [N, K] and bias [N] of one projection, prepared for this machine. Immutable, shareable
// between threads and contexts. Holds the weight exactly once: f32 as it is (mapped pages stay
// mapped), bf16 as a packed copy, see runtime/ops/cpu/linear.h for the layout and its reasons.
class LinearWeight {
 public:
  LinearWeight() = default;
  // weight: [N, K] f32 or bf16 (= the dtype the product is computed in); bias: [N] f32 or empty;
  // both in host memory. A GPU gets a copy; for one in 8 bits, of a weight in bf16, that in bf16 is
  // there for a moment. Throws Error on 8 bits elsewhere.
  LinearWeight(SharedMatrix weight, Tensor bias, WeightPlace place = {});
  // The rows of several weights with the same K below each other, as one product (q, k, v; gate,
  // up). `biases` is as long as `weights`, or empty for a product without bias; where only some
  // have one (null for the others), the missing ones are zero.
  static LinearWeight Stack(const std::vector<SharedMatrix>& weights,
                            const std::vector<const Tensor*>& biases, WeightPlace place = {});

  // On a GPU the [N, K] matrix itself. REQUIRES: device() is one, format() is plain.
  ConstTensorView OnDevice() const { return weight_.view; }
  // Outputs [begin, end) of this weight as a weight of their own. Shares the memory where the
  // layout allows (f32; packed, when both ends are multiples of 64 or the end), else copies.
  LinearWeight Outputs(int64_t begin, int64_t end) const;

  int64_t n() const { return n_; }
  int64_t k() const { return k_; }
  DType dtype() const { return dtype_; }  // of what it is multiplied with
  WeightFormat format() const { return format_; }
  Device device() const { return weight_.view.device(); }
  bool has_bias() const { return !bias_.empty(); }
  // The memory of the weight (padding of packed weights included), its factors and the bias.
  size_t SizeBytes() const;
  // Copies row `row` of the [N, K] matrix to `to`: [K] f32. Costs a line of memory for each pair of
  // columns when packed: for few rows (embeddings tied to the output projection), not for many.
  // REQUIRES: in host memory.
  void CopyRow(int64_t row, float* to) const;

 private:
  friend class LinearImpl;
  int64_t n_ = 0, k_ = 0;
  DType dtype_ = DType::kF32;
  WeightFormat format_ = WeightFormat::kPlain;
  // [N, K] row-major, or packed (packed_). In 8 bits [N, K rounded up to 16], zeros in the padding,
  // and 15 rows more in memory: the library multiplies 16 outputs at once, wherever they begin.
  SharedMatrix weight_;
  SharedMatrix factors_;  // [N] f32, with 8 bits
  bool packed_ = false;
  Tensor bias_;
  Tensor rounded_bias_;  // on a GPU: as bf16, for results in bf16
};

// x: [M, K] in the weight's dtype, or f32 with options.rms_norm (rows may be strided, then they are
// copied first); y: [M, N] (or
// as the activation says) f32 or the weight's dtype, contiguous. Throws Error naming shapes or
// dtypes that do not fit. The first call with a new M prepares code for it (0.2 to 4 ms) where
// oneDNN runs, kept in the context.
void Linear(ExecContext& ctx, ConstTensorView x, const LinearWeight& weight, TensorView y,
            const LinearOptions& options = {});

// Which implementation Linear takes, as a pure function that can be printed and tested.
// bf16_rows: of no consequence to f32.
enum class LinearKernel { kReference, kVector, kOneDnn, kAmx };
const char* Name(LinearKernel kernel);
LinearKernel ChooseLinear(int64_t m, int64_t n, int64_t k, DType dtype, Bf16Rows bf16_rows,
                          bool reference);

// Likewise on a GPU. aligned: the rows of x begin at multiples of 16 bytes, before a norm as well.
enum class GpuLinearKernel {
  kFewRows,     // ours, products in bf16 whatever the weight's format
  kCublas,      // in the compute dtype
  kCublasFp8,   // x quantised to e4m3, sums in f32
  kCublasInt8,  // x quantised to int8, sums in int32
};
const char* Name(GpuLinearKernel kernel);
GpuLinearKernel ChooseGpuLinear(int64_t m, int64_t n, int64_t k, bool aligned, DType dtype,
                                WeightFormat format, Activation activation);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_LINEAR_H_
