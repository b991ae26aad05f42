#include "llm/generator.h"

#include <algorithm>
#include <string>
#include <utility>

#include "runtime/error.h"
#include "runtime/transfer.h"

namespace sluice {
namespace {

// Keys and values of `positions` positions, read once by every step.
double KvBytes(const KvGeometry& kv, int64_t positions) {
  return 2.0 * positions * kv.num_layers * kv.kv_heads * kv.head_dim * SizeOf(kv.dtype);
}

}  // namespace

const char* Name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kCancelled:
      return "cancelled";
  }
  return "?";
}

// Lets text through up to a stop string, holding back what may still become one.
class Generation::StopFilter {
 public:
  explicit StopFilter(std::span<const std::string> stop_strings) : stop_strings_(stop_strings) {}

  // Text that may be shown after `piece` came.
  std::string Push(std::string_view piece) {
    pending_ += piece;
    size_t end = std::string::npos;
    for (const std::string& stop : stop_strings_) end = std::min(end, pending_.find(stop));
    if (end != std::string::npos) {
      stopped_ = true;
      pending_.resize(end);
      return std::exchange(pending_, {});
    }
    size_t held = 0;
    for (const std::string& stop : stop_strings_) {
      for (size_t n = std::min(stop.size() - 1, pending_.size()); n > held; --n) {
        if (pending_.compare(pending_.size() - n, n, stop, 0, n) == 0) held = n;
      }
    }
    std::string shown = pending_.substr(0, pending_.size() - held);
    pending_.erase(0, shown.size());
    return shown;
  }
  // What was held back, once no more comes.
  std::string Finish() { return std::exchange(pending_, {}); }
  bool stopped() const { return stopped_; }

 private:
  std::span<const std::string> stop_strings_;
  std::string pending_;
  bool stopped_ = false;
};

Generation::Generation(const Vlm& vlm, KvCache& cache, PromptRows prompt,
                       std::span<const int32_t> prompt_ids, const GenerateOptions& options,
                       TextSink sink, LayerPolicy* policy, KvPolicy* recall)
    : vlm_(vlm),
      cache_(cache),
      prompt_(std::move(prompt)),
      policy_(policy),
      recall_(recall),
      options_((CheckGenerateOptions(options), options)),
      sink_(std::move(sink)),
      sampler_(options.sampling, vlm.tokenizer().vocab_size(), vlm.generation_defaults().limits),
      filter_(std::make_unique<StopFilter>(options_.stop_strings)),
      characters_(vlm.tokenizer().NewStream()),
      logits_(DType::kF32, {1, vlm.decoder().vocab_size()}, vlm.info().device),
      context_(prompt_ids.begin(), prompt_ids.end()) {
  if (prompt_.size() < 1) throw Error("[generate] a prompt must have a row, got none");
}

Generation::~Generation() = default;

// Returns whether more is wanted.
bool Generation::Show(const std::string& text) {
  result_.text += text;
  if (text.empty() || !sink_ || sink_(text)) return true;
  result_.reason = FinishReason::kCancelled;
  return false;
}

// Half a character and held-back text are shown as they are; a stop string may be complete only
// now.
void Generation::Flush() {
  const bool wanted = Show(filter_->Push(characters_->Finish()));
  if (filter_->stopped()) {
    result_.reason = FinishReason::kStop;
  } else if (wanted) {
    Show(filter_->Finish());
  }
}

// Whether one of the checkpoint's stop strings is complete with `piece`. Unlike those of the
// options they stay in the text, as generate() has it.
bool Generation::EndsBehindStopString(std::string_view piece) {
  const std::vector<std::string>& strings = vlm_.generation_defaults().stop_strings;
  if (strings.empty() || !options_.stop_strings.empty()) return false;
  tail_ += piece;
  size_t longest = 0;
  for (const std::string& stop : strings) {
    if (tail_.find(stop) != std::string::npos) return true;
    longest = std::max(longest, stop.size());
  }
  if (tail_.size() >= longest) tail_.erase(0, tail_.size() - (longest - 1));
  return false;
}

// Returns whether the token is to be read and the answer to go on.
bool Generation::TakeToken(int32_t id) {
  const std::vector<int32_t>& stop_ids = vlm_.generation_defaults().stop_ids;
  if (std::find(stop_ids.begin(), stop_ids.end(), id) != stop_ids.end()) {
    result_.reason = FinishReason::kStop;
    Flush();
    return false;
  }
  result_.ids.push_back(id);
  context_.push_back(id);
  const std::string piece = characters_->Push(id);
  const bool wanted = Show(filter_->Push(piece));
  const bool stopped = filter_->stopped() || (wanted && EndsBehindStopString(piece));
  if (stopped) result_.reason = FinishReason::kStop;
  if (stopped || !wanted) return false;
  if (static_cast<int64_t>(result_.ids.size()) >= options_.max_new_tokens ||
      cache_.Reach() >= vlm_.decoder().max_positions()) {
    result_.reason = FinishReason::kLength;
    Flush();
    return false;
  }
  return true;
}

