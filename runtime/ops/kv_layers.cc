#include "runtime/ops/kv_layers.h"

#include <numeric>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "runtime/ops/cpu/kv_layers.h"
#include "runtime/ops/cuda/kv_layers.h"
#include "runtime/ops/kv_table.h"
#include "runtime/ops/note.h"
#include "runtime/transfer.h"

namespace sluice {
namespace {

void CheckLayers(const char* op, const ExecContext& ctx, std::span<const KvLayerView> layers,
                 int64_t begin, int64_t rows) {
  if (layers.empty()) throw Error(std::string("[") + op + "] expected at least one layer, got 0");
  const KvLayerView& first = layers.front();
  for (const KvLayerView& kv : layers) {
    const int64_t room = static_cast<int64_t>(kv.blocks.size()) * kKvBlockTokens;
    if (begin < 0 || rows < 0 || begin > room || rows > room - begin) {
      throw Error(std::string("[") + op + "] positions [" + std::to_string(begin) + ", " +
                  std::to_string(begin) + " + " + std::to_string(rows) +
                  ") must lie in the cache's " + std::to_string(room) + "; reserve them first");
    }
    if (kv.kv_heads != first.kv_heads || kv.head_dim != first.head_dim || kv.dtype != first.dtype ||
        kv.device != ctx.device() || kv.base != first.base) {
      throw Error(std::string("[") + op + "] expected layers of one cache on the " +
                  Name(ctx.device()) + ", got others");
    }
  }
}

void CheckTensor(const char* op, const char* what, ConstTensorView x, Shape shape, DType dtype) {
  if (x.shape() == shape && x.dtype() == dtype && x.contiguous()) return;
  throw Error(std::string("[") + op + "] " + what + " must be contiguous " + shape.ToString() +
              " " + Name(dtype) + ", got " + x.shape().ToString() + " " + Name(x.dtype()));
}

cuda::KvBlocks BlocksOf(const KvLayerView& kv) {
  return {const_cast<void*>(kv.base), kv.kv_heads, kv.head_dim, kv.dtype};
}

// The rows and `more` numbers behind their table, on the device; `more_there` is where the latter
// lie.
cuda::LayerRows RowsThere(ExecContext& ctx, std::span<const KvLayerView> layers, int64_t begin,
                          int64_t rows, std::span<const int32_t> more = {},
                          const int32_t** more_there = nullptr) {
  std::vector<int32_t> table = {static_cast<int32_t>(begin % kKvBlockTokens)};
  for (const KvLayerView& kv : layers) AppendBlocks(kv, begin, begin + rows, table);
  const auto count = static_cast<int64_t>(layers.size());
  cuda::LayerRows there;
  there.blocks = (static_cast<int64_t>(table.size()) - 1) / count;
  there.layers = count;
  there.rows = rows;
  NoteScalars(ctx, layers.front().base, count, rows);
  const size_t end = table.size();
  table.insert(table.end(), more.begin(), more.end());
  there.table = Within(ctx, table);
  if (more_there) *more_there = there.table + end;
  return there;
}

}  // namespace

int64_t PackedKvBytes(const KvLayerView& kv, int64_t rows, KvPacking packing) {
  const int64_t elements = 2 * rows * kv.kv_heads * kv.head_dim;
  if (packing == KvPacking::kPlain) return elements * static_cast<int64_t>(SizeOf(kv.dtype));
  return elements + 2 * kv.kv_heads * static_cast<int64_t>(sizeof(float));
}

void PackKv(ExecContext& ctx, std::span<const KvLayerView> layers, int64_t begin, int64_t rows,
            KvPacking packing, TensorView packed) {
  constexpr char kOp[] = "pack_kv";
  CheckLayers(kOp, ctx, layers, begin, rows);
  const auto count = static_cast<int64_t>(layers.size());
  CheckTensor(kOp, "packed", packed, {count * PackedKvBytes(layers.front(), rows, packing)},
              DType::kU8);
  if (rows == 0) return;
  if (!OnGpu(kOp, ctx, {packed})) return cpu::PackKv(ctx, layers, begin, rows, packing, packed);
  const Workspace::Scope scope(ctx.workspace());
  const cuda::LayerRows from = RowsThere(ctx, layers, begin, rows);
  if (packing == KvPacking::kPlain) {
    ctx.Queue(cuda::PackLayers, BlocksOf(layers.front()), from, packed.raw());
  } else {
    ctx.Queue(cuda::PackLayersInt8, BlocksOf(layers.front()), from,
              static_cast<uint8_t*>(packed.raw()));
  }
}

void UnpackKv(ExecContext& ctx, ConstTensorView packed, int64_t rows,
              std::span<const KvLayerView> layers, int64_t begin) {
  constexpr char kOp[] = "unpack_kv";
  CheckLayers(kOp, ctx, layers, begin, rows);
  const auto count = static_cast<int64_t>(layers.size());
  CheckTensor(kOp, "packed", packed,
              {count * PackedKvBytes(layers.front(), rows, KvPacking::kPlain)}, DType::kU8);
  if (rows == 0) return;
  if (!OnGpu(kOp, ctx, {packed})) return cpu::UnpackKv(ctx, packed, rows, layers, begin);
  const Workspace::Scope scope(ctx.workspace());
  ctx.Queue(cuda::UnpackLayers, BlocksOf(layers.front()), RowsThere(ctx, layers, begin, rows),
            packed.raw());
}

void DequantiseKv(ExecContext& ctx, ConstTensorView x, ConstTensorView runs, ConstTensorView scales,
                  TensorView y) {
  constexpr char kOp[] = "dequantise_kv";
  if (x.shape().rank() != 2 || scales.shape().rank() != 2 || scales.dim(1) < 1 ||
      x.dim(1) % scales.dim(1) != 0) {
    throw Error(std::string("[") + kOp + "] expected x [N, K * D] and scales [R, K], got " +
                x.shape().ToString() + " and " + scales.shape().ToString());
  }
  CheckTensor(kOp, "x", x, x.shape(), DType::kI8);
  CheckTensor(kOp, "runs", runs, {x.dim(0)}, DType::kI32);
  CheckTensor(kOp, "scales", scales, scales.shape(), DType::kF32);
  if (y.shape() != x.shape() || (y.dtype() != DType::kF32 && y.dtype() != DType::kBF16)) {
    throw Error(std::string("[") + kOp + "] y must be " + x.shape().ToString() +
                " f32 or bf16, got " + y.shape().ToString() + " " + Name(y.dtype()));
  }
  if (!OnGpu(kOp, ctx, {x, runs, scales, y})) return cpu::DequantiseKv(x, runs, scales, y);
  ctx.Queue(cuda::DequantiseKv, x, runs, scales, y);
}

void MeanKeys(ExecContext& ctx, std::span<const KvLayerView> layers, int64_t begin,
              std::span<const int32_t> counts, int32_t first, ConstTensorView inv_freq,
              TensorView means) {
  constexpr char kOp[] = "mean_keys";
  std::vector<int32_t> ends(counts.size());
  std::partial_sum(counts.begin(), counts.end(), ends.begin());
  for (const int32_t count : counts) {
    if (count >= 1) continue;
    throw Error(std::string("[") + kOp + "] runs must have at least one position, got " +
                std::to_string(count));
  }
  const int64_t rows = ends.empty() ? 0 : ends.back();
  CheckLayers(kOp, ctx, layers, begin, rows);
  const KvLayerView& kv = layers.front();
  const auto runs = static_cast<int64_t>(counts.size());
  const int64_t width = int64_t{kv.kv_heads} * kv.head_dim * static_cast<int64_t>(layers.size());
  CheckTensor(kOp, "means", means, {runs, width}, DType::kF32);
  CheckTensor(kOp, "inv_freq", inv_freq, {kv.head_dim / 2}, DType::kF32);
  if (rows == 0) return;
  if (!OnGpu(kOp, ctx, {inv_freq, means})) {
    return cpu::MeanKeys(ctx, layers, begin, counts, first, inv_freq, means);
  }
  const Workspace::Scope scope(ctx.workspace());
  const int32_t* ends_there = nullptr;
  const cuda::LayerRows from = RowsThere(ctx, layers, begin, rows, ends, &ends_there);
  NoteScalars(ctx, first);
  ctx.Queue(cuda::MeanKeys, BlocksOf(kv), from, ends_there, runs, first,
            static_cast<const float*>(inv_freq.raw()), static_cast<float*>(means.raw()));
}

}  // namespace sluice
