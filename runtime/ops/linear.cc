#include "runtime/ops/linear.h"

#include <cstring>
#include <utility>

#include "runtime/error.h"
#include "runtime/ops/activation.h"
#include "runtime/ops/cpu/linear.h"
#include "runtime/ops/cpu/weight_memory.h"
#include "runtime/ops/cuda/activation.h"
#include "runtime/ops/cuda/linear.h"
#include "runtime/ops/cuda/linear_few.h"
#include "runtime/ops/cuda/quantise.h"
#include "runtime/ops/norm.h"
#include "runtime/ops/quantise.h"
#include "runtime/transfer.h"

namespace sluice {
namespace {

void CheckWeight(const ConstTensorView& weight) {
  if (weight.shape().rank() != 2 || !weight.contiguous() ||
      (weight.dtype() != DType::kF32 && weight.dtype() != DType::kBF16)) {
    throw Error("[linear] weight must be a contiguous [N, K] f32 or bf16, got " +
                weight.shape().ToString() + " " + Name(weight.dtype()));
  }
}

void CheckBias(const Tensor& bias, int64_t n) {
  if (bias.empty()) return;
  if (bias.shape() != Shape{n} || bias.dtype() != DType::kF32) {
    throw Error("[linear] bias must be " + Shape{n}.ToString() + " f32, got " +
                bias.shape().ToString() + " " + Name(bias.dtype()));
  }
}

// Of a product in 8 bits.
constexpr int64_t kOutputsAtOnce = 16, kInputsAtOnce = 16;

int64_t RoundUp(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

}  // namespace

// Reaches into LinearWeight for the functions of this file.
class LinearImpl {
 public:
  static LinearWeight Make(const std::vector<SharedMatrix>& parts, Tensor bias,
                           const WeightPlace& place) {
    LinearWeight result;
    result.k_ = parts.front().view.dim(1);
    result.dtype_ = parts.front().view.dtype();
    result.format_ = place.format;
    for (const SharedMatrix& part : parts) {
      if (part.view.dim(1) != result.k_ || part.view.dtype() != result.dtype_) {
        throw Error("[linear] stacked weights must be [N, " + std::to_string(result.k_) + "] " +
                    Name(result.dtype_) + ", got " + part.view.shape().ToString() + " " +
                    Name(part.view.dtype()));
      }
      result.n_ += part.view.dim(0);
    }
    CheckBias(bias, result.n_);
    const bool plain = place.format == WeightFormat::kPlain;
    if (!plain && (place.device == Device::kCpu || result.dtype_ != DType::kBF16)) {
      throw Error(std::string("[linear] a weight in ") + Name(place.format) +
                  " must be one of bf16 on a GPU, got " + Name(result.dtype_) + " on the " +
                  Name(place.device));
    }
    if (place.device == Device::kCuda) {
      plain ? Upload(parts, result) : UploadQuantised(parts, result);
      UploadBias(bias, result);
      return result;
    }
    result.bias_ = std::move(bias);
    result.packed_ = result.dtype_ == DType::kBF16;
    // Products read f32 weights as f32: a mapped file may hold them unaligned.
    const bool aligned =
        reinterpret_cast<uintptr_t>(parts.front().view.raw()) % alignof(float) == 0;
    if (!result.packed_ && parts.size() == 1 && aligned) {
      result.weight_ = parts.front();
      return result;
    }

    const int64_t blocks = (result.n_ + kPackedOutputs - 1) / kPackedOutputs;
    const int64_t pairs = (result.k_ + kPackedInputs - 1) / kPackedInputs * kPackedInputs / 2;
    const WeightMemory copy =
        AllocateWeight(result.dtype_, result.packed_ ? Shape{blocks, pairs, kPackedOutputs, 2}
                                                     : Shape{result.n_, result.k_});
    int64_t row = 0;
    for (const SharedMatrix& part : parts) {
      if (result.packed_) {
        PackRows(part.view.raw(), row, part.view.dim(0), result.k_, copy.view.data<BFloat16>());
      } else {
        std::memcpy(copy.view.data<float>() + row * result.k_, part.view.raw(),
                    part.view.SizeBytes());
      }
      row += part.view.dim(0);
      if (part.release) part.release();
    }
    if (result.packed_) ClearPadding(result, copy.view);
    result.weight_ = {copy.view, copy.keeper, nullptr};
    return result;
  }

