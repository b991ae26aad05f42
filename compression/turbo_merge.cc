#include "compression/turbo_merge.h"

#include <cstring>
#include <numeric>
#include <utility>

#include "compression/bipartite_merge.h"
#include "compression/frame_runs.h"
#include "runtime/error.h"
#include "runtime/ops/novelty.h"
#include "runtime/transfer.h"

namespace sluice {

TurboMerge::TurboMerge(const Options& options) : options_(options) {
  CheckKeep("turbo-merge", options.keep);
  if (!(options.lambda >= 0 && options.lambda <= 1e3)) {
    throw InputError("[turbo-merge] lambda must not be negative, got " +
                     std::to_string(options.lambda));
  }
}

std::vector<float> TurboMerge::Values(ExecContext& ctx, ConstTensorView x, int64_t frames) {
  std::vector<float> values(x.dim(0));
  if (options_.lambda == 0) return values;
  Tensor sum(DType::kI32, {2 * x.dim(1)}, ctx.device());
  if (sum_) Transfer(ctx, *sum_, sum);
  const Workspace::Scope scope(ctx.workspace());
  const TensorView cosines = ctx.workspace().Allocate(DType::kF32, {x.dim(0)});
  HistoryCosines(ctx, x, frames, sum_ ? ConstTensorView(sum) : ConstTensorView(), sum, cosines);
  Transfer(ctx, cosines, TensorView(values.data(), DType::kF32, cosines.shape()));
  sum_ = std::make_shared<const Tensor>(std::move(sum));
  for (float& value : values) value = 1 - value;
  const int64_t size = x.dim(0) / frames;
  for (int64_t f = 0; f < frames; ++f) {
    const std::span<float> mine = std::span(values).subspan(f * size, size);
    CutAt95thPercentile(mine);
    ScaleToMean(mine, options_.lambda);
  }
  return values;
}

VisualTokens TurboMerge::Compress(ExecContext& ctx, VisualTokens tokens) {
  before_compress_ = sum_;
  if (tokens.size() == 0) return tokens;
  std::vector<int64_t> kept;
  std::vector<Tensor> merged;
  for (const FrameGroup& group : FrameGroups(tokens)) {
    const ConstTensorView x = tokens.features.view().Slice(group.begin, group.end);
    MergeState state;
    state.groups = group.frames;
    state.values = Values(ctx, x, group.frames);
    state.sizes.assign(x.dim(0), 1);
    state.places.resize(x.dim(0));
    std::iota(state.places.begin(), state.places.end(), group.begin);
    state.features = TransferTo(ctx, x, ctx.device());
    MergeTo(ctx, state, KeptOf(options_.keep, group.length()));
    kept.insert(kept.end(), state.places.begin(), state.places.end());
    merged.push_back(std::move(state.features));
  }
  if (static_cast<int64_t>(kept.size()) == tokens.size()) return tokens;
  VisualTokens fewer = KeepTokens(ctx, tokens, kept);
  int64_t begin = 0;
  for (const Tensor& rows : merged) {
    Transfer(ctx, rows, fewer.features.view().Slice(begin, begin + rows.dim(0)));
    begin += rows.dim(0);
  }
  return fewer;
}

void TurboMerge::Persist(Archive& archive) {
  std::vector<double> sum;
  if (sum_) {
    const Tensor here = Placed(sum_->view(), Device::kCpu);
    sum.resize(here.dim(0) / 2);
    std::memcpy(sum.data(), here.view().raw(), here.SizeBytes());
  }
  archive.Array("sum", sum);
  if (archive.loading()) {
    sum_ = nullptr;
    const Shape shape{2 * static_cast<int64_t>(sum.size())};
    if (!sum.empty()) {
      sum_ = std::make_shared<const Tensor>(
          Placed(ConstTensorView(sum.data(), DType::kI32, shape), Device::kCpu));
    }
  }
  before_compress_ = sum_;
}

int64_t TurboMerge::SizeBytes() const {
  size_t bytes = 0;
  for (const auto* sum : {&sum_, &before_compress_}) {
    if (*sum) bytes += (*sum)->SizeBytes();
  }
  return static_cast<int64_t>(bytes);
}

}  // namespace sluice
