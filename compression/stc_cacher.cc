#include "compression/stc_cacher.h"

#include <algorithm>
#include <numeric>
#include <span>
#include <string>
#include <utility>

#include "runtime/error.h"
#include "runtime/ops/similarity.h"
#include "runtime/transfer.h"

namespace sluice {
namespace {

constexpr uint64_t kMostLayers = 4096;  // of a tower

std::vector<float> Cosines(ExecContext& ctx, ConstTensorView a, ConstTensorView b,
                           std::span<const float> center = {}) {
  std::vector<float> cosines(a.dim(0));
  const TensorView on_host(cosines.data(), DType::kF32, {a.dim(0)});
  if (ctx.device() == Device::kCpu) {
    RowCosines(ctx, a, b, on_host, center);
  } else {
    const Workspace::Scope scope(ctx.workspace());
    const TensorView there = ctx.workspace().Allocate(DType::kF32, on_host.shape());
    RowCosines(ctx, a, b, there, center);
    Transfer(ctx, there, on_host);
  }
  return cosines;
}

ConstTensorView LastRows(const Tensor& x, int64_t count) {
  return x.view().Slice(x.dim(0) - count, x.dim(0));
}

}  // namespace

StcCacher::StcCacher(const StcCacherOptions& options) : options_(options) {
  if (options.interval < 1) {
    throw InputError("[stc-cacher] the interval must be at least 1 frame, got " +
                     std::to_string(options.interval));
  }
  if (!(options.ratio > 0 && options.ratio <= 1)) {
    throw InputError("[stc-cacher] the ratio of fresh patches must lie in (0, 1], got " +
                     std::to_string(options.ratio));
  }
  if (!(options.refresh_below >= -1 && options.refresh_below <= 1)) {
    throw InputError("[stc-cacher] the refresh threshold is a cosine in -1..1, got " +
                     std::to_string(options.refresh_below));
  }
}

int64_t StcCacher::FreshOf(int64_t patches) const {
  return std::clamp<int64_t>(static_cast<int64_t>(static_cast<double>(patches) * options_.ratio), 1,
                             patches);
}

bool StcCacher::Changed(ExecContext& ctx, ConstTensorView keys,
                        ConstTensorView reference_keys) const {
  std::vector<float> middle(keys.dim(1));
  MeanRow(ctx, reference_keys, middle);
  const std::vector<float> cosines = Cosines(ctx, keys, reference_keys, middle);
  const auto below = std::count_if(cosines.begin(), cosines.end(), [&](float cosine) {
    return cosine < static_cast<float>(options_.refresh_below);
  });
  return below > FreshOf(keys.dim(0));
}

std::vector<bool> StcCacher::Schedule(int64_t frames) const {
  std::vector<bool> whole(frames);
  for (int64_t f = 0; f < frames; ++f) {
    whole[f] = IsDue(next_ + f) || (f == 0 && !HasReference());
  }
  return whole;
}

std::vector<bool> StcCacher::ChooseWhole(ExecContext& ctx, int layers,
                                         std::span<const ConstTensorView> first_keys) {
  const auto frames = static_cast<int64_t>(first_keys.size());
  references_.resize(layers);
  // What a saved stream brought lies in host memory.
  for (LayerReference& reference : references_) {
    for (Tensor* part : {&reference.keys, &reference.values, &reference.update}) {
      *part = Placed(std::move(*part), ctx.device());
    }
  }
  first_choice_.assign(frames, {});
  std::vector<bool> whole = Schedule(frames);
  int64_t latest = -1;  // whole frame of this batch
  for (int64_t f = 0; f < frames; ++f) {
    if (!whole[f] && options_.refresh_below > -1) {
      const ConstTensorView keys = first_keys[f];
      // Behind a class token, if there is one.
      const ConstTensorView reference =
          latest < 0 ? LastRows(references_[0].keys, keys.dim(0)) : first_keys[latest];
      whole[f] = Changed(ctx, keys, reference);
      counts_.refreshes += whole[f];
    }
    if (whole[f]) {
      latest = f;
      ++counts_.whole;
    } else {
      counts_.patches += layers * first_keys[f].dim(0);
      counts_.fresh += layers * FreshOf(first_keys[f].dim(0));
    }
  }
  next_ += frames;
  counts_.frames += frames;
  return whole;
}

void StcCacher::ChooseFresh(ExecContext& ctx, int layer, int64_t frame, ConstTensorView keys,
                            ConstTensorView reference_keys, std::vector<int32_t>& fresh) {
  std::vector<int32_t>& choice = first_choice_[frame];
  if (layer == 0 || !options_.shared_selection) {
    const std::vector<float> cosines = Cosines(ctx, keys, reference_keys);
    choice.resize(cosines.size());
    std::iota(choice.begin(), choice.end(), 0);
    const int64_t count = FreshOf(keys.dim(0));
    std::nth_element(choice.begin(), choice.begin() + count - 1, choice.end(),
                     [&](int32_t a, int32_t b) {
                       return cosines[a] != cosines[b] ? cosines[a] < cosines[b] : a < b;
                     });
    choice.resize(count);
    std::sort(choice.begin(), choice.end());
  }
  fresh.insert(fresh.end(), choice.begin(), choice.end());
}

void StcCacher::Persist(Archive& archive) {
  archive.Number("next", next_, int64_t{0});
  for (int64_t* count :
       {&counts_.frames, &counts_.whole, &counts_.refreshes, &counts_.patches, &counts_.fresh}) {
    archive.Number("count", *count, int64_t{0});
  }
  archive.Resize("layers", references_, kMostLayers);
  for (LayerReference& reference : references_) {
    archive.Value("keys", reference.keys);
    archive.Value("values", reference.values);
    archive.Value("update", reference.update);
  }
}

void StcCacher::Reset() {
  references_.clear();
  next_ = 0;
}

int64_t StcCacher::SizeBytes() const {
  int64_t bytes = 0;
  for (const LayerReference& r : references_) {
    bytes += r.keys.SizeBytes() + r.values.SizeBytes() + r.update.SizeBytes();
  }
  return bytes;
}

}  // namespace sluice
