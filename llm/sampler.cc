#include "llm/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <unordered_set>

#include "runtime/error.h"
#include "runtime/ops/cuda/sample.h"
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

// The place of the largest logit, the first of equals. Throws Error unless all are finite or -inf,
// and one is finite.
int32_t Likeliest(std::span<const float> logits) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  int32_t best = -1;
  for (int32_t id = 0; id < static_cast<int32_t>(logits.size()); ++id) {
    if (std::isnan(logits[id]) || logits[id] == kInfinity) {
      throw Error("[sampler] logits must be finite or -inf, logit of id " + std::to_string(id) +
                  " is " + std::to_string(logits[id]));
    }
    if (logits[id] != -kInfinity && (best < 0 || logits[id] > logits[best])) best = id;
  }
  if (best < 0) {
    throw Error("[sampler] at least one logit must be finite, all " +
                std::to_string(logits.size()) + " are -inf");
  }
  return best;
}

// Differences are divided, not logits: no temperature, however small, makes an infinity.
double Weight(float logit, float top, float temperature) {
  return std::exp((static_cast<double>(logit) - top) / temperature);
}

}  // namespace

Sampler::Sampler(const SamplingOptions& options, int32_t num_ids, const DrawLimits& limits)
    : options_(options), num_ids_(num_ids), limits_(limits), state_(options.seed) {
  // NaN fails every comparison, so each range is written as what must hold.
  Require(options.temperature >= 0 && std::isfinite(options.temperature), "temperature",
          "0 or more", options.temperature);
  Require(options.top_k >= 0, "top_k", "0 or more", options.top_k);
  Require(options.top_p >= 0 && options.top_p <= 1, "top_p", "from 0 to 1", options.top_p);
  Require(options.repetition_penalty > 0 && std::isfinite(options.repetition_penalty),
          "repetition_penalty", "above 0", options.repetition_penalty);
  Require(num_ids > 0, "num_ids", "1 or more", num_ids);
}

double Sampler::NextDraw() { return static_cast<double>(NextRandom(&state_) >> 11) * 0x1.0p-53; }

int32_t Sampler::Sample(ExecContext& ctx, TensorView logits, std::span<const int32_t> context) {
  if (logits.shape().rank() != 2 || logits.dim(0) != 1 || logits.dim(1) < num_ids_) {
    throw Error("[sampler] logits must be [1, " + std::to_string(num_ids_) + " or more], got " +
                logits.shape().ToString());
  }
  if (logits.device() == Device::kCpu) {
    return Sample(std::span(logits.data<float>(), logits.dim(1)), context);
  }
  const TensorView known = logits.Columns(0, num_ids_);
  OnGpu("sampler", ctx, {known});
  if (options_.repetition_penalty != 1.0f && !context.empty()) {
    const Workspace::Scope scope(ctx.workspace());
    const auto bytes = static_cast<int64_t>(cuda::PenaltyWorkspaceBytes(num_ids_));
    const TensorView seen = ctx.workspace().Allocate(DType::kU8, {bytes});
    ctx.Queue(cuda::Penalise, static_cast<float*>(known.raw()), num_ids_, Within(ctx, context),
              static_cast<int64_t>(context.size()), options_.repetition_penalty, seen.raw());
  }
  return SampleOnGpu(ctx, known);
}

