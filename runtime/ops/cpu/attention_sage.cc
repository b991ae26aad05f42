#include "runtime/ops/cpu/attention_sage.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <vector>

#include "runtime/ops/cpu/element.h"
#include "runtime/parallel.h"

namespace sluice::cpu {
namespace {

constexpr float kLog2e = 1.44269504f;
constexpr float kMasked = -5e6f;  // finite, so that rows that see nothing stay numbers

// Rows of 8 or 4 bits with a scale a group.
struct Quantised {
  std::vector<int> x;         // [rows, D]
  std::vector<float> scales;  // [rows] of the row's group
};

template <typename GroupOf>
Quantised Quantise(const std::vector<float>& rows, int head_dim, int bits, const GroupOf& group) {
  const float most = bits == 8 ? 127 : 7;
  const auto count = static_cast<int64_t>(rows.size()) / head_dim;
  std::map<int64_t, float> largest;
  for (int64_t i = 0; i < count; ++i) {
    float& of_group = largest.try_emplace(group(i), kSageFloor).first->second;
    for (int d = 0; d < head_dim; ++d) {
      of_group = std::max(of_group, std::abs(rows[i * head_dim + d]));
    }
  }
  Quantised quantised{std::vector<int>(rows.size()), std::vector<float>(count)};
  for (int64_t i = 0; i < count; ++i) {
    const float of_group = largest.at(group(i)), times = most / of_group;
    quantised.scales[i] = of_group / most;
    for (int d = 0; d < head_dim; ++d) {
      quantised.x[i * head_dim + d] =
          static_cast<int>(std::clamp(std::nearbyint(rows[i * head_dim + d] * times), -most, most));
    }
  }
  return quantised;
}

std::vector<float> MeanRow(const float* rows, int64_t count, int head_dim) {
  std::vector<float> mean(head_dim, 0);
  for (int64_t i = 0; i < count; ++i) {
    for (int d = 0; d < head_dim; ++d) mean[d] += rows[i * head_dim + d];
  }
  for (float& x : mean) x /= static_cast<float>(count);
  return mean;
}

// Toward zero to `bits` behind the leading one of a number of the size 2^exponent.
float Truncate(float value, int exponent, int bits) {
  const float unit = std::ldexp(1.0f, exponent - bits);
  return std::trunc(value / unit) * unit;
}

// R of one channel: sum of p[t] v[t] for t < count, by 32.
float Sum(const float* p, const float* v, int64_t count, SageSums sums) {
  float total = 0, part = 0;
  for (int64_t first = 0; first < count; first += 32) {
    const int64_t end = std::min<int64_t>(first + 32, count);
    if (sums == SageSums::kFp22) {
      float largest = std::abs(part);
      for (int64_t t = first; t < end; ++t) largest = std::max(largest, std::abs(p[t] * v[t]));
      if (largest == 0) continue;
      const int exponent = std::ilogb(largest);
      part = Truncate(part, exponent, 13);
      for (int64_t t = first; t < end; ++t) part += Truncate(p[t] * v[t], exponent, 13);
      if (part != 0) part = Truncate(part, std::ilogb(part), 13);
      continue;
    }
    for (int64_t t = first; t < end; ++t) part += p[t] * v[t];
    if (sums == SageSums::kF16) {
      part = Float16::From(part).ToFloat();
      if (first % 64 == 32) {
        total += part;
        part = 0;
      }
    }
  }
  return total + part;
}

// Values as they are multiplied, and what a channel of the result is multiplied with.
struct Values {
  std::vector<float> v;        // [keys, D]
  std::vector<float> channel;  // [D]
  std::vector<float> tile;     // [tiles] besides
  std::vector<float> mean;     // [D], added at the end
};

Values PrepareValues(const SageProblem& x, const SageVariant& variant) {
  const int head_dim = x.head_dim;
  Values values{std::vector<float>(x.v, x.v + x.keys * head_dim), std::vector<float>(head_dim, 1),
                std::vector<float>((x.keys + variant.tile_keys - 1) / variant.tile_keys, 1),
                std::vector<float>(head_dim, 0)};
  if (variant.smooth_values) {
    values.mean = MeanRow(x.v, x.keys, head_dim);
    for (size_t i = 0; i < values.v.size(); ++i) values.v[i] -= values.mean[i % head_dim];
  }
  if (variant.values == SageValues::kF16) {
    for (float& value : values.v) value = Float16::From(value).ToFloat();
  }
  if (variant.values != SageValues::kFp8) return values;
  std::fill(values.channel.begin(), values.channel.end(), kSageFloor);
  for (size_t i = 0; i < values.v.size(); ++i) {
    float& largest = values.channel[i % head_dim];
    largest = std::max(largest, std::abs(values.v[i]));
  }
  const int64_t tile_size = int64_t{variant.tile_keys} * head_dim;
  if (variant.tile_value_scales) {
    for (size_t tile = 0; tile < values.tile.size(); ++tile) {
      float largest = kSageFloor;
      const size_t end = std::min<size_t>((tile + 1) * tile_size, values.v.size());
      for (size_t i = tile * tile_size; i < end; ++i) {
        largest = std::max(largest, std::abs(values.v[i]) / values.channel[i % head_dim]);
      }
      values.tile[tile] = largest;
    }
  }
  for (float& of_channel : values.channel) of_channel /= variant.value_range;
  for (size_t i = 0; i < values.v.size(); ++i) {
    values.v[i] =
        RoundToFp8(values.v[i] / (values.channel[i % head_dim] * values.tile[i / tile_size]));
  }
  return values;
}

float RoundProbability(float p, SageValues values) {
  switch (values) {
    case SageValues::kF32:
      return p;
    case SageValues::kF16:
      return Float16::From(p).ToFloat();
    case SageValues::kFp8:
      return RoundToFp8(p);
  }
  return p;
}

// Rows of `count` tokens of one head: [count, D] f32.
template <typename At>
std::vector<float> Rows(int64_t count, int head_dim, const At& at) {
  std::vector<float> rows(count * head_dim);
  for (int64_t t = 0; t < count; ++t) {
    for (int d = 0; d < head_dim; ++d) rows[t * head_dim + d] = ToFloat(at(t, d));
  }
  return rows;
}

template <typename T>
void StoreRows(const std::vector<float>& rows, int head_dim, T* out, int64_t stride) {
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto at = static_cast<int64_t>(i);
    Store(rows[i], &out[at / head_dim * stride + at % head_dim]);
  }
}

template <typename T>
void EncoderRows(ExecContext& ctx, ConstTensorView q, ConstTensorView k, ConstTensorView v,
                 int64_t batch, int heads, int head_dim, float scale, TensorView out,
                 ConstTensorView key_bias) {
  const int64_t queries = q.dim(0) / batch, keys = k.dim(0) / batch;
  ParallelFor(ctx, batch * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t sequence = item / heads, column = item % heads * head_dim;
      const auto rows = [&](ConstTensorView x, int64_t count) {
        const T* first = x.data<T>() + sequence * count * x.stride0() + column;
        return Rows(count, head_dim, [&](int64_t t, int d) { return first[t * x.stride0() + d]; });
      };
      const std::vector<float> own_q = rows(q, queries), own_k = rows(k, keys);
      const std::vector<float> own_v = rows(v, keys);
      std::vector<float> result(own_q.size());
      SageReference(
          {.q = own_q.data(),
           .k = own_k.data(),
           .v = own_v.data(),
           .queries = queries,
           .keys = keys,
           .head_dim = head_dim,
           .scale = scale,
           .key_bias = key_bias.empty() ? nullptr : key_bias.data<float>() + sequence * keys},
          SageVariant::Cpu(), result.data());
      StoreRows(result, head_dim, out.data<T>() + sequence * queries * out.stride0() + column,
                out.stride0());
    }
  });
}