  static LinearArgs Args(ConstTensorView x, const LinearWeight& weight, TensorView y,
                         const LinearOptions& options) {
    return {.m = x.dim(0),
            .n = weight.n_,
            .k = weight.k_,
            .x = x,
            .weight = weight.weight_.view.raw(),
            .dtype = weight.dtype_,
            .bias = weight.has_bias() ? weight.bias_.data<float>() : nullptr,
            .y = y,
            .options = options};
  }

  static bool RunsOnGpu(const ExecContext& ctx, ConstTensorView x, const LinearWeight& weight,
                        ConstTensorView y, const LinearOptions& options) {
    return ::sluice::OnGpu("linear", ctx, {x, weight.weight_.view, y, options.rms_norm});
  }

  static GpuLinearKernel Choose(ConstTensorView x, const LinearWeight& weight,
                                const LinearOptions& options) {
    const bool aligned =
        reinterpret_cast<uintptr_t>(x.raw()) % 16 == 0 && x.stride0() * SizeOf(x.dtype()) % 16 == 0;
    return ChooseGpuLinear(x.dim(0), weight.n_, weight.k_, aligned, weight.dtype_, weight.format_,
                           options.activation);
  }

  // Whether the product normalises the rows of x itself.
  static bool Normalises(const ExecContext& ctx, ConstTensorView x, const LinearWeight& weight,
                         const LinearOptions& options) {
    const int64_t bytes = x.dim(0) * x.dim(1) * static_cast<int64_t>(SizeOf(weight.dtype_));
    return ctx.device() == Device::kCuda && bytes <= cuda::kMostNormedBytes &&
           Choose(x, weight, options) == GpuLinearKernel::kFewRows &&
           reinterpret_cast<uintptr_t>(options.rms_norm.raw()) % 16 == 0;
  }

  // x is rows apart as they lie.
  static void RunOnGpu(ExecContext& ctx, ConstTensorView x, const LinearWeight& weight,
                       TensorView y, const LinearOptions& options) {
    switch (Choose(x, weight, options)) {
      case GpuLinearKernel::kFewRows:
        return RunFewRows(ctx, x, weight, y, options);
      case GpuLinearKernel::kCublas:
        return RunPlain(ctx, x, weight, y, options);
      case GpuLinearKernel::kCublasFp8:
      case GpuLinearKernel::kCublasInt8:
        return RunQuantised(ctx, x, weight, y, options);
    }
  }

 private:
  static const float* Floats(ConstTensorView x) { return static_cast<const float*>(x.raw()); }

  static void RunFewRows(ExecContext& ctx, ConstTensorView x, const LinearWeight& weight,
                         TensorView y, const LinearOptions& options) {
    ctx.Queue(cuda::FewRows,
              cuda::FewRowsArgs{.m = x.dim(0),
                                .n = weight.n_,
                                .k = weight.k_,
                                .x = x.raw(),
                                .x_stride = x.stride0(),
                                .norm = Floats(options.rms_norm),
                                .norm_eps = options.rms_eps,
                                .weight = weight.weight_.view.raw(),
                                .weight_stride = weight.weight_.view.stride0(),
                                .format = weight.format_,
                                .factors = Floats(weight.factors_.view),
                                .bias = Floats(weight.bias_.view()),
                                .y = y.raw(),
                                .y_dtype = y.dtype(),
                                .accumulate = options.accumulate,
                                .silu_mul = options.activation == Activation::kSiluMul});
  }

  static void RunPlain(ExecContext& ctx, ConstTensorView x, const LinearWeight& weight,
                       TensorView y, const LinearOptions& options) {
    RunProduct(ctx,
               {.m = x.dim(0),
                .n = weight.n_,
                .k = weight.k_,
                .x = x.raw(),
                .x_stride = x.stride0(),
                .weight = weight.weight_.view.raw(),
                .dtype = weight.dtype_},
               weight, y, options);
  }