int32_t Generation::Choose(ExecContext& ctx) {
  const GenerationDefaults& defaults = vlm_.generation_defaults();
  if (defaults.rules.empty()) return sampler_.Sample(ctx, logits_, context_);
  const AnswerState state{context_, static_cast<int64_t>(result_.ids.size()), cache_.Reach(),
                          defaults.stop_ids};
  if (logits_.device() == Device::kCpu) {
    defaults.rules.Apply(state, {logits_.data<float>(), static_cast<size_t>(logits_.dim(1))});
    return sampler_.Sample(ctx, logits_, context_);
  }
  // Rules are rare: on a GPU they cost a copy of the logits for every token.
  const Tensor host(DType::kF32, logits_.shape());
  Transfer(ctx, logits_, host.view());
  const std::span<float> logits(host.data<float>(), static_cast<size_t>(host.dim(1)));
  defaults.rules.Apply(state, logits);
  return sampler_.Sample(logits, context_);
}

SequenceStep Generation::NextStep(ExecContext& ctx) {
  const Decoder& decoder = vlm_.decoder();
  if (prompt_left() == 0) {
    if (next_.empty()) next_ = Tensor(DType::kF32, {1, decoder.hidden_size()}, ctx.device());
    decoder.Embed(ctx, {&result_.ids.back(), 1}, next_);
    return {&cache_, next_, logits_};
  }
  const int64_t most = std::max<int64_t>(most_rows_, 1);
  if (reads_by_layers()) {
    SequenceStep step{&cache_, {}, logits_, policy_, recall_};
    pieces_.rows = most;
    if (pieces_.under_way() || most < prompt_left()) step.pieces = &pieces_;
    if (!pieces_.under_way()) {
      const TraceScope trace(&ctx.tracer(), "question", prompt_.size());
      step.embeddings = prompt_.Read(ctx, decoder, 0, prompt_.size(), next_);
    }
    return step;
  }
  const int64_t rows = std::min(prompt_left(), most);
  const bool last = rows == prompt_left();
  const TraceScope trace(&ctx.tracer(), "question", rows);
  return {&cache_, prompt_.Read(ctx, decoder, read_, rows, next_),
          last ? logits_.view() : TensorView()};
}

// The step has written the logits.
void Generation::Take(ExecContext& ctx) {
  try {
    finished_ = !TakeToken(Choose(ctx));
  } catch (...) {
    failure_ = std::current_exception();
    finished_ = true;
  }
}

void Advance(ExecContext& ctx, const Vlm& vlm, std::span<Generation* const> answers) {
  const Decoder& decoder = vlm.decoder();
  std::vector<SequenceStep> steps;
  std::vector<int64_t> firsts, rows_of;
  int64_t rows = 0;
  bool prompts = false;
  for (Generation* answer : answers) {
    prompts |= answer->prompt_left() > 0;
    firsts.push_back(answer->cache_.length());
    steps.push_back(answer->NextStep(ctx));
    rows_of.push_back(steps.back().embeddings.empty() ? 0 : steps.back().embeddings.dim(0));
    rows += rows_of.back();
  }
  {
    TraceScope trace(&ctx.tracer(), prompts ? "prefill_question" : "decode", rows);
    decoder.Step(ctx, steps);
    trace.AddWork(0, static_cast<double>(decoder.WeightBytesPerToken()));
    for (size_t i = 0; i < steps.size(); ++i) {
      if (steps[i].pieces && steps[i].pieces->under_way()) continue;  // counted with the last piece
      const KvCache& cache = *steps[i].cache;
      const int64_t ran = cache.MeanRowsSince(firsts[i]);  // in the mean over layers
      const double lm_head = steps[i].logits.empty() ? 0 : decoder.LmHeadFlops();
      trace.AddWork(ran * decoder.FlopsPerToken(cache.MeanRows() - ran / 2) + lm_head,
                    KvBytes(decoder.kv_geometry(), cache.MeanRows()));
    }
  }
  for (size_t i = 0; i < answers.size(); ++i) {
    Generation& answer = *answers[i];
    if (answer.prompt_left() > 0) {
      if (answer.pieces_.under_way()) continue;
      answer.read_ += answer.reads_by_layers() ? answer.prompt_left() : rows_of[i];
      if (answer.prompt_left() > 0) continue;
      answer.prompt_ = PromptRows();  // read_ is 0 as well: nothing is left
      answer.read_ = 0;
      answer.next_ = Tensor();
      answer.policy_ = nullptr;
      answer.recall_ = nullptr;
    }
    answer.Take(ctx);
  }
}

void CheckGenerateOptions(const GenerateOptions& options) {
  if (options.max_new_tokens < 1) {
    throw InputError("[generate] max_new_tokens must be at least 1, got " +
                     std::to_string(options.max_new_tokens));
  }
  for (const std::string& stop : options.stop_strings) {
    if (stop.empty()) {
      throw InputError("[generate] stop strings must not be empty, got an empty one");
    }
  }
  Sampler(options.sampling, 1);
}

Generated Generate(ExecContext& ctx, const Vlm& vlm, KvCache& cache, PromptRows prompt,
                   std::span<const int32_t> prompt_ids, const GenerateOptions& options,
                   const TextSink& sink, LayerPolicy* policy, KvPolicy* recall) {
  Generation answer(vlm, cache, std::move(prompt), prompt_ids, options, sink, policy, recall);
  Generation* const one = &answer;
  while (!answer.finished()) Advance(ctx, vlm, {&one, 1});
  if (answer.failure()) std::rethrow_exception(answer.failure());
  return answer.result();
}

}  // namespace sluice
