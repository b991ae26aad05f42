// From logits to the next id. Order as in transformers: repetition penalty, temperature, top-k,
// top-p.
#ifndef SLUICE_LLM_SAMPLER_H_
#define SLUICE_LLM_SAMPLER_H_

#include <cstdint>
#include <span>
#include <vector>

#include "runtime/exec_context.h"
#include "runtime/tensor.h"

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
  // The same of logits [1, V] f32 where `ctx` works. On a GPU the likeliest id is found there if
  // nothing else is asked for; else the logits are copied first, 4 V bytes a token.
  int32_t Sample(ExecContext& ctx, TensorView logits, std::span<const int32_t> context);

 private:
  SamplingOptions options_;
  int32_t num_ids_;
  uint64_t state_;
  std::vector<int32_t> order_;
};

}  // namespace sluice

#endif  // SLUICE_LLM_SAMPLER_H_
