// The decode loop: sample, stop or emit, step. One call answers one question.
#ifndef SLUICE_LLM_GENERATOR_H_
#define SLUICE_LLM_GENERATOR_H_

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "llm/kv_cache.h"
#include "llm/kv_policy.h"
#include "llm/sampler.h"
#include "llm/vlm.h"
#include "runtime/exec_context.h"

namespace sluice {

struct GenerateOptions {
  int max_new_tokens = 128;  // at least 1
  SamplingOptions sampling;
  std::vector<std::string> stop_strings;  // none of them empty
};

enum class FinishReason { kStop, kLength, kCancelled };
const char* Name(FinishReason reason);

struct Generated {
  std::string text;
  std::vector<int32_t> ids;  // without the stop id
  FinishReason reason = FinishReason::kStop;
  std::vector<Evidence> evidence;  // in order of time; of answers that recalled
};

// Called with each piece of finished text (whole characters); return false to cancel.
using TextSink = std::function<bool(std::string_view piece)>;

// Continues `cache` after `prompt` ([S, E] f32 embeddings, S >= 1). The cache then holds the prompt
// and all of `ids`, except the last one where a stop string, the length or the sink ended the
// answer. Ends with kStop at a stop id of the checkpoint or in front of a stop string (text that
// may become one is held back), with kLength at max_new_tokens or the end of the model's context.
// Traces "prefill_question" and "decode". `prompt_ids` serves the repetition penalty only; `sink`
// may be empty; `policy` and `recall`, for the prompt's step, may be null. Throws InputError on
// options out of range and, as ResourceExhausted, whatever Decoder::Step throws; the caller rewinds
// the cache.
Generated Generate(ExecContext& ctx, const Vlm& vlm, KvCache& cache, ConstTensorView prompt,
                   std::span<const int32_t> prompt_ids, const GenerateOptions& options,
                   const TextSink& sink, LayerPolicy* policy = nullptr, KvPolicy* recall = nullptr);

}  // namespace sluice

#endif  // SLUICE_LLM_GENERATOR_H_
