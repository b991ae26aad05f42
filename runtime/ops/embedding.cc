#include "runtime/ops/embedding.h"

#include <string>

#include "runtime/convert.h"
#include "runtime/error.h"
#include "runtime/ops/cuda/rows.h"
#include "runtime/parallel.h"
#include "runtime/transfer.h"

namespace sluice {
namespace {

void CheckIdsAndResult(std::span<const int32_t> ids, int64_t rows, int64_t width,
                       const TensorView& y) {
  const Shape expected{static_cast<int64_t>(ids.size()), width};
  if (y.shape() != expected || y.dtype() != DType::kF32) {
    throw Error("[embed] y must be " + expected.ToString() + " f32, got " + y.shape().ToString() +
                " " + Name(y.dtype()));
  }
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= rows) {
      throw Error("[embed] id " + std::to_string(i) + " must lie in [0, " + std::to_string(rows) +
                  "), got " + std::to_string(ids[i]));
    }
  }
}

}  // namespace

// There is one implementation: a row is one conversion (see runtime/convert.h), which has its own
// fast paths, and waiting for memory is the rest.
void Embed(ExecContext& ctx, ConstTensorView table, std::span<const int32_t> ids, TensorView y) {
  if (table.shape().rank() != 2 ||
      (table.dtype() != DType::kF32 && table.dtype() != DType::kBF16)) {
    throw Error("[embed] table must be [V, E] f32 or bf16, got " + table.shape().ToString() + " " +
                Name(table.dtype()));
  }
  CheckIdsAndResult(ids, table.dim(0), table.dim(1), y);
  if (OnGpu("embed", ctx, {table, y})) {
    const Workspace::Scope scope(ctx.workspace());
    return ctx.Queue(cuda::EmbedRows, table, Within(ctx, ids), y);
  }
  const char* rows = static_cast<const char*>(table.raw());
  const int64_t row_bytes = table.stride0() * static_cast<int64_t>(SizeOf(table.dtype()));
  ParallelFor(ctx, y.dim(0), 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      ConvertElements(rows + ids[i] * row_bytes, table.dtype(), y.data<float>() + i * y.stride0(),
                      DType::kF32, y.dim(1));
    }
  });
}

void Embed(ExecContext& ctx, const LinearWeight& table, std::span<const int32_t> ids,
           TensorView y) {
  if (table.device() != Device::kCpu) return Embed(ctx, table.OnDevice(), ids, y);
  CheckIdsAndResult(ids, table.n(), table.k(), y);
  ParallelFor(ctx, y.dim(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      table.CopyRow(ids[i], y.data<float>() + i * y.stride0());
    }
  });
}

}  // namespace sluice
