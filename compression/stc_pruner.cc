#include "compression/stc_pruner.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "compression/frame_runs.h"
#include "runtime/transfer.h"

namespace sluice {

std::string StcPruner::name() const {
  if (options_.join_from <= 1) return "stc-pruner-join";
  if (options_.score == Score::kDualAnchor) return "stc-pruner-paper";
  return options_.history == History::kCompat ? "stc-pruner-compat" : "stc-pruner";
}

StcPruner::StcPruner(const Options& options) : options_(options) {
  CheckKeep("stc-pruner", options.keep);
}

VisualTokens StcPruner::Compress(ExecContext& ctx, VisualTokens tokens) {
  before_compress_ = sum_;
  if (tokens.size() == 0) return tokens;
  const ConstTensorView x = tokens.features;
  const std::vector<FrameGroup> groups = FrameGroups(tokens);
  int64_t left = 0;
  for (const FrameGroup& group : groups) {
    left += group.frames * KeptOf(options_.keep, group.length());
  }
  const bool by_rank = options_.history == History::kCompat;
  Tensor sum(DType::kF32, {by_rank ? CalmChannels(x.dim(1)) : x.dim(1)}, ctx.device());
  if (sum_) Transfer(ctx, *sum_, sum);

  // The novelty of all tokens, then the places of those that stay: one copy brings both.
  const Workspace::Scope scope(ctx.workspace());
  const TensorView numbers = ctx.workspace().Allocate(DType::kI32, {tokens.size() + left});
  const TensorView novelty(numbers.raw(), DType::kF32, {tokens.size()}, -1, ctx.device());
  const TensorView places = numbers.Slice(tokens.size(), tokens.size() + left);
  bool first = !sum_;
  int64_t listed = 0;
  for (const FrameGroup& group : groups) {
    const TensorView mine = novelty.Slice(group.begin, group.end);
    const int64_t count = group.frames * KeptOf(options_.keep, group.length());
    Novelty(ctx, {.x = x.Slice(group.begin, group.end),
                  .frames = group.frames,
                  .history = first ? ConstTensorView() : sum.view(),
                  .new_history = sum,
                  .novelty = mine,
                  .score = options_.score,
                  .by_rank = by_rank});
    LargestOfGroups(ctx, mine, group.frames, places.Slice(listed, listed + count));
    listed += count;
    first = false;
  }
  std::vector<int32_t> copied(tokens.size() + left);
  Transfer(ctx, numbers, TensorView(copied.data(), DType::kI32, numbers.shape()));
  tokens.scores.resize(tokens.size());
  std::memcpy(tokens.scores.data(), copied.data(), tokens.size() * sizeof(float));
  sum_ = std::make_shared<const Tensor>(std::move(sum));
  if (left == tokens.size()) return tokens;

  std::vector<int64_t> kept;
  for (const FrameGroup& group : groups) {
    const int64_t of_frame = KeptOf(options_.keep, group.length());
    for (int64_t i = 0; i < group.frames * of_frame; ++i) {
      const int64_t frame = group.begin + i / of_frame * group.length();
      kept.push_back(frame + copied[tokens.size() + static_cast<int64_t>(kept.size())]);
    }
  }
  VisualTokens fewer = KeepTokens(ctx, tokens, kept);
  if (options_.join_from > 1) return fewer;
  listed = 0;
  for (const FrameGroup& group : groups) {
    const int64_t end = listed + group.frames * KeptOf(options_.keep, group.length());
    JoinRows(ctx, x.Slice(group.begin, group.end), group.frames, places.Slice(listed, end),
             static_cast<float>(options_.join_from), fewer.features.view().Slice(listed, end));
    listed = end;
  }
  return fewer;
}

void StcPruner::Persist(Archive& archive) {
  std::vector<float> sum;
  if (sum_) {
    const Tensor here = Placed(sum_->view(), Device::kCpu);
    sum.assign(here.data<float>(), here.data<float>() + here.dim(0));
  }
  archive.Array("sum", sum);
  if (archive.loading()) {
    sum_ = nullptr;
    const Shape shape{static_cast<int64_t>(sum.size())};
    if (!sum.empty()) {
      sum_ = std::make_shared<const Tensor>(
          Placed(ConstTensorView(sum.data(), DType::kF32, shape), Device::kCpu));
    }
  }
  before_compress_ = sum_;
}

int64_t StcPruner::SizeBytes() const {
  size_t bytes = 0;
  for (const auto* sum : {&sum_, &before_compress_}) {
    if (*sum) bytes += (*sum)->SizeBytes();
  }
  return static_cast<int64_t>(bytes);
}

}  // namespace sluice
