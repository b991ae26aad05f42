// STC-Cacher (Streaming Token Compression, arXiv 2512.00891, section on the Cacher; training-free):
// frames that resemble a reference frame are encoded by computing few of their patches afresh.
//
// Every `interval`-th frame of the stream is computed whole and becomes the reference. In every
// other frame and layer the `ratio` of patches whose keys differ most from the reference's (full
// width, cosine, ties to the lower index) are computed afresh; values, attention and MLP of all
// others are the reference's. Selected frames never become references, so errors do not accumulate.
// A class token does not count among the patches and is always computed afresh.
//
// Different from the authors' code: attention and MLP of a patch are kept as their sum, which is
// exact (the same patches are fresh in both) and a quarter smaller; the first frame is always
// whole; a frame that changed too much may be computed whole out of turn (`refresh_below`), where
// theirs has a fixed schedule only; a class token is an ordinary
// patch to theirs and may go stale.
#ifndef SLUICE_COMPRESSION_STC_CACHER_H_
#define SLUICE_COMPRESSION_STC_CACHER_H_

#include <cstdint>
#include <span>
#include <vector>

#include "runtime/archive.h"
#include "vision/feature_reuse.h"

namespace sluice {

struct StcCacherOptions {
  int interval = 2;     // one frame of so many is computed whole
  double ratio = 0.25;  // of the patches of the others are computed afresh, in (0, 1]
  // The first layer chooses for all of them: saves comparing keys in the others.
  bool shared_selection = false;
  // A frame is computed whole out of turn (a cut, a moving camera) if more than `ratio` of its
  // patches have changed: if the cosine of their first-layer keys to the reference's, both less the
  // mean of the reference's keys, is below this. Without the mean, keys of any two patches point
  // much the same way in some towers; with it what is unrelated is near 0. In [-1, 1]; -1 keeps to
  // the schedule.
  double refresh_below = 0.6;
  bool operator==(const StcCacherOptions&) const = default;
};

class StcCacher final : public FeatureReuse {
 public:
  // Throws InputError on an interval below 1, a ratio outside (0, 1], or a cosine outside [-1, 1].
  explicit StcCacher(const StcCacherOptions& options);

  std::vector<bool> Schedule(int64_t frames) const override;
  std::vector<bool> ChooseWhole(ExecContext& ctx, int layers,
                                std::span<const ConstTensorView> first_keys) override;
  int64_t FreshPatches(int64_t patches) const override;
  void ChooseFresh(ExecContext& ctx, int layer, std::span<const RowPairs> keys,
                   TensorView fresh) const override;
  bool KeepsReference() const override { return !IsDue(next_); }
  LayerReference& reference(int layer) override { return references_[layer]; }

  // Saves or loads where the schedule stands, the reference and the counts.
  void Persist(Archive& archive);
  // Forgets the reference: the next frame is computed whole, and the schedule begins there.
  void Reset();

  // Since the beginning.
  struct Counts {
    int64_t frames = 0;
    int64_t whole = 0;      // frames computed whole, refreshes included
    int64_t refreshes = 0;  // out of turn
    int64_t patches = 0;    // of all frames and layers
    int64_t fresh = 0;      // of them, computed
  };
  const Counts& counts() const { return counts_; }
  int64_t SizeBytes() const;  // of the reference

 private:
  bool IsDue(int64_t frame) const { return frame % options_.interval == 0; }
  bool HasReference() const { return !references_.empty() && !references_[0].keys.empty(); }
  // Adds the frames that changed too much to those computed whole. Waits for the GPU once, and
  // again behind each frame that is added.
  void AddChanged(ExecContext& ctx, std::span<const ConstTensorView> first_keys,
                  std::vector<bool>& whole);

  const StcCacherOptions options_;
  std::vector<LayerReference> references_;
  int64_t next_ = 0;  // number of the next frame, from the last Reset
  Counts counts_;
};

}  // namespace sluice

#endif  // SLUICE_COMPRESSION_STC_CACHER_H_
