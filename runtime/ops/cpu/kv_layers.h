// Rows of all layers of a KV cache on the CPU; contracts: runtime/ops/kv_layers.h. Arguments have
// been checked by the caller.
#ifndef SLUICE_RUNTIME_OPS_CPU_KV_LAYERS_H_
#define SLUICE_RUNTIME_OPS_CPU_KV_LAYERS_H_

#include <cstdint>
#include <span>

#include "runtime/ops/kv_layers.h"

namespace sluice::cpu {

void PackKv(ExecContext& ctx, std::span<const KvLayerView> layers, int64_t begin, int64_t rows,
            KvPacking packing, TensorView packed);
void UnpackKv(ExecContext& ctx, ConstTensorView packed, int64_t rows,
              std::span<const KvLayerView> layers, int64_t begin);
void DequantiseKv(ConstTensorView x, ConstTensorView runs, ConstTensorView scales, TensorView y);
void MeanKeys(ExecContext& ctx, std::span<const KvLayerView> layers, int64_t begin,
              std::span<const int32_t> counts, int32_t first, ConstTensorView inv_freq,
              TensorView means);

}  // namespace sluice::cpu

#endif  // SLUICE_RUNTIME_OPS_CPU_KV_LAYERS_H_
