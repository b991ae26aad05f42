#include "compression/turbo_tower.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "compression/bipartite_merge.h"
#include "runtime/error.h"

namespace sluice {

TurboTower::TurboTower(const TurboOptions& options) : options_(options) {
  const double remove = options.remove;
  const bool share = remove > 0 && remove <= 0.5;
  const bool count = remove >= 0 && remove <= 1e6 && remove == std::floor(remove);
  if (!share && !count) {
    throw InputError(
        "[turbo] remove a whole number of tokens a block, or a share in (0, 0.5], got " +
        std::to_string(remove));
  }
  if (!(options.lambda >= 0 && options.lambda <= 1e3)) {
    throw InputError("[turbo] lambda must lie in 0..1000, got " + std::to_string(options.lambda));
  }
  if (options.min_tokens < 0) {
    throw InputError("[turbo] min_tokens must not be negative, got " +
                     std::to_string(options.min_tokens));
  }
}

int64_t TurboTower::TokensToRemove(int64_t tokens, int64_t class_tokens) const {
  if (tokens < options_.min_tokens) return 0;
  const int64_t patches = tokens - class_tokens;
  const double wanted =
      options_.remove < 1 ? options_.remove * static_cast<double>(patches) : options_.remove;
  return std::min(static_cast<int64_t>(wanted), patches / 2);
}

void TurboTower::ChoosePlaces(const ExecContext& ctx, ConstTensorView keys,
                              std::span<const float> received, int64_t class_tokens, int64_t remove,
                              std::span<int32_t> places) const {
  std::vector<float> values(received.begin(), received.end());
  if (!values.empty()) {
    if (class_tokens == 0) CutAt95thPercentile(values);
    ScaleToMean(values, options_.lambda);
  }
  MatchTokens(ctx, keys, values, class_tokens, remove, places);
}

}  // namespace sluice
