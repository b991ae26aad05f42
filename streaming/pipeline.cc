#include "streaming/pipeline.h"

#include <algorithm>
#include <deque>
#include <optional>
#include <utility>
#include <vector>

#include "runtime/error.h"
#include "runtime/transfer.h"
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

VisualTokens Encode(ExecContext& ctx, const VisionEncoder& encoder,
                    std::span<const FramePtr> frames, const EncodeHooks& hooks) {
  const auto count = static_cast<int64_t>(frames.size());
  const PreprocessConfig& config = encoder.preprocess_config();
  const Workspace::Scope scratch(ctx.workspace());
  const TensorView pixels =
      ctx.workspace().Allocate(DType::kF32, {count, 3, config.height, config.width});
  {
    const TraceScope trace(&ctx.tracer(), "preprocess", count);
    Preprocess(ctx, frames, config, pixels);
  }
  return encoder.Encode(ctx, pixels, frames, hooks);
}

// `count` of an encoder's tokens from `begin` on.
VisualTokens Part(ExecContext& ctx, const VisualTokens& all, int64_t begin, int64_t count) {
  const auto first = all.origins.begin() + begin;
  return {
      .features = TransferTo(ctx, all.features.view().Slice(begin, begin + count), ctx.device()),
      .origins = {first, first + count},
      .grid_rows = all.grid_rows,
      .grid_cols = all.grid_cols,
      .scores = {}};
}

// The tokens of all taken frames: encoded together, but for sessions that have a hand in the tower.
std::vector<VisualTokens> EncodeAll(ExecContext& ctx, std::span<const Arrivals> arrivals) {
  const VisionEncoder& encoder = arrivals[0].session->vlm->encoder();
  const auto alone = [&](const Arrivals& of) {
    return arrivals.size() == 1 || of.session->reuse || of.session->merge;
  };
  std::vector<VisualTokens> tokens(arrivals.size());
  std::vector<FramePtr> shared;
  for (size_t i = 0; i < arrivals.size(); ++i) {
    const Arrivals& of = arrivals[i];
    if (of.taken.empty()) continue;
    if (alone(of)) {
      const EncodeHooks hooks{.reuse = of.session->reuse.get(), .merge = of.session->merge.get()};
      tokens[i] = Encode(ctx, encoder, of.taken, hooks);
    } else {
      shared.insert(shared.end(), of.taken.begin(), of.taken.end());
    }
  }
  if (shared.empty()) return tokens;
  const VisualTokens all = Encode(ctx, encoder, shared, {});
  int64_t begin = 0;
  for (size_t i = 0; i < arrivals.size(); ++i) {
    if (arrivals[i].taken.empty() || alone(arrivals[i])) continue;
    const auto count = static_cast<int64_t>(arrivals[i].taken.size()) * encoder.tokens_per_frame();
    tokens[i] = Part(ctx, all, begin, count);
    begin += count;
  }
  return tokens;
}

VisualTokens Compress(ExecContext& ctx, Session& session, VisualTokens tokens, StepGuard& guard) {
  if (!session.compressors.empty()) {
    const TraceScope trace(&ctx.tracer(), "compress", tokens.size());
    for (const auto& compressor : session.compressors) {
      tokens = compressor->Compress(ctx, std::move(tokens));
      guard.Compressed(*compressor);
    }
  }
  // Rows that are remembered for a replay, or compared with the next frame's, stay on the host.
  const PyramidMode mode = session.pyramid.mode();
  const bool remembers = mode == PyramidMode::kReplay || mode == PyramidMode::kQueryFree;
  if (remembers && tokens.features.device() != Device::kCpu) {
    tokens.features = TransferTo(ctx, tokens.features, Device::kCpu);
  }
  return tokens;
}

// Runs all steps (of sessions of one model) together. [S, E] f32 embeddings, no logits.
void Append(ExecContext& ctx, const Decoder& decoder, std::span<SequenceStep> steps) {
  if (steps.empty()) return;
  std::vector<int64_t> firsts;
  int64_t rows = 0;
  for (const SequenceStep& step : steps) {
    firsts.push_back(step.cache->length());
    rows += step.embeddings.dim(0);
  }
  TraceScope trace(&ctx.tracer(), "prefill", rows);
  decoder.Step(ctx, steps);
  trace.AddWork(0, static_cast<double>(decoder.WeightBytesPerToken()));
  for (size_t i = 0; i < steps.size(); ++i) {
    const KvCache& cache = *steps[i].cache;
    const int64_t ran = cache.MeanRowsSince(firsts[i]);  // in the mean over layers
    trace.AddWork(ran * decoder.FlopsPerToken(cache.MeanRows() - ran / 2), 0);
  }
}