  // A product that the library adds the bias to, and what it does not know behind it.
  static void RunProduct(ExecContext& ctx, cuda::ProductArgs product, const LinearWeight& weight,
                         TensorView y, const LinearOptions& options) {
    Workspace& workspace = ctx.workspace();
    const Activation activation = options.activation;
    if (activation == Activation::kSiluMul) {
      const TensorView gate_up = workspace.Allocate(weight.dtype_, {product.m, product.n});
      RunProduct(ctx, product, weight, gate_up, {});
      return ctx.Queue(cuda::SiluMul, gate_up, y);
    }
    if (activation == Activation::kGeluErf || activation == Activation::kQuickGelu) {
      const TensorView sums = workspace.Allocate(DType::kF32, y.shape());
      RunProduct(ctx, product, weight, sums, {});
      return ctx.Queue(cuda::Finish, cuda::FinishArgs{.m = product.m,
                                                      .n = product.n,
                                                      .sums = sums.raw(),
                                                      .sums_stride = sums.stride0(),
                                                      .activation = activation,
                                                      .y = y.raw(),
                                                      .y_dtype = y.dtype()});
    }
    const bool rounded = y.dtype() == DType::kBF16 || weight.format_ == WeightFormat::kFp8;
    product.bias = (rounded ? weight.rounded_bias_ : weight.bias_).view().raw();
    product.gelu_tanh = activation == Activation::kGeluTanh;
    product.accumulate = options.accumulate;
    QueueProduct(ctx, product, y);
  }

  static void QueueProduct(ExecContext& ctx, cuda::ProductArgs product, TensorView y) {
    product.y = y.raw();
    product.y_stride = y.stride0();
    product.y_dtype = y.dtype();
    const TensorView scratch = ctx.workspace().Allocate(
        DType::kU8, {static_cast<int64_t>(cuda::Products::kWorkspaceBytes)});
    ctx.Queue([&](cuda::Stream stream) { ctx.gpu_products().Run(product, scratch.raw(), stream); });
  }

  static void RunQuantised(ExecContext& ctx, ConstTensorView x, const LinearWeight& weight,
                           TensorView y, const LinearOptions& options) {
    Workspace& workspace = ctx.workspace();
    const ConstTensorView matrix = weight.weight_.view;
    const TensorView q = workspace.Allocate(matrix.dtype(), {x.dim(0), matrix.dim(1)});
    const TensorView row_factors = workspace.Allocate(DType::kF32, {x.dim(0)});
    ctx.Queue(cuda::QuantiseRows, x, weight.format_, q, row_factors);
    cuda::ProductArgs product = {.m = x.dim(0),
                                 .n = weight.n_,
                                 .k = matrix.dim(1),
                                 .x = q.raw(),
                                 .x_stride = q.stride0(),
                                 .weight = matrix.raw(),
                                 .dtype = matrix.dtype()};
    const float* const factors = Floats(weight.factors_.view);
    // Of few rows the library is slow with factors: 16 x 3584 x 18944 take 51 us, without them 28.
    constexpr int64_t kRowsForFactors = 64;
    if (weight.format_ == WeightFormat::kFp8 && product.m >= kRowsForFactors &&
        weight.n_ % kOutputsAtOnce == 0 && reinterpret_cast<uintptr_t>(factors) % 16 == 0) {
      product.row_factors = Floats(row_factors);
      product.factors = factors;
      return RunProduct(ctx, product, weight, y, options);
    }
    product.n = RoundUp(weight.n_, kOutputsAtOnce);
    const DType of_sums = weight.format_ == WeightFormat::kInt8 ? DType::kI32 : DType::kF32;
    const TensorView sums = workspace.Allocate(of_sums, {product.m, product.n});
    QueueProduct(ctx, product, sums);
    ctx.Queue(cuda::Finish, cuda::FinishArgs{.m = product.m,
                                             .n = weight.n_,
                                             .sums = sums.raw(),
                                             .sums_dtype = sums.dtype(),
                                             .sums_stride = sums.stride0(),
                                             .row_factors = Floats(row_factors),
                                             .factors = factors,
                                             .bias = Floats(weight.bias_.view()),
                                             .activation = options.activation,
                                             .y = y.raw(),
                                             .y_dtype = y.dtype(),
                                             .accumulate = options.accumulate});
  }

