#include "streaming/pipeline.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "runtime/error.h"
#include "vision/preprocess.h"

namespace sluice {
namespace {

// Room that frames leave for a question's text; its answer's comes on top.
constexpr int64_t kQuestionTokens = 64;

// Takes back what a step did to the session, unless it is told to keep it.
class StepGuard {
 public:
  explicit StepGuard(Session& session) : session_(session), mark_(session.cache.MarkHere()) {}
  StepGuard(const StepGuard&) = delete;
  StepGuard& operator=(const StepGuard&) = delete;
  ~StepGuard() {
    if (kept_) return;
    session_.cache.RewindTo(mark_);
    for (TokenCompressor* compressor : compressed_) compressor->Undo();
  }
  void Compressed(TokenCompressor& compressor) { compressed_.push_back(&compressor); }
  void Keep() { kept_ = true; }

 private:
  Session& session_;
  const KvCache::Mark mark_;
  std::vector<TokenCompressor*> compressed_;
  bool kept_ = false;
};

VisualTokens Encode(ExecContext& ctx, const VisionEncoder& encoder,
                    std::span<const FramePtr> frames) {
  const auto count = static_cast<int64_t>(frames.size());
  const PreprocessConfig& config = encoder.preprocess_config();
  const Workspace::Scope scratch(ctx.workspace());
  const TensorView pixels =
      ctx.workspace().Allocate(DType::kF32, {count, 3, config.height, config.width});
  {
    const TraceScope trace(&ctx.tracer(), "preprocess", count);
    Preprocess(ctx, frames, config, pixels);
  }
  TraceScope trace(&ctx.tracer(), "encode", count);
  VisualTokens tokens = encoder.Encode(ctx, pixels, frames);
  trace.AddWork(count * encoder.FlopsPerFrame(),
                static_cast<double>(pixels.SizeBytes() + tokens.features.SizeBytes()));
  return tokens;
}

VisualTokens Compress(ExecContext& ctx, Session& session, VisualTokens tokens, StepGuard& guard) {
  if (session.compressors.empty()) return tokens;
  const TraceScope trace(&ctx.tracer(), "compress", tokens.size());
  for (const auto& compressor : session.compressors) {
    tokens = compressor->Compress(ctx, std::move(tokens));
    guard.Compressed(*compressor);
  }
  return tokens;
}

// Adds [S, E] f32 embeddings to the cache.
void Append(ExecContext& ctx, Session& session, ConstTensorView embeddings) {
  const Decoder& decoder = session.vlm->decoder();
  const int64_t count = embeddings.dim(0), seen = session.cache.length() + (count + 1) / 2;
  TraceScope trace(&ctx.tracer(), "prefill", count);
  trace.AddWork(count * decoder.FlopsPerToken(seen),
                static_cast<double>(decoder.WeightBytesPerToken()));
  SequenceStep step{&session.cache, embeddings, {}};
  decoder.Step(ctx, {&step, 1});
}

void Prefill(ExecContext& ctx, Session& session, const VisualTokens& tokens, size_t frames) {
  const bool fresh = session.cache.length() == 0;
  const auto prefix = static_cast<int64_t>(fresh ? session.prefix_ids.size() : 0);
  const int64_t room = kQuestionTokens + session.options.generate.max_new_tokens;
  if (session.cache.length() + prefix + tokens.size() + room > session.context_limit()) {
    throw InputError(
        "[ingest] the context is full: it holds " + std::to_string(session.frames_seen) +
        " frames (" + std::to_string(session.visual_tokens) + " tokens); " +
        std::to_string(frames) + " more (" + std::to_string(tokens.size()) + " tokens) and " +
        std::to_string(room) + " tokens for a question exceed its limit of " +
        std::to_string(session.context_limit()) +
        "; sample fewer frames a second, play a shorter part, or use a token compressor");
  }
  if (prefix > 0) {
    const Tensor embeddings(DType::kF32, {prefix, session.vlm->decoder().hidden_size()});
    session.vlm->decoder().Embed(ctx, session.prefix_ids, embeddings);
    Append(ctx, session, embeddings);
  }
  if (tokens.size() > 0) Append(ctx, session, tokens.features);
}

void Extend(std::vector<int32_t>& ids, const std::vector<int32_t>& more) {
  ids.insert(ids.end(), more.begin(), more.end());
}

// Ids of the dialogue so far and of `turn`'s question: what follows the video.
std::vector<int32_t> DialogueIds(const Session& session, const Turn& turn) {
  std::vector<int32_t> ids;
  for (const Turn& earlier : session.transcript) {
    Extend(ids, earlier.question_ids);
    Extend(ids, earlier.answer_ids);
  }
  Extend(ids, turn.question_ids);
  return ids;
}

// Rows that the model wants behind the last frame: one or none.
int64_t NewlineRows(const Vlm& vlm) { return vlm.newline_row().empty() ? 0 : 1; }

// [rows + ids, E] f32: the row that ends the video, if any, and the dialogue.
Tensor EmbedDialogue(ExecContext& ctx, const Vlm& vlm, const std::vector<int32_t>& ids) {
  const auto count = static_cast<int64_t>(ids.size());
  const int64_t newline = NewlineRows(vlm);
  const TraceScope trace(&ctx.tracer(), "question", newline + count);
  Tensor prompt(DType::kF32, {newline + count, vlm.decoder().hidden_size()});
  if (newline > 0) {
    std::copy_n(vlm.newline_row().data<float>(), prompt.dim(1), prompt.data<float>());
  }
  vlm.decoder().Embed(ctx, ids, prompt.view().Slice(newline, newline + count));
  return prompt;
}

void CheckQuestion(const Session& session, const std::string& question) {
  if (session.frames_seen == 0) {
    throw InputError("[ask] no frame has been seen yet; expected at least one before a question");
  }
  if (question.find_first_not_of(" \t\r\n") == std::string::npos) {
    throw InputError("[ask] the question is blank; expected some text");
  }
}

// The session's options with as many new tokens as the context still holds after `prompt` tokens.
GenerateOptions FitToContext(const Session& session, int64_t prompt) {
  // The last token of an answer is never read again, so it needs no position.
  const int64_t room = session.context_limit() - session.cache.length() - prompt + 1;
  if (room < 1) {
    throw InputError("[ask] the context is full: " + std::to_string(session.frames_seen) +
                     " frames take " + std::to_string(session.cache.length()) +
                     " tokens, the dialogue and this question " + std::to_string(prompt) +
                     ", the limit is " + std::to_string(session.context_limit()) +
                     "; ask something shorter or do not keep the dialogue");
  }
  GenerateOptions options = session.options.generate;
  options.max_new_tokens = static_cast<int>(std::min<int64_t>(options.max_new_tokens, room));
  return options;
}

}  // namespace

void Ingest(ExecContext& ctx, Session& session, std::span<const FramePtr> frames) {
  if (frames.empty()) return;
  StepGuard guard(session);
  VisualTokens tokens = Encode(ctx, session.vlm->encoder(), frames);
  tokens = Compress(ctx, session, std::move(tokens), guard);
  Prefill(ctx, session, tokens, frames.size());
  session.frames_seen += static_cast<int64_t>(frames.size());
  session.visual_tokens += tokens.size();
  session.last_time = frames.back()->time;
  guard.Keep();
}

Generated Ask(ExecContext& ctx, Session& session, const std::string& question,
              const TextSink& sink) {
  CheckQuestion(session, question);
  const Vlm& vlm = *session.vlm;
  const StepGuard rewind(session);
  Turn turn;
  turn.question = question;
  turn.time = session.last_time;
  turn.question_ids = vlm.prompt_format().EncodeQuestion(vlm.tokenizer(), question,
                                                         /*follow_up=*/!session.transcript.empty());
  const std::vector<int32_t> ids = DialogueIds(session, turn);
  const GenerateOptions options =
      FitToContext(session, NewlineRows(vlm) + static_cast<int64_t>(ids.size()));
  const Tensor prompt = EmbedDialogue(ctx, vlm, ids);
  std::vector<int32_t> text_ids = session.prefix_ids;
  Extend(text_ids, ids);
  Generated answer = Generate(ctx, vlm, session.cache, prompt, text_ids, options, sink);
  if (session.options.keep_dialogue && answer.reason != FinishReason::kCancelled) {
    turn.answer = answer.text;
    turn.answer_ids = answer.ids;
    session.transcript.push_back(std::move(turn));
  }
  return answer;
}

}  // namespace sluice
