// cuBLASLt reads matrices by columns. What lies in memory as y [M, N] row by row is y^T [N, M] to
// it, so the product it is asked for is y^T = W x^T with W^T [K, N] transposed.
//
// Finish: y[m, n] = act(row_factors[m] * factors[n] * sums[m, n] + bias[n]) (+ y[m, n]). A thread
// takes kVector neighbouring outputs of rows blockIdx.y, blockIdx.y + gridDim.y, ...: bound by
// memory, 4 bytes read and 2 or 4 written (or 8 moved) for each.
#include <cublasLt.h>

#include <array>
#include <limits>
#include <map>
#include <mutex>
#include <span>
#include <tuple>

#include "runtime/ops/cuda/launch.cuh"
#include "runtime/ops/cuda/linear.h"

namespace sluice::cuda {
namespace {

using ::sluice::cuda::Check;  // of what CUDA reports
void Check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS) Fail(what, cublasLtGetStatusString(status));
}

cudaDataType_t TypeOf(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return CUDA_R_16BF;
    case DType::kU8:
      return CUDA_R_8F_E4M3;
    case DType::kI8:
      return CUDA_R_8I;
    case DType::kI32:
      return CUDA_R_32I;
    default:
      return CUDA_R_32F;
  }
}

// The library's descriptions, each ended when it goes out of scope.
struct Layout {
  Layout(DType dtype, int64_t rows, int64_t columns, int64_t stride) {
    Check(cublasLtMatrixLayoutCreate(&handle, TypeOf(dtype), rows, columns, stride),
          "describing a matrix");
  }
  ~Layout() { cublasLtMatrixLayoutDestroy(handle); }
  cublasLtMatrixLayout_t handle = nullptr;
};

struct Operation {
  explicit Operation(bool whole_numbers) {
    Check(cublasLtMatmulDescCreate(&handle, whole_numbers ? CUBLAS_COMPUTE_32I : CUBLAS_COMPUTE_32F,
                                   whole_numbers ? CUDA_R_32I : CUDA_R_32F),
          "describing a product");
  }
  ~Operation() { cublasLtMatmulDescDestroy(handle); }
  template <typename T>
  void Set(cublasLtMatmulDescAttributes_t attribute, T value) {
    Check(cublasLtMatmulDescSetAttribute(handle, attribute, &value, sizeof value),
          "describing a product");
  }
  cublasLtMatmulDesc_t handle = nullptr;
};

constexpr int64_t kWorthTiming = int64_t{1} << 28;  // M * N * K

struct Preference {
  Preference() { Check(cublasLtMatmulPreferenceCreate(&handle), "stating a preference"); }
  ~Preference() { cublasLtMatmulPreferenceDestroy(handle); }
  cublasLtMatmulPreference_t handle = nullptr;
};

template <typename T, int kVector>
struct alignas(sizeof(T) * kVector) Piece {
  T v[kVector];
};

__device__ inline float Activated(Activation activation, float x) {
  switch (activation) {
    case Activation::kGeluTanh:
      return 0.5f * x * (1.f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case Activation::kGeluErf:
      return 0.5f * x * (1.f + erff(x * 0.70710678f));
    case Activation::kQuickGelu:
      return x / (1.f + expf(-1.702f * x));
    case Activation::kSiluMul:  // of a gate
      return x / (1.f + expf(-x));
    case Activation::kNone:
      break;
  }
  return x;
}

template <typename Sum, typename Y, int kVector>
__global__ void FinishKernel(FinishArgs a) {
  const bool paired = a.activation == Activation::kSiluMul;
  const int64_t outputs = paired ? a.n / 2 : a.n;
  const int64_t n = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) * kVector;
  if (n >= outputs) return;
  using Sums = Piece<Sum, kVector>;
  using Ys = Piece<Y, kVector>;
  for (int64_t m = blockIdx.y; m < a.m; m += gridDim.y) {
    const float row_factor = a.row_factors ? a.row_factors[m] : 1.f;
    const auto* const sums = static_cast<const Sum*>(a.sums) + m * a.sums_stride;
    const auto value = [&](const Sums& piece, int i, int64_t at) {
      auto x = static_cast<float>(piece.v[i]);
      if (a.factors) x *= row_factor * a.factors[at];
      return a.bias ? x + a.bias[at] : x;
    };
    const Sums piece = *reinterpret_cast<const Sums*>(sums + n);
    const Sums ups = paired ? *reinterpret_cast<const Sums*>(sums + outputs + n) : Sums();
    Ys* const to = reinterpret_cast<Ys*>(static_cast<Y*>(a.y) + m * outputs + n);
    const Ys before = a.accumulate ? *to : Ys();
    Ys y;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      float x = Activated(a.activation, value(piece, i, n + i));
      if (paired) x *= value(ups, i, outputs + n + i);
      y.v[i] = FromFloat<Y>(a.accumulate ? ToFloat(before.v[i]) + x : x);
    }
    *to = y;
  }
}

}  // namespace

