#include "llm/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <unordered_set>

#include "runtime/error.h"
#include "runtime/ops/cuda/select.h"
#include "runtime/transfer.h"

namespace sluice {
namespace {

void Require(bool ok, const char* field, const char* expected, double got) {
  if (ok) return;
  throw InputError(std::string("[sampler] ") + field + " must be " + expected + ", is " +
                   std::to_string(got));
}

// SplitMix64 (Steele, Lea, Flood 2014): a few integer operations, the same on every platform.
uint64_t NextRandom(uint64_t* state) {
  uint64_t z = *state += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

}  // namespace

Sampler::Sampler(const SamplingOptions& options, int32_t num_ids)
    : options_(options), num_ids_(num_ids), state_(options.seed) {
  // NaN fails every comparison, so each range is written as what must hold.
  Require(options.temperature >= 0 && std::isfinite(options.temperature), "temperature",
          "0 or more", options.temperature);
  Require(options.top_k >= 0, "top_k", "0 or more", options.top_k);
  Require(options.top_p >= 0 && options.top_p <= 1, "top_p", "from 0 to 1", options.top_p);
  Require(options.repetition_penalty > 0 && std::isfinite(options.repetition_penalty),
          "repetition_penalty", "above 0", options.repetition_penalty);
  Require(num_ids > 0, "num_ids", "1 or more", num_ids);
}

int32_t Sampler::Sample(ExecContext& ctx, TensorView logits, std::span<const int32_t> context) {
  if (logits.shape().rank() != 2 || logits.dim(0) != 1 || logits.dim(1) < num_ids_) {
    throw Error("[sampler] logits must be [1, " + std::to_string(num_ids_) + " or more], got " +
                logits.shape().ToString());
  }
  if (logits.device() == Device::kCpu) {
    return Sample(std::span(logits.data<float>(), logits.dim(1)), context);
  }
  if (options_.temperature == 0 && options_.repetition_penalty == 1.0f) {
    const Workspace::Scope scope(ctx.workspace());
    const TensorView there = ctx.workspace().Allocate(DType::kI32, {1});
    ctx.Queue(cuda::ArgMax, logits.Columns(0, num_ids_), there);
    int32_t best = -1;
    Transfer(ctx, there, TensorView(&best, DType::kI32, {1}));
    if (best >= 0) return best;  // else what is wrong is told below
  }
  const Tensor copy = TransferTo(ctx, logits, Device::kCpu);
  return Sample(std::span(copy.data<float>(), copy.dim(1)), context);
}

int32_t Sampler::Sample(std::span<float> logits, std::span<const int32_t> context) {
  if (static_cast<int64_t>(logits.size()) < num_ids_) {
    throw Error("[sampler] logits must be at least [" + std::to_string(num_ids_) + "], got [" +
                std::to_string(logits.size()) + "]");
  }
  if (options_.repetition_penalty != 1.0f) {
    std::unordered_set<int32_t> seen;
    for (const int32_t id : context) {
      if (id < 0 || id >= num_ids_ || !seen.insert(id).second) continue;
      float& logit = logits[id];
      logit = logit < 0 ? logit * options_.repetition_penalty : logit / options_.repetition_penalty;
    }
  }
  int32_t best = -1;
  for (int32_t id = 0; id < num_ids_; ++id) {
    if (std::isnan(logits[id]) || logits[id] == std::numeric_limits<float>::infinity()) {
      throw Error("[sampler] logits must be finite or -inf, logit of id " + std::to_string(id) +
                  " is " + std::to_string(logits[id]));
    }
    const bool possible = logits[id] != -std::numeric_limits<float>::infinity();
    if (possible && (best < 0 || logits[id] > logits[best])) best = id;
  }
  if (best < 0) {
    throw Error("[sampler] at least one logit must be finite, all " + std::to_string(num_ids_) +
                " are -inf");
  }
  if (options_.temperature == 0) return best;

  // Differences are divided, not logits: no temperature, however small, makes an infinity.
  const double top = logits[best];
  const auto weight = [&](int32_t id) {
    return std::exp((static_cast<double>(logits[id]) - top) / options_.temperature);
  };
  const double draw =
      static_cast<double>(NextRandom(&state_) >> 11) * 0x1.0p-53;  // uniform in [0, 1)

  const bool limit_count = options_.top_k > 0 && options_.top_k < num_ids_;
  const bool limit_mass = options_.top_p < 1.0f;
  order_.resize(num_ids_);
  std::iota(order_.begin(), order_.end(), 0);
  double total = 0;
  size_t kept = order_.size();
  if (!limit_count && !limit_mass) {
    for (const int32_t id : order_) total += weight(id);
  } else {
    // The likeliest ids leave a heap one by one, which costs V + kept x log V instead of a sort.
    // Of equal logits the smaller id comes first.
    const auto less_likely = [&](int32_t a, int32_t b) {
      return logits[a] != logits[b] ? logits[a] < logits[b] : a > b;
    };
    auto heap_end = order_.end();
    const auto pop = [&] {
      std::pop_heap(order_.begin(), heap_end, less_likely);
      return *--heap_end;
    };
    // Summed before the heap shuffles them: its layout is the standard library's choice.
    if (!limit_count) {
      for (const int32_t id : order_) total += weight(id);
    }
    std::make_heap(order_.begin(), heap_end, less_likely);
    std::vector<int32_t> likely;
    if (limit_count) {
      // Ids that tie with the k-th stay too, as in the reference.
      while (heap_end != order_.begin() && (static_cast<int64_t>(likely.size()) < options_.top_k ||
                                            logits[order_.front()] == logits[likely.back()])) {
        likely.push_back(pop());
        total += weight(likely.back());
      }
    }
    if (limit_mass) {
      // An id stays while those before it hold less than top_p; the first always does.
      double mass = 0;
      size_t count = 0;
      while (count == 0 || mass < options_.top_p * total) {
        if (count == likely.size()) {
          if (limit_count || heap_end == order_.begin()) break;
          likely.push_back(pop());
        }
        mass += weight(likely[count++]);
      }
      likely.resize(count);
      total = mass;
    }
    order_ = std::move(likely);
    kept = order_.size();
  }
  double left = draw * total;
  for (size_t i = 0; i < kept; ++i) {
    left -= weight(order_[i]);
    if (left < 0) return order_[i];
  }
  // Rounding may leave a little: the last id that can be drawn at all.
  while (weight(order_[kept - 1]) == 0) --kept;
  return order_[kept - 1];
}

}  // namespace sluice
