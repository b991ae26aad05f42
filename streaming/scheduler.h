// Many live streams on one model: who is worked for next, and what runs together.
//
// One thread does all work on the model, in rounds. A round is
//   1. one token for every answer in progress: their decode steps, and the prompts of answers that
//      begin, run in one Decoder::Step: prompts of at most `prompt_rows_per_round` rows whole, as
//      many as so many rows hold, the earliest question first; of longer ones a part of one, in
//      turn, that takes what is left of so many rows and never less than a quarter of them. What
//      compressors left of their streams is prefilled before and counts as their rows. Prompts that
//      are read by layers (llm/generator.h) are taken alike, in steps of their own;
//   2. frames: at most `frames_per_round`, one at a time from each stream in turn. Half of them, or
//      fewer, come from streams where a question waits for its frames, the earliest question first;
//      the rest from all streams, the longest wait first. They are encoded together where no state
//      of a stream is in the way and prefilled in one Decoder::Step.
// So a token waits for one batch of frames at most, and a frame for one step of all answers at
// most: questions never hold up the video, and the video never holds up an answer. A long prefix (a
// stream's system prompt) is prefilled by parts of `prompt_rows_per_round` before its first frames.
// With nothing else to do a round prefills what compressors left of one stream to be read later.
// Between the parts of a prompt its answer may be cancelled, and its time may end.
//
// Within a stream the order is that of the calls: a question is answered about every frame that was
// accepted before it and none that came later, unless it had to wait for another answer of the same
// stream: then about all that were encoded by its turn. An answer goes on while frames arrive.
#ifndef SLUICE_STREAMING_SCHEDULER_H_
#define SLUICE_STREAMING_SCHEDULER_H_

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "compression/block_store.h"
#include "llm/generator.h"
#include "runtime/archive.h"
#include "runtime/clock.h"
#include "streaming/engine.h"
#include "streaming/metrics.h"
#include "streaming/session.h"
#include "vision/frame.h"

namespace sluice {

struct SchedulerOptions {
  int frames_per_round = 8;
  int64_t prompt_rows_per_round = 512;
  int max_streams = 64;
  // Of pictures of all streams that wait; where there are more the stream with the most of them
  // loses its oldest frame, kQueueFull. 0: no limit.
  int64_t queued_bytes = 0;
};

// What one stream may take. 0: no limit of its own.
struct StreamBudget {
  int64_t kv_bytes = 0;          // of the device's KV pool, answers aside; frames past it: kMemory
  int queued_frames = 16;        // at least 1; a full queue loses its oldest frame, kQueueFull
  int queued_questions = 8;      // at least 1; more are refused
  int answer_tokens = 512;       // at least 1; caps what a question asks for
  double answer_seconds = 60;    // of wall time, from asking; then the answer ends with kTime
  double frames_per_second = 0;  // of wall time; faster frames are dropped, kRate
};

enum class DropReason { kQueueFull, kRate, kMemory, kOutOfOrder, kBadFrame, kDuplicate, kClosing };
const char* Name(DropReason reason);

// Numbers given by the client, unique within its stream.
using FrameNumber = uint64_t;
using QuestionId = uint64_t;

struct StreamQuestion {
  QuestionId id = 0;
  std::string text;
  std::optional<GenerateOptions> generate;  // otherwise the stream's
};

// Asked after the first frame and then after each that is an interval later than the one asked
// after before; left out while its last answer is still in progress. Apart from the dialogue.
struct StandingQuestion {
  StreamQuestion question;
  double interval_seconds = 5;     // of media time, above 0
  bool only_when_changed = false;  // an equal answer is not reported, nor any as it grows
};

struct AnswerUsage {
  int64_t prompt_tokens = 0, answer_tokens = 0, visual_tokens = 0;
  double queued_seconds = 0;       // from asking to its first step
  double first_token_seconds = 0;  // from asking
  double total_seconds = 0;
};

enum class AnswerEnd { kStop, kLength, kCancelled, kTime, kMemory, kFailed };
const char* Name(AnswerEnd end);

struct StreamAnswer {
  QuestionId id = 0;
  std::string text;
  AnswerEnd end = AnswerEnd::kStop;
  std::string error;   // one line, with kMemory and kFailed
  MediaTime asked_at;  // of the last frame seen
  int64_t frames_seen = 0;
  AnswerUsage usage;
  std::vector<Evidence> evidence;
  std::string no_evidence;  // why there is none, in one line
  bool standing = false;
  bool changed = true;  // from the answer before; of a standing question
};

// What a stream tells its owner, in order. Called on the scheduler's thread or on the thread that
// called the scheduler, never on two at once for one stream; must return at once and must not call
// the scheduler.
class StreamEvents {
 public:
  virtual ~StreamEvents() = default;
  // The frame is part of the stream's memory from here on.
  virtual void OnFrame(FrameNumber frame, MediaTime time) = 0;
  virtual void OnDropped(FrameNumber frame, MediaTime time, DropReason reason) = 0;
  virtual void OnText(QuestionId question, std::string_view piece) = 0;
  virtual void OnAnswer(const StreamAnswer& answer) = 0;
  virtual void OnWarning(std::string_view line) = 0;
  // The stream cannot go on; nothing follows. error: one line.
  virtual void OnFailed(std::string_view error) = 0;
};

struct StreamCounts {
  int64_t pushed = 0, encoded = 0, dropped = 0;  // pushed = encoded + dropped + waiting
  int64_t waiting = 0;
};

struct StreamReport {
  StreamCounts frames;
  int64_t session_bytes = 0, kv_bytes = 0, visual_tokens = 0;
  int64_t questions = 0, answer_tokens = 0;
  MediaTime last_time;
};

using StreamId = std::string;  // 32 hexadecimal digits from the system's random source

// Thread-safe. Calls return at once; Close, Save and Restore wait for the round in progress.
class Scheduler {
 public:
  // clock: for budgets and timings; outlives the scheduler. Starts its thread unless `manual`, for
  // tests, which then call RunRound themselves.
  Scheduler(std::shared_ptr<const Engine> engine, const SchedulerOptions& options,
            const Clock& clock, Metrics& metrics, bool manual = false);
  ~Scheduler();  // closes every stream: OnFailed("... closing") where something was in progress

