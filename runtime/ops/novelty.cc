#include "runtime/ops/novelty.h"

#include <string>

#include "runtime/error.h"
#include "runtime/ops/cpu/novelty.h"
#include "runtime/ops/cuda/novelty.h"
#include "runtime/ops/note.h"
#include "runtime/transfer.h"

namespace sluice {
namespace {

void Require(const char* op, const char* what, ConstTensorView x, Shape shape, DType dtype) {
  if (x.shape() == shape && x.dtype() == dtype && (shape.rank() == 2 || x.contiguous())) return;
  throw Error(std::string("[") + op + "] " + what + " must be contiguous " + shape.ToString() +
              " " + Name(dtype) + ", got " + x.shape().ToString() + " " + Name(x.dtype()));
}

// That `count` values are of `groups` equally long groups with at least one value each.
void RequireGroups(const char* op, int64_t count, int64_t groups) {
  if (groups >= 1 && count >= groups && count % groups == 0) return;
  throw Error(std::string("[") + op + "] " + std::to_string(count) + " rows must be of " +
              std::to_string(groups) + " equal groups with a row each at least");
}

}  // namespace

void Novelty(ExecContext& ctx, const NoveltyArgs& args) {
  const ConstTensorView x = args.x;
  if (x.shape().rank() != 2 || x.dtype() != DType::kF32 || x.dim(1) < 1) {
    throw Error("[novelty] x must be [M, D] f32, got " + x.shape().ToString() + " " +
                Name(x.dtype()));
  }
  RequireGroups("novelty", x.dim(0), args.frames);
  const Shape history{args.by_rank ? CalmChannels(x.dim(1)) : x.dim(1)};
  if (!args.history.empty()) {
    Require("novelty", "the history", args.history, history, DType::kF32);
  }
  Require("novelty", "the new history", args.new_history, history, DType::kF32);
  Require("novelty", "novelty", args.novelty, {x.dim(0)}, DType::kF32);
  if (OnGpu("novelty", ctx, {x, args.history, args.new_history, args.novelty})) {
    const Workspace::Scope scope(ctx.workspace());
    const auto bytes = static_cast<int64_t>(cuda::NoveltyWorkspaceBytes(args));
    const TensorView scratch = ctx.workspace().Allocate(DType::kU8, {bytes});
    NoteScalars(ctx, args.frames, args.score, args.by_rank, scratch.raw());
    return ctx.Queue(cuda::Novelty, args, scratch.raw());
  }
  cpu::Novelty(args);
}

void HistoryCosines(ExecContext& ctx, ConstTensorView x, int64_t frames, ConstTensorView history,
                    TensorView new_history, TensorView cosines) {
  RequireGroups("history_cosines", x.dim(0), frames);
  Require("history_cosines", "x", x, {x.dim(0), x.dim(1)}, DType::kF32);
  if (!history.empty()) {
    Require("history_cosines", "the history", history, {2 * x.dim(1)}, DType::kI32);
  }
  Require("history_cosines", "the new history", new_history, {2 * x.dim(1)}, DType::kI32);
  Require("history_cosines", "cosines", cosines, {x.dim(0)}, DType::kF32);
  if (OnGpu("history_cosines", ctx, {x, history, new_history, cosines})) {
    const Workspace::Scope scope(ctx.workspace());
    const TensorView sums = ctx.workspace().Allocate(DType::kI32, {frames, 2 * x.dim(1)});
    NoteScalars(ctx, frames, sums.raw());
    return ctx.Queue(cuda::HistoryCosines, x, frames, history, new_history, sums, cosines);
  }
  cpu::HistoryCosines(x, frames, history, new_history, cosines);
}

void LargestOfGroups(ExecContext& ctx, ConstTensorView values, int64_t groups, TensorView places) {
  RequireGroups("largest_of_groups", values.shape().NumElements(), groups);
  RequireGroups("largest_of_groups", places.shape().NumElements(), groups);
  const int64_t count = values.shape().NumElements();
  Require("largest_of_groups", "values", values, {count}, DType::kF32);
  Require("largest_of_groups", "places", places, {places.shape().NumElements()}, DType::kI32);
  if (places.dim(0) > count) {
    throw Error("[largest_of_groups] there are " + std::to_string(count) +
                " values, expected at least " + std::to_string(places.dim(0)));
  }
  if (OnGpu("largest_of_groups", ctx, {values, places})) {
    NoteScalars(ctx, groups);
    return ctx.Queue(cuda::LargestOfGroups, values, groups, places);
  }
  cpu::LargestOfGroups(values, groups, places);
}

void JoinRows(ExecContext& ctx, ConstTensorView x, int64_t frames, ConstTensorView kept,
              float join_from, TensorView y) {
  RequireGroups("join_rows", x.dim(0), frames);
  RequireGroups("join_rows", y.dim(0), frames);
  Require("join_rows", "x", x, {x.dim(0), x.dim(1)}, DType::kF32);
  Require("join_rows", "y", y, {y.dim(0), x.dim(1)}, DType::kF32);
  Require("join_rows", "kept", kept, {y.dim(0)}, DType::kI32);
  if (OnGpu("join_rows", ctx, {x, kept, y})) {
    const Workspace::Scope scope(ctx.workspace());
    const TensorView to = ctx.workspace().Allocate(DType::kI32, {x.dim(0)});
    NoteScalars(ctx, frames, join_from, to.raw());
    return ctx.Queue(cuda::JoinRows, x, frames, kept, join_from, to, y);
  }
  cpu::JoinRows(x, frames, kept, join_from, y);
}

}  // namespace sluice
