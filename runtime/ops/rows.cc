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

// Checks lists of rows of `whole` [G * R, D] against `part`, a row for each, and returns R.
int64_t CheckLists(const char* op, ExecContext& ctx, const RowLists& lists, ConstTensorView whole,
                   ConstTensorView part) {
  CheckMatrix(op, "the matrix", whole);
  if (lists.rows.shape().rank() != 2 || lists.rows.dtype() != DType::kI32 || lists.ahead < 0) {
    throw Error(std::string("[") + op + "] the lists must be [G, k] i32, got " +
                Describe(lists.rows));
  }
  const int64_t groups = lists.groups();
  if (groups == 0 ? whole.dim(0) > 0 : whole.dim(0) % groups > 0) {
    throw Error(std::string("[") + op + "] " + std::to_string(whole.dim(0)) +
                " rows must be a multiple of " + std::to_string(groups) + " groups");
  }
  CheckSame(op, "the listed rows", part, {groups * lists.each(), whole.dim(1)}, whole.dtype());
  const int64_t length = groups > 0 ? whole.dim(0) / groups : 0;
  if (ctx.device() != Device::kCpu) return length;
  for (int64_t g = 0; g < groups; ++g) {
    const int32_t* list = lists.rows.data<int32_t>() + g * lists.rows.stride0();
    for (int64_t i = 0; i < lists.rows.dim(1); ++i) {
      if (list[i] >= 0 && list[i] < length - lists.ahead) continue;
      throw Error(std::string("[") + op + "] indices must lie in [0, " +
                  std::to_string(length - lists.ahead) + "), got " + std::to_string(list[i]));
    }
  }
  return length;
}

// A matrix of `length` rows like those of `whole` for each group.
void CheckGroups(const char* op, const char* what, std::span<const ConstTensorView> matrices,
                 const RowLists& lists, int64_t length, ConstTensorView whole) {
  if (static_cast<int64_t>(matrices.size()) != lists.groups()) {
    throw Error(std::string("[") + op + "] " + what + " must be " + std::to_string(lists.groups()) +
                " matrices, got " + std::to_string(matrices.size()));
  }
  for (const ConstTensorView& matrix : matrices) {
    CheckSame(op, what, matrix, {length, whole.dim(1)}, whole.dtype());
  }
}

// As OnGpu, of an op that also reads a matrix for each group.
bool AllOnGpu(const char* op, const ExecContext& ctx, const RowLists& lists,
              std::span<const ConstTensorView> matrices,
              std::initializer_list<ConstTensorView> tensors) {
  for (const ConstTensorView& matrix : matrices) OnGpu(op, ctx, {matrix});
  OnGpu(op, ctx, {lists.rows});
  return OnGpu(op, ctx, tensors);
}

// Calls use(group, row of the group, row of the part) for all listed rows, by several threads.
template <typename Use>
void ForListed(ExecContext& ctx, const RowLists& lists, ConstTensorView part, const Use& use) {
  const int64_t each = lists.each();
  ParallelFor(ctx, lists.groups() * each, Grain(part), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / each, at = i % each - lists.ahead;
      const int32_t* list = lists.rows.data<int32_t>() + group * lists.rows.stride0();
      use(group, at < 0 ? at + lists.ahead : lists.ahead + list[at], i);
    }
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
  if (OnGpu("copy_rows", ctx, {x, y})) return ctx.Queue(cuda::CopyMatrix, x, y);
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

RowLists ListRows(ExecContext& ctx, std::span<const int32_t> rows, int64_t groups) {
  const auto count = static_cast<int64_t>(rows.size());
  if (groups < 0 || (groups == 0 ? count > 0 : count % groups > 0)) {
    throw Error("[list_rows] " + std::to_string(count) + " indices must be a multiple of " +
                std::to_string(groups) + " groups");
  }
  return {.rows = ConstTensorView(Within(ctx, rows), DType::kI32,
                                  {groups, groups > 0 ? count / groups : 0}, -1, ctx.device())};
}

void GatherRows(ExecContext& ctx, ConstTensorView x, const RowLists& lists, TensorView y) {
  constexpr char kOp[] = "gather_rows";
  const int64_t length = CheckLists(kOp, ctx, lists, x, y);
  if (AllOnGpu(kOp, ctx, lists, {}, {x, y})) return ctx.Queue(cuda::GatherRows, x, lists, y);
  const size_t bytes = x.dim(1) * SizeOf(x.dtype());
  ForListed(ctx, lists, y, [&](int64_t group, int64_t row, int64_t to) {
    std::memcpy(RowOf(y, to), RowOf(x, group * length + row), bytes);
  });
}

void OverlayRows(ExecContext& ctx, std::span<const ConstTensorView> rest, ConstTensorView x,
                 const RowLists& lists, TensorView y) {
  constexpr char kOp[] = "overlay_rows";
  const int64_t length = CheckLists(kOp, ctx, lists, y, x);
  CheckGroups(kOp, "the rest", rest, lists, length, y);
  if (AllOnGpu(kOp, ctx, lists, rest, {x, y})) {
    return ctx.Queue(cuda::OverlayRows, rest, x, lists, y);
  }
  const size_t bytes = y.dim(1) * SizeOf(y.dtype());
  ParallelFor(ctx, y.dim(0), Grain(y), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / length, row = i % length, of_listed = row - lists.ahead;
      const int32_t* list = lists.rows.data<int32_t>() + group * lists.rows.stride0();
      const int32_t* list_end = list + lists.rows.dim(1);
      const int32_t* found = std::lower_bound(list, list_end, of_listed);
      const char* from = RowOf(rest[group], row);
      if (of_listed < 0) {
        from = RowOf(x, group * lists.each() + row);
      } else if (found != list_end && *found == of_listed) {
        from = RowOf(x, group * lists.each() + lists.ahead + (found - list));
      }
      std::memcpy(RowOf(y, i), from, bytes);
    }
  });
}

