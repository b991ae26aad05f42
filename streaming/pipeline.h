// THE page: how a frame becomes memory and a question becomes an answer. Start reading at
// pipeline.cc. Stateless: everything it remembers is in the Session it is given.
#ifndef SLUICE_STREAMING_PIPELINE_H_
#define SLUICE_STREAMING_PIPELINE_H_

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "llm/generator.h"
#include "runtime/exec_context.h"
#include "streaming/session.h"
#include "vision/frame.h"

namespace sluice {

// Frames of one session, and what becomes of them.
struct Arrivals {
  Session* session = nullptr;
  std::span<const FramePtr> frames;  // at least one
  std::vector<FramePtr> taken = {};  // filled in by Ingest: those that were no duplicates
};

// (duplicates) -> preprocess -> encode -> compress -> prefill. Appends the frames, in order, to the
// session's memory; the prompt's prefix is prefilled before the first. What token compressors leave
// waits until it is as much as a batch of frames is without them, or until the next question. With
// a memory, what exceeds its window then leaves the cache. Throws InputError when the context has
// no room for them and a question after them, ResourceExhausted when the KV pool has none; after
// these and any other exception the session is as before. With mode replay of PyramidDrop frames
// are only remembered, and prefilled with each question. Frames that the duplicate filter holds
// back are seen, and leave nothing. Traces "duplicates" (items: frames), "preprocess", "encode"
// (items: frames), "compress" (tokens in), "prefill" (tokens kept).
void Ingest(ExecContext& ctx, Session& session, std::span<const FramePtr> frames);
// The same for several sessions of one model (each at most once), whose frames are encoded
// together, except where a cacher or turbo works inside the tower, and prefilled in one step. After
// an exception all of them are as before. Every product is made of other rows than for one session,
// so that in bf16, and in f32 for some sizes, results differ from its by rounding.
void Ingest(ExecContext& ctx, std::span<Arrivals> arrivals);

// Whether the context holds `tokens` more visual tokens and a question after them: Ingest throws
// where it does not.
bool HasRoom(const Session& session, int64_t tokens);

// Prefills what waits, for a moment with nothing else to do. Throws as Ingest does.
void ReadWaiting(ExecContext& ctx, Session& session);
// Tokens that wait to be prefilled, and what is left of the prompt before the first of all.
int64_t WaitingTokens(const Session& session);
int64_t UnreadPrefix(const Session& session);
// Prefills at most so many rows of a long prefix, which Ingest then need not. Throws as Ingest
// does.
void ReadPrefix(ExecContext& ctx, Session& session, int64_t rows);

// A question as it is encoded where it follows the video, and where it follows an earlier turn.
struct QuestionIds {
  std::vector<int32_t> first, follow_up;
};
// The tokens of the longest question that a session of these options can ever answer.
int64_t MostQuestionTokens(const Session& session);
// Safe on any thread. Throws InputError on a blank question, on one of more than `most_tokens`
// tokens, naming both, and as PromptFormat::EncodeQuestion.
QuestionIds EncodeQuestion(const Vlm& vlm, const std::string& text, int64_t most_tokens);

struct PendingQuestion {
  std::string text;
  GenerateOptions generate;
  bool joins_dialogue = true;  // sees earlier turns, and becomes one if the session keeps them
  std::shared_ptr<const QuestionIds> ids = nullptr;  // of the text, if they are known already
};

// An answer on its way. It continues a branch of the cache, so of its session it needs nothing but
// the model, and frames may arrive meanwhile: once its prompt is read where needs_session().
struct PendingAnswer {
  bool needs_session() const { return generation->reads_by_layers(); }
  Turn turn;
  std::unique_ptr<KvCache> cache;
  std::optional<StreamRecall> recall;  // what it is answered from, once a memory's window has slid
  int64_t prompt_tokens = 0;
  bool keep = false;        // in the transcript
  std::string no_evidence;  // why there will be none, unless it recalls
  std::optional<Generation> generation;
};

// Gets ready to answer about everything ingested so far: newline row, dialogue, question. Once a
// memory's window has slid, the question sees what it recalls, and the answer comes with its
// evidence. Steps of
// the answer are Advance(), llm/generator.h. Throws InputError when no frame has been seen, on a
// blank question, and when the context has no room for the question, before anything of it is
// embedded; and as ReadWaiting does.
std::unique_ptr<PendingAnswer> BeginAnswer(ExecContext& ctx, Session& session,
                                           const PendingQuestion& question, TextSink sink);
// Keeps the turn in the transcript if that is wanted and the answer was finished and not cancelled.
// At most once an answer.
Generated EndAnswer(Session& session, PendingAnswer& answer);

// All of an answer. It ends with FinishReason::kLength where the context ends. But for the
// transcript and for what waited to be read the session is then as before, whatever happens. Throws
// as BeginAnswer and Advance do, and what the sink throws.
Generated Ask(ExecContext& ctx, Session& session, const std::string& question,
              const TextSink& sink);

}  // namespace sluice

#endif  // SLUICE_STREAMING_PIPELINE_H_