  // events: may be null (nobody listens at the moment); replaced by Attach. Throws InputError on
  // options and budgets out of range, ResourceExhausted when max_streams are open.
  StreamId Open(const SessionOptions& options, const StreamBudget& budget,
                std::shared_ptr<StreamEvents> events);
  // Who listens from now on. Throws InputError on an unknown stream, here and below.
  void Attach(const StreamId& stream, std::shared_ptr<StreamEvents> events);

  // A frame later than the last, by its media time and by Frame::index (others are dropped,
  // kOutOfOrder). A picture larger than the model's input is brought to that size here, on the
  // caller's thread, so that large ones neither hold up the round nor fill the queue; ones with a
  // side of more than kMaxPictureSide are dropped, kBadFrame.
  void Push(const StreamId& stream, FrameNumber number, FramePtr frame);
  // Whether half of queued_bytes is free: what can wait, as a recording can, is pushed then, so
  // that nothing of it is dropped for what cannot.
  bool HasRoomForPictures() const;
  // Throws InputError on a blank question, one of more bytes than kMostPromptBytes or more tokens
  // than the context holds, a number in use, options out of range; ResourceExhausted when as many
  // wait as the budget allows. The question is tokenized here, on the caller's thread: a tenth of a
  // second at most.
  void Ask(const StreamId& stream, const StreamQuestion& question);
  void AskAlways(const StreamId& stream, const StandingQuestion& question);
  // Ends an answer in progress, one that waits, or a standing question. Unknown ones are ignored:
  // they may just have ended.
  void Cancel(const StreamId& stream, QuestionId question);
  // From the next frame or question on. Throws InputError, naming it, on what a running stream
  // cannot change: everything but frames_per_batch, keep_dialogue and generate.
  void SetOptions(const StreamId& stream, const SessionOptions& options);

  StreamReport Report(const StreamId& stream) const;
  StreamReport Close(const StreamId& stream);
  std::vector<StreamId> streams() const;

  // Writes what the stream has seen and said, its budget and its standing questions, as SaveSession
  // does; frames and questions that wait and an answer in progress are not part of it. owner:
  // called with the file, for what the caller adds. No rounds run meanwhile.
  void Save(const StreamId& stream, const std::filesystem::path& file,
            const std::function<void(Archive&)>& owner);
  // Opens a saved stream again, with the id it had. most: as LoadSession has it. owner: reads what
  // the caller added, may lower the budget, and tells who listens. Throws as LoadSession and Open
  // do, InputError also when the stream is open.
  using Owner =
      std::function<std::shared_ptr<StreamEvents>(Archive&, const StreamId&, StreamBudget&)>;
  StreamReport Restore(const std::filesystem::path& file, const BlockStoreOptions& most,
                       const Owner& owner);

  // No frames or questions are taken from now on (kClosing, and ResourceExhausted); what waits is
  // finished. Returns when nothing is left to do or after `seconds` of wall time.
  void Drain(double seconds);

  // One round; returns whether there was anything to do. REQUIRES: manual.
  bool RunRound();

 private:
  struct Stream;
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace sluice

#endif  // SLUICE_STREAMING_SCHEDULER_H_
