#include "llm/generator.h"

#include <algorithm>
#include <string>
#include <utility>

#include "runtime/error.h"

namespace sluice {
namespace {

// Lets text through up to a stop string, holding back what may still become one.
class StopFilter {
 public:
  explicit StopFilter(std::span<const std::string> stop_strings) : stop_strings_(stop_strings) {
    for (const std::string& stop : stop_strings) {
      if (stop.empty()) {
        throw InputError("[generate] stop strings must not be empty, got an empty one");
      }
    }
  }

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

Generated Generate(ExecContext& ctx, const Vlm& vlm, KvCache& cache, ConstTensorView prompt,
                   std::span<const int32_t> prompt_ids, const GenerateOptions& options,
                   const TextSink& sink, LayerPolicy* policy, KvPolicy* recall) {
  if (options.max_new_tokens < 1) {
    throw InputError("[generate] max_new_tokens must be at least 1, got " +
                     std::to_string(options.max_new_tokens));
  }
  const Decoder& decoder = vlm.decoder();
  const std::vector<int32_t>& stop_ids = vlm.generation_defaults().stop_ids;
  StopFilter filter(options.stop_strings);
  Sampler sampler(options.sampling, vlm.tokenizer().vocab_size());
  const std::unique_ptr<Tokenizer::Stream> characters = vlm.tokenizer().NewStream();
  const Tensor logits(DType::kF32, {1, decoder.vocab_size()});
  const Tensor embedding(DType::kF32, {1, decoder.hidden_size()});
  std::vector<int32_t> context(prompt_ids.begin(), prompt_ids.end());

  Generated result;
  const auto show = [&](const std::string& text) {
    result.text += text;
    return text.empty() || !sink || sink(text);
  };
  {
    const int64_t first = cache.length();
    TraceScope trace(&ctx.tracer(), "prefill_question", prompt.dim(0));
    SequenceStep step{&cache, prompt, logits, policy, recall};
    decoder.Step(ctx, {&step, 1});
    const int64_t ran = cache.MeanRowsSince(first);  // in the mean over layers
    trace.AddWork(ran * decoder.FlopsPerToken(cache.MeanRows() - ran / 2) + decoder.LmHeadFlops(),
                  decoder.WeightBytesPerToken() + KvBytes(decoder.kv_geometry(), cache.MeanRows()));
  }
  for (;;) {
    const int32_t id =
        sampler.Sample({logits.data<float>(), static_cast<size_t>(logits.dim(1))}, context);
    if (std::find(stop_ids.begin(), stop_ids.end(), id) != stop_ids.end()) {
      result.reason = FinishReason::kStop;
      break;
    }
    result.ids.push_back(id);
    context.push_back(id);
    const bool wanted = show(filter.Push(characters->Push(id)));
    if (filter.stopped()) {
      result.reason = FinishReason::kStop;
      return result;
    }
    if (!wanted) {
      result.reason = FinishReason::kCancelled;
      return result;
    }
    if (static_cast<int64_t>(result.ids.size()) >= options.max_new_tokens ||
        cache.Reach() >= decoder.max_positions()) {
      result.reason = FinishReason::kLength;
      break;
    }
    TraceScope trace(&ctx.tracer(), "decode", 1);
    const int64_t seen = cache.MeanRows() + 1;
    trace.AddWork(decoder.FlopsPerToken(seen) + decoder.LmHeadFlops(),
                  decoder.WeightBytesPerToken() + KvBytes(decoder.kv_geometry(), seen));
    decoder.Embed(ctx, {&id, 1}, embedding);
    SequenceStep step{&cache, embedding, logits};
    decoder.Step(ctx, {&step, 1});
  }
  // Half a character and held-back text are shown as they are; a stop string may be complete only
  // now.
  bool wanted = show(filter.Push(characters->Finish()));
  if (filter.stopped()) {
    result.reason = FinishReason::kStop;
  } else if (wanted) {
    wanted = show(filter.Finish());
  }
  if (!wanted && !filter.stopped()) result.reason = FinishReason::kCancelled;
  return result;
}

}  // namespace sluice
