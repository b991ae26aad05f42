// Rows of all layers of a paged KV cache on a CUDA device; contracts: runtime/ops/kv_layers.h,
// blocks: runtime/ops/cuda/kv.h. Arguments have been checked by the caller; tables are device
// memory.
#ifndef SLUICE_RUNTIME_OPS_CUDA_KV_LAYERS_H_
#define SLUICE_RUNTIME_OPS_CUDA_KV_LAYERS_H_

#include <cstdint>

#include "runtime/ops/cuda/device.h"
#include "runtime/ops/cuda/kv.h"
#include "runtime/tensor.h"

namespace sluice::cuda {

// The same rows of every layer: row i stands at position offset + i of the blocks that the layer's
// part of the table lists.
struct LayerRows {
  const int32_t* table = nullptr;  // {offset, `blocks` numbers for each layer}
  int64_t blocks = 0, layers = 0, rows = 0;
};
void PackLayers(const KvBlocks& kv, const LayerRows& from, void* packed, Stream stream);
void UnpackLayers(const KvBlocks& kv, const LayerRows& to, const void* packed, Stream stream);
void PackLayersInt8(const KvBlocks& kv, const LayerRows& from, uint8_t* packed, Stream stream);
void DequantiseKv(ConstTensorView x, ConstTensorView runs, ConstTensorView scales, TensorView y,
                  Stream stream);
// ends: [runs] where they end, in rows; the first begins at 0, whose key was rotated to `first`.
void MeanKeys(const KvBlocks& kv, const LayerRows& from, const int32_t* ends, int64_t runs,
              int32_t first, const float* inv_freq, float* means, Stream stream);

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_KV_LAYERS_H_
