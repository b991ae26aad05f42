// The decode loop: sample, stop or emit, step. Several answers may share every step.
#ifndef SLUICE_LLM_GENERATOR_H_
#define SLUICE_LLM_GENERATOR_H_

#include <cstdint>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "llm/kv_cache.h"
#include "llm/kv_policy.h"
#include "llm/prompt_rows.h"
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
  std::string no_evidence;         // why there is none, in one line
};

// Called with each piece of finished text (whole characters); return false to cancel.
using TextSink = std::function<bool(std::string_view piece)>;

// An answer on its way, one token a step. Used by one thread at a time.
class Generation {
 public:
  // Continues `cache` after `prompt` (at least one row); cache, policy and recall (both for the
  // prompt; may be null) are not owned. `prompt_ids` (see AnswerState::context) serves the
  // repetition penalty and the checkpoint's rules; `sink` may be empty. Throws InputError on
  // options out of range.
  Generation(const Vlm& vlm, KvCache& cache, PromptRows prompt, std::span<const int32_t> prompt_ids,
             const GenerateOptions& options, TextSink sink, LayerPolicy* policy = nullptr,
             KvPolicy* recall = nullptr);
  ~Generation();

  bool finished() const { return finished_; }
  // So far; without text that is still held back.
  const Generated& result() const { return result_; }
  // What the sink, or memory, threw; the answer is then finished.
  std::exception_ptr failure() const { return failure_; }
  // Rows of the prompt that are still to be read. A prompt with a policy or recall goes through the
  // layers as one and counts as unread until it is done.
  int64_t prompt_left() const { return prompt_.size() - read_; }
  // A prompt with a policy or recall: what these refer to must not change until it is read. The
  // cache alone is enough for others.
  bool reads_by_layers() const { return policy_ || recall_; }
  // How many of the prompt's rows a step reads at most, or, of one that is read by layers, about
  // how many rows' work it does. All of them if not told. Another number rounds differently.
  void ReadAtMost(int64_t rows) { most_rows_ = rows; }

 private:
  friend void Advance(ExecContext&, const Vlm&, std::span<Generation* const>);
  class StopFilter;
  SequenceStep NextStep(ExecContext& ctx);
  void Take(ExecContext& ctx);
  int32_t Choose(ExecContext& ctx);
  bool TakeToken(int32_t id);
  bool EndsBehindStopString(std::string_view piece);
  bool Show(const std::string& text);
  void Flush();

  const Vlm& vlm_;
  KvCache& cache_;
  PromptRows prompt_;
  int64_t read_ = 0;  // rows of the prompt
  int64_t most_rows_ = std::numeric_limits<int64_t>::max();
  StepInPieces pieces_;
  Tensor next_;  // [S, E] f32, made for a step
  LayerPolicy* policy_;
  KvPolicy* recall_;
  const GenerateOptions options_;
  const TextSink sink_;
  Sampler sampler_;
  std::unique_ptr<StopFilter> filter_;
  std::unique_ptr<Tokenizer::Stream> characters_;
  Tensor logits_;                 // [1, V] f32
  std::vector<int32_t> context_;  // ids so far
  std::string tail_;  // of the text, in which the checkpoint's stop strings are looked for
  Generated result_;
  std::exception_ptr failure_;
  bool finished_ = false;
};

// One step for each of `answers` (at least one, none of them finished, of different caches) in one
// Decoder::Step: a token, or as much of the prompt as it may read; with the end of the prompt comes
// the first token. Traces it as "decode", or as "prefill_question" if it reads a prompt, whose rows
// are traced as "question" while they are made. Throws what
// Decoder::Step throws; all answers are then as before, but for those whose prompt is read by
// layers: they cannot go on.
void Advance(ExecContext& ctx, const Vlm& vlm, std::span<Generation* const> answers);

// Checks what does not depend on a model. Throws InputError.
void CheckGenerateOptions(const GenerateOptions& options);

// All of an answer: the cache then holds the prompt and all of `ids`, except the last one where a
// stop string, the length or the sink ended the answer. Ends with kStop at a stop id of the
// checkpoint or in front of a stop string (text that may become one is held back), with kLength at
// max_new_tokens or the end of the model's context. Throws as Generation and Advance do, and what
// the sink throws; the caller rewinds the cache.
Generated Generate(ExecContext& ctx, const Vlm& vlm, KvCache& cache, PromptRows prompt,
                   std::span<const int32_t> prompt_ids, const GenerateOptions& options,
                   const TextSink& sink, LayerPolicy* policy = nullptr, KvPolicy* recall = nullptr);

}  // namespace sluice

#endif  // SLUICE_LLM_GENERATOR_H_
