// The plain reference of attention: one query at a time, exactly as the equation reads.
#include "runtime/ops/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "runtime/ops/cpu/element.h"
#include "runtime/parallel.h"

namespace sluice::cpu {
namespace {

// softmax(q K^T * scale + bias) for one query. key(t) points at the D elements of key t; bias: of
// the first key, or null.
template <typename T, typename Key>
std::vector<float> Probabilities(const T* q, int64_t num_keys, int head_dim, float scale,
                                 const float* bias, const Key& key) {
  std::vector<float> p(num_keys);
  float max = -INFINITY;
  for (int64_t t = 0; t < num_keys; ++t) {
    const T* k = key(t);
    float dot = 0;
    for (int d = 0; d < head_dim; ++d) dot += ToFloat(q[d]) * ToFloat(k[d]);
    p[t] = dot * scale + (bias ? bias[t] : 0);
    max = std::max(max, p[t]);
  }
  float sum = 0;
  for (float& x : p) sum += x = std::exp(x - max);
  for (float& x : p) x /= sum;
  return p;
}

// o = probabilities V for one query. value(t, d) is element d of value t.
template <typename T, typename Key, typename Value>
void AttendOne(const T* q, int64_t num_keys, int head_dim, float scale, const float* bias,
               const Key& key, const Value& value, T* out) {
  const std::vector<float> p = Probabilities(q, num_keys, head_dim, scale, bias, key);
  for (int d = 0; d < head_dim; ++d) {
    float o = 0;
    for (int64_t t = 0; t < num_keys; ++t) o += p[t] * ToFloat(value(t, d));
    Store(o, &out[d]);
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
      const T* first_key = k.data<T>() + sequence * keys * k.stride0() + column;
      const T* first_value = v.data<T>() + sequence * keys * v.stride0() + column;
      for (int64_t i = sequence * queries; i < (sequence + 1) * queries; ++i) {
        AttendOne(
            q.data<T>() + i * q.stride0() + column, keys, head_dim, scale,
            key_bias.empty() ? nullptr : key_bias.data<float>() + sequence * keys,
            [&](int64_t t) { return first_key + t * k.stride0(); },
            [&](int64_t t, int d) { return first_value[t * v.stride0() + d]; },
            out.data<T>() + i * out.stride0() + column);
      }
    }
  });
}

template <typename T>
void ReceivedRows(ExecContext& ctx, ConstTensorView q, ConstTensorView k, int64_t batch, int heads,
                  int head_dim, float scale, ConstTensorView key_bias, TensorView received) {
  const int64_t queries = q.dim(0) / batch, keys = k.dim(0) / batch;
  ParallelFor(ctx, batch * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t sequence = item / heads, column = item % heads * head_dim;
      const T* first_key = k.data<T>() + sequence * keys * k.stride0() + column;
      float* sums = received.data<float>() + item * keys;
      std::fill_n(sums, keys, 0.0f);
      for (int64_t i = sequence * queries; i < (sequence + 1) * queries; ++i) {
        const std::vector<float> p =
            Probabilities(q.data<T>() + i * q.stride0() + column, keys, head_dim, scale,
                          key_bias.empty() ? nullptr : key_bias.data<float>() + sequence * keys,
                          [&](int64_t t) { return first_key + t * k.stride0(); });
        for (int64_t t = 0; t < keys; ++t) sums[t] += p[t] / static_cast<float>(queries);
      }
    }
  });
}

template <typename T>
void CausalRows(ExecContext& ctx, ConstTensorView q, int64_t begin, int heads, float scale,
                const KvLayerView& kv, TensorView out) {
  const int head_dim = kv.head_dim, group = heads / kv.kv_heads;
  const int64_t area = int64_t{kKvBlockTokens} * head_dim;  // keys or values of one head and block
  ParallelFor(ctx, q.dim(0) * heads, 1, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t i = item / heads, head = item % heads, kv_head = head / group;
      const auto block = [&](int64_t t) {
        return static_cast<const T*>(kv.blocks[t / kKvBlockTokens]);
      };
      AttendOne(
          q.data<T>() + i * q.stride0() + head * head_dim, begin + i + 1, head_dim, scale, nullptr,
          [&](int64_t t) { return block(t) + kv_head * area + t % kKvBlockTokens * head_dim; },
          [&](int64_t t, int d) {
            return block(
                t)[(kv.kv_heads + kv_head) * area + d * kKvBlockTokens + t % kKvBlockTokens];
          },
          out.data<T>() + i * heads * head_dim + head * head_dim);
    }
  });
}

}  // namespace

void EncoderAttentionReference(ExecContext& ctx, ConstTensorView q, ConstTensorView k,
                               ConstTensorView v, int64_t batch, int heads, int head_dim,
                               float scale, TensorView out, ConstTensorView key_bias) {
  WithType(q.dtype(), [&](auto element) {
    EncoderRows<decltype(element)>(ctx, q, k, v, batch, heads, head_dim, scale, out, key_bias);
  });
}

void AttentionReceivedReference(ExecContext& ctx, ConstTensorView q, ConstTensorView k,
                                int64_t batch, int heads, int head_dim, float scale,
                                ConstTensorView key_bias, TensorView received) {
  WithType(q.dtype(), [&](auto element) {
    ReceivedRows<decltype(element)>(ctx, q, k, batch, heads, head_dim, scale, key_bias, received);
  });
}

void CausalAttentionReference(ExecContext& ctx, ConstTensorView q, int64_t begin, int heads,
                              float scale, const KvLayerView& kv, TensorView out) {
  WithType(kv.dtype, [&](auto element) {
    CausalRows<decltype(element)>(ctx, q, begin, heads, scale, kv, out);
  });
}

}  // namespace sluice::cpu
