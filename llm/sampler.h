// From logits to the next id. Order as in transformers: repetition penalty, temperature, top-k,
// top-p.
#ifndef SLUICE_LLM_SAMPLER_H_
#define SLUICE_LLM_SAMPLER_H_

#include <cstdint>
#include <span>
#include <vector>

namespace sluice {

struct SamplingOptions {
  float temperature = 0.0f;  // 0: greedy (ties to the smallest id)
  int top_k = 0;             // 0: off
  float top_p = 1.0f;        // 1: off
  float repetition_penalty = 1.0f;
  uint64_t seed = 0;
};

// Deterministic for a seed, on every platform. Used by one thread at a time.
class Sampler {
 public:
  // num_ids: ids >= num_ids have no token and are never chosen. Throws InputError on options out of
  // range.
  Sampler(const SamplingOptions& options, int32_t num_ids);
  // logits: V values (may be modified). `context`: ids so far, read only for the repetition
  // penalty.
  int32_t Sample(std::span<float> logits, std::span<const int32_t> context);

 private:
  SamplingOptions options_;
  int32_t num_ids_;
  uint64_t state_;
  std::vector<int32_t> order_;
};

}  // namespace sluice

#endif  // SLUICE_LLM_SAMPLER_H_