template <typename T>
void CausalRows(ExecContext& ctx, ConstTensorView q, int64_t begin, int heads, float scale,
                const KvLayerView& kv, TensorView out) {
  const int head_dim = kv.head_dim, group = heads / kv.kv_heads;
  const int64_t area = int64_t{kKvBlockTokens} * head_dim, queries = q.dim(0);
  const int64_t keys = begin + queries;
  ParallelFor(ctx, heads, 1, [&](int64_t first, int64_t last) {
    for (int64_t head = first; head < last; ++head) {
      const int64_t kv_head = head / group, column = head * head_dim;
      const auto block = [&](int64_t t) {
        return static_cast<const T*>(kv.blocks[t / kKvBlockTokens]);
      };
      const std::vector<float> own_q = Rows(queries, head_dim, [&](int64_t t, int d) {
        return q.data<T>()[t * q.stride0() + column + d];
      });
      const std::vector<float> own_k = Rows(keys, head_dim, [&](int64_t t, int d) {
        return block(t)[kv_head * area + t % kKvBlockTokens * head_dim + d];
      });
      const std::vector<float> own_v = Rows(keys, head_dim, [&](int64_t t, int d) {
        return block(t)[(kv.kv_heads + kv_head) * area + d * kKvBlockTokens + t % kKvBlockTokens];
      });
      std::vector<float> result(own_q.size());
      SageReference({.q = own_q.data(),
                     .k = own_k.data(),
                     .v = own_v.data(),
                     .queries = queries,
                     .keys = keys,
                     .head_dim = head_dim,
                     .scale = scale,
                     .causal = true},
                    SageVariant::Cpu(), result.data());
      StoreRows(result, head_dim, out.data<T>() + column, out.stride0());
    }
  });
}

}  // namespace

