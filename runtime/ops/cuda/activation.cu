// y[m, i] = silu(x[m, i]) * x[m, I + i]: bound by memory, 3 elements moved for each result. A block
// takes 256 columns of a row.
// p[m, i] = exp(x[m, i] - max) / sum: one block a row, which it reads three times from the caches.
#include "runtime/ops/cuda/activation.h"
#include "runtime/ops/cuda/launch.cuh"

namespace sluice::cuda {
namespace {

template <typename In, typename Out>
__global__ void SiluMulKernel(const In* x, int64_t x_stride, int64_t rows, int64_t width, Out* y,
                              int64_t y_stride) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= width) return;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const float gate = ToFloat(x[row * x_stride + i]), up = ToFloat(x[row * x_stride + width + i]);
    y[row * y_stride + i] = FromFloat<Out>(gate / (1.f + expf(-gate)) * up);
  }
}

__global__ void SoftmaxKernel(float* x, int64_t stride, int64_t width) {
  float* row = x + blockIdx.x * stride;
  float most = -INFINITY;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) most = fmaxf(most, row[i]);
  most = BlockMax(most);
  float sum = 0;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    row[i] = expf(row[i] - most);
    sum += row[i];
  }
  const float scale = 1.f / BlockSum(sum);
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) row[i] *= scale;
}

}  // namespace

void SiluMul(ConstTensorView gate_up, TensorView y, Stream stream) {
  const int64_t rows = y.dim(0), width = y.dim(1);
  if (rows * width == 0) return;
  WithType(gate_up.dtype(), [&](auto in) {
    WithType(y.dtype(), [&](auto out) {
      using In = decltype(in);
      using Out = decltype(out);
      const dim3 grid(static_cast<unsigned>((width + kThreads - 1) / kThreads),
                      static_cast<unsigned>(std::min<int64_t>(rows, 1 << 15)));
      SiluMulKernel<<<grid, kThreads, 0, stream>>>(static_cast<const In*>(gate_up.raw()),
                                                   gate_up.stride0(), rows, width,
                                                   static_cast<Out*>(y.raw()), y.stride0());
    });
  });
  CheckLaunch("silu_mul");
}

void Softmax(TensorView x, Stream stream) {
  if (x.dim(0) == 0) return;
  SoftmaxKernel<<<static_cast<unsigned>(x.dim(0)), kThreads, 0, stream>>>(
      static_cast<float*>(x.raw()), x.stride0(), x.dim(1));
  CheckLaunch("softmax");
}

}  // namespace sluice::cuda
