// Rows of all layers of a KV cache at once: what leaves a window, how it is found again, and what
// comes back. On a GPU each is one launch for all layers.
//
// layers: of one cache (one geometry and device), at least one; positions as in
// runtime/ops/attention.h, those named must be reserved in all of them. Throw Error naming what
// does not fit.
#ifndef SLUICE_RUNTIME_OPS_KV_LAYERS_H_
#define SLUICE_RUNTIME_OPS_KV_LAYERS_H_

#include <cstdint>
#include <span>

#include "runtime/exec_context.h"
#include "runtime/ops/attention.h"
#include "runtime/tensor.h"

namespace sluice {

// A layer's rows, packed: keys [rows, K * D], then values likewise; in the cache's dtype, or as
// int8 behind the scales of both, [2, K] f32.
enum class KvPacking { kPlain, kInt8 };
int64_t PackedKvBytes(const KvLayerView& kv, int64_t rows, KvPacking packing);

// packed [layers * PackedKvBytes] u8 = positions [begin, begin + rows) of the layers, one after
// another. As int8, with s the largest absolute value of the keys, or values, of a head in a layer:
// its scale is s / 127, and x becomes x * (127 / s), rounded to the nearest, halves away from zero.
void PackKv(ExecContext& ctx, std::span<const KvLayerView> layers, int64_t begin, int64_t rows,
            KvPacking packing, TensorView packed);
// Stores what was packed as kPlain at positions [begin, begin + rows).
void UnpackKv(ExecContext& ctx, ConstTensorView packed, int64_t rows,
              std::span<const KvLayerView> layers, int64_t begin);

// y[i, h * D + d] = scales[runs[i], h] * x[i, h * D + d], rounded to y's dtype, f32 or bf16.
// x: [N, K * D] i8; runs: [N] i32; scales: [R, K] f32; all contiguous.
void DequantiseKv(ExecContext& ctx, ConstTensorView x, ConstTensorView runs, ConstTensorView scales,
                  TensorView y);

// means[r, l * K * D + c] = the mean over the positions of run r of key channel c in layer l, each
// key turned back (runtime/ops/rope.h) by the number it was rotated to: `first` for position
// `begin`, one more for each further. counts: positions of the runs, which follow each other from
// `begin` on, each at least 1. means: [R, layers * K * D] f32, contiguous. Sums in f32.
void MeanKeys(ExecContext& ctx, std::span<const KvLayerView> layers, int64_t begin,
              std::span<const int32_t> counts, int32_t first, ConstTensorView inv_freq,
              TensorView means);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_KV_LAYERS_H_
