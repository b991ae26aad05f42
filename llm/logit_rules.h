// What a checkpoint's generation_config.json forbids while an answer is written, and how it limits
// a draw, as generate() of transformers does it.
#ifndef SLUICE_LLM_LOGIT_RULES_H_
#define SLUICE_LLM_LOGIT_RULES_H_

#include <cstdint>
#include <span>
#include <vector>

namespace sluice {

// An answer on its way, as rules look at it.
struct AnswerState {
  // The prompt's ids, a run of visual tokens as one placeholder, and those of the answer so far.
  std::span<const int32_t> context;
  int64_t answer_ids = 0;  // of them the answer's
  int64_t positions = 0;   // of prompt and answer, with every visual token
  std::span<const int32_t> stop_ids;
};

// Which ids must not come next. Without any, nothing is forbidden.
struct LogitRules {
  std::vector<int32_t> suppress;                // never
  std::vector<int32_t> begin_suppress;          // not as an answer's first
  std::vector<std::vector<int32_t>> bad_words;  // runs of ids that are never completed; none empty
  int64_t no_repeat_ngram = 0;                  // runs of so many ids come once; 0: off
  int64_t min_new_tokens = 0;                   // stop ids only after so many ids of an answer
  int64_t min_positions = 0;                    // stop ids only after so many of all

  bool empty() const;
  // Sets the logits of forbidden ids to -inf. Ids beyond `logits` are passed over.
  void Apply(const AnswerState& state, std::span<float> logits) const;
};

// Limits of a draw beside top-k and top-p, after which they apply in this order.
struct DrawLimits {
  double min_p = 0;      // keeps ids at least so likely, relative to the likeliest; 0: off
  double typical_p = 1;  // keeps the most typical ids that hold this mass; 1: off
  double epsilon = 0;    // keeps ids of at least this probability, and the likeliest; 0: off
  double eta = 0;        // the same, less where the entropy is high; 0: off

  bool none() const { return min_p <= 0 && typical_p >= 1 && epsilon <= 0 && eta <= 0; }
  // `weights`: in proportion to the probabilities of `ids`, at least one above 0. Removes ids with
  // their weights; the order of the others stays.
  void Narrow(std::vector<int32_t>& ids, std::vector<double>& weights) const;
};

}  // namespace sluice

#endif  // SLUICE_LLM_LOGIT_RULES_H_