SageVariant SageVariant::Hopper() {
  SageVariant variant;
  variant.groups = SageGroups::kThread;
  variant.tile_queries = 64;
  variant.tile_keys = 128;
  variant.warp_queries = 16;
  variant.values = SageValues::kFp8;
  variant.tile_value_scales = true;
  variant.sums = SageSums::kFp22;
  variant.sum_rounded = true;
  return variant;
}

SageVariant SageVariant::Int8F16() {
  SageVariant variant;
  variant.groups = SageGroups::kThread;
  variant.values = SageValues::kF16;
  return variant;
}

SageVariant SageVariant::Int4Fp8() {
  SageVariant variant;
  variant.qk_bits = 4;
  variant.groups = SageGroups::kThread;
  variant.smooth_queries = true;
  variant.values = SageValues::kFp8;
  variant.sums = SageSums::kFp22;
  return variant;
}

int64_t SageGroupOfQuery(const SageVariant& variant, int64_t query) {
  switch (variant.groups) {
    case SageGroups::kToken:
      return query;
    case SageGroups::kBlock:
      return query / variant.tile_queries;
    case SageGroups::kWarp:
      return query / variant.warp_queries;
    case SageGroups::kThread:
      return 8 * (query / variant.warp_queries) + query % 8;
  }
  return query;
}

int64_t SageGroupOfKey(const SageVariant& variant, int64_t key) {
  switch (variant.groups) {
    case SageGroups::kToken:
      return key;
    case SageGroups::kBlock:
    case SageGroups::kWarp:
      return key / variant.tile_keys;
    case SageGroups::kThread:
      return 4 * (key / variant.tile_keys) + key % 8 / 2;
  }
  return key;
}

float RoundToFp8(float value) {
  constexpr float kLargest = 448;
  constexpr int kLeastExponent = -6, kBits = 3;
  const float size = std::min(std::abs(value), kLargest);
  if (size == 0) return value;
  const float unit = std::ldexp(1.0f, std::max(std::ilogb(size), kLeastExponent) - kBits);
  return std::copysign(std::nearbyint(size / unit) * unit, value);
}

