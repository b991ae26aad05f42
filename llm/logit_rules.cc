#include "llm/logit_rules.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace sluice {
namespace {

void Forbid(std::span<const int32_t> ids, std::span<float> logits) {
  for (const int32_t id : ids) {
    if (id >= 0 && id < static_cast<int64_t>(logits.size())) {
      logits[id] = -std::numeric_limits<float>::infinity();
    }
  }
}

bool EndsWith(std::span<const int32_t> context, std::span<const int32_t> end) {
  return end.size() <= context.size() &&
         std::equal(end.begin(), end.end(), context.end() - static_cast<int64_t>(end.size()));
}

// What followed the context's last `length` - 1 ids wherever they stood before.
void ForbidRepeats(std::span<const int32_t> context, size_t length, std::span<float> logits) {
  if (context.size() + 1 < length) return;
  const auto last = context.last(length - 1);
  for (size_t begin = 0; begin + length <= context.size(); ++begin) {
    if (std::equal(last.begin(), last.end(), context.begin() + static_cast<int64_t>(begin))) {
      Forbid(context.subspan(begin + length - 1, 1), logits);
    }
  }
}

// In nats.
double Entropy(const std::vector<double>& weights, double total) {
  double entropy = 0;
  for (const double weight : weights) {
    if (weight > 0) entropy -= weight / total * std::log(weight / total);
  }
  return entropy;
}

template <typename Predicate>
void KeepIf(std::vector<int32_t>& ids, std::vector<double>& weights, const Predicate& wanted) {
  size_t kept = 0;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (!wanted(weights[i])) continue;
    ids[kept] = ids[i];
    weights[kept++] = weights[i];
  }
  ids.resize(kept);
  weights.resize(kept);
}

void KeepTypical(double mass, std::vector<int32_t>& ids, std::vector<double>& weights) {
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  const double entropy = Entropy(weights, total);
  const auto surprise = [&](double weight) {
    return weight > 0 ? std::abs(-std::log(weight / total) - entropy)
                      : std::numeric_limits<double>::infinity();
  };
  std::vector<double> typical = weights;
  std::sort(typical.begin(), typical.end(),
            [&](double a, double b) { return surprise(a) < surprise(b); });
  double held = 0;
  size_t last = 0;
  while (last + 1 < typical.size() && (held += typical[last] / total) < mass) ++last;
  const double most = surprise(typical[last]);
  KeepIf(ids, weights, [&](double weight) { return surprise(weight) <= most; });
}

// Keeps what is at least this likely, and what equals the likeliest.
void KeepLikely(double least, double total, std::vector<int32_t>& ids,
                std::vector<double>& weights) {
  const double top = *std::max_element(weights.begin(), weights.end());
  KeepIf(ids, weights, [&](double weight) { return weight / total >= least || weight == top; });
}

}  // namespace

bool LogitRules::empty() const {
  return suppress.empty() && begin_suppress.empty() && bad_words.empty() && no_repeat_ngram == 0 &&
         min_new_tokens == 0 && min_positions == 0;
}

void LogitRules::Apply(const AnswerState& state, std::span<float> logits) const {
  if (no_repeat_ngram > 0) {
    ForbidRepeats(state.context, static_cast<size_t>(no_repeat_ngram), logits);
  }
  for (const std::vector<int32_t>& word : bad_words) {
    if (EndsWith(state.context, std::span(word).first(word.size() - 1))) {
      Forbid(std::span(word).last(1), logits);
    }
  }
  if (state.answer_ids < min_new_tokens || state.positions < min_positions) {
    Forbid(state.stop_ids, logits);
  }
  Forbid(suppress, logits);
  if (state.answer_ids == 0) Forbid(begin_suppress, logits);
}

void DrawLimits::Narrow(std::vector<int32_t>& ids, std::vector<double>& weights) const {
  if (min_p > 0) {
    const double top = *std::max_element(weights.begin(), weights.end());
    KeepIf(ids, weights, [&](double weight) { return weight >= min_p * top; });
  }
  if (typical_p < 1) KeepTypical(typical_p, ids, weights);
  if (epsilon > 0) {
    KeepLikely(epsilon, std::accumulate(weights.begin(), weights.end(), 0.0), ids, weights);
  }
  if (eta > 0) {
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    const double least = std::min(eta, std::sqrt(eta) * std::exp(-Entropy(weights, total)));
    KeepLikely(least, total, ids, weights);
  }
}

}  // namespace sluice
