// What builds without CUDA link instead of the .cu files: there are no devices.
#ifndef SLUICE_HAS_CUDA

#include "runtime/error.h"
#include "runtime/ops/cuda/activation.h"
#include "runtime/ops/cuda/attention.h"
#include "runtime/ops/cuda/copies.h"
#include "runtime/ops/cuda/device.h"
#include "runtime/ops/cuda/kv.h"
#include "runtime/ops/cuda/kv_layers.h"
#include "runtime/ops/cuda/linear.h"
#include "runtime/ops/cuda/linear_few.h"
#include "runtime/ops/cuda/merge.h"
#include "runtime/ops/cuda/norm.h"
#include "runtime/ops/cuda/novelty.h"
#include "runtime/ops/cuda/pictures.h"
#include "runtime/ops/cuda/quantise.h"
#include "runtime/ops/cuda/recorder.h"
#include "runtime/ops/cuda/resize.h"
#include "runtime/ops/cuda/rope.h"
#include "runtime/ops/cuda/rows.h"
#include "runtime/ops/cuda/sample.h"
#include "runtime/ops/cuda/select.h"

namespace sluice::cuda {
namespace {

[[noreturn]] void Refuse() {
  throw Error("[cuda] this build has no CUDA kernels; configure with -DSLUICE_CUDA=ON");
}

}  // namespace

int DeviceCount() { return 0; }
std::string DeviceName() { Refuse(); }
int ComputeCapability() { return 0; }
void Synchronize(Stream) { Refuse(); }
Stream NewStream() { Refuse(); }
void EndStream(Stream) noexcept {}
GrowingMemory::GrowingMemory(size_t) { Refuse(); }
GrowingMemory::~GrowingMemory() = default;
bool GrowingMemory::GrowTo(size_t) { Refuse(); }
void CopyNow(void*, const void*, size_t) { Refuse(); }
struct Recorder::State {};
Recorder::Recorder(Stream stream) : stream_(stream) { Refuse(); }
Recorder::~Recorder() = default;
void Recorder::Run(const std::string&, const std::function<void()>&) { Refuse(); }
void Recorder::Note(uint64_t) { Refuse(); }
const int32_t* Recorder::Numbers(std::span<const int32_t>) { Refuse(); }
void* Allocate(size_t) { Refuse(); }
void Free(void*) noexcept {}
CaptureScope::CaptureScope() { Refuse(); }
CaptureScope::~CaptureScope() = default;
void CopyRows(void*, size_t, const void*, size_t, size_t, size_t, Stream) { Refuse(); }
Event NewEvent() { Refuse(); }
void EndEvent(Event) noexcept {}
void Mark(Event, Stream) { Refuse(); }
void WaitFor(Event, Stream) { Refuse(); }
bool IsReached(Event) { Refuse(); }
void Synchronize(Event) { Refuse(); }
void* AllocatePinned(size_t) { Refuse(); }
void FreePinned(void*) noexcept {}
int64_t MemoryInUse() { Refuse(); }
void RmsNorm(const RmsNormArgs&, Stream) { Refuse(); }
void LayerNorm(const LayerNormArgs&, Stream) { Refuse(); }
struct Products::State {};
Products::Products() { Refuse(); }
Products::~Products() = default;
void Products::Run(const ProductArgs&, void*, Stream) { Refuse(); }
void Finish(const FinishArgs&, Stream) { Refuse(); }
void SiluMul(ConstTensorView, TensorView, Stream) { Refuse(); }
void Softmax(TensorView, Stream) { Refuse(); }
void Rope(TensorView, int, const int32_t*, ConstTensorView, Stream) { Refuse(); }
void CopyMatrix(ConstTensorView, TensorView, Stream) { Refuse(); }
void ZeroRows(TensorView, Stream) { Refuse(); }
void GatherRows(ConstTensorView, const RowLists&, TensorView, Stream) { Refuse(); }
void OverlayRows(std::span<const ConstTensorView>, ConstTensorView, const RowLists&, TensorView,
                 Stream) {
  Refuse();
}
void AddRows(ConstTensorView, float, ConstTensorView, TensorView, Stream) { Refuse(); }
void SubtractListed(ConstTensorView, std::span<const ConstTensorView>, const RowLists&, TensorView,
                    Stream) {
  Refuse();
}
void AddListed(std::span<const ConstTensorView>, ConstTensorView, const RowLists&, TensorView,
               Stream) {
  Refuse();
}
void Attention(const AttentionArgs&, void*, size_t, Stream) { Refuse(); }
void FewRows(const FewRowsArgs&, Stream) { Refuse(); }
void QuantiseRows(ConstTensorView, WeightFormat, TensorView, TensorView, Stream) { Refuse(); }
void Convert(ConstTensorView, TensorView, Stream) { Refuse(); }
void EmbedRows(ConstTensorView, const int32_t*, TensorView, Stream) { Refuse(); }
void StoreKv(const KvBlocks&, const int32_t*, const KvRows&, Stream) { Refuse(); }
void LoadKv(const KvBlocks&, const int32_t*, const KvRows&, Stream) { Refuse(); }
void RotateAndStore(const KvBlocks&, void*, int64_t, int64_t, int, const int32_t*, const int32_t*,
                    const float*, Stream) {
  Refuse();
}
bool CanRotateAndStore(int, int64_t, DType) { return false; }
void GatherKv(const KvBlocks&, const int32_t*, const int32_t*, int64_t, const int32_t*, Stream) {
  Refuse();
}
void PackLayers(const KvBlocks&, const LayerRows&, void*, Stream) { Refuse(); }
void UnpackLayers(const KvBlocks&, const LayerRows&, const void*, Stream) { Refuse(); }
void PackLayersInt8(const KvBlocks&, const LayerRows&, uint8_t*, Stream) { Refuse(); }
void DequantiseKv(ConstTensorView, ConstTensorView, ConstTensorView, TensorView, Stream) {
  Refuse();
}
void MeanKeys(const KvBlocks&, const LayerRows&, const int32_t*, int64_t, int32_t, const float*,
              float*, Stream) {
  Refuse();
}
void PlainAttention(const PlainAttentionArgs&, Stream) { Refuse(); }
size_t DecodeWorkspaceBytes(const DecodeAttentionArgs&) { Refuse(); }
void DecodeAttention(const DecodeAttentionArgs&, void*, Stream) { Refuse(); }
void KeyScores(const KeyScoreArgs&, Stream) { Refuse(); }
void MeanOfRows(const float*, int64_t, int64_t, int64_t, float*, Stream) { Refuse(); }
void GatherPatches(ConstTensorView, int64_t, int64_t, TensorView, Stream) { Refuse(); }
void RepeatRows(ConstTensorView, TensorView, Stream) { Refuse(); }
void BlendGrid(ConstTensorView, const GridTaps&, TensorView, Stream) { Refuse(); }
void RowCosines(std::span<const RowPairs>, TensorView, Stream) { Refuse(); }
void MeanRow(ConstTensorView, TensorView, Stream) { Refuse(); }
void LowestPlaces(ConstTensorView, TensorView, Stream) { Refuse(); }
size_t NoveltyWorkspaceBytes(const NoveltyArgs&) { Refuse(); }
void Novelty(const NoveltyArgs&, void*, Stream) { Refuse(); }
void HistoryCosines(ConstTensorView, int64_t, ConstTensorView, TensorView, TensorView, TensorView,
                    Stream) {
  Refuse();
}
void LargestOfGroups(ConstTensorView, int64_t, TensorView, Stream) { Refuse(); }
void JoinRows(ConstTensorView, int64_t, ConstTensorView, float, TensorView, TensorView, Stream) {
  Refuse();
}
void MergeRows(const MergeRowsArgs&, Stream) { Refuse(); }
void NearestOfPairs(ConstTensorView, int64_t, TensorView, TensorView, Stream) { Refuse(); }
void Send(void*, const void*, size_t, Stream) { Refuse(); }
void ResizeAndNormalise(const ResizeArgs&, Stream) { Refuse(); }
size_t PenaltyWorkspaceBytes(int32_t) { Refuse(); }
void Penalise(float*, int32_t, const int32_t*, int64_t, float, void*, Stream) { Refuse(); }
size_t SummariseWorkspaceBytes() { Refuse(); }
void SummariseLogits(const SummariseArgs&, Stream) { Refuse(); }
void ArgMax(ConstTensorView, TensorView, Stream) { Refuse(); }

}  // namespace sluice::cuda
#endif  // !SLUICE_HAS_CUDA