// Tokens that a question and its answer need.
int64_t QuestionRoom(const Session& session) {
  return kQuestionTokens + session.options.generate.max_new_tokens;
}

// Throws InputError unless there is room for the tokens that `frames` left.
void CheckRoom(const Session& session, int64_t more, size_t frames) {
  if (HasRoom(session, more)) return;
  const int64_t room = QuestionRoom(session);
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
  Tensor rows(DType::kF32, {static_cast<int64_t>(ids.size()), vlm.decoder().hidden_size()},
              ctx.device());
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

// Whether the window takes what the context holds, and slides only where that would overflow.
bool FillsContext(const Session& session) {
  return session.memory && session.memory->options().window_tokens == 0;
}

void TellWarning(const Session& session, const std::string& line) {
  session.on_warning ? session.on_warning(line) : Logger()->warn("{}", line);
}

// What exceeds the window leaves it. Where there is no memory to do it in, the window is longer
// until the next time.
void Trim(ExecContext& ctx, Session& session) {
  if (!session.memory) return;
  try {
    if (!FillsContext(session)) session.memory->Trim(ctx, session.cache);
  } catch (const ResourceExhausted& error) {
    Logger()->warn("{}", error.what());
  }
  if (const auto warning = session.memory->TakeWarning()) TellWarning(session, *warning);
}

// Lets the oldest frames leave a window that takes what the context holds, so that `tokens` more
// fit; as many of them as there are.
void MakeRoom(ExecContext& ctx, Session& session, int64_t tokens) {
  if (!FillsContext(session)) return;
  const auto pinned = static_cast<int64_t>(session.prefix_ids.size());
  const int64_t window = session.cache.Reach() - pinned;
  const int64_t excess =
      session.cache.Reach() + UnreadPrefix(session) + tokens - session.context_limit();
  if (excess <= 0 || window <= 0) return;
  const int64_t blocks = (excess + kKvBlockTokens - 1) / kKvBlockTokens;
  session.memory->Trim(ctx, session.cache, std::max<int64_t>(window - blocks * kKvBlockTokens, 0));
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

// With a memory the oldest turns are forgotten beyond its budget; the one that is then first
// follows the video, no other turn.
void ForgetTurns(Session& session) {
  int64_t tokens = 0;
  size_t kept = session.transcript.size();
  while (kept > 0) {
    const Turn& next = session.transcript[kept - 1];
    tokens += static_cast<int64_t>(next.question_ids.size() + next.answer_ids.size());
    if (tokens > session.memory->options().dialogue_tokens) break;
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

// Keeps a turn for later questions.
void Remember(Session& session, Turn turn) {
  session.transcript.push_back(std::move(turn));
  const bool whole = FillsContext(session) && session.cache.gone() == 0;
  if (session.memory && !whole) ForgetTurns(session);
}

// What a question adds to the cache: the frames that are replayed with their prefix, if any, the
// row that ends the video, if the model wants one, and the dialogue.
PromptRows Prompt(const Session& session, const std::vector<int32_t>& ids) {
  const Vlm& vlm = *session.vlm;
  PromptRows prompt;
  if (session.pyramid.replays()) {
    const int64_t width = vlm.decoder().hidden_size();
    const std::span<const float> frames = session.pyramid.ReplayRows();
    prompt.AddIds(session.prefix_ids);
    prompt.AddRows(ConstTensorView(frames.data(), DType::kF32,
                                   {static_cast<int64_t>(frames.size()) / width, width}));
  }
  if (!vlm.newline_row().empty()) {
    const int64_t width = vlm.decoder().hidden_size();
    prompt.AddRows(ConstTensorView(vlm.newline_row().raw(), DType::kF32, {1, width}));
  }
  prompt.AddIds(ids);
  return prompt;
}

void CheckBlank(const std::string& question) {
  if (question.find_first_not_of(" \t\r\n") == std::string::npos) {
    throw InputError("[ask] the question is blank; expected some text");
  }
}

void CheckQuestion(const Session& session, const std::string& question) {
  if (session.frames_seen == 0) {
    throw InputError("[ask] no frame has been seen yet; expected at least one before a question");
  }
  CheckBlank(question);
}

// `options` with as many new tokens as the context still holds after the `seen` rows of the stream
// that a question sees and `prompt` tokens.
GenerateOptions FitToContext(const Session& session, GenerateOptions options, int64_t seen,
                             int64_t prompt) {
  // The last token of an answer is never read again, so it needs no position.
  const int64_t room = session.context_limit() - seen - prompt + 1;
  if (room < 1) {
    throw InputError("[ask] the context is full: " + std::to_string(session.frames_seen) +
                     " frames take " + std::to_string(seen) +
                     " tokens, the dialogue and this question " + std::to_string(prompt) +
                     ", the limit is " + std::to_string(session.context_limit()) +
                     "; ask something shorter or do not keep the dialogue");
  }
  options.max_new_tokens = static_cast<int>(std::min<int64_t>(options.max_new_tokens, room));
  return options;
}

// What follows the video: the question, of which `turn` is told the ids, after the turns it joins.
std::vector<int32_t> IdsOf(const Session& session, const PendingQuestion& question, Turn& turn) {
  const Vlm& vlm = *session.vlm;
  const bool follow_up = question.joins_dialogue && !session.transcript.empty();
  turn.question_ids =
      question.ids ? (follow_up ? question.ids->follow_up : question.ids->first)
                   : vlm.prompt_format().EncodeQuestion(vlm.tokenizer(), question.text, follow_up);
  return question.joins_dialogue ? DialogueIds(session, turn) : turn.question_ids;
}

// How many of a question's last rows choose what it sees. Each costs a look at all there is in one
// piece of work.
int64_t RankingRows(const Turn& turn) {
  constexpr int64_t kMostRankingRows = 256;
  return std::min<int64_t>(static_cast<int64_t>(turn.question_ids.size()), kMostRankingRows);
}

// Why an answer comes without evidence, unless it recalls.
std::string WhyNoEvidence(const Session& session) {
  if (session.pyramid.replays())
    return "the frames that are remembered were read with the question";
  if (session.cache.gone() > 0) return "recall is off, only the newest frames were in view";
  return "all " + std::to_string(session.frames_seen) +
         " frames were in view, nothing had to be recalled";
}

// What waits of several sessions: their prefixes first, in one step, then the tokens in another.
void ReadWaiting(ExecContext& ctx, std::span<Session* const> sessions) {
  std::deque<StepGuard> guards;
  std::deque<Tensor> prefixes;
  std::deque<VisualTokens> tokens;
  std::vector<SequenceStep> first, second;
  std::vector<Session*> read;
  for (Session* session : sessions) {
    if (session->waiting.empty()) continue;
    read.push_back(session);
    MakeRoom(ctx, *session, WaitingTokens(*session) + QuestionRoom(*session));
    guards.emplace_back(*session);
    if (const std::string* instruction = session->pyramid.wanted_instruction()) {
      ReadInstruction(ctx, *session, *instruction);
    }
    if (const int64_t unread = UnreadPrefix(*session); unread > 0) {
      const std::span<const int32_t> prefix = session->prefix_ids;
      prefixes.push_back(EmbedIds(ctx, *session->vlm, prefix.last(unread)));
      first.push_back({&session->cache, prefixes.back(), {}});
    }
  }
  if (read.empty()) return;
  const Decoder& decoder = read[0]->vlm->decoder();
  Append(ctx, decoder, first);
  for (Session* session : read) {
    tokens.push_back(Joined(ctx, session->waiting));
    if (tokens.back().size() == 0) continue;
    LayerPolicy* policy = session->pyramid.ForFrames(tokens.back(), session->cache.length());
    second.push_back({&session->cache, tokens.back().features, {}, policy});
  }
  Append(ctx, decoder, second);
  for (size_t i = 0; i < read.size(); ++i) {
    Session& session = *read[i];
    if (tokens[i].size() > 0) {
      const int64_t first = session.cache.length() - tokens[i].size();
      session.pyramid.Arrived(tokens[i], first);
      if (session.memory) session.memory->Arrived(ctx, session.cache, tokens[i], first);
    }
    session.waiting.clear();
    guards[i].Keep();
  }
}

}  // namespace

int64_t WaitingTokens(const Session& session) {
  int64_t tokens = 0;
  for (const VisualTokens& batch : session.waiting) tokens += batch.size();
  return tokens;
}

// The cache begins with the prefix, and no frame comes before all of it.
int64_t UnreadPrefix(const Session& session) {
  const auto prefix = static_cast<int64_t>(session.prefix_ids.size());
  return std::max<int64_t>(prefix - session.cache.length(), 0);
}

void ReadPrefix(ExecContext& ctx, Session& session, int64_t rows) {
  const int64_t unread = UnreadPrefix(session);
  if (unread == 0) return;
  StepGuard guard(session);
  const std::span<const int32_t> prefix = session.prefix_ids;
  const Tensor next =
      EmbedIds(ctx, *session.vlm, prefix.last(unread).first(std::min(unread, rows)));
  SequenceStep step{&session.cache, next, {}};
  Append(ctx, session.vlm->decoder(), {&step, 1});
  guard.Keep();
}

QuestionIds EncodeQuestion(const Vlm& vlm, const std::string& text, int64_t most_tokens) {
  CheckBlank(text);
  const auto encode = [&](bool follow_up) {
    std::vector<int32_t> ids = vlm.prompt_format().EncodeQuestion(vlm.tokenizer(), text, follow_up);
    if (static_cast<int64_t>(ids.size()) <= most_tokens) return ids;
    throw InputError("[ask] the question has " + std::to_string(ids.size()) +
                     " tokens, the context has room for " + std::to_string(most_tokens) +
                     " even without frames; ask something shorter");
  };
  QuestionIds ids;
  ids.first = encode(false);
  ids.follow_up = encode(true);
  return ids;
}

int64_t MostQuestionTokens(const Session& session) {
  const int64_t newline = session.vlm->newline_row().empty() ? 0 : 1;
  return session.context_limit() - static_cast<int64_t>(session.prefix_ids.size()) - newline;
}

bool HasRoom(const Session& session, int64_t tokens) {
  if (session.memory) return true;             // its window was checked when the session began
  if (session.pyramid.replays()) return true;  // the window has its own bounds
  const int64_t held = session.cache.length() + UnreadPrefix(session) + WaitingTokens(session);
  return held + tokens + QuestionRoom(session) <= session.context_limit();
}

void Ingest(ExecContext& ctx, std::span<Arrivals> arrivals) {
  if (arrivals.empty()) return;
  std::deque<StepGuard> guards;
  for (Arrivals& of : arrivals) {
    guards.emplace_back(*of.session);
    of.taken = WithoutDuplicates(ctx, *of.session, of.frames);
    if (!of.taken.empty()) guards.back().Encoding();
  }
  std::vector<VisualTokens> tokens = EncodeAll(ctx, arrivals);
  std::vector<int64_t> left(arrivals.size(), 0);
  std::vector<Session*> worth_reading;
  for (size_t i = 0; i < arrivals.size(); ++i) {
    Session& session = *arrivals[i].session;
    if (arrivals[i].taken.empty()) continue;
    VisualTokens kept = Compress(ctx, session, std::move(tokens[i]), guards[i]);
    left[i] = kept.size();
    if (session.pyramid.replays()) {
      tokens[i] = std::move(kept);
      continue;
    }
    CheckRoom(session, left[i], arrivals[i].taken.size());
    // Even nothing makes a fresh session read its prefix.
    const bool fresh =
        session.waiting.empty() && (session.cache.length() == 0 || UnreadPrefix(session) > 0);
    if (left[i] > 0 || fresh) session.waiting.push_back(std::move(kept));
    if (IsWorthReading(session)) worth_reading.push_back(&session);
  }
  ReadWaiting(ctx, worth_reading);
  for (size_t i = 0; i < arrivals.size(); ++i) {
    Session& session = *arrivals[i].session;
    if (session.pyramid.replays() && !arrivals[i].taken.empty()) {
      session.pyramid.Arrived(tokens[i], 0);
    }
    session.visual_tokens += left[i];
    session.frames_seen += static_cast<int64_t>(arrivals[i].frames.size());
    session.last_time = arrivals[i].frames.back()->time;
    guards[i].Keep();
  }
  for (Session* session : worth_reading) Trim(ctx, *session);
}

void Ingest(ExecContext& ctx, Session& session, std::span<const FramePtr> frames) {
  if (frames.empty()) return;
  Arrivals arrivals{&session, frames};
  Ingest(ctx, {&arrivals, 1});
}

void ReadWaiting(ExecContext& ctx, Session& session) {
  Session* const one = &session;
  ReadWaiting(ctx, {&one, 1});
  Trim(ctx, session);
}

std::unique_ptr<PendingAnswer> BeginAnswer(ExecContext& ctx, Session& session,
                                           const PendingQuestion& question, TextSink sink) {
  CheckQuestion(session, question.text);
  ReadWaiting(ctx, session);
  const Vlm& vlm = *session.vlm;
  auto answer = std::make_unique<PendingAnswer>();
  Turn& turn = answer->turn;
  turn.question = question.text;
  turn.time = session.last_time;
  std::vector<int32_t> ids = IdsOf(session, question, turn);
  if (FillsContext(session)) {
    // What does not fit is let go: the oldest turns first, then the oldest frames.
    const int64_t answer_tokens =
        std::min<int64_t>(question.generate.max_new_tokens, session.context_limit() / 8);
    const auto tokens = [&] { return 1 + static_cast<int64_t>(ids.size()) + answer_tokens; };
    const bool slid = session.memory->Recalls(session.cache);
    if (slid || session.cache.Reach() + tokens() > session.context_limit()) {
      ForgetTurns(session);
      ids = IdsOf(session, question, turn);
      if (!slid) MakeRoom(ctx, session, tokens());
    }
  }
  PromptRows prompt = Prompt(session, ids);
  answer->prompt_tokens = prompt.size();
  answer->keep = question.joins_dialogue && session.options.keep_dialogue;
  answer->no_evidence = WhyNoEvidence(session);
  int64_t seen = session.cache.Reach();
  if (session.memory && session.memory->Recalls(session.cache)) {
    answer->recall.emplace(*session.memory, session.cache, RankingRows(turn));
    seen = session.memory->MostRows();
  }
  const GenerateOptions options = FitToContext(session, question.generate, seen, prompt.size());
  // Frames that are replayed are in the prompt, and those that are recalled go into a cache of the
  // question's own.
  const KvPositions positions = answer->recall ? KvPositions::kRows : session.pyramid.positions();
  answer->cache = session.pyramid.replays() || answer->recall
                      ? std::make_unique<KvCache>(session.cache.pool(), positions)
                      : session.cache.Branch();
  if (answer->recall) answer->cache->Advance(session.cache.length());
  LayerPolicy* policy = session.pyramid.ForQuestion(static_cast<int64_t>(session.prefix_ids.size()),
                                                    RankingRows(turn));
  std::vector<int32_t> text_ids = session.prefix_ids;
  if (const auto visual = vlm.tokenizer().TokenToId(vlm.prompt_format().placeholder())) {
    text_ids.push_back(*visual);
  }
  Extend(text_ids, ids);
  answer->generation.emplace(vlm, *answer->cache, std::move(prompt), text_ids, options,
                             std::move(sink), policy, answer->recall ? &*answer->recall : nullptr);
  return answer;
}

Generated EndAnswer(Session& session, PendingAnswer& answer) {
  Generated generated = answer.generation->result();
  if (answer.recall) generated.evidence = answer.recall->evidence();
  if (generated.evidence.empty()) generated.no_evidence = answer.no_evidence;
  if (answer.keep && answer.generation->finished() &&
      generated.reason != FinishReason::kCancelled) {
    answer.turn.answer = generated.text;
    answer.turn.answer_ids = generated.ids;
    Remember(session, std::move(answer.turn));
  }
  return generated;
}

Generated Ask(ExecContext& ctx, Session& session, const std::string& question,
              const TextSink& sink) {
  const auto answer = BeginAnswer(ctx, session, {question, session.options.generate}, sink);
  Generation* const one = &*answer->generation;
  while (!one->finished()) Advance(ctx, *session.vlm, {&one, 1});
  if (one->failure()) std::rethrow_exception(one->failure());
  return EndAnswer(session, *answer);
}

}  // namespace sluice