// What an algorithm was chosen for: sizes, stride, types, epilogue, how far operands are aligned,
// and whether there are factors.
using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int, int, int, int, bool>;

namespace {

// What was chosen, for all contexts of the process: so that the same product adds up in the same
// order in each of them.
class Choices {
 public:
  // Calls choose() for a key that is asked for the first time.
  template <typename Choose>
  cublasLtMatmulAlgo_t Find(const Key& key, const Choose& choose) {
    const std::lock_guard lock(mutex_);
    const auto found = chosen_.find(key);
    return found != chosen_.end() ? found->second : chosen_.emplace(key, choose()).first->second;
  }

 private:
  std::mutex mutex_;
  std::map<Key, cublasLtMatmulAlgo_t> chosen_;
};

Choices& ChoicesOfProcess() {
  static Choices choices;
  return choices;
}

// Of the library's proposals the one that is fastest here. run(algorithm, y): queues the product,
// whose result y has `bytes` bytes. Waits for the device.
template <typename Run>
size_t FastestOf(std::span<const cublasLtMatmulHeuristicResult_t> proposals, size_t bytes,
                 cudaStream_t stream, const Run& run) {
  constexpr int kRounds = 3, kRuns = 4;
  void* const y = Allocate(bytes);  // what is accumulated into must not be changed
  if (!y) return 0;
  cudaEvent_t begin = nullptr, end = nullptr;
  Check(cudaEventCreate(&begin), "making an event");
  Check(cudaEventCreate(&end), "making an event");
  Check(cudaMemsetAsync(y, 0, bytes, stream), "clearing memory");
  size_t best = 0;
  float least = std::numeric_limits<float>::infinity();
  for (int round = 0; round < kRounds; ++round) {  // the first one warms up
    for (size_t i = 0; i < proposals.size(); ++i) {
      Check(cudaEventRecord(begin, stream), "marking a time");
      bool ran = true;
      for (int j = 0; j < kRuns && ran; ++j) ran = run(proposals[i].algo, y);
      Check(cudaEventRecord(end, stream), "marking a time");
      Check(cudaEventSynchronize(end), "timing a product");
      float milliseconds = 0;
      Check(cudaEventElapsedTime(&milliseconds, begin, end), "timing a product");
      if (!ran || round == 0 || milliseconds >= least) continue;
      least = milliseconds;
      best = i;
    }
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  Free(y);
  return best;
}

}  // namespace

struct Products::State {
  cublasLtHandle_t library = nullptr;
};

Products::Products() : state_(std::make_unique<State>()) {
  Check(cublasLtCreate(&state_->library), "opening cuBLASLt");
}

Products::~Products() { cublasLtDestroy(state_->library); }

void Products::Run(const ProductArgs& args, void* workspace, Stream stream) {
  const bool whole_numbers = args.dtype == DType::kI8;
  Operation operation(whole_numbers);
  operation.Set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  const cublasLtEpilogue_t epilogue =
      args.gelu_tanh ? (args.bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU)
                     : (args.bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT);
  operation.Set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
  if (args.bias) {
    operation.Set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, args.bias);
    operation.Set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE,
                  TypeOf(args.dtype == DType::kU8 ? DType::kBF16 : args.y_dtype));
  }
  if (args.dtype == DType::kU8) operation.Set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, int8_t{0});
  if (args.factors) {
    constexpr int32_t kVector = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    operation.Set(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, kVector);
    operation.Set(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, kVector);
    operation.Set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, args.factors);
    operation.Set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, args.row_factors);
  }
  const Layout weight(args.dtype, args.k, args.n, args.k),
      x(args.dtype, args.k, args.m, args.x_stride), y(args.y_dtype, args.n, args.m, args.y_stride);

  const auto alignment = [](const void* p) {
    const auto address = reinterpret_cast<uintptr_t>(p);
    return static_cast<uint32_t>(address % 16 == 0 ? 16 : address % 4 == 0 ? 4 : 2);
  };
  const uint32_t of_x = alignment(args.x), of_y = alignment(args.y);
  const Key key(args.m, args.n, args.k, args.x_stride, static_cast<int>(args.dtype),
                static_cast<int>(args.y_dtype), epilogue, static_cast<int>(of_x * 32 + of_y),
                args.factors != nullptr);
  const float one = 1, of_c = args.accumulate ? 1.f : 0.f;
  const int32_t whole_one = 1, whole_zero = 0;
  const auto factor = [&](const float& real, const int32_t& whole) {
    return whole_numbers ? static_cast<const void*>(&whole) : &real;
  };
  const auto run = [&](const cublasLtMatmulAlgo_t& algorithm, void* result) {
    return cublasLtMatmul(state_->library, operation.handle, factor(one, whole_one), args.weight,
                          weight.handle, args.x, x.handle, factor(of_c, whole_zero), result,
                          y.handle, result, y.handle, &algorithm, workspace, kWorkspaceBytes,
                          stream);
  };
  const auto choose = [&] {
    Preference preference;
    const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
      Check(
          cublasLtMatmulPreferenceSetAttribute(preference.handle, attribute, &value, sizeof value),
          "stating a preference");
    };
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, of_x);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, of_y);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, of_y);
    std::array<cublasLtMatmulHeuristicResult_t, 8> proposals;
    int count = 0;
    Check(cublasLtMatmulAlgoGetHeuristic(
              state_->library, operation.handle, weight.handle, x.handle, y.handle, y.handle,
              preference.handle, static_cast<int>(proposals.size()), proposals.data(), &count),
          "choosing an algorithm");
    if (count == 0) {
      throw Error("[cuda] cuBLASLt has no algorithm for M " + std::to_string(args.m) + ", N " +
                  std::to_string(args.n) + ", K " + std::to_string(args.k) + " in " +
                  Name(args.dtype));
    }
    // The library's first proposal takes up to half as long again as its best one for some of a
    // tower's and a decoder's products. Small ones are not worth the milliseconds.
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
    Check(cudaStreamIsCapturing(stream, &capturing), "asking a stream");
    size_t best = 0;
    if (count > 1 && capturing == cudaStreamCaptureStatusNone &&
        args.m * args.n * args.k >= kWorthTiming) {
      const size_t bytes = (args.m * args.y_stride) * SizeOf(args.y_dtype);
      best = FastestOf(std::span(proposals).first(count), bytes, stream,
                       [&](const cublasLtMatmulAlgo_t& algorithm, void* result) {
                         return run(algorithm, result) == CUBLAS_STATUS_SUCCESS;
                       });
    }
    return proposals[best].algo;
  };
  Check(run(ChoicesOfProcess().Find(key, choose), args.y), "a product");
}

