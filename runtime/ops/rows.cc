#include "runtime/ops/rows.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "runtime/error.h"
#include "runtime/ops/cpu/rows.h"
#include "runtime/ops/cuda/rows.h"
#include "runtime/parallel.h"
#include "runtime/transfer.h"

namespace sluice {
namespace {

// Waking a thread costs about as much as moving 64 KB.
int64_t Grain(ConstTensorView x) {
  return 1 + (int64_t{64} << 10) / std::max<int64_t>(x.dim(1) * SizeOf(x.dtype()), 1);
}

std::string Describe(ConstTensorView x) { return x.shape().ToString() + " " + Name(x.dtype()); }

void CheckMatrix(const char* op, const char* what, ConstTensorView x) {
  if (x.shape().rank() == 2 && (x.dtype() == DType::kF32 || x.dtype() == DType::kBF16)) return;
  throw Error(std::string("[") + op + "] " + what + " must be [M, D] f32 or bf16, got " +
              Describe(x));
}

void CheckSame(const char* op, const char* what, ConstTensorView x, Shape shape, DType dtype) {
  if (x.shape() == shape && x.dtype() == dtype) return;
  throw Error(std::string("[") + op + "] " + what + " must be " + shape.ToString() + " " +
              Name(dtype) + ", got " + Describe(x));
}

char* RowOf(ConstTensorView x, int64_t row) {
  return static_cast<char*>(const_cast<void*>(x.raw())) + row * x.stride0() * SizeOf(x.dtype());
}

// Checks a gather or scatter between `whole` and the listed rows `part`.
void CheckIndices(const char* op, ConstTensorView whole, ConstTensorView part,
                  std::span<const int32_t> indices, int64_t groups) {
  CheckMatrix(op, "the matrix", whole);
  const auto count = static_cast<int64_t>(indices.size());
  if (groups < 0 ||
      (groups == 0 ? count + whole.dim(0) > 0 : count % groups + whole.dim(0) % groups > 0)) {
    throw Error(std::string("[") + op + "] " + std::to_string(count) + " indices and " +
                std::to_string(whole.dim(0)) + " rows must be multiples of " +
                std::to_string(groups) + " groups");
  }
  CheckSame(op, "the listed rows", part, {count, whole.dim(1)}, whole.dtype());
  if (groups == 0) return;
  const int64_t length = whole.dim(0) / groups;
  for (const int32_t index : indices) {
    if (index >= 0 && index < length) continue;
    throw Error(std::string("[") + op + "] indices must lie in [0, " + std::to_string(length) +
                "), got " + std::to_string(index));
  }
}

cuda::RowList ListOf(ExecContext& ctx, std::span<const int32_t> indices, int64_t groups) {
  return {.indices = Within(ctx, indices),
          .count = static_cast<int64_t>(indices.size()),
          .groups = std::max<int64_t>(groups, 1)};
}

// Calls move(row of the whole, row of the part) for all indices.
template <typename Move>
void ForIndices(ExecContext& ctx, ConstTensorView whole, std::span<const int32_t> indices,
                int64_t groups, const Move& move) {
  if (indices.empty()) return;
  const int64_t length = whole.dim(0) / groups;
  const int64_t per_group = static_cast<int64_t>(indices.size()) / groups;
  ParallelFor(ctx, indices.size(), Grain(whole), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) move(i / per_group * length + indices[i], i);
  });
}

// Rows [begin, end) by the kernels of the context.
void SubtractRange(const ExecContext& ctx, ConstTensorView a, ConstTensorView b, TensorView y,
                   int64_t begin, int64_t end) {
  if (ctx.reference_kernels()) {
    cpu::SubtractReference(a, b, y, begin, end);
  } else {
    cpu::SubtractSimd(a, b, y, begin, end);
  }
}

void AddRange(const ExecContext& ctx, ConstTensorView a, ConstTensorView b, TensorView y,
              int64_t begin, int64_t end) {
  if (ctx.reference_kernels()) {
    cpu::AddReference(a, b, y, begin, end);
  } else {
    cpu::AddSimd(a, b, y, begin, end);
  }
}

}  // namespace

void CopyRows(ExecContext& ctx, ConstTensorView x, TensorView y) {
  CheckMatrix("copy_rows", "x", x);
  CheckSame("copy_rows", "y", y, x.shape(), x.dtype());
  if (OnGpu("copy_rows", ctx, {x, y})) return Transfer(ctx, x, y);
  const size_t bytes = x.dim(1) * SizeOf(x.dtype());
  ParallelFor(ctx, x.dim(0), Grain(x), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) std::memcpy(RowOf(y, m), RowOf(x, m), bytes);
  });
}

