#include "compression/stc_cacher.h"

#include <algorithm>
#include <span>
#include <string>
#include <utility>

#include "runtime/error.h"
#include "runtime/ops/similarity.h"
#include "runtime/transfer.h"

namespace sluice {
namespace {

constexpr uint64_t kMostLayers = 4096;  // of a tower

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

int64_t StcCacher::FreshPatches(int64_t patches) const {
  return std::clamp<int64_t>(static_cast<int64_t>(static_cast<double>(patches) * options_.ratio), 1,
                             patches);
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
  std::vector<bool> whole = Schedule(frames);
  if (options_.refresh_below > -1) AddChanged(ctx, first_keys, whole);
  for (int64_t f = 0; f < frames; ++f) {
    const int64_t patches = first_keys[f].dim(0);
    counts_.whole += whole[f];
    counts_.patches += whole[f] ? 0 : layers * patches;
    counts_.fresh += whole[f] ? 0 : layers * FreshPatches(patches);
  }
  next_ += frames;
  counts_.frames += frames;
  return whole;
}

void StcCacher::AddChanged(ExecContext& ctx, std::span<const ConstTensorView> first_keys,
                           std::vector<bool>& whole) {
  const auto frames = static_cast<int64_t>(first_keys.size());
  // A frame refers to the one computed whole before it, so those behind a frame that is added are
  // compared anew.
  for (int64_t begin = 0; begin < frames;) {
    const Workspace::Scope scope(ctx.workspace());
    std::vector<int64_t> compared;
    std::vector<RowPairs> pairs;
    ConstTensorView reference, middle;
    for (int64_t f = 0; f < frames; ++f) {
      if (whole[f]) {
        reference = first_keys[f];
        middle = {};
      } else if (f >= begin) {
        // Behind a class token, if there is one.
        if (reference.empty()) reference = LastRows(references_[0].keys, first_keys[f].dim(0));
        if (middle.empty()) {
          const TensorView mean = ctx.workspace().Allocate(DType::kF32, {reference.dim(1)});
          MeanRow(ctx, reference, mean);
          middle = mean;
        }
        compared.push_back(f);
        pairs.push_back({first_keys[f], reference, middle});
      }
    }
    if (pairs.empty()) return;
    const int64_t patches = first_keys[0].dim(0);
    const TensorView there =
        ctx.workspace().Allocate(DType::kF32, {static_cast<int64_t>(pairs.size()), patches});
    RowCosines(ctx, pairs, there);
    const Tensor cosines = TransferTo(ctx, there, Device::kCpu);
    const auto changed = std::find_if(compared.begin(), compared.end(), [&](const int64_t& f) {
      const float* row = cosines.data<float>() + (&f - compared.data()) * patches;
      const auto below = std::count_if(row, row + patches, [&](float cosine) {
        return cosine < static_cast<float>(options_.refresh_below);
      });
      return below > FreshPatches(patches);
    });
    if (changed == compared.end()) return;
    whole[*changed] = true;
    ++counts_.refreshes;
    begin = *changed + 1;
  }
}

void StcCacher::ChooseFresh(ExecContext& ctx, int layer, std::span<const RowPairs> keys,
                            TensorView fresh) const {
  if (layer > 0 && options_.shared_selection) return;
  const Workspace::Scope scope(ctx.workspace());
  const TensorView cosines =
      ctx.workspace().Allocate(DType::kF32, {fresh.dim(0), keys[0].a.dim(0)});
  RowCosines(ctx, keys, cosines);
  LowestPlaces(ctx, cosines, fresh);
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
