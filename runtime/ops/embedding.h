// Rows of a table by id.
#ifndef SLUICE_RUNTIME_OPS_EMBEDDING_H_
#define SLUICE_RUNTIME_OPS_EMBEDDING_H_

#include <cstdint>
#include <span>

#include "runtime/exec_context.h"
#include "runtime/ops/linear.h"
#include "runtime/tensor.h"

namespace sluice {

// y[i] = table[ids[i]].  table: [V, E] f32 or bf16; y: [ids.size(), E] f32.
// Throws Error when an id is not in [0, V).
void Embed(ExecContext& ctx, ConstTensorView table, std::span<const int32_t> ids, TensorView y);

// The same from the weight of an output projection [V, E] that is tied to the embeddings, so that
// the table is held once. The projection's bias plays no part.
void Embed(ExecContext& ctx, const LinearWeight& table, std::span<const int32_t> ids, TensorView y);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_EMBEDDING_H_
