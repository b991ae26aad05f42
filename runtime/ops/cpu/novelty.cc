#include "runtime/ops/cpu/novelty.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <span>
#include <vector>

namespace sluice::cpu {
namespace {

// The calm channels of x in ascending order of their variance; `means` gets the mean of every
// channel.
std::vector<int32_t> ChooseChannels(ConstTensorView x, std::vector<float>& means) {
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
  channels.resize(CalmChannels(width));
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

// One frame; `history` holds the sum over earlier ones.
void NoveltyOfFrame(const NoveltyArgs& args, ConstTensorView x, float* history, float* novelty) {
  const int64_t size = x.dim(0);
  std::vector<float> means;
  const std::vector<int32_t> channels = ChooseChannels(x, means);
  const auto count = static_cast<int64_t>(channels.size());
  for (int64_t c = 0; c < args.new_history.dim(0); ++c) {
    history[c] += means[args.by_rank ? channels[c] : c];
  }
  std::vector<float> temporal(count), spatial(count), rows(size * count);
  for (int64_t c = 0; c < count; ++c) temporal[c] = history[args.by_rank ? c : channels[c]];
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
    const float redundancy = args.score == NoveltyScore::kDualAnchor
                                 ? to_temporal + to_spatial / spatial_norm
                                 : Gaussians(2 - 2 * to_temporal) +
                                       Gaussians(1 + spatial_norm * spatial_norm - 2 * to_spatial);
    novelty[i] = -redundancy;
  }
}

// Rows of `kept` become the mean of themselves and of the rows of `frame` nearest to them.
void JoinFrame(ConstTensorView frame, std::span<const int32_t> kept, float join_from,
               TensorView y) {
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
    float* const out = y.data<float>() + k * y.stride0();
    for (int64_t d = 0; d < width; ++d) {
      out[d] = static_cast<float>(sums[k * width + d] / static_cast<double>(sizes[k]));
    }
  }
}

}  // namespace

void Novelty(const NoveltyArgs& args) {
  const int64_t size = args.x.dim(0) / args.frames;
  float* const history = args.new_history.data<float>();
  if (args.history.empty()) {
    std::fill_n(history, args.new_history.dim(0), 0.0f);
  } else if (args.history.raw() != history) {
    std::copy_n(args.history.data<float>(), args.new_history.dim(0), history);
  }
  for (int64_t f = 0; f < args.frames; ++f) {
    NoveltyOfFrame(args, args.x.Slice(f * size, (f + 1) * size), history,
                   args.novelty.data<float>() + f * size);
  }
}

void HistoryCosines(ConstTensorView x, int64_t frames, ConstTensorView history,
                    TensorView new_history, TensorView cosines) {
  const int64_t size = x.dim(0) / frames, width = x.dim(1);
  std::vector<double> sum(width);
  if (!history.empty()) std::memcpy(sum.data(), history.raw(), width * sizeof(double));
  for (int64_t f = 0; f < frames; ++f) {
    const ConstTensorView frame = x.Slice(f * size, (f + 1) * size);
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t d = 0; d < width; ++d) sum[d] += frame.data<float>()[i * frame.stride0() + d];
    }
    const double sum_norm = std::sqrt(std::inner_product(sum.begin(), sum.end(), sum.begin(), 0.0));
    for (int64_t i = 0; i < size; ++i) {
      const float* const row = frame.data<float>() + i * frame.stride0();
      double dot = 0, norm = 0;
      for (int64_t d = 0; d < width; ++d) {
        dot += row[d] * sum[d];
        norm += double{row[d]} * row[d];
      }
      cosines.data<float>()[f * size + i] =
          static_cast<float>(dot / std::max(std::sqrt(norm) * sum_norm, 1e-12));
    }
  }
  std::memcpy(new_history.raw(), sum.data(), width * sizeof(double));
}

void LargestOfGroups(ConstTensorView values, int64_t groups, TensorView places) {
  const int64_t size = values.dim(0) / groups, kept = places.dim(0) / groups;
  std::vector<int32_t> order(size);
  for (int64_t g = 0; g < groups; ++g) {
    const float* const value = values.data<float>() + g * size;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return value[a] > value[b]; });
    std::sort(order.begin(), order.begin() + kept);
    std::copy_n(order.begin(), kept, places.data<int32_t>() + g * kept);
  }
}

void JoinRows(ConstTensorView x, int64_t frames, ConstTensorView kept, float join_from,
              TensorView y) {
  const int64_t size = x.dim(0) / frames, left = y.dim(0) / frames;
  for (int64_t f = 0; f < frames; ++f) {
    JoinFrame(x.Slice(f * size, (f + 1) * size), std::span(kept.data<int32_t>() + f * left, left),
              join_from, y.Slice(f * left, (f + 1) * left));
  }
}

}  // namespace sluice::cpu
