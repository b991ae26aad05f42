// cuBLASLt reads matrices by columns. What lies in memory as y [M, N] row by row is y^T [N, M] to
// it, so the product it is asked for is y^T = W x^T with W^T [K, N] transposed.
#include <cublasLt.h>

#include <map>
#include <tuple>

#include "runtime/ops/cuda/launch.cuh"
#include "runtime/ops/cuda/linear.h"

namespace sluice::cuda {
namespace {

void Check(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw Error(std::string("[cuda linear] ") + what + " failed: " + cublasLtGetStatusString(status));
}

cudaDataType_t TypeOf(DType dtype) { return dtype == DType::kBF16 ? CUDA_R_16BF : CUDA_R_32F; }

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
  Operation() {
    Check(cublasLtMatmulDescCreate(&handle, CUBLAS_COMPUTE_32F, CUDA_R_32F),
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

struct Preference {
  Preference() { Check(cublasLtMatmulPreferenceCreate(&handle), "stating a preference"); }
  ~Preference() { cublasLtMatmulPreferenceDestroy(handle); }
  cublasLtMatmulPreference_t handle = nullptr;
};

__global__ void ActivateErf(const float* x, int64_t count, float* y32, __nv_bfloat16* y16) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += step) {
    const float value = 0.5f * x[i] * (1.f + erff(x[i] * 0.70710678f));
    y32 ? void(y32[i] = value) : void(y16[i] = __float2bfloat16_rn(value));
  }
}

__global__ void ActivateQuick(const float* x, int64_t count, float* y32, __nv_bfloat16* y16) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += step) {
    const float value = x[i] / (1.f + expf(-1.702f * x[i]));
    y32 ? void(y32[i] = value) : void(y16[i] = __float2bfloat16_rn(value));
  }
}

}  // namespace

// What an algorithm was chosen for: sizes, stride, types, epilogue, and how far operands are
// aligned.
using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int, int, int, int>;

struct Products::State {
  cublasLtHandle_t library = nullptr;
  std::map<Key, cublasLtMatmulAlgo_t> chosen;
};

Products::Products() : state_(std::make_unique<State>()) {
  Check(cublasLtCreate(&state_->library), "opening cuBLASLt");
}

Products::~Products() { cublasLtDestroy(state_->library); }

void Products::Run(const ProductArgs& args, void* workspace, Stream stream) {
  Operation operation;
  operation.Set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  const cublasLtEpilogue_t epilogue =
      args.gelu_tanh ? (args.bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU)
                     : (args.bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT);
  operation.Set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
  if (args.bias) {
    operation.Set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, args.bias);
    operation.Set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, TypeOf(args.y_dtype));
  }
  const Layout weight(args.dtype, args.k, args.n, args.k),
      x(args.dtype, args.k, args.m, args.x_stride), y(args.y_dtype, args.n, args.m, args.n);

  const auto alignment = [](const void* p) {
    const auto address = reinterpret_cast<uintptr_t>(p);
    return static_cast<uint32_t>(address % 16 == 0 ? 16 : address % 4 == 0 ? 4 : 2);
  };
  const uint32_t of_x = alignment(args.x), of_y = alignment(args.y);
  const Key key(args.m, args.n, args.k, args.x_stride, static_cast<int>(args.dtype),
                static_cast<int>(args.y_dtype), epilogue, static_cast<int>(of_x * 32 + of_y));
  auto found = state_->chosen.find(key);
  if (found == state_->chosen.end()) {
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
    cublasLtMatmulHeuristicResult_t best;
    int count = 0;
    Check(cublasLtMatmulAlgoGetHeuristic(state_->library, operation.handle, weight.handle, x.handle,
                                         y.handle, y.handle, preference.handle, 1, &best, &count),
          "choosing an algorithm");
    if (count == 0) {
      throw Error("[cuda linear] cuBLASLt has no algorithm for M " + std::to_string(args.m) +
                  ", N " + std::to_string(args.n) + ", K " + std::to_string(args.k) + " in " +
                  Name(args.dtype));
    }
    found = state_->chosen.emplace(key, best.algo).first;
  }
  const float one = 1, of_c = args.accumulate ? 1.f : 0.f;
  Check(cublasLtMatmul(state_->library, operation.handle, &one, args.weight, weight.handle, args.x,
                       x.handle, &of_c, args.y, y.handle, args.y, y.handle, &found->second,
                       workspace, kWorkspaceBytes, stream),
        "a product");
}

void Activate(Gelu kind, const float* x, int64_t count, void* y, DType y_dtype, Stream stream) {
  if (count == 0) return;
  auto* y32 = y_dtype == DType::kF32 ? static_cast<float*>(y) : nullptr;
  auto* y16 = y_dtype == DType::kBF16 ? static_cast<__nv_bfloat16*>(y) : nullptr;
  const auto kernel = kind == Gelu::kErf ? ActivateErf : ActivateQuick;
  kernel<<<BlocksFor(count), kThreads, 0, stream>>>(x, count, y32, y16);
  CheckLaunch("activation");
}

}  // namespace sluice::cuda
