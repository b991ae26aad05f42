// A thread takes one angle of one row and turns that pair of some heads by it: sine and cosine, the
// expensive part, are computed once for kHeadsAtOnce heads. More would leave a GPU without work.
#include "runtime/ops/cuda/launch.cuh"
#include "runtime/ops/cuda/rope.cuh"
#include "runtime/ops/cuda/rope.h"

namespace sluice::cuda {
namespace {

constexpr int kHeadsAtOnce = 2;

template <typename T>
__global__ void RopeKernel(T* x, int64_t stride, int64_t rows, int heads, int head_dim,
                           const int32_t* positions, const float* inv_freq) {
  const int half = head_dim / 2;
  const int64_t at = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (at >= rows * half) return;
  const int64_t row = at / half;
  const int i = static_cast<int>(at % half), position = positions[row];
  float sine, cosine;
  SineAndCosine(position, inv_freq[i], sine, cosine);
  const int first = blockIdx.y * kHeadsAtOnce, end = min(heads, first + kHeadsAtOnce);
  T* pair = x + row * stride + int64_t{first} * head_dim + i;
  for (int head = first; head < end; ++head, pair += head_dim) {
    Rotate(sine, cosine, pair[0], pair[half]);
  }
}

}  // namespace

void Rope(TensorView x, int head_dim, const int32_t* positions, ConstTensorView inv_freq,
          Stream stream) {
  const int64_t angles = x.dim(0) * (head_dim / 2);
  if (angles == 0) return;
  const auto blocks = static_cast<unsigned>((angles + kThreads - 1) / kThreads);
  WithType(x.dtype(), [&](auto element) {
    using T = decltype(element);
    const int heads = static_cast<int>(x.dim(1) / head_dim);
    const dim3 grid(blocks, (heads + kHeadsAtOnce - 1) / kHeadsAtOnce);
    RopeKernel<<<grid, kThreads, 0, stream>>>(static_cast<T*>(x.raw()), x.stride0(), x.dim(0),
                                              heads, head_dim, positions,
                                              static_cast<const float*>(inv_freq.raw()));
  });
  CheckLaunch("rope");
}

}  // namespace sluice::cuda
