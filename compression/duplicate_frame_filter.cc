#include "compression/duplicate_frame_filter.h"

#include <cmath>
#include <utility>

#include "compression/frame_runs.h"
#include "runtime/error.h"

namespace sluice {
namespace {

double Cosine(const float* a, const float* b, int64_t size) {
  double ab = 0, aa = 0, bb = 0;
  for (int64_t i = 0; i < size; ++i) {
    ab += double{a[i]} * b[i];
    aa += double{a[i]} * a[i];
    bb += double{b[i]} * b[i];
  }
  // Two zero vectors are the same; one has no direction to compare.
  if (aa == 0 || bb == 0) return aa == bb ? 1 : -1;
  return ab / std::sqrt(aa * bb);
}

}  // namespace

DuplicateFrameFilter::DuplicateFrameFilter(double threshold) : threshold_(threshold) {
  if (!(threshold >= -1 && threshold <= 1)) {
    throw InputError("[duplicate-frames] the threshold is a cosine in -1..1, got " +
                     std::to_string(threshold));
  }
}

bool DuplicateFrameFilter::Duplicates(const VisualTokens& tokens, int64_t begin,
                                      int64_t end) const {
  if (last_kept_.origins.size() != static_cast<size_t>(end - begin)) return false;
  const int64_t width = tokens.features.dim(1);
  const float* features = tokens.features.data<float>();
  for (int64_t i = begin; i < end; ++i) {
    const TokenOrigin& then = last_kept_.origins[i - begin];
    const TokenOrigin& now = tokens.origins[i];
    if (then.row != now.row || then.col != now.col) return false;
    // A little slack, or equal tokens would differ from themselves at threshold 1.
    constexpr double kRounding = 1e-6;
    if (Cosine(&last_kept_.features[(i - begin) * width], features + i * width, width) <
        threshold_ - kRounding) {
      return false;
    }
  }
  return true;
}

VisualTokens DuplicateFrameFilter::Compress(ExecContext&, VisualTokens tokens) {
  before_compress_ = last_kept_;
  const int64_t count = tokens.size();
  if (count == 0) return tokens;
  const int64_t width = tokens.features.dim(1);
  const float* features = tokens.features.data<float>();
  std::vector<int64_t> kept;
  for (const auto& [begin, end] : FrameRuns(tokens)) {
    if (Duplicates(tokens, begin, end)) continue;
    last_kept_.features.assign(features + begin * width, features + end * width);
    last_kept_.origins.assign(tokens.origins.begin() + begin, tokens.origins.begin() + end);
    for (int64_t i = begin; i < end; ++i) kept.push_back(i);
  }
  if (static_cast<int64_t>(kept.size()) == count) return tokens;
  return KeepTokens(tokens, kept);
}

void DuplicateFrameFilter::Undo() { last_kept_ = before_compress_; }

}  // namespace sluice
