// What builds without CUDA link instead of the .cu files: there are no devices.
#ifndef SLUICE_HAS_CUDA

#include "runtime/error.h"
#include "runtime/ops/cuda/activation.h"
#include "runtime/ops/cuda/attention.h"
#include "runtime/ops/cuda/device.h"
#include "runtime/ops/cuda/linear.h"
#include "runtime/ops/cuda/norm.h"
#include "runtime/ops/cuda/rope.h"
#include "runtime/ops/cuda/rows.h"

namespace sluice::cuda {
namespace {

[[noreturn]] void Refuse() {
  throw Error("[cuda] this build has no CUDA kernels; configure with -DSLUICE_CUDA=ON");
}

}  // namespace

int DeviceCount() { return 0; }
std::string DeviceName() { Refuse(); }
void Synchronize(Stream) { Refuse(); }
Stream NewStream() { Refuse(); }
void EndStream(Stream) noexcept {}
void* Allocate(size_t) { Refuse(); }
void Free(void*) noexcept {}
void CopyRows(void*, size_t, const void*, size_t, size_t, size_t, Stream) { Refuse(); }
void RmsNorm(const RmsNormArgs&, Stream) { Refuse(); }
void LayerNorm(const LayerNormArgs&, Stream) { Refuse(); }
struct Products::State {};
Products::Products() { Refuse(); }
Products::~Products() = default;
void Products::Run(const ProductArgs&, void*, Stream) { Refuse(); }
void Activate(Gelu, const float*, int64_t, void*, DType, Stream) { Refuse(); }
void SiluMul(ConstTensorView, TensorView, Stream) { Refuse(); }
void Softmax(TensorView, Stream) { Refuse(); }
void Rope(TensorView, int, const int32_t*, ConstTensorView, Stream) { Refuse(); }
void GatherRows(ConstTensorView, const RowList&, TensorView, Stream) { Refuse(); }
void ScatterRows(ConstTensorView, const RowList&, TensorView, Stream) { Refuse(); }
void AddRows(ConstTensorView, float, ConstTensorView, TensorView, const RowList&, Listed, Stream) {
  Refuse();
}
void Attention(const AttentionArgs&, void*, size_t, Stream) { Refuse(); }

}  // namespace sluice::cuda
#endif  // !SLUICE_HAS_CUDA
