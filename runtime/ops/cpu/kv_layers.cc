#include "runtime/ops/cpu/kv_layers.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "runtime/ops/rope.h"
#include "runtime/ops/rows.h"

namespace sluice::cpu {
namespace {

// Rows [rows, heads * D] f32 as int8, each head with a scale: scales[heads], then the rows.
void Quantise(ConstTensorView rows, int heads, float* scales, int8_t* to) {
  const int64_t width = rows.dim(1), size = width / heads;
  for (int head = 0; head < heads; ++head) {
    float most = 0;
    for (int64_t i = 0; i < rows.dim(0); ++i) {
      const float* row = rows.data<float>() + i * rows.stride0() + head * size;
      for (int64_t d = 0; d < size; ++d) most = std::max(most, std::abs(row[d]));
    }
    scales[head] = most / 127;
    const float inverse = most > 0 ? 127 / most : 0;
    for (int64_t i = 0; i < rows.dim(0); ++i) {
      const float* row = rows.data<float>() + i * rows.stride0() + head * size;
      int8_t* out = to + i * width + head * size;
      for (int64_t d = 0; d < size; ++d) {
        out[d] = static_cast<int8_t>(std::clamp(std::lround(row[d] * inverse), -127L, 127L));
      }
    }
  }
}

}  // namespace

void PackKv(ExecContext& ctx, std::span<const KvLayerView> layers, int64_t begin, int64_t rows,
            KvPacking packing, TensorView packed) {
  const KvLayerView& kv = layers.front();
  const int heads = kv.kv_heads;
  const int64_t width = int64_t{heads} * kv.head_dim;
  const int64_t bytes = PackedKvBytes(kv, rows, packing);
  const Workspace::Scope scope(ctx.workspace());
  const TensorView both = ctx.workspace().Allocate(kv.dtype, {2 * rows, width});
  const TensorView wide = ctx.workspace().Allocate(DType::kF32, {2 * rows, width});
  std::vector<float> scales(2 * heads);
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    uint8_t* to = packed.data<uint8_t>() + layer * bytes;
    LoadKv(ctx, layers[layer], begin, both.Slice(0, rows), both.Slice(rows, 2 * rows));
    if (packing == KvPacking::kPlain) {
      std::memcpy(to, both.raw(), bytes);
      continue;
    }
    Convert(ctx, both, wide);
    auto* quantised = reinterpret_cast<int8_t*>(to + scales.size() * sizeof(float));
    Quantise(wide.Slice(0, rows), heads, scales.data(), quantised);
    Quantise(wide.Slice(rows, 2 * rows), heads, scales.data() + heads, quantised + rows * width);
    std::memcpy(to, scales.data(), scales.size() * sizeof(float));
  }
}

void UnpackKv(ExecContext& ctx, ConstTensorView packed, int64_t rows,
              std::span<const KvLayerView> layers, int64_t begin) {
  const KvLayerView& kv = layers.front();
  const int64_t bytes = PackedKvBytes(kv, rows, KvPacking::kPlain);
  const Workspace::Scope scope(ctx.workspace());
  const TensorView both =
      ctx.workspace().Allocate(kv.dtype, {2 * rows, int64_t{kv.kv_heads} * kv.head_dim});
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    std::memcpy(both.raw(), packed.data<uint8_t>() + layer * bytes, bytes);
    StoreKv(ctx, both.Slice(0, rows), both.Slice(rows, 2 * rows), begin, layers[layer]);
  }
}

void DequantiseKv(ConstTensorView x, ConstTensorView runs, ConstTensorView scales, TensorView y) {
  const int64_t width = x.dim(1), heads = scales.dim(1);
  const Tensor wide(DType::kF32, x.shape());
  for (int64_t i = 0; i < x.dim(0); ++i) {
    const float* scale = scales.data<float>() + runs.data<int32_t>()[i] * heads;
    for (int64_t c = 0; c < width; ++c) {
      wide.data<float>()[i * width + c] =
          scale[c * heads / width] * static_cast<float>(x.data<int8_t>()[i * width + c]);
    }
  }
  ConvertInto(wide, y);
}

void MeanKeys(ExecContext& ctx, std::span<const KvLayerView> layers, int64_t begin,
              std::span<const int32_t> counts, int32_t first, ConstTensorView inv_freq,
              TensorView means) {
  const KvLayerView& kv = layers.front();
  const int64_t width = int64_t{kv.kv_heads} * kv.head_dim;
  int64_t rows = 0;
  for (const int32_t count : counts) rows += count;
  std::vector<int32_t> back(rows);
  for (int64_t i = 0; i < rows; ++i) back[i] = -(first + static_cast<int32_t>(i));
  const Workspace::Scope scope(ctx.workspace());
  const TensorView keys = ctx.workspace().Allocate(kv.dtype, {rows, width});
  const TensorView values = ctx.workspace().Allocate(kv.dtype, {rows, width});
  const TensorView turned = ctx.workspace().Allocate(DType::kF32, {rows, width});
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    LoadKv(ctx, layers[layer], begin, keys, values);
    Convert(ctx, keys, turned);
    Rope(ctx, turned, kv.head_dim, back, inv_freq);
    const float* row = turned.data<float>();
    for (size_t run = 0; run < counts.size(); ++run) {
      float* mean = means.data<float>() + (run * layers.size() + layer) * width;
      std::fill_n(mean, width, 0.0f);
      for (int32_t i = 0; i < counts[run]; ++i, row += width) {
        for (int64_t d = 0; d < width; ++d) mean[d] += row[d];
      }
      for (int64_t d = 0; d < width; ++d) mean[d] /= static_cast<float>(counts[run]);
    }
  }
}

}  // namespace sluice::cpu
