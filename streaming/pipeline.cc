#include "streaming/pipeline.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "runtime/error.h"
#include "streaming/logging.h"
#include "vision/preprocess.h"

namespace sluice {
namespace {

// Takes back what a step did to the session, unless it is told to keep it.
class StepGuard {
 public:
  explicit StepGuard(Session& session)
      : session_(session),
        mark_(session.cache.MarkHere()),
        duplicates_(session.duplicates),
        waiting_(session.waiting.size()) {}
  StepGuard(const StepGuard&) = delete;
  StepGuard& operator=(const StepGuard&) = delete;
  ~StepGuard() {
    if (kept_) return;
    session_.cache.RewindTo(mark_);
    if (session_.memory) session_.memory->RewindTo(mark_.length);
    session_.duplicates = duplicates_;
    session_.waiting.resize(waiting_);
    if (encoded_ && session_.reuse) session_.reuse->Reset();
    for (TokenCompressor* compressor : compressed_) compressor->Undo();
  }
  void Encoding() { encoded_ = true; }
  void Compressed(TokenCompressor& compressor) { compressed_.push_back(&compressor); }
  void Keep() { kept_ = true; }

 private:
  Session& session_;
  const KvCache::Mark mark_;
  const std::optional<DuplicateFrameFilter> duplicates_;
  const size_t waiting_;
  std::vector<TokenCompressor*> compressed_;
  bool encoded_ = false, kept_ = false;
};

std::vector<FramePtr> WithoutDuplicates(ExecContext& ctx, Session& session,
                                        std::span<const FramePtr> frames) {
  std::vector<FramePtr> taken(frames.begin(), frames.end());
  if (!session.duplicates) return taken;
  const TraceScope trace(&ctx.tracer(), "duplicates", static_cast<int64_t>(frames.size()));
  std::erase_if(taken, [&](const FramePtr& frame) { return !session.duplicates->Passes(*frame); });
  return taken;
}

VisualTokens Encode(ExecContext& ctx, Session& session, std::span<const FramePtr> frames) {
  const auto count = static_cast<int64_t>(frames.size());
  const PreprocessConfig& config = session.vlm->encoder().preprocess_config();
  const Workspace::Scope scratch(ctx.workspace());
  const TensorView pixels =
      ctx.workspace().Allocate(DType::kF32, {count, 3, config.height, config.width});
  {
    const TraceScope trace(&ctx.tracer(), "preprocess", count);
    Preprocess(ctx, frames, config, pixels);
  }
  return session.vlm->encoder().Encode(
      ctx, pixels, frames, {.reuse = session.reuse.get(), .merge = session.merge.get()});
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

// Adds [S, E] f32 embeddings to the cache. policy: what may leave between layers, or null.
void Append(ExecContext& ctx, Session& session, ConstTensorView embeddings,
            LayerPolicy* policy = nullptr) {
  const Decoder& decoder = session.vlm->decoder();
  const int64_t first = session.cache.length();
  TraceScope trace(&ctx.tracer(), "prefill", embeddings.dim(0));
  SequenceStep step{&session.cache, embeddings, {}, policy};
  decoder.Step(ctx, {&step, 1});
  const int64_t ran = session.cache.MeanRowsSince(first);  // in the mean over layers
  const int64_t seen = session.cache.MeanRows() - ran / 2;
  trace.AddWork(ran * decoder.FlopsPerToken(seen),
                static_cast<double>(decoder.WeightBytesPerToken()));
}

int64_t WaitingTokens(const Session& session) {
  int64_t tokens = 0;
  for (const VisualTokens& batch : session.waiting) tokens += batch.size();
  return tokens;
}

// Throws InputError unless the context holds `more` visual tokens besides those it has or will read
// soon, and a question after them.
void CheckRoom(const Session& session, int64_t more, size_t frames) {
  if (session.memory) return;  // its window was checked when the session began
  const int64_t room = kQuestionTokens + session.options.generate.max_new_tokens;
  const bool fresh = session.cache.length() == 0;
  const auto prefix = static_cast<int64_t>(fresh ? session.prefix_ids.size() : 0);
  const int64_t held = session.cache.length() + prefix + WaitingTokens(session);
  if (held + more + room <= session.context_limit()) return;
  throw InputError("[ingest] the context is full: it holds " + std::to_string(session.frames_seen) +
                   " frames (" + std::to_string(session.visual_tokens) + " tokens); " +
                   std::to_string(frames) + " more (" + std::to_string(more) + " tokens) and " +
                   std::to_string(room) + " tokens for a question exceed its limit of " +
                   std::to_string(session.context_limit()) +
                   "; sample fewer frames a second, play a shorter part, use a token compressor, "
                   "or let the window slide (--memory)");
}

// [ids, E] f32.
Tensor EmbedIds(ExecContext& ctx, const Vlm& vlm, std::span<const int32_t> ids) {
  Tensor rows(DType::kF32, {static_cast<int64_t>(ids.size()), vlm.decoder().hidden_size()});
  vlm.decoder().Embed(ctx, ids, rows);
  return rows;
}

// Reads a standing instruction as a question about no frames, for the queries of its last row.
void ReadInstruction(ExecContext& ctx, Session& session, const std::string& instruction) {
  const Vlm& vlm = *session.vlm;
  std::vector<int32_t> ids = session.prefix_ids;
  const std::vector<int32_t> question =
      vlm.prompt_format().EncodeQuestion(vlm.tokenizer(), instruction, /*follow_up=*/false);
  ids.insert(ids.end(), question.begin(), question.end());
  QueryRecorder recorder(session.pyramid.plan());
  KvCache cache(session.cache.pool(), session.pyramid.positions());
  const Tensor rows = EmbedIds(ctx, vlm, ids);
  SequenceStep step{&cache, rows, {}, &recorder};
  vlm.decoder().Step(ctx, {&step, 1});
  session.pyramid.SetQueries(std::move(recorder.queries));
}

// Few rows take the decoder nearly as long as many do, so what compressors leave waits until it is
// as much as a batch of frames is without them.
bool IsWorthReading(const Session& session) {
  if (session.compressors.empty()) return true;
  const int64_t dense = session.vlm->encoder().tokens_per_frame();
  return WaitingTokens(session) >= session.options.frames_per_batch * dense;
}

// Frames that have been read become part of what can be recalled, and what exceeds the window
// leaves it.
void Memorise(ExecContext& ctx, Session& session, const VisualTokens& tokens, int64_t first) {
  session.memory->Arrived(ctx, session.cache, tokens, first);
  session.memory->Trim(ctx, session.cache);
  if (const auto warning = session.memory->TakeWarning()) Logger()->warn("{}", *warning);
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

// Keeps a turn for later questions. With a memory the oldest turns are forgotten beyond its budget;
// the one that is then first follows the video, no other turn.
void Remember(Session& session, Turn turn) {
  session.transcript.push_back(std::move(turn));
  if (!session.memory) return;
  int64_t tokens = 0;
  size_t kept = session.transcript.size();
  while (kept > 0) {
    const Turn& next = session.transcript[kept - 1];
    tokens += static_cast<int64_t>(next.question_ids.size() + next.answer_ids.size());
    if (tokens > session.options.memory->dialogue_tokens) break;
    --kept;
  }
  if (kept == 0) return;
  session.transcript.erase(session.transcript.begin(), session.transcript.begin() + kept);
  if (session.transcript.empty()) return;
  const Vlm& vlm = *session.vlm;
  Turn& first = session.transcript.front();
  first.question_ids = vlm.prompt_format().EncodeQuestion(vlm.tokenizer(), first.question,
                                                          /*follow_up=*/false);
}

// What a question adds to the cache: the frames that are replayed with their prefix, if any, the
// row that ends the video, if the model wants one, and the dialogue. [S, E] f32.
Tensor EmbedPrompt(ExecContext& ctx, const Session& session, const std::vector<int32_t>& ids) {
  const Vlm& vlm = *session.vlm;
  const int64_t width = vlm.decoder().hidden_size(), count = static_cast<int64_t>(ids.size());
  const bool replays = session.pyramid.replays();
  const auto prefix = static_cast<int64_t>(replays ? session.prefix_ids.size() : 0);
  const std::span<const float> frames = session.pyramid.ReplayRows();
  const int64_t newline = prefix + static_cast<int64_t>(frames.size()) / width;
  const int64_t text = newline + (vlm.newline_row().empty() ? 0 : 1);
  const TraceScope trace(&ctx.tracer(), "question", text + count);
  Tensor prompt(DType::kF32, {text + count, width});
  if (prefix > 0) vlm.decoder().Embed(ctx, session.prefix_ids, prompt.view().Slice(0, prefix));
  std::copy(frames.begin(), frames.end(), prompt.data<float>() + prefix * width);
  if (text > newline) {
    std::copy_n(vlm.newline_row().data<float>(), width, prompt.data<float>() + newline * width);
  }
  vlm.decoder().Embed(ctx, ids, prompt.view().Slice(text, text + count));
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

// The session's options with as many new tokens as the context still holds after the `seen` rows
// of the stream that a question sees and `prompt` tokens.
GenerateOptions FitToContext(const Session& session, int64_t seen, int64_t prompt) {
  // The last token of an answer is never read again, so it needs no position.
  const int64_t room = session.context_limit() - seen - prompt + 1;
  if (room < 1) {
    throw InputError("[ask] the context is full: " + std::to_string(session.frames_seen) +
                     " frames take " + std::to_string(seen) +
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
  const std::vector<FramePtr> taken = WithoutDuplicates(ctx, session, frames);
  int64_t left = 0;
  if (!taken.empty()) {
    guard.Encoding();
    VisualTokens tokens = Encode(ctx, session, taken);
    tokens = Compress(ctx, session, std::move(tokens), guard);
    left = tokens.size();
    if (session.pyramid.replays()) {
      session.pyramid.Arrived(tokens, 0);
    } else {
      CheckRoom(session, left, taken.size());
      // Even nothing makes a fresh session read its prefix.
      const bool fresh = session.waiting.empty() && session.cache.length() == 0;
      if (left > 0 || fresh) session.waiting.push_back(std::move(tokens));
      if (IsWorthReading(session)) ReadWaiting(ctx, session);
    }
  }
  session.visual_tokens += left;
  session.frames_seen += static_cast<int64_t>(frames.size());
  session.last_time = frames.back()->time;
  guard.Keep();
}

void ReadWaiting(ExecContext& ctx, Session& session) {
  if (session.waiting.empty()) return;
  StepGuard guard(session);
  if (const std::string* instruction = session.pyramid.wanted_instruction()) {
    ReadInstruction(ctx, session, *instruction);
  }
  if (session.cache.length() == 0 && !session.prefix_ids.empty()) {
    Append(ctx, session, EmbedIds(ctx, *session.vlm, session.prefix_ids));
  }
  const VisualTokens tokens = Joined(session.waiting);
  if (tokens.size() > 0) {
    const int64_t first = session.cache.length();
    Append(ctx, session, tokens.features, session.pyramid.ForFrames(tokens, first));
    session.pyramid.Arrived(tokens, first);
    if (session.memory) Memorise(ctx, session, tokens, first);
  }
  session.waiting.clear();
  guard.Keep();
}

Generated Ask(ExecContext& ctx, Session& session, const std::string& question,
              const TextSink& sink) {
  CheckQuestion(session, question);
  ReadWaiting(ctx, session);
  const Vlm& vlm = *session.vlm;
  const StepGuard rewind(session);
  Turn turn;
  turn.question = question;
  turn.time = session.last_time;
  turn.question_ids = vlm.prompt_format().EncodeQuestion(vlm.tokenizer(), question,
                                                         /*follow_up=*/!session.transcript.empty());
  const std::vector<int32_t> ids = DialogueIds(session, turn);
  const Tensor prompt = EmbedPrompt(ctx, session, ids);
  // Frames that are replayed or recalled stand in a cache of the question's own.
  std::optional<StreamRecall> recall;
  int64_t seen = session.cache.Reach();
  if (session.memory && session.memory->Recalls(session.cache)) {
    recall.emplace(*session.memory, session.cache, static_cast<int64_t>(turn.question_ids.size()));
    seen = session.memory->MostRows();
  }
  KvCache own(session.cache.pool(), recall ? KvPositions::kRows : session.pyramid.positions());
  if (recall) own.Advance(session.cache.length());
  KvCache& cache = session.pyramid.replays() || recall ? own : session.cache;
  const GenerateOptions options = FitToContext(session, seen, prompt.dim(0));
  LayerPolicy* policy = session.pyramid.ForQuestion(static_cast<int64_t>(session.prefix_ids.size()),
                                                    static_cast<int64_t>(turn.question_ids.size()));
  std::vector<int32_t> text_ids = session.prefix_ids;
  Extend(text_ids, ids);
  Generated answer = Generate(ctx, vlm, cache, prompt, text_ids, options, sink, policy,
                              recall ? &*recall : nullptr);
  if (recall) answer.evidence = recall->evidence();
  if (session.options.keep_dialogue && answer.reason != FinishReason::kCancelled) {
    turn.answer = answer.text;
    turn.answer_ids = answer.ids;
    Remember(session, std::move(turn));
  }
  return answer;
}

}  // namespace sluice
