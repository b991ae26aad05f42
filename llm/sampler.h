// From logits to the next id. Order as in transformers: repetition penalty, temperature, top-k,
// top-p, further limits.
#ifndef SLUICE_LLM_SAMPLER_H_
#define SLUICE_LLM_SAMPLER_H_

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "llm/logit_rules.h"
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
  // num_ids: ids >= num_ids have no token and are never chosen. limits: of draws, not of the greedy
  // choice. Throws InputError on options out of range.
  Sampler(const SamplingOptions& options, int32_t num_ids, const DrawLimits& limits = {});
  // logits: V values (may be modified). `context`: ids so far, read only for the repetition
  // penalty.
  int32_t Sample(std::span<float> logits, std::span<const int32_t> context);
  // The same of logits [1, V] f32 where `ctx` works (may be modified). On a GPU only likely ids
  // leave it, or the part of the ids that the draw fell into; all logits where more than
  // cuda::kMostCandidates ids are likely enough to be drawn, as under a flat distribution, and
  // where draws have limits.
  int32_t Sample(ExecContext& ctx, TensorView logits, std::span<const int32_t> context);
  // How often all logits were copied from a GPU.
  int64_t whole_copies() const { return whole_copies_; }

 private:
  bool limits_count() const { return options_.top_k > 0 && options_.top_k < num_ids_; }
  bool limits_mass() const { return options_.top_p < 1.0f; }
  double NextDraw();  // uniform in [0, 1)
  // The place in `logits` of the id that `draw` falls on, of finite ones and -inf. `logits` are in
  // the order of their ids; those that are left out are less likely than all of them, and
  // `everything`, if given, is the mass of all relative to `top`, the largest. Nothing where that
  // does not tell.
  std::optional<int32_t> Choose(std::span<const float> logits, float top, double draw,
                                std::optional<double> everything);
  int32_t SampleOnGpu(ExecContext& ctx, TensorView logits);

  SamplingOptions options_;
  int32_t num_ids_;
  DrawLimits limits_;
  uint64_t state_;
  int64_t whole_copies_ = 0;
  std::vector<int32_t> order_;
};

}  // namespace sluice

#endif  // SLUICE_LLM_SAMPLER_H_