void Convert(ExecContext& ctx, ConstTensorView x, TensorView y) {
  CheckMatrix("convert", "x", x);
  CheckMatrix("convert", "y", y);
  CheckSame("convert", "y", y, x.shape(), y.dtype());
  if (OnGpu("convert", ctx, {x, y})) return ctx.Queue(cuda::Convert, x, y);
  ParallelFor(ctx, x.dim(0), Grain(x), [&](int64_t begin, int64_t end) {
    ConvertInto(x.Slice(begin, end), y.Slice(begin, end));
  });
}

void GatherRows(ExecContext& ctx, ConstTensorView x, std::span<const int32_t> indices,
                int64_t groups, TensorView y) {
  CheckIndices("gather_rows", x, y, indices, groups);
  if (OnGpu("gather_rows", ctx, {x, y})) {
    const Workspace::Scope scope(ctx.workspace());
    return ctx.Queue(cuda::GatherRows, x, ListOf(ctx, indices, groups), y);
  }
  const size_t bytes = x.dim(1) * SizeOf(x.dtype());
  ForIndices(ctx, x, indices, groups,
             [&](int64_t from, int64_t to) { std::memcpy(RowOf(y, to), RowOf(x, from), bytes); });
}

void ScatterRows(ExecContext& ctx, ConstTensorView x, std::span<const int32_t> indices,
                 int64_t groups, TensorView y) {
  CheckIndices("scatter_rows", y, x, indices, groups);
  if (OnGpu("scatter_rows", ctx, {x, y})) {
    const Workspace::Scope scope(ctx.workspace());
    return ctx.Queue(cuda::ScatterRows, x, ListOf(ctx, indices, groups), y);
  }
  const size_t bytes = x.dim(1) * SizeOf(x.dtype());
  ForIndices(ctx, y, indices, groups,
             [&](int64_t to, int64_t from) { std::memcpy(RowOf(y, to), RowOf(x, from), bytes); });
}

void Subtract(ExecContext& ctx, ConstTensorView a, ConstTensorView b, TensorView y) {
  CheckMatrix("subtract", "y", y);
  CheckSame("subtract", "a", a, y.shape(), DType::kF32);
  CheckSame("subtract", "b", b, y.shape(), DType::kF32);
  if (OnGpu("subtract", ctx, {a, b, y})) {
    return ctx.Queue(cuda::AddRows, a, -1.0f, b, y, cuda::RowList(), cuda::Listed());
  }
  ParallelFor(ctx, y.dim(0), Grain(a),
              [&](int64_t begin, int64_t end) { SubtractRange(ctx, a, b, y, begin, end); });
}

void SubtractListed(ExecContext& ctx, ConstTensorView a, ConstTensorView b,
                    std::span<const int32_t> indices, TensorView y) {
  CheckIndices("subtract_listed", b, a, indices, 1);
  CheckSame("subtract_listed", "b", b, y.shape(), DType::kF32);
  CheckSame("subtract_listed", "y", y, b.shape(), DType::kF32);
  if (OnGpu("subtract_listed", ctx, {a, b, y})) {
    const Workspace::Scope scope(ctx.workspace());
    return ctx.Queue(cuda::AddRows, a, -1.0f, b, y, ListOf(ctx, indices, 1),
                     cuda::Listed{.b = true, .y = true});
  }
  ForIndices(ctx, y, indices, 1, [&](int64_t to, int64_t from) {
    SubtractRange(ctx, a.Slice(from, from + 1), b.Slice(to, to + 1), y.Slice(to, to + 1), 0, 1);
  });
}

void AddListed(ExecContext& ctx, ConstTensorView a, ConstTensorView b,
               std::span<const int32_t> indices, TensorView y) {
  CheckIndices("add_listed", a, y, indices, 1);
  CheckSame("add_listed", "a", a, b.shape(), DType::kF32);
  CheckSame("add_listed", "b", b, a.shape(), DType::kF32);
  if (OnGpu("add_listed", ctx, {a, b, y})) {
    const Workspace::Scope scope(ctx.workspace());
    return ctx.Queue(cuda::AddRows, a, 1.0f, b, y, ListOf(ctx, indices, 1),
                     cuda::Listed{.a = true, .b = true});
  }
  ForIndices(ctx, a, indices, 1, [&](int64_t from, int64_t to) {
    AddRange(ctx, a.Slice(from, from + 1), b.Slice(from, from + 1), y.Slice(to, to + 1), 0, 1);
  });
}

void Add(ExecContext& ctx, ConstTensorView a, ConstTensorView b, TensorView y) {
  CheckMatrix("add", "b", b);
  CheckSame("add", "a", a, b.shape(), DType::kF32);
  CheckSame("add", "y", y, b.shape(), DType::kF32);
  if (OnGpu("add", ctx, {a, b, y})) {
    return ctx.Queue(cuda::AddRows, a, 1.0f, b, y, cuda::RowList(), cuda::Listed());
  }
  ParallelFor(ctx, y.dim(0), Grain(y),
              [&](int64_t begin, int64_t end) { AddRange(ctx, a, b, y, begin, end); });
}

}  // namespace sluice
