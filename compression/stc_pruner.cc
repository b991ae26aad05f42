#include "compression/stc_pruner.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "compression/frame_runs.h"

namespace sluice {
namespace {

constexpr double kChannelShare = 0.5;

// The channels with the lowest population variance over all rows, in ascending order of it; `means`
// gets the mean of every channel.
std::vector<int32_t> CalmChannels(ConstTensorView x, std::vector<float>& means) {
  const int64_t rows = x.dim(0), width = x.dim(1);
  std::vector<double> sums(width), squares(width);
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = x.data<float>() + i * x.stride0();
    for (int64_t c = 0; c < width; ++c) {
      sums[c] += row[c];
      squares[c] += double{row[c]} * row[c];
    }
  }
  means.resize(width);
  std::vector<double> variances(width);
  for (int64_t c = 0; c < width; ++c) {
    const double mean = sums[c] / static_cast<double>(rows);
    means[c] = static_cast<float>(mean);
    variances[c] = squares[c] / static_cast<double>(rows) - mean * mean;
  }
  std::vector<int32_t> channels(width);
  std::iota(channels.begin(), channels.end(), 0);
  std::stable_sort(channels.begin(), channels.end(),
                   [&](int32_t a, int32_t b) { return variances[a] < variances[b]; });
  channels.resize(std::max<int64_t>(1, static_cast<int64_t>(kChannelShare * double(width))));
  return channels;
}

float Norm(std::span<const float> v) {
  float sum = 0;
  for (float x : v) sum += x * x;
  return std::max(std::sqrt(sum), 1e-12f);
}

// Sum of five Gaussians of the squared distance.
float Gaussians(float squared_distance) {
  const float x = std::max(squared_distance, 0.0f);
  float sum = 0;
  for (const float width : {0.25f, 0.5f, 1.0f, 2.0f, 4.0f}) sum += std::exp(-x / width);
  return sum;
}

// Rows of `kept` become the mean of themselves and of the rows of `frame` nearest to them.
void Join(ConstTensorView frame, std::span<const int64_t> kept, double join_from, float* out) {
  const int64_t width = frame.dim(1), count = static_cast<int64_t>(kept.size());
  const auto row = [&](int64_t token) {
    return std::span(frame.data<float>() + token * frame.stride0(), width);
  };
  std::vector<double> sums(count * width);
  std::vector<int64_t> sizes(count);
  for (int64_t token = 0, next = 0; token < frame.dim(0); ++token) {
    int64_t to = -1;
    if (next < count && kept[next] == token) {
      to = next++;
    } else {
      double best = join_from;
      for (int64_t k = 0; k < count; ++k) {
        const double dot =
            std::inner_product(row(token).begin(), row(token).end(), row(kept[k]).begin(), 0.0f);
        const double cosine = dot / (double{Norm(row(token))} * Norm(row(kept[k])));
        if (cosine < best) continue;
        best = cosine;
        to = k;
      }
    }
    if (to < 0) continue;
    ++sizes[to];
    for (int64_t d = 0; d < width; ++d) sums[to * width + d] += row(token)[d];
  }
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t d = 0; d < width; ++d) {
      *out++ = static_cast<float>(sums[k * width + d] / static_cast<double>(sizes[k]));
    }
  }
}

}  // namespace

std::string StcPruner::name() const {
  if (options_.join_from <= 1) return "stc-pruner-join";
  if (options_.score == Score::kDualAnchor) return "stc-pruner-paper";
  return options_.history == History::kCompat ? "stc-pruner-compat" : "stc-pruner";
}

StcPruner::StcPruner(const Options& options) : options_(options) {
  CheckKeep("stc-pruner", options.keep);
}

VisualTokens StcPruner::Compress(ExecContext&, VisualTokens tokens) {
  before_compress_ = memory_;
  std::vector<int64_t> kept;
  std::vector<float> scores;
  for (const FrameRun& run : FrameRuns(tokens)) {
    for (const int64_t token : Choose(tokens.features.view().Slice(run.begin, run.end), scores)) {
      kept.push_back(run.begin + token);
    }
  }
  tokens.scores = std::move(scores);
  if (static_cast<int64_t>(kept.size()) == tokens.size()) return tokens;
  VisualTokens fewer = KeepTokens(tokens, kept);
  if (options_.join_from > 1) return fewer;
  float* out = fewer.features.data<float>();
  for (size_t first = 0; const FrameRun& run : FrameRuns(tokens)) {
    std::vector<int64_t> mine;
    for (; first < kept.size() && kept[first] < run.end; ++first) {
      mine.push_back(kept[first] - run.begin);
    }
    Join(tokens.features.view().Slice(run.begin, run.end), mine, options_.join_from, out);
    out += static_cast<int64_t>(mine.size()) * tokens.features.dim(1);
  }
  return fewer;
}

std::vector<int64_t> StcPruner::Choose(ConstTensorView x, std::vector<float>& scores) {
  const int64_t size = x.dim(0), kept = KeptOf(options_.keep, size);
  std::vector<float> means;
  const std::vector<int32_t> channels = CalmChannels(x, means);
  const auto count = static_cast<int64_t>(channels.size());
  const bool by_rank = options_.history == History::kCompat;

  memory_.sum.resize(by_rank ? channels.size() : means.size());
  for (size_t c = 0; c < memory_.sum.size(); ++c) {
    memory_.sum[c] += means[by_rank ? channels[c] : c];
  }
  std::vector<float> temporal(count), spatial(count), rows(size * count), redundancy(size);
  for (int64_t c = 0; c < count; ++c) temporal[c] = memory_.sum[by_rank ? c : channels[c]];
  const float temporal_norm = Norm(temporal);
  for (float& value : temporal) value /= temporal_norm;

  for (int64_t i = 0; i < size; ++i) {
    const float* from = x.data<float>() + i * x.stride0();
    float* row = rows.data() + i * count;
    for (int64_t c = 0; c < count; ++c) row[c] = from[channels[c]];
    const float norm = Norm({row, static_cast<size_t>(count)});
    for (int64_t c = 0; c < count; ++c) spatial[c] += row[c] /= norm;
  }
  for (float& value : spatial) value /= static_cast<float>(size);
  const float spatial_norm = Norm(spatial);
  for (int64_t i = 0; i < size; ++i) {
    const float* row = rows.data() + i * count;
    float to_spatial = 0, to_temporal = 0;
    for (int64_t c = 0; c < count; ++c) {
      to_spatial += row[c] * spatial[c];
      to_temporal += row[c] * temporal[c];
    }
    redundancy[i] = options_.score == Score::kDualAnchor
                        ? to_temporal + to_spatial / spatial_norm
                        : Gaussians(2 - 2 * to_temporal) +
                              Gaussians(1 + spatial_norm * spatial_norm - 2 * to_spatial);
  }
  for (const float value : redundancy) scores.push_back(-value);
  std::vector<int64_t> order(size);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return redundancy[a] < redundancy[b]; });
  order.resize(kept);
  std::sort(order.begin(), order.end());
  return order;
}

void StcPruner::Undo() { memory_ = before_compress_; }

}  // namespace sluice