  static void Upload(const std::vector<SharedMatrix>& parts, LinearWeight& to) {
    const auto weight = std::make_shared<Tensor>(to.dtype_, Shape{to.n_, to.k_}, Device::kCuda);
    int64_t row = 0;
    for (const SharedMatrix& part : parts) {
      cuda::CopyNow(weight->view().Slice(row, to.n_).raw(), part.view.raw(), part.view.SizeBytes());
      row += part.view.dim(0);
      if (part.release) part.release();
    }
    to.weight_ = {*weight, weight, nullptr};
  }

  static void UploadQuantised(const std::vector<SharedMatrix>& parts, LinearWeight& to) {
    const auto weight = std::make_shared<Tensor>(
        StorageOf(to.format_), Shape{to.n_ + kOutputsAtOnce - 1, RoundUp(to.k_, kInputsAtOnce)},
        Device::kCuda);
    const auto factors = std::make_shared<Tensor>(DType::kF32, Shape{to.n_}, Device::kCuda);
    int64_t row = 0;
    for (const SharedMatrix& part : parts) {
      const Tensor plain(to.dtype_, part.view.shape(), Device::kCuda);  // while it is quantised
      cuda::CopyNow(plain.view().raw(), part.view.raw(), part.view.SizeBytes());
      if (part.release) part.release();
      const int64_t end = row + part.view.dim(0);
      cuda::QuantiseRows(plain, to.format_, weight->view().Slice(row, end),
                         factors->view().Slice(row, end), nullptr);
      cuda::Synchronize(nullptr);  // other streams do not wait for it
      row = end;
    }
    to.weight_ = {weight->view().Slice(0, to.n_), weight, nullptr};
    to.factors_ = {*factors, factors, nullptr};
  }

  static void UploadBias(const Tensor& bias, LinearWeight& to) {
    if (bias.empty()) return;
    to.bias_ = Placed(bias.view(), Device::kCuda);
    if (to.dtype_ == DType::kBF16) {
      to.rounded_bias_ = Placed(ConvertTo(bias, DType::kBF16), Device::kCuda);
    }
  }