void SageReference(const SageProblem& x, const SageVariant& variant, float* out, float* log_sums) {
  const int head_dim = x.head_dim;
  const float to_log2 = x.scale * kLog2e;
  std::vector<float> mean_k(head_dim, 0);
  if (x.key_mean) {
    mean_k.assign(x.key_mean, x.key_mean + head_dim);
  } else if (variant.smooth_keys) {
    mean_k = MeanRow(x.k, x.keys, head_dim);
  }
  std::vector<float> k(x.k, x.k + x.keys * head_dim), q(x.q, x.q + x.queries * head_dim);
  for (size_t i = 0; i < k.size(); ++i) k[i] -= mean_k[i % head_dim];
  std::vector<std::vector<float>> mean_q;  // of each tile of queries
  for (int64_t first = 0; variant.smooth_queries && first < x.queries;
       first += variant.tile_queries) {
    const int64_t count = std::min<int64_t>(variant.tile_queries, x.queries - first);
    mean_q.push_back(MeanRow(x.q + first * head_dim, count, head_dim));
    for (int64_t i = first * head_dim; i < (first + count) * head_dim; ++i) {
      q[i] -= mean_q.back()[i % head_dim];
    }
  }
  const Quantised q8 = Quantise(q, head_dim, variant.qk_bits,
                                [&](int64_t i) { return SageGroupOfQuery(variant, i); });
  const Quantised k8 =
      Quantise(k, head_dim, variant.qk_bits, [&](int64_t j) { return SageGroupOfKey(variant, j); });
  const Values values = PrepareValues(x, variant);
  std::vector<float> by_channel(values.v.size());  // [D, keys]
  for (size_t i = 0; i < by_channel.size(); ++i) {
    by_channel[static_cast<int64_t>(i) % head_dim * x.keys + static_cast<int64_t>(i) / head_dim] =
        values.v[i];
  }
  const float headroom =
      variant.values == SageValues::kFp8 ? std::log2(variant.probability_range) : 0;

  std::vector<float> z(variant.tile_keys), p(variant.tile_keys), o(head_dim);
  for (int64_t i = 0; i < x.queries; ++i) {
    const int64_t seen = x.causal ? std::min(x.keys, i + 1 + x.keys - x.queries) : x.keys;
    float max = kMasked, sum = 0;
    std::fill(o.begin(), o.end(), 0.0f);
    for (int64_t first = 0; first < seen; first += variant.tile_keys) {
      const int64_t count = std::min<int64_t>(variant.tile_keys, seen - first);
      float largest = kMasked;
      for (int64_t t = 0; t < count; ++t) {
        const int64_t j = first + t;
        int dot = 0;
        for (int d = 0; d < head_dim; ++d) {
          dot += q8.x[i * head_dim + d] * k8.x[j * head_dim + d];
        }
        float score = static_cast<float>(dot) * (q8.scales[i] * k8.scales[j]);
        if (variant.smooth_queries) {
          const std::vector<float>& of_tile = mean_q[i / variant.tile_queries];
          for (int d = 0; d < head_dim; ++d) score += of_tile[d] * k[j * head_dim + d];
        }
        z[t] = score * to_log2 + (x.key_bias ? x.key_bias[j] * kLog2e : 0);
        largest = std::max(largest, z[t]);
      }
      const float before = max;
      max = std::max(max, largest - headroom);
      const float keep = std::exp2(before - max);
      sum *= keep;
      for (int64_t t = 0; t < count; ++t) {
        const float exact = std::exp2(z[t] - max);
        p[t] = RoundProbability(exact, variant.values);
        sum += variant.sum_rounded ? p[t] : exact;
      }
      const float of_tile = values.tile[first / variant.tile_keys];
      for (int d = 0; d < head_dim; ++d) {
        const float r = Sum(p.data(), &by_channel[d * x.keys + first], count, variant.sums);
        o[d] = o[d] * keep + r * of_tile;
      }
    }
    for (int d = 0; d < head_dim; ++d) {
      out[i * head_dim + d] = o[d] / sum * values.channel[d] + values.mean[d];
    }
    if (!log_sums) continue;
    float with_mean = 0;
    for (int d = 0; d < head_dim; ++d) with_mean += x.q[i * head_dim + d] * mean_k[d];
    log_sums[i] = (std::log2(sum) + max) / kLog2e + x.scale * with_mean;
  }
}

void EncoderAttentionSageReference(ExecContext& ctx, ConstTensorView q, ConstTensorView k,
                                   ConstTensorView v, int64_t batch, int heads, int head_dim,
                                   float scale, TensorView out, ConstTensorView key_bias) {
  WithType(q.dtype(), [&](auto element) {
    EncoderRows<decltype(element)>(ctx, q, k, v, batch, heads, head_dim, scale, out, key_bias);
  });
}

void CausalAttentionSageReference(ExecContext& ctx, ConstTensorView q, int64_t begin, int heads,
                                  float scale, const KvLayerView& kv, TensorView out) {
  WithType(kv.dtype, [&](auto element) {
    CausalRows<decltype(element)>(ctx, q, begin, heads, scale, kv, out);
  });
}

}  // namespace sluice::cpu