void Finish(const FinishArgs& a, Stream stream) {
  const int64_t outputs = a.activation == Activation::kSiluMul ? a.n / 2 : a.n;
  if (a.m == 0 || outputs == 0) return;
  constexpr int kWide = 4;
  const bool wide = outputs % kWide == 0 && a.sums_stride % kWide == 0 &&
                    reinterpret_cast<uintptr_t>(a.sums) % (kWide * 4) == 0 &&
                    reinterpret_cast<uintptr_t>(a.y) % (kWide * SizeOf(a.y_dtype)) == 0;
  const int64_t pieces = outputs / (wide ? kWide : 1);
  const dim3 grid(static_cast<unsigned>((pieces + kThreads - 1) / kThreads),
                  static_cast<unsigned>(std::min<int64_t>(a.m, 1 << 15)));
  WithType(a.y_dtype, [&](auto y) {
    using Y = decltype(y);
    const auto run = [&](auto kernel) { kernel<<<grid, kThreads, 0, stream>>>(a); };
    if (a.sums_dtype == DType::kI32) {
      wide ? run(FinishKernel<int32_t, Y, kWide>) : run(FinishKernel<int32_t, Y, 1>);
    } else {
      wide ? run(FinishKernel<float, Y, kWide>) : run(FinishKernel<float, Y, 1>);
    }
  });
  CheckLaunch("finish");
}

}  // namespace sluice::cuda