  // PackRows pads inputs; this pads the outputs of the last block.
  static void ClearPadding(const LinearWeight& weight, TensorView packed) {
    const int64_t used = weight.n_ % kPackedOutputs;
    if (used == 0) return;
    const int64_t pairs = packed.dim(1);
    BFloat16* block = packed.data<BFloat16>() + (packed.dim(0) - 1) * pairs * kPackedOutputs * 2;
    for (int64_t pair = 0; pair < pairs; ++pair, block += kPackedOutputs * 2) {
      std::memset(block + used * 2, 0, (kPackedOutputs - used) * 2 * sizeof(BFloat16));
    }
  }
};

LinearWeight::LinearWeight(SharedMatrix weight, Tensor bias, WeightPlace place) {
  CheckWeight(weight.view);
  *this = LinearImpl::Make({std::move(weight)}, std::move(bias), place);
}

LinearWeight LinearWeight::Stack(const std::vector<SharedMatrix>& weights,
                                 const std::vector<const Tensor*>& biases, WeightPlace place) {
  if (weights.size() == 0 || (biases.size() != 0 && biases.size() != weights.size())) {
    throw Error("[linear] stack must get as many biases as weights or none, got " +
                std::to_string(weights.size()) + " weights and " + std::to_string(biases.size()) +
                " biases");
  }
  int64_t n = 0;
  for (const SharedMatrix& weight : weights) {
    CheckWeight(weight.view);
    n += weight.view.dim(0);
  }
  Tensor bias;
  for (const Tensor* part : biases) {
    if (part && !part->empty()) bias = Tensor(DType::kF32, {n});
  }
  if (!bias.empty()) {
    float* to = bias.data<float>();
    auto weight = weights.begin();
    for (const Tensor* part : biases) {
      const int64_t rows = (weight++)->view.dim(0);
      if (part && !part->empty()) {
        CheckBias(*part, rows);
        std::memcpy(to, part->data<float>(), rows * sizeof(float));
      } else {
        std::memset(to, 0, rows * sizeof(float));
      }
      to += rows;
    }
  }
  return LinearImpl::Make(weights, std::move(bias), place);
}

LinearWeight LinearWeight::Outputs(int64_t begin, int64_t end) const {
  if (begin < 0 || begin >= end || end > n_) {
    throw Error("[linear] outputs must lie in [0, " + std::to_string(n_) + "), got [" +
                std::to_string(begin) + ", " + std::to_string(end) + ")");
  }
  if (device() != Device::kCpu) {
    LinearWeight part = {};
    part.n_ = end - begin;
    part.k_ = k_;
    part.dtype_ = dtype_;
    part.format_ = format_;
    part.weight_ = {weight_.view.Slice(begin, end), weight_.keeper, nullptr};
    if (!factors_.view.empty()) {
      part.factors_ = {factors_.view.Slice(begin, end), factors_.keeper, nullptr};
    }
    if (has_bias()) part.bias_ = Placed(bias_.view().Slice(begin, end), device());
    if (!rounded_bias_.empty()) {
      part.rounded_bias_ = Placed(rounded_bias_.view().Slice(begin, end), device());
    }
    return part;
  }
  Tensor bias;
  if (has_bias()) {
    bias = Tensor(DType::kF32, {end - begin});
    std::memcpy(bias.data<float>(), bias_.data<float>() + begin, (end - begin) * sizeof(float));
  }
  const bool whole_blocks = begin % kPackedOutputs == 0 && (end % kPackedOutputs == 0 || end == n_);
  if (packed_ && !whole_blocks) {
    const auto rows = std::make_shared<Tensor>(DType::kF32, Shape{end - begin, k_});
    for (int64_t row = begin; row < end; ++row) {
      CopyRow(row, rows->data<float>() + (row - begin) * k_);
    }
    const auto copy = std::make_shared<Tensor>(ConvertTo(*rows, dtype_));
    return LinearImpl::Make({{*copy, copy, nullptr}}, std::move(bias), Device::kCpu);
  }
  LinearWeight part = {};
  part.n_ = end - begin;
  part.k_ = k_;
  part.dtype_ = dtype_;
  part.packed_ = packed_;
  part.bias_ = std::move(bias);
  part.weight_ = {packed_ ? weight_.view.Slice(begin / kPackedOutputs,
                                               (end + kPackedOutputs - 1) / kPackedOutputs)
                          : weight_.view.Slice(begin, end),
                  weight_.keeper, nullptr};
  return part;
}

size_t LinearWeight::SizeBytes() const {
  const auto bytes = [](const SharedMatrix& x) { return x.view.empty() ? 0 : x.view.SizeBytes(); };
  return bytes(weight_) + bytes(factors_) + bias_.SizeBytes() + rounded_bias_.SizeBytes();
}

void LinearWeight::CopyRow(int64_t row, float* to) const {
  if (row < 0 || row >= n_) {
    throw Error("[linear] row must lie in [0, " + std::to_string(n_) + "), got " +
                std::to_string(row));
  }
  if (!packed_) {
    std::memcpy(to, weight_.view.data<float>() + row * k_, k_ * sizeof(float));
    return;
  }
  const BFloat16* from = weight_.view.data<BFloat16>();
  for (int64_t k = 0; k < k_; ++k) to[k] = from[PackedIndex(row, k, k_)].ToFloat();
}

const char* Name(LinearKernel kernel) {
  switch (kernel) {
    case LinearKernel::kReference:
      return "reference";
    case LinearKernel::kVector:
      return "vector";
    case LinearKernel::kOneDnn:
      return "onednn";
    case LinearKernel::kAmx:
      return "amx";
  }
  return "?";
}

LinearKernel ChooseLinear(int64_t m, int64_t n, int64_t k, DType dtype, Bf16Rows bf16_rows,
                          bool reference) {
  if (reference) return LinearKernel::kReference;
  // However many rows, the vectors' product of bf16 is not behind that of f32. Measured on one core
  // of an EPYC (Zen 3, AVX2), microseconds bf16 / f32 (M x N x K):
  //   8 x 896 x 896: 146 / 193      64 x 896 x 896: 1082 / 1138   256 x 896 x 896: 4694 / 4677
  //   8 x 896 x 4864: 813 / 1462    64 x 896 x 4864: 6386 / 6745  256 x 896 x 4864: 25725 / 25412
  // The limit, 103 GFLOP/s of multiply-adds, allows 997 for 64 x 896 x 896.
  const bool widens = bf16_rows == Bf16Rows::kWidened || bf16_rows == Bf16Rows::kPlain;
  if (dtype == DType::kBF16 && widens) return LinearKernel::kVector;
  // Measured on two cores with AMX, microseconds vector / oneDNN (m rows, N x K):
  //   weights in memory: bf16 9728 x 896    1: 539 / 715   4: 604 / 715    8: 1046 / 741
  //                      bf16 896 x 4864    1: 264 / 350   4: 289 / 350    8: 852 / 358
  //                      f32  9728 x 896    1: 1062 / 1491 4: 1102 / 1662  8: 1340 / 1836
  //   in the caches:     bf16 320 x 320     1: 2.7 / 2.7   2: 3.4 / 2.6    4: 5.1 / 2.7
  //                      bf16 1152 x 896    1: 12 / 8      2: 17 / 8       4: 27 / 8
  //                      f32  320 x 320     1: 2.6 / 10    4: 4.3 / 11     8: 7.5 / 13
  // While a weight comes from memory, rows up to four cost nothing; in the caches AMX wins.
  if (m == 1) return LinearKernel::kVector;
  if (dtype == DType::kF32) return m <= 8 ? LinearKernel::kVector : LinearKernel::kOneDnn;
  constexpr int64_t kInMemory = int64_t{4} << 20;  // bytes of one weight
  const bool in_memory = n * k * static_cast<int64_t>(SizeOf(dtype)) >= kInMemory;
  if (m <= 4 && in_memory) return LinearKernel::kVector;
  return bf16_rows == Bf16Rows::kAmx ? LinearKernel::kAmx : LinearKernel::kOneDnn;
}

const char* Name(GpuLinearKernel kernel) {
  switch (kernel) {
    case GpuLinearKernel::kFewRows:
      return "few_rows";
    case GpuLinearKernel::kCublas:
      return "cublas";
    case GpuLinearKernel::kCublasFp8:
      return "cublas_fp8";
    case GpuLinearKernel::kCublasInt8:
      return "cublas_int8";
  }
  return "?";
}

GpuLinearKernel ChooseGpuLinear(int64_t m, int64_t n, int64_t k, bool aligned, DType dtype,
                                WeightFormat format, Activation activation) {
  const bool plain = format == WeightFormat::kPlain;
  // Of more than two rows the library's kernel is the better one for large weights. Measured on an
  // H100 with 16 rows, microseconds of ours / cuBLASLt (N x K):
  //   bf16  1152 x 896: 2.8 / 4.6   9728 x 896: 10.6 / 11.0   3584 x 3584: 12.1 / 14.4
  //         4608 x 3584: 18.5 / 15.3   3584 x 18944: 61 / 56   151936 x 896: 112 / 107
  //   fp8   1152 x 896: 3.5 / 8.0   3584 x 3584: 8.0 / 12.3   4608 x 3584: 12.7 / 13.6
  //         3584 x 18944: 33 / 39   37888 x 3584: 63 / 63   151936 x 896: 116 / 71
  constexpr int64_t kMostBytes = int64_t{28} << 20, kMostBytesOf8Bits = int64_t{100} << 20;
  const bool small = plain ? 2 * n * k <= kMostBytes : n * k <= kMostBytesOf8Bits;
  if ((m <= cuda::kMostSummedRows || (m <= cuda::kMostFewRows && small)) && aligned &&
      dtype == DType::kBF16 && k % (plain ? 8 : 16) == 0 &&
      (activation == Activation::kNone || activation == Activation::kSiluMul)) {
    return GpuLinearKernel::kFewRows;
  }
  return plain                          ? GpuLinearKernel::kCublas
         : format == WeightFormat::kFp8 ? GpuLinearKernel::kCublasFp8
                                        : GpuLinearKernel::kCublasInt8;
}

void Linear(ExecContext& ctx, ConstTensorView x, const LinearWeight& weight, TensorView y,
            const LinearOptions& options) {
  if (weight.n() == 0) throw Error("[linear] weight must be set, got an empty one");
  const bool normed = !options.rms_norm.empty();
  const DType dtype = normed ? DType::kF32 : weight.dtype();
  if (x.shape().rank() != 2 || x.dim(1) != weight.k() || x.dtype() != dtype) {
    throw Error("[linear] x must be [M, " + std::to_string(weight.k()) + "] " + Name(dtype) +
                ", got " + x.shape().ToString() + " " + Name(x.dtype()));
  }
  if (normed &&
      (options.rms_norm.shape() != Shape{weight.k()} || options.rms_norm.dtype() != DType::kF32)) {
    throw Error("[linear] the norm's weight must be " + Shape{weight.k()}.ToString() +
                " f32, got " + options.rms_norm.shape().ToString() + " " +
                Name(options.rms_norm.dtype()));
  }
  const bool paired = options.activation == Activation::kSiluMul;
  if (paired && weight.n() % 2 != 0) {
    throw Error("[linear] gate and up must be as many outputs, got " + std::to_string(weight.n()) +
                " together");
  }
  const Shape y_shape{x.dim(0), paired ? weight.n() / 2 : weight.n()};
  if (y.shape() != y_shape || !y.contiguous() ||
      (y.dtype() != DType::kF32 && y.dtype() != weight.dtype())) {
    throw Error("[linear] y must be a contiguous " + y_shape.ToString() + " f32 or " +
                Name(weight.dtype()) + ", got " + y.shape().ToString() + " " + Name(y.dtype()));
  }
  if (options.accumulate && (y.dtype() != DType::kF32 || options.activation != Activation::kNone)) {
    throw Error(std::string("[linear] accumulate needs y in f32 and no activation, got ") +
                Name(y.dtype()) + (options.activation == Activation::kNone ? "" : " and one"));
  }
  if (x.dim(0) == 0) return;

  Workspace::Scope scope(ctx.workspace());
  if (normed && !LinearImpl::Normalises(ctx, x, weight, options)) {
    const TensorView rows = ctx.workspace().Allocate(weight.dtype(), x.shape());
    RmsNorm(ctx, x, options.rms_norm, options.rms_eps, rows);
    return Linear(ctx, rows, weight, y,
                  {.activation = options.activation, .accumulate = options.accumulate});
  }
  if (LinearImpl::RunsOnGpu(ctx, x, weight, y, options)) {
    return LinearImpl::RunOnGpu(ctx, x, weight, y, options);
  }
  if (!x.contiguous()) {
    // oneDNN has fast products for contiguous rows only; the copy is small beside the product.
    const TensorView rows = ctx.workspace().Allocate(x.dtype(), x.shape());
    ConvertInto(x, rows);
    x = rows;
  }
  const LinearArgs args = LinearImpl::Args(x, weight, y, options);
  // f32 does not wait for the measurement.
  const bool asks = args.dtype == DType::kBF16 && !ctx.reference_kernels();
  const LinearKernel kernel =
      ChooseLinear(args.m, args.n, args.k, args.dtype, asks ? FastestBf16Rows() : Bf16Rows::kPlain,
                   ctx.reference_kernels());
  if (paired && (kernel != LinearKernel::kAmx || args.n % 32 != 0)) {
    const TensorView gate_up = ctx.workspace().Allocate(x.dtype(), {args.m, args.n});
    Linear(ctx, x, weight, gate_up);
    SiluMul(ctx, gate_up, y);
    return;
  }
  switch (kernel) {
    case LinearKernel::kReference:
      return LinearReference(args);
    case LinearKernel::kVector:
      return LinearVector(ctx, args);
    case LinearKernel::kOneDnn:
      return LinearOneDnn(ctx, args);
    case LinearKernel::kAmx:
      return LinearAmx(ctx, args);
  }
}

}  // namespace sluice