void ZeroRows(ExecContext& ctx, TensorView y) {
  CheckMatrix("zero_rows", "y", y);
  if (OnGpu("zero_rows", ctx, {y})) return ctx.Queue(cuda::ZeroRows, y);
  for (int64_t m = 0; m < y.dim(0); ++m) {
    std::memset(RowOf(y, m), 0, y.dim(1) * SizeOf(y.dtype()));
  }
}

void Subtract(ExecContext& ctx, ConstTensorView a, ConstTensorView b, TensorView y) {
  CheckMatrix("subtract", "y", y);
  CheckSame("subtract", "a", a, y.shape(), DType::kF32);
  CheckSame("subtract", "b", b, y.shape(), DType::kF32);
  if (OnGpu("subtract", ctx, {a, b, y})) {
    return ctx.Queue(cuda::AddRows, a, -1.0f, b, y);
  }
  ParallelFor(ctx, y.dim(0), Grain(a),
              [&](int64_t begin, int64_t end) { SubtractRange(ctx, a, b, y, begin, end); });
}

void SubtractListed(ExecContext& ctx, ConstTensorView a, std::span<const ConstTensorView> b,
                    const RowLists& lists, TensorView y) {
  constexpr char kOp[] = "subtract_listed";
  CheckSame(kOp, "y", y, y.shape(), DType::kF32);
  const int64_t length = CheckLists(kOp, ctx, lists, y, a);
  CheckGroups(kOp, "b", b, lists, length, y);
  if (AllOnGpu(kOp, ctx, lists, b, {a, y})) {
    return ctx.Queue(cuda::SubtractListed, a, b, lists, y);
  }
  ForListed(ctx, lists, a, [&](int64_t group, int64_t row, int64_t from) {
    const int64_t to = group * length + row;
    SubtractRange(ctx, a.Slice(from, from + 1), b[group].Slice(row, row + 1), y.Slice(to, to + 1),
                  0, 1);
  });
}

void AddListed(ExecContext& ctx, std::span<const ConstTensorView> a, ConstTensorView b,
               const RowLists& lists, TensorView y) {
  constexpr char kOp[] = "add_listed";
  CheckSame(kOp, "y", y, y.shape(), DType::kF32);
  const int64_t length = CheckLists(kOp, ctx, lists, b, y);
  CheckGroups(kOp, "a", a, lists, length, b);
  if (AllOnGpu(kOp, ctx, lists, a, {b, y})) return ctx.Queue(cuda::AddListed, a, b, lists, y);
  ForListed(ctx, lists, y, [&](int64_t group, int64_t row, int64_t to) {
    const int64_t from = group * length + row;
    AddRange(ctx, a[group].Slice(row, row + 1), b.Slice(from, from + 1), y.Slice(to, to + 1), 0, 1);
  });
}

void Add(ExecContext& ctx, ConstTensorView a, ConstTensorView b, TensorView y) {
  CheckMatrix("add", "b", b);
  CheckSame("add", "a", a, b.shape(), DType::kF32);
  CheckSame("add", "y", y, b.shape(), DType::kF32);
  if (OnGpu("add", ctx, {a, b, y})) {
    return ctx.Queue(cuda::AddRows, a, 1.0f, b, y);
  }
  ParallelFor(ctx, y.dim(0), Grain(y),
              [&](int64_t begin, int64_t end) { AddRange(ctx, a, b, y, begin, end); });
}

}  // namespace sluice
