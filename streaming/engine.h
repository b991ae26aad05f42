// The library's front door: a loaded model, its KV pool, and runs over sources.
#ifndef SLUICE_STREAMING_ENGINE_H_
#define SLUICE_STREAMING_ENGINE_H_

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "llm/generator.h"
#include "runtime/clock.h"
#include "runtime/trace.h"
#include "streaming/frame_queue.h"
#include "streaming/session.h"
#include "streaming/source.h"

namespace sluice {

struct EngineOptions {
  std::filesystem::path model;  // checkpoint directory
  VlmOptions vlm;
  int num_threads = 0;          // 0: physical cores
  int64_t kv_budget_bytes = 0;  // 0: no limit
};

// Thread-safe: sessions of one engine may run on different threads.
class Engine {
 public:
  // Loads the checkpoint. Throws InputError as Vlm::Load does.
  explicit Engine(const EngineOptions& options);
  // With a model that is loaded already; `model` and `vlm` of the options are not read.
  Engine(std::shared_ptr<const Vlm> vlm, const EngineOptions& options);
  const std::shared_ptr<const Vlm>& vlm() const { return vlm_; }
  int num_threads() const { return num_threads_; }
  const KvBlockPool& pool() const { return *pool_; }
  // Its KV blocks come from the engine's pool, under the budget of all sessions together.
  std::unique_ptr<Session> NewSession(const SessionOptions& options) const;
  // For one thread at a time, with num_threads() threads of its own.
  std::unique_ptr<ExecContext> NewContext() const;

 private:
  std::shared_ptr<const Vlm> vlm_;
  std::shared_ptr<KvBlockPool> pool_;
  int num_threads_;
};

// A question and when to ask it: once a frame later than `at` arrives or the stream ends ("what had
// been seen by then"); without `at`, at the end of the stream.
struct TimedQuestion {
  std::string text;
  std::optional<MediaTime> at;
};

struct TimedAnswer {
  TimedQuestion question;
  MediaTime asked_at;  // media time of the last frame seen
  int64_t frames_seen = 0;
  Generated generated;
  std::string note;                // one line where it could not be asked at its time
  double first_token_seconds = 0;  // from asking to the first text
  double total_seconds = 0;
};

// Why a question that is asked once the source has ended, after a last frame at `last`, was not
// asked at its time; empty where its time had come.
std::string NoteOfLateTime(const TimedQuestion& question, const SourceInfo& source, MediaTime last);

// What a run reports while it goes on. Called on the thread that runs.
struct RunObserver {
  std::function<void(const SourceInfo&)> on_open;
  std::function<void(const Frame&, int64_t frames_seen)> on_frame;
  std::function<void(const TimedQuestion&, MediaTime now)> on_question;
  std::function<bool(std::string_view piece)> on_text;  // false cancels this answer
  std::function<void(const TimedAnswer&)> on_answer;
};

struct RunResult {
  std::vector<TimedAnswer> answers;
  SourceInfo source;
  FrameQueue::Counts queue;
  int64_t frames = 0;
  int64_t duplicates = 0;              // of them, held back by the duplicate filter
  std::optional<std::string> warning;  // a damaged source that ended early
  std::vector<std::string> warnings;   // told while it ran (SourceOptions::on_warning)
  std::string error;                   // what ended the run: the source failed; empty: nothing did
  int64_t not_asked = 0;               // questions that were therefore never asked
};

// Plays `source` through `session`, asking each question at its time, in order of time; questions
// for the same time in the order given. Decoding runs on a thread of its own, beside this one.
//
// A recording is ingested in batches of frames_per_batch frames, cut only by questions and its end,
// so that the same file gives the same answers however fast this machine is. A live source is
// ingested in batches of what is waiting, at most so many; when it is faster than the model, the
// oldest waiting frames are dropped and counted.
//
// Source::Cancel from another thread ends the run early: remaining questions are asked about what
// has been seen. A source that fails after a question was answered ends the run with `error`.
// Other exceptions (of the source, the model, the observer) end it at once and pass through; the
// session then holds what was ingested before. Throws InputError when a question is due before the
// first frame or the source gave none, and, before the first frame, on a question that the context
// cannot hold.
RunResult Run(ExecContext& ctx, Session& session, Source& source,
              std::vector<TimedQuestion> questions, const RunObserver& observer);

}  // namespace sluice

#endif  // SLUICE_STREAMING_ENGINE_H_