int32_t Sampler::SampleOnGpu(ExecContext& ctx, TensorView logits) {
  const Workspace::Scope scope(ctx.workspace());
  const auto copy = [&](ConstTensorView from, void* to) {
    Transfer(ctx, from, TensorView(to, from.dtype(), from.shape()));
  };
  std::vector<float> whole;
  const auto copy_all = [&] {
    ++whole_copies_;
    whole.resize(num_ids_);
    copy(logits, whole.data());
  };
  if (options_.temperature == 0) {
    const TensorView there = ctx.workspace().Allocate(DType::kI32, {1});
    ctx.Queue(cuda::ArgMax, logits, there);
    int32_t best = -1;
    copy(there, &best);
    if (best >= 0) return best;
    copy_all();
    return Likeliest(whole);  // tells what is wrong
  }
  if (!limits_.none()) {
    copy_all();
    return *Choose(whole, whole[Likeliest(whole)], NextDraw(), std::nullopt);
  }

  // The summary, then the candidates, of which as many as are mostly enough come in the same copy.
  struct {
    cuda::LogitSummary summary;
    cuda::Candidate candidates[cuda::kMostCandidates];
  } result;
  constexpr int64_t kFirst = sizeof(cuda::LogitSummary) + 512 * sizeof(cuda::Candidate);
  const TensorView there = ctx.workspace().Allocate(DType::kU8, {sizeof result});
  const TensorView scratch =
      ctx.workspace().Allocate(DType::kU8, {static_cast<int64_t>(cuda::SummariseWorkspaceBytes())});
  cuda::SummariseArgs args;
  args.logits = static_cast<const float*>(logits.raw());
  args.count = num_ids_;
  args.temperature = options_.temperature;
  args.wants_candidates = limits_count() || limits_mass();
  args.top_k = limits_count() ? options_.top_k : 0;
  args.top_p = options_.top_p;
  args.summary = static_cast<cuda::LogitSummary*>(there.raw());
  args.candidates = reinterpret_cast<cuda::Candidate*>(args.summary + 1);
  args.workspace = scratch.raw();
  ctx.Queue(cuda::SummariseLogits, args);
  copy(there.Slice(0, args.wants_candidates ? kFirst : sizeof(cuda::LogitSummary)), &result);
  const cuda::LogitSummary& summary = result.summary;
  if (summary.broken || summary.top == -std::numeric_limits<float>::infinity()) {
    copy_all();
    return Likeliest(whole);  // tells what is wrong
  }
  const double draw = NextDraw();
  double everything = 0;
  for (const double mass : summary.masses) everything += mass;

  if (args.wants_candidates) {
    const int64_t count = summary.candidates;
    if (count <= cuda::kMostCandidates) {
      const int64_t bytes = sizeof(cuda::LogitSummary) + count * sizeof(cuda::Candidate);
      if (bytes > kFirst) {
        copy(there.Slice(kFirst, bytes), reinterpret_cast<uint8_t*>(&result) + kFirst);
      }
      std::sort(result.candidates, result.candidates + count,
                [](const auto& a, const auto& b) { return a.id < b.id; });
      std::vector<float> likely;
      for (int64_t i = 0; i < count; ++i) likely.push_back(result.candidates[i].logit);
      const auto place = Choose(likely, summary.top, draw, everything);
      if (place) return result.candidates[*place].id;
    }
    copy_all();
    return *Choose(whole, summary.top, draw, std::nullopt);
  }

  // The draw falls into a part, whose logits decide.
  double left = draw * everything;
  const int32_t length = cuda::SamplePartLength(num_ids_);
  int last = cuda::kSampleParts - 1;
  while (summary.masses[last] == 0) --last;
  std::vector<float> part(length);
  int32_t drawable = -1;
  for (int p = 0; p <= last; ++p) {
    if (left >= summary.masses[p] && p < last) {
      left -= summary.masses[p];
      continue;
    }
    const int32_t begin = p * length, end = std::min(begin + length, num_ids_);
    copy(logits.Columns(begin, end), part.data());
    for (int32_t id = begin; id < end; ++id) {
      const double weight = Weight(part[id - begin], summary.top, options_.temperature);
      left -= weight;
      if (left < 0) return id;
      if (weight > 0) drawable = id;
    }
  }
  // Rounding may leave a little: the last id that can be drawn at all.
  return drawable;
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
  logits = logits.first(num_ids_);
  const int32_t best = Likeliest(logits);
  if (options_.temperature == 0) return best;
  return *Choose(logits, logits[best], NextDraw(), std::nullopt);
}

std::optional<int32_t> Sampler::Choose(std::span<const float> logits, float top, double draw,
                                       std::optional<double> everything) {
  const auto weight = [&](int32_t id) { return Weight(logits[id], top, options_.temperature); };
  const bool limit_count = limits_count();
  order_.resize(logits.size());
  std::iota(order_.begin(), order_.end(), 0);
  double total = 0;
  size_t kept = order_.size();
  if (!limit_count && !limits_mass()) {
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
    if (!limit_count && everything) {
      total = *everything;
    } else if (!limit_count) {
      // Summed before the heap shuffles them: its layout is the standard library's choice.
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
    if (limits_mass()) {
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
      const bool suffices = limit_count || mass >= options_.top_p * total;
      if (everything && !suffices) return std::nullopt;
      likely.resize(count);
      total = mass;
    }
    order_ = std::move(likely);
    kept = order_.size();
  }
  if (!limits_.none()) {
    order_.resize(kept);
    std::vector<double> weights;
    for (const int32_t id : order_) weights.push_back(weight(id));
    limits_.Narrow(order_, weights);
    kept = order_.size();
    total = std::accumulate(weights.begin(), weights.end(), 0.0);
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
