#include "streaming/scheduler.h"

#include <sys/random.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <new>
#include <span>
#include <thread>
#include <utility>

#include "compression/duplicate_frame_filter.h"
#include "runtime/error.h"
#include "runtime/thread_name.h"
#include "streaming/logging.h"
#include "streaming/pipeline.h"
#include "streaming/session_file.h"
#include "vision/preprocess.h"

namespace sluice {
namespace {

constexpr AnswerEnd kEnds[] = {AnswerEnd::kStop, AnswerEnd::kLength, AnswerEnd::kCancelled,
                               AnswerEnd::kTime, AnswerEnd::kMemory, AnswerEnd::kFailed};
constexpr DropReason kReasons[] = {
    DropReason::kQueueFull, DropReason::kRate,      DropReason::kMemory, DropReason::kOutOfOrder,
    DropReason::kBadFrame,  DropReason::kDuplicate, DropReason::kClosing};
// recall and attention: of one layer; attention: where it was asked to be quantised.
constexpr const char* kStages[] = {
    "duplicates",       "preprocess",     "encode", "compress",       "prefill",
    "prefill_question", "decoder/recall", "decode", "attention/sage", "attention/exact"};

double Seconds(WallTime begin, WallTime end) {
  return std::chrono::duration<double>(end - begin).count();
}

StreamId NewId() {
  uint8_t bytes[16];
  if (getrandom(bytes, sizeof(bytes), 0) != sizeof(bytes)) {
    throw Error("[scheduler] the system gave no random bytes for a stream's name");
  }
  StreamId id;
  for (const uint8_t byte : bytes) {
    for (const int digit : {byte >> 4, byte & 15}) id += "0123456789abcdef"[digit];
  }
  return id;
}

void CheckOptions(const SchedulerOptions& options) {
  if (options.frames_per_round < 1 || options.prompt_rows_per_round < 1 ||
      options.max_streams < 1) {
    throw InputError(
        "[scheduler] frames_per_round, prompt_rows_per_round and max_streams must be at least 1, "
        "got " +
        std::to_string(options.frames_per_round) + ", " +
        std::to_string(options.prompt_rows_per_round) + " and " +
        std::to_string(options.max_streams));
  }
  if (options.queued_bytes < 0) {
    throw InputError("[scheduler] queued_bytes must be 0 (no limit) or more, got " +
                     std::to_string(options.queued_bytes));
  }
}

void CheckBudget(const StreamBudget& budget) {
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw InputError(std::string("[scheduler] a stream's budget: ") + what);
  };
  require(budget.kv_bytes >= 0, "kv_bytes must be 0 (no limit) or more");
  require(budget.queued_frames >= 1, "queued_frames must be at least 1");
  require(budget.queued_questions >= 1, "queued_questions must be at least 1");
  require(budget.answer_tokens >= 1, "answer_tokens must be at least 1");
  require(budget.answer_seconds >= 0 && std::isfinite(budget.answer_seconds),
          "answer_seconds must be 0 (no limit) or more, and finite");
  require(budget.frames_per_second >= 0 && std::isfinite(budget.frames_per_second),
          "frames_per_second must be 0 (no limit) or more, and finite");
}

// What a running stream may not change must be equal.
void CheckChange(const SessionOptions& now, const SessionOptions& wanted) {
  const auto require = [](bool equal, const char* what) {
    if (equal) return;
    throw InputError(std::string("[scheduler] a running stream cannot change its ") + what +
                     "; open another one");
  };
  require(now.system_prompt == wanted.system_prompt, "system_prompt");
  require(now.duplicate_threshold == wanted.duplicate_threshold, "duplicate_threshold");
  require(now.max_context_tokens == wanted.max_context_tokens, "max_context_tokens");
  require(now.cacher == wanted.cacher, "cacher");
  require(now.turbo == wanted.turbo, "turbo");
  require(now.compressors == wanted.compressors, "compressors");
  require(now.pyramid == wanted.pyramid, "pyramid");
  require(now.memory == wanted.memory, "memory");
  CheckGenerateOptions(wanted.generate);
  if (wanted.frames_per_batch < 1) {
    throw InputError("[scheduler] frames_per_batch must be at least 1, got " +
                     std::to_string(wanted.frames_per_batch));
  }
}

bool IsWhole(const Frame& frame) {
  return frame.width > 0 && frame.height > 0 && frame.width <= kMaxPictureSide &&
         frame.height <= kMaxPictureSide &&
         frame.rgb.size() / 3 / static_cast<size_t>(frame.width) ==
             static_cast<size_t>(frame.height) &&
         frame.rgb.size() == size_t{3} * frame.width * frame.height;
}

// Runs `work`; what it throws comes back as one line, and whether it was for want of memory or for
// what it was given.
struct Trouble {
  bool memory = false;
  std::string line;
  bool input = false;
};
std::optional<Trouble> Try(const std::function<void()>& work, bool input_is_memory) {
  try {
    work();
    return std::nullopt;
  } catch (const ResourceExhausted& error) {
    return Trouble{true, error.what()};
  } catch (const InputError& error) {
    return Trouble{input_is_memory, error.what(), true};
  } catch (const std::bad_alloc&) {
    return Trouble{true, "[scheduler] the system has no memory for this; open fewer streams"};
  } catch (const std::exception& error) {
    return Trouble{false, error.what()};
  }
}

// A place in the order of all calls.
using Order = uint64_t;

struct WaitingFrame {
  FrameNumber number = 0;
  FramePtr frame;
  Order order = 0;
};

int64_t BytesOf(const WaitingFrame& waiting) {
  const Frame& frame = *waiting.frame;
  const size_t cells = frame.thumbnail ? frame.thumbnail->cells.size() : 0;
  return static_cast<int64_t>(frame.rgb.size() + cells * sizeof(float));
}

struct WaitingQuestion {
  StreamQuestion question;
  std::shared_ptr<const QuestionIds> ids;  // of its text
  Order order = 0;
  WallTime asked;
  bool standing = false;
  bool quiet = false;  // only reported when changed
  bool cancelled = false;
};

struct Standing {
  StandingQuestion what;
  std::shared_ptr<const QuestionIds> ids;  // of its text
  std::optional<MediaTime> due;            // none: with the next frame
  std::optional<std::string> last;         // answer
};

constexpr int64_t kMostCounted = int64_t{1} << 60;
constexpr size_t kMostStanding = 1 << 10;  // that a file may hold

struct Instruments {
  explicit Instruments(Metrics& metrics) {
    for (const char* stage : kStages) {
      stages[stage] = &metrics.histogram("sluice_stage_seconds", "Time of one call of a stage.",
                                         LatencyBounds(), {{"stage", stage}});
    }
    for (const DropReason reason : kReasons) {
      dropped[reason] =
          &metrics.counter("sluice_frames_dropped_total", "Frames that were not encoded.",
                           {{"reason", Name(reason)}});
    }
    for (const AnswerEnd end : kEnds) {
      answers[end] = &metrics.counter("sluice_answers_total", "Answers by how they ended.",
                                      {{"end", Name(end)}});
    }
    pushed = &metrics.counter("sluice_frames_pushed_total", "Frames that clients sent.");
    encoded = &metrics.counter("sluice_frames_encoded_total", "Frames that were encoded.");
    visual_tokens =
        &metrics.counter("sluice_visual_tokens_total", "Visual tokens that compressors left.");
    patches = &metrics.counter("sluice_cacher_patches_total",
                               "Patches, of every layer, of frames that a cacher saw.");
    fresh = &metrics.counter("sluice_cacher_fresh_patches_total",
                             "Of them, those that were computed afresh.");
    answer_tokens = &metrics.counter("sluice_answer_tokens_total", "Tokens generated.");
    first_token = &metrics.histogram("sluice_time_to_first_token_seconds",
                                     "From asking to the first token.", LatencyBounds());
    answer = &metrics.histogram("sluice_answer_seconds", "From asking to the end of an answer.",
                                LatencyBounds());
    round =
        &metrics.histogram("sluice_round_seconds", "Time of a scheduling round.", LatencyBounds());
    const auto tier = [&](const char* name) {
      return &metrics.gauge("sluice_kv_bytes", "Bytes of keys and values by tier.",
                            {{"tier", name}});
    };
    device_bytes = tier("device");
    host_bytes = tier("host");
    disk_bytes = tier("disk");
    forgotten = &metrics.counter("sluice_memory_frames_forgotten_total",
                                 "Frames that left the window and found no room in any tier.");
    queued_frames = &metrics.gauge("sluice_queued_frames", "Frames that wait.");
    queued_bytes = &metrics.gauge("sluice_queued_frame_bytes", "Bytes of their pictures.");
    queued_questions = &metrics.gauge("sluice_queued_questions", "Questions that wait.");
    in_progress = &metrics.gauge("sluice_answers_in_progress", "Answers in progress.");
    streams = &metrics.gauge("sluice_streams_open", "Open streams.");
  }
  std::map<std::string, Histogram*, std::less<>> stages;
  std::map<DropReason, Counter*> dropped;
  std::map<AnswerEnd, Counter*> answers;
  Counter *pushed, *encoded, *visual_tokens, *patches, *fresh, *answer_tokens, *forgotten;
  Histogram *first_token, *answer, *round;
  Gauge *device_bytes, *host_bytes, *disk_bytes;
  Gauge *queued_frames, *queued_bytes, *queued_questions, *in_progress, *streams;
};

}  // namespace

const char* Name(DropReason reason) {
  switch (reason) {
    case DropReason::kQueueFull:
      return "queue_full";
    case DropReason::kRate:
      return "rate";
    case DropReason::kMemory:
      return "memory";
    case DropReason::kOutOfOrder:
      return "out_of_order";
    case DropReason::kBadFrame:
      return "bad_frame";
    case DropReason::kDuplicate:
      return "duplicate";
    case DropReason::kClosing:
      return "closing";
  }
  return "?";
}

const char* Name(AnswerEnd end) {
  switch (end) {
    case AnswerEnd::kStop:
      return "stop";
    case AnswerEnd::kLength:
      return "length";
    case AnswerEnd::kCancelled:
      return "cancelled";
    case AnswerEnd::kTime:
      return "time";
    case AnswerEnd::kMemory:
      return "memory";
    case AnswerEnd::kFailed:
      return "failed";
  }
  return "?";
}

struct Scheduler::Stream {
  StreamId id;
  StreamBudget budget;
  int64_t question_tokens = 0;  // of the longest question

  // Used by the round, or by who waits for its end.
  std::unique_ptr<Session> session;       // none once the stream has failed
  std::unique_ptr<PendingAnswer> answer;  // to `asked`
  StreamAnswer told;                      // what is known of it so far
  uint64_t read_turn = 0;                 // when a part of a long prompt was last read
  int failed_frames = 0;                  // that broke the model, one after another
  int64_t tokens_per_frame = 0;           // that compressors leave at most
  bool warned = false;                    // of the memory that frames do not get
  StcCacher::Counts reuse;                // as last added to the metrics
  int64_t forgotten = 0;                  // the same, of its memory

  // Guarded by State::mutex.
  SessionOptions options;
  bool options_changed = false;
  std::deque<WaitingFrame> frames;
  int64_t queued_bytes = 0;               // of their pictures
  std::deque<WaitingQuestion> questions;  // by order
  std::optional<WaitingQuestion> asked;   // whose answer is in progress
  bool stepped = false;                   // the answer has read its prompt
  bool holds_session = false;             // what the answer reads must not change
  bool unread = false;                    // tokens wait to be prefilled
  std::vector<Standing> standing;
  StreamReport report;
  std::optional<MediaTime> newest;  // frame accepted
  int64_t newest_index = 0;
  double allowance = 0;  // of frames, by the rate
  WallTime filled;       // when that was right
  std::string failure;

  std::mutex events_mutex;  // taken with no other lock held
  std::shared_ptr<StreamEvents> events;
  bool silent = false;  // nothing follows

  void Tell(const std::function<void(StreamEvents&)>& what) {
    const std::lock_guard lock(events_mutex);
    if (silent || !events) return;
    try {
      what(*events);
    } catch (const std::exception& error) {
      Logger()->warn("[scheduler] stream {}: a listener threw: {}", id, error.what());
    }
  }
  void TellWarning(std::string_view line) {
    Logger()->warn("stream {}: {}", id.substr(0, 8), line);
    Tell([&](StreamEvents& listener) { listener.OnWarning(line); });
  }
  void FallSilent() {
    const std::lock_guard lock(events_mutex);
    silent = true;
  }
  // The rest REQUIRES State::mutex.
  bool QuestionIsReady() const {
    return !questions.empty() && (frames.empty() || questions.front().order < frames.front().order);
  }
  bool MayTakeFrame() const {
    return !frames.empty() && (asked ? !holds_session : !QuestionIsReady());
  }
  bool HasWork() const { return asked || unread || !frames.empty() || !questions.empty(); }
  void AddFrame(WaitingFrame frame) {
    queued_bytes += BytesOf(frame);
    frames.push_back(std::move(frame));
  }
  WaitingFrame TakeFrame() {
    WaitingFrame frame = std::move(frames.front());
    frames.pop_front();
    queued_bytes -= BytesOf(frame);
    return frame;
  }
  std::deque<WaitingFrame> TakeFrames() {
    queued_bytes = 0;
    return std::exchange(frames, {});
  }
  void CountDrop(int64_t count) { report.frames.dropped += count; }
};

namespace {

// Frames of one stream in a round.
template <typename Stream>
struct Batch {
  std::shared_ptr<Stream> stream;
  std::vector<WaitingFrame> frames;
  std::vector<FramePtr> pictures;
};

}  // namespace

struct Scheduler::State {
  using StreamPtr = std::shared_ptr<Stream>;
  // A frame for which its stream has no room.
  struct Refused {
    StreamPtr stream;
    WaitingFrame frame;
    std::string why;
  };

  State(std::shared_ptr<const Engine> model, const SchedulerOptions& scheduler_options,
        const Clock& wall_clock, Metrics& metrics)
      : engine(std::move(model)),
        options(scheduler_options),
        clock(wall_clock),
        instruments(metrics),
        ctx(engine->NewContext()) {}

  // Keeps rounds out, or is one: between its construction and its end nobody else has one. Served
  // in the order of coming: whoever saves streams without end holds up no round for longer than a
  // save.
  class Exclusive {
   public:
    explicit Exclusive(State& state) : state_(state) {
      std::unique_lock lock(state.mutex);
      const uint64_t turn = state.turns_taken++;
      state.changed.wait(lock, [&] { return state.turns_over == turn; });
    }
    ~Exclusive() {
      {
        const std::lock_guard lock(state_.mutex);
        ++state_.turns_over;
      }
      state_.changed.notify_all();
    }
    Exclusive(const Exclusive&) = delete;
    Exclusive& operator=(const Exclusive&) = delete;

   private:
    State& state_;
  };

  StreamPtr Find(const StreamId& id) const {  // REQUIRES: mutex
    for (const StreamPtr& stream : streams) {
      if (stream->id == id) return stream;
    }
    throw InputError("[scheduler] no stream " + id + " is open");
  }
  std::vector<StreamPtr> Streams() const {
    const std::lock_guard lock(mutex);
    return streams;
  }
  bool HasWork() const {  // REQUIRES: mutex
    return std::any_of(streams.begin(), streams.end(),
                       [](const StreamPtr& stream) { return stream->HasWork(); });
  }
  void Add(const StreamPtr& stream);
  std::optional<DropReason> RefusalOf(Stream& stream, const Frame& frame);
  FramePtr ForTheTower(const FramePtr& frame, bool compared) const;
  std::optional<std::pair<StreamPtr, WaitingFrame>> TakeForBytes() const;
  StreamPtr FindToAsk(const StreamId& id, const StreamQuestion& question) const;
  std::shared_ptr<const QuestionIds> Encode(const StreamQuestion& question,
                                            const std::function<StreamPtr()>& check) const;

  bool RunRound();
  void ApplyOptions();
  bool EndEarly();
  bool StepAnswers();
  std::vector<StreamPtr> AnswersToStep();
  void Stepped(Stream& stream, const std::optional<Trouble>& trouble);
  bool Begin(const StreamPtr& stream);
  void EndAnswerOf(Stream& stream, AnswerEnd end, const std::string& error);
  void EndWaiting(Stream& stream, const WaitingQuestion& question, AnswerEnd end,
                  const std::string& error);
  void Report(Stream& stream, const WaitingQuestion& question, StreamAnswer answer);
  bool IngestFrames();
  std::vector<Batch<Stream>> TakeFrames(std::vector<Refused>& refused);
  void TakeTurns(std::vector<StreamPtr> order, int64_t most, int64_t& taken,
                 std::vector<Batch<Stream>>& batches, std::vector<Refused>& refused);
  void AskWhatIsDue(Stream& stream, const WaitingFrame& frame);
  std::string Refusal(const Stream& stream, size_t frames) const;
  void IngestAlone(Batch<Stream>& batch);
  void BlameFrame(Stream& stream, const WaitingFrame& frame, const Trouble& trouble);
  void Encoded(Batch<Stream>& batch, std::span<const FramePtr> taken);
  void Drop(Stream& stream, std::span<const WaitingFrame> frames, DropReason reason);
  void Warn(Stream& stream, const std::string& line);
  bool ReadWhatWaits();
  bool HasLongPrefix(const Stream& stream) const;
  bool ReadPrefixes();
  void End(Stream& stream, AnswerEnd end, const std::string& failure);
  void UpdateReports();
  void Work();

  const std::shared_ptr<const Engine> engine;
  const SchedulerOptions options;
  const Clock& clock;
  Instruments instruments;
  const std::unique_ptr<ExecContext> ctx;  // of the round

  mutable std::mutex mutex;
  std::condition_variable changed;
  std::vector<StreamPtr> streams;  // in the order of opening
  Order next_order = 1;
  uint64_t read_turns = 0;                   // parts of long prompts
  uint64_t turns_taken = 0, turns_over = 0;  // of Exclusive
  bool draining = false, stopping = false, manual = false;
  std::thread thread;
};

// ---- A round ---------------------------------------------------------------------------------

bool Scheduler::State::RunRound() {
  const WallTime begin = clock.Now();
  ApplyOptions();
  bool worked = EndEarly();
  worked |= StepAnswers();
  worked |= ReadPrefixes();
  worked |= IngestFrames();
  if (!worked) worked = ReadWhatWaits();
  UpdateReports();
  if (worked) instruments.round->Observe(Seconds(begin, clock.Now()));
  return worked;
}

void Scheduler::State::ApplyOptions() {
  const std::lock_guard lock(mutex);
  for (const StreamPtr& stream : streams) {
    if (stream->options_changed && stream->session) stream->session->options = stream->options;
    stream->options_changed = false;
  }
}

// Answers, and questions that wait, which were cancelled or whose time is over.
bool Scheduler::State::EndEarly() {
  const WallTime now = clock.Now();
  bool any = false;
  for (const StreamPtr& stream : Streams()) {
    const auto end_of = [&](const WaitingQuestion& question) -> std::optional<AnswerEnd> {
      if (question.cancelled) return AnswerEnd::kCancelled;
      const double limit = stream->budget.answer_seconds;
      if (limit > 0 && Seconds(question.asked, now) >= limit) return AnswerEnd::kTime;
      return std::nullopt;
    };
    std::optional<AnswerEnd> in_progress;
    std::vector<std::pair<WaitingQuestion, AnswerEnd>> waiting;
    {
      const std::lock_guard lock(mutex);
      if (stream->asked) in_progress = end_of(*stream->asked);
      std::erase_if(stream->questions, [&](const WaitingQuestion& question) {
        const auto end = end_of(question);
        if (end) waiting.emplace_back(question, *end);
        return end.has_value();
      });
    }
    if (in_progress) EndAnswerOf(*stream, *in_progress, "");
    for (const auto& [question, end] : waiting) EndWaiting(*stream, question, end, "");
    any |= in_progress || !waiting.empty();
  }
  return any;
}

bool Scheduler::State::StepAnswers() {
  const std::vector<StreamPtr> stepping = AnswersToStep();
  const Vlm& vlm = *engine->vlm();
  std::vector<StreamPtr> together;
  std::vector<Generation*> generations;
  for (const StreamPtr& stream : stepping) {
    Generation* const one = &*stream->answer->generation;
    if (!one->reads_by_layers()) {
      together.push_back(stream);
      generations.push_back(one);
    } else {
      Stepped(*stream, Try([&] { Advance(*ctx, vlm, {&one, 1}); }, false));
    }
  }
  if (together.empty()) return !stepping.empty();
  std::vector<std::optional<Trouble>> troubles(together.size());
  if (Try([&] { Advance(*ctx, vlm, generations); }, false)) {
    // Somebody's trouble: each by itself, and it stays theirs.
    for (size_t i = 0; i < together.size(); ++i) {
      troubles[i] = Try([&] { Advance(*ctx, vlm, {&generations[i], 1}); }, false);
    }
  }
  for (size_t i = 0; i < together.size(); ++i) Stepped(*together[i], troubles[i]);
  return true;
}

// What becomes of an answer after its step.
void Scheduler::State::Stepped(Stream& stream, const std::optional<Trouble>& trouble) {
  const Generation& generation = *stream.answer->generation;
  const auto fail = [&](const Trouble& of) {
    EndAnswerOf(stream, of.memory ? AnswerEnd::kMemory : AnswerEnd::kFailed, of.line);
  };
  if (trouble) return fail(*trouble);
  if (generation.prompt_left() > 0) return;
  {
    const std::lock_guard lock(mutex);
    if (!stream.stepped) {
      stream.told.usage.first_token_seconds = Seconds(stream.asked->asked, clock.Now());
      instruments.first_token->Observe(stream.told.usage.first_token_seconds);
    }
    stream.stepped = true;
    stream.holds_session = false;
  }
  if (generation.failure()) {
    fail(*Try([&] { std::rethrow_exception(generation.failure()); }, false));
  } else if (generation.finished()) {
    const bool stopped = generation.result().reason == FinishReason::kStop;
    EndAnswerOf(stream, stopped ? AnswerEnd::kStop : AnswerEnd::kLength, "");
  }
}

// Those in progress and, as far as their prompts have room in a round, those that begin.
std::vector<Scheduler::State::StreamPtr> Scheduler::State::AnswersToStep() {
  std::vector<StreamPtr> stepping;
  std::vector<std::pair<Order, StreamPtr>> beginning;
  {
    const std::lock_guard lock(mutex);
    for (const StreamPtr& stream : streams) {
      if (stream->asked && stream->stepped) {
        stepping.push_back(stream);
      } else if (stream->asked) {
        beginning.emplace_back(stream->asked->order, stream);
      } else if (stream->QuestionIsReady()) {
        beginning.emplace_back(stream->questions.front().order, stream);
      }
    }
  }
  std::sort(beginning.begin(), beginning.end(),
            [](const auto& a, const auto& b) { return a.first < b.first; });
  const int64_t most = options.prompt_rows_per_round;
  int64_t rows = 0;
  bool full = false;
  StreamPtr longest_wait;  // of those with long prompts
  for (const auto& [order, stream] : beginning) {
    if (!stream->answer) {
      const int64_t waiting = WaitingTokens(*stream->session);
      full = full || rows >= most || (rows > 0 && rows + waiting > most);
      if (full || !Begin(stream)) continue;
      rows += waiting;
    }
    Generation& generation = *stream->answer->generation;
    const int64_t left = generation.prompt_left();
    if (left > most) {
      if (!longest_wait || stream->read_turn < longest_wait->read_turn) longest_wait = stream;
      continue;
    }
    full = full || (rows > 0 && rows + left > most);
    if (full) continue;
    rows += left;
    generation.ReadAtMost(left);
    stepping.push_back(stream);
  }
  if (longest_wait) {
    longest_wait->read_turn = ++read_turns;
    const int64_t part = std::max({most - rows, most / 4, int64_t{1}});
    longest_wait->answer->generation->ReadAtMost(part);
    stepping.push_back(longest_wait);
  }
  return stepping;
}

// Makes the answer to the stream's first question. False: it has ended already.
bool Scheduler::State::Begin(const StreamPtr& stream) {
  WaitingQuestion question;
  {
    const std::lock_guard lock(mutex);
    question = stream->questions.front();
    stream->questions.pop_front();
    stream->asked = question;
    stream->stepped = false;
    stream->holds_session = true;
  }
  const Session& session = *stream->session;
  StreamAnswer& told = stream->told = StreamAnswer();
  told.id = question.question.id;
  told.asked_at = session.last_time;
  told.frames_seen = session.frames_seen;
  told.standing = question.standing;
  told.usage.visual_tokens = session.visual_tokens;
  told.usage.queued_seconds = Seconds(question.asked, clock.Now());
  PendingQuestion pending{question.question.text,
                          question.question.generate.value_or(session.options.generate),
                          !question.standing, question.ids};
  pending.generate.max_new_tokens =
      std::min(pending.generate.max_new_tokens, stream->budget.answer_tokens);
  TextSink sink = [stream = stream.get(), id = question.question.id,
                   quiet = question.quiet](std::string_view piece) {
    if (!quiet) stream->Tell([&](StreamEvents& events) { events.OnText(id, piece); });
    return true;
  };
  const auto trouble =
      Try([&] { stream->answer = BeginAnswer(*ctx, *stream->session, pending, std::move(sink)); },
          false);
  if (trouble) {
    EndAnswerOf(*stream, trouble->memory ? AnswerEnd::kMemory : AnswerEnd::kFailed, trouble->line);
    return false;
  }
  told.usage.prompt_tokens = stream->answer->prompt_tokens;
  const std::lock_guard lock(mutex);
  stream->holds_session = stream->answer->needs_session();
  return true;
}

// Ends the answer in progress.
void Scheduler::State::EndAnswerOf(Stream& stream, AnswerEnd end, const std::string& error) {
  StreamAnswer answer = std::exchange(stream.told, {});
  answer.end = end;
  answer.error = error;
  if (stream.answer) {
    const bool whole = end == AnswerEnd::kStop || end == AnswerEnd::kLength;
    Generated generated =
        whole ? EndAnswer(*stream.session, *stream.answer) : stream.answer->generation->result();
    answer.text = generated.text;
    answer.evidence = std::move(generated.evidence);
    answer.no_evidence = whole ? std::move(generated.no_evidence) : "the answer was not finished";
    answer.usage.answer_tokens = static_cast<int64_t>(generated.ids.size());
    stream.answer.reset();
  }
  WaitingQuestion question;
  {
    const std::lock_guard lock(mutex);
    question = *std::exchange(stream.asked, std::nullopt);
    stream.holds_session = false;
  }
  Report(stream, question, std::move(answer));
}

// Ends a question whose answer has not begun.
void Scheduler::State::EndWaiting(Stream& stream, const WaitingQuestion& question, AnswerEnd end,
                                  const std::string& error) {
  StreamAnswer answer;
  answer.id = question.question.id;
  answer.end = end;
  answer.error = error;
  answer.standing = question.standing;
  answer.usage.queued_seconds = Seconds(question.asked, clock.Now());
  if (stream.session) {
    answer.asked_at = stream.session->last_time;
    answer.frames_seen = stream.session->frames_seen;
  }
  Report(stream, question, std::move(answer));
}

void Scheduler::State::Report(Stream& stream, const WaitingQuestion& question,
                              StreamAnswer answer) {
  answer.usage.total_seconds = Seconds(question.asked, clock.Now());
  instruments.answers[answer.end]->Add();
  instruments.answer_tokens->Add(answer.usage.answer_tokens);
  instruments.answer->Observe(answer.usage.total_seconds);
  const bool whole = answer.end == AnswerEnd::kStop || answer.end == AnswerEnd::kLength;
  {
    const std::lock_guard lock(mutex);
    stream.report.answer_tokens += answer.usage.answer_tokens;
    for (Standing& standing : stream.standing) {
      if (!whole || !answer.standing || standing.what.question.id != answer.id) continue;
      answer.changed = standing.last != answer.text;
      standing.last = answer.text;
    }
  }
  if (question.quiet && !answer.changed) return;
  stream.Tell([&](StreamEvents& events) { events.OnAnswer(answer); });
}

// ---- Frames ----------------------------------------------------------------------------------

bool Scheduler::State::IngestFrames() {
  std::vector<Refused> refused;
  std::vector<Batch<Stream>> batches = TakeFrames(refused);
  for (const Refused& of : refused) {
    Warn(*of.stream, of.why);
    Drop(*of.stream, {&of.frame, 1}, DropReason::kMemory);
  }
  // Streams that lately found no memory do not put the others' step at risk.
  const auto alone =
      std::stable_partition(batches.begin(), batches.end(),
                            [](const Batch<Stream>& batch) { return !batch.stream->warned; });
  const std::span<Batch<Stream>> together(batches.begin(), alone);
  std::vector<Arrivals> arrivals;
  for (const Batch<Stream>& batch : together) {
    arrivals.push_back({batch.stream->session.get(), batch.pictures});
  }
  if (together.size() > 1 && !Try([&] { Ingest(*ctx, arrivals); }, true)) {
    for (size_t i = 0; i < together.size(); ++i) Encoded(together[i], arrivals[i].taken);
  } else {
    for (Batch<Stream>& batch : together) IngestAlone(batch);
  }
  for (auto batch = alone; batch != batches.end(); ++batch) IngestAlone(*batch);
  return !batches.empty() || !refused.empty();
}

// refused: frames for which the stream has no room.
std::vector<Batch<Scheduler::Stream>> Scheduler::State::TakeFrames(std::vector<Refused>& refused) {
  const std::lock_guard lock(mutex);
  std::vector<Batch<Stream>> batches;
  std::vector<StreamPtr> urgent, all;
  for (const StreamPtr& stream : streams) {
    if (!stream->MayTakeFrame()) continue;
    all.push_back(stream);
    if (!stream->asked && !stream->questions.empty()) urgent.push_back(stream);
  }
  std::sort(urgent.begin(), urgent.end(), [](const StreamPtr& a, const StreamPtr& b) {
    return a->questions.front().order < b->questions.front().order;
  });
  int64_t taken = 0;
  TakeTurns(std::move(urgent), options.frames_per_round / 2, taken, batches, refused);
  std::erase_if(all, [](const StreamPtr& stream) { return !stream->MayTakeFrame(); });
  std::sort(all.begin(), all.end(), [](const StreamPtr& a, const StreamPtr& b) {
    return a->frames.front().order < b->frames.front().order;
  });
  TakeTurns(std::move(all), options.frames_per_round, taken, batches, refused);
  return batches;
}

// One frame from each stream of `order`, again and again, until `most` are taken.
void Scheduler::State::TakeTurns(std::vector<StreamPtr> order, int64_t most, int64_t& taken,
                                 std::vector<Batch<Stream>>& batches,
                                 std::vector<Refused>& refused) {
  for (bool any = true; any && taken < most;) {
    any = false;
    for (const StreamPtr& stream : order) {
      if (taken >= most) return;
      if (!stream->MayTakeFrame() || HasLongPrefix(*stream)) continue;
      auto batch = std::find_if(batches.begin(), batches.end(),
                                [&](const auto& b) { return b.stream == stream; });
      const size_t before = batch == batches.end() ? 0 : batch->frames.size();
      if (before >= static_cast<size_t>(stream->options.frames_per_batch)) continue;
      WaitingFrame frame = stream->TakeFrame();
      any = true;
      AskWhatIsDue(*stream, frame);
      if (std::string why = Refusal(*stream, before + 1); !why.empty()) {
        refused.push_back({stream, std::move(frame), std::move(why)});
        continue;
      }
      if (batch == batches.end()) batch = batches.insert(batch, Batch<Stream>{stream, {}, {}});
      batch->pictures.push_back(frame.frame);
      batch->frames.push_back(std::move(frame));
      ++taken;
    }
  }
}

// Standing questions that come right after `frame`.
void Scheduler::State::AskWhatIsDue(Stream& stream, const WaitingFrame& frame) {
  if (draining) return;
  for (Standing& standing : stream.standing) {
    const StreamQuestion& question = standing.what.question;
    if (standing.due && frame.frame->time < *standing.due) continue;
    const auto same = [&](const WaitingQuestion& other) {
      return other.question.id == question.id;
    };
    if (stream.asked && same(*stream.asked)) continue;
    if (std::any_of(stream.questions.begin(), stream.questions.end(), same)) continue;
    standing.due = frame.frame->time + MediaTime::FromSeconds(standing.what.interval_seconds);
    WaitingQuestion asked{question,    standing.ids, frame.order,
                          clock.Now(), true,         standing.what.only_when_changed,
                          false};
    const auto behind =
        std::find_if(stream.questions.begin(), stream.questions.end(),
                     [&](const WaitingQuestion& other) { return other.order > frame.order; });
    stream.questions.insert(behind, std::move(asked));
    ++stream.report.questions;
  }
}

// Why the stream cannot hold so many more frames, if they leave as much as they may; or nothing. To
// be known before they are encoded: a step that fails is done again for each stream by itself.
std::string Scheduler::State::Refusal(const Stream& stream, size_t frames) const {
  const Session& session = *stream.session;
  int64_t more = static_cast<int64_t>(frames) * stream.tokens_per_frame;
  if (!HasRoom(session, more)) {
    return "[scheduler] the context is full after " + std::to_string(session.frames_seen) +
           " frames; further ones are dropped, questions are still answered";
  }
  if (stream.budget.kv_bytes == 0) return "";
  more += WaitingTokens(session) + UnreadPrefix(session);
  int64_t blocks = 0;
  for (int layer = 0; layer < engine->pool().geometry().num_layers; ++layer) {
    blocks += (session.cache.rows(layer) + more + kKvBlockTokens - 1) / kKvBlockTokens;
  }
  if (blocks * engine->pool().block_bytes() <= stream.budget.kv_bytes) return "";
  return "[scheduler] the stream's budget of " + std::to_string(stream.budget.kv_bytes) +
         " bytes of keys and values is full after " + std::to_string(session.frames_seen) +
         " frames; further ones are dropped, questions are still answered";
}

void Scheduler::State::IngestAlone(Batch<Stream>& batch) {
  Stream& stream = *batch.stream;
  Arrivals arrivals{stream.session.get(), batch.pictures};
  const auto trouble = Try([&] { Ingest(*ctx, {&arrivals, 1}); }, false);
  if (!trouble) return Encoded(batch, arrivals.taken);
  if (batch.frames.size() == 1) return BlameFrame(stream, batch.frames[0], *trouble);
  // One of them is to blame: each by itself, and the others go on.
  for (size_t i = 0; i < batch.frames.size(); ++i) {
    if (!stream.session) {  // it has ended meanwhile
      Drop(stream, {&batch.frames[i], 1}, DropReason::kClosing);
      continue;
    }
    Batch<Stream> one{batch.stream, {batch.frames[i]}, {batch.pictures[i]}};
    IngestAlone(one);
  }
}

// A frame that cannot be ingested is dropped: for want of memory or room, or because it is no good.
// When several in a row break the model it is not the frames, and the stream ends.
void Scheduler::State::BlameFrame(Stream& stream, const WaitingFrame& frame,
                                  const Trouble& trouble) {
  constexpr int kMostInARow = 3;
  if (trouble.memory || !HasRoom(*stream.session, stream.tokens_per_frame)) {
    Warn(stream, trouble.line);
    return Drop(stream, {&frame, 1}, DropReason::kMemory);
  }
  if (trouble.input || ++stream.failed_frames < kMostInARow) {
    stream.TellWarning(trouble.line);
    return Drop(stream, {&frame, 1}, DropReason::kBadFrame);
  }
  Drop(stream, {&frame, 1}, DropReason::kClosing);
  End(stream, AnswerEnd::kFailed, trouble.line);
}

void Scheduler::State::Encoded(Batch<Stream>& batch, std::span<const FramePtr> taken) {
  Stream& stream = *batch.stream;
  stream.warned = false;
  stream.failed_frames = 0;
  instruments.encoded->Add(static_cast<int64_t>(taken.size()));
  {
    const std::lock_guard lock(mutex);
    stream.report.frames.encoded += static_cast<int64_t>(taken.size());
    stream.unread = !stream.session->waiting.empty();
  }
  size_t next = 0;
  for (const WaitingFrame& frame : batch.frames) {
    if (next < taken.size() && taken[next] == frame.frame) {
      ++next;
      stream.Tell([&](StreamEvents& events) { events.OnFrame(frame.number, frame.frame->time); });
    } else {
      Drop(stream, {&frame, 1}, DropReason::kDuplicate);
    }
  }
}

void Scheduler::State::Drop(Stream& stream, std::span<const WaitingFrame> frames,
                            DropReason reason) {
  {
    const std::lock_guard lock(mutex);
    stream.CountDrop(static_cast<int64_t>(frames.size()));
  }
  instruments.dropped[reason]->Add(static_cast<int64_t>(frames.size()));
  for (const WaitingFrame& frame : frames) {
    stream.Tell(
        [&](StreamEvents& events) { events.OnDropped(frame.number, frame.frame->time, reason); });
  }
}

// Once, until a frame finds room again.
void Scheduler::State::Warn(Stream& stream, const std::string& line) {
  if (!std::exchange(stream.warned, true)) stream.TellWarning(line);
}

// Whether so much of the stream's prefix is left to be read that it is read by parts.
bool Scheduler::State::HasLongPrefix(const Stream& stream) const {
  return !stream.session->pyramid.replays() &&
         UnreadPrefix(*stream.session) > options.prompt_rows_per_round;
}

// A part of the long prefix of one stream whose frames wait for it.
bool Scheduler::State::ReadPrefixes() {
  StreamPtr next;
  {
    const std::lock_guard lock(mutex);
    for (const StreamPtr& stream : streams) {
      if (!stream->MayTakeFrame() || !HasLongPrefix(*stream)) continue;
      if (!next || stream->read_turn < next->read_turn) next = stream;
    }
  }
  if (!next) return false;
  next->read_turn = ++read_turns;
  const auto trouble =
      Try([&] { ReadPrefix(*ctx, *next->session, options.prompt_rows_per_round); }, true);
  if (!trouble) return true;
  if (!trouble->memory) {
    End(*next, AnswerEnd::kFailed, trouble->line);
    return true;
  }
  std::deque<WaitingFrame> frames;
  {
    const std::lock_guard lock(mutex);
    frames = next->TakeFrames();
  }
  Warn(*next, trouble->line);
  for (const WaitingFrame& frame : frames) Drop(*next, {&frame, 1}, DropReason::kMemory);
  return true;
}

bool Scheduler::State::ReadWhatWaits() {
  bool any = false;
  for (const StreamPtr& stream : Streams()) {
    if (any) break;  // the others next time, unless there is something else to do by then
    {
      const std::lock_guard lock(mutex);
      if (!std::exchange(stream->unread, false)) continue;
    }
    any = true;
    // A question, or the next frames, will try again.
    const auto trouble = Try([&] { ReadWaiting(*ctx, *stream->session); }, true);
    if (!trouble) continue;
    if (trouble->memory) {
      Warn(*stream, trouble->line);
    } else {
      End(*stream, AnswerEnd::kFailed, trouble->line);
    }
  }
  return any;
}

// ---- Ends ------------------------------------------------------------------------------------

// Ends everything of a stream. failure: why the stream cannot go on; empty when its owner closes
// it.
void Scheduler::State::End(Stream& stream, AnswerEnd end, const std::string& failure) {
  UpdateReports();
  std::deque<WaitingFrame> frames;
  std::deque<WaitingQuestion> questions;
  bool answering;
  {
    const std::lock_guard lock(mutex);
    frames = stream.TakeFrames();
    questions.swap(stream.questions);
    answering = stream.asked.has_value();
    stream.failure = failure.empty() ? "it was closed" : failure;
    stream.unread = false;
    stream.standing.clear();
  }
  for (const WaitingFrame& frame : frames) Drop(stream, {&frame, 1}, DropReason::kClosing);
  if (answering) EndAnswerOf(stream, end, failure);
  for (const WaitingQuestion& question : questions) EndWaiting(stream, question, end, failure);
  if (!failure.empty()) stream.Tell([&](StreamEvents& events) { events.OnFailed(failure); });
  stream.FallSilent();
  stream.session.reset();
}

void Scheduler::State::UpdateReports() {
  for (auto& [name, cost] : ctx->tracer().stages()) {
    const auto stage = instruments.stages.find(name);
    if (stage == instruments.stages.end()) continue;
    for (int64_t i = 0; i < cost.calls; ++i) {
      stage->second->Observe(cost.seconds / static_cast<double>(cost.calls));
    }
  }
  ctx->tracer().Clear();
  const std::lock_guard lock(mutex);
  int64_t frames = 0, frame_bytes = 0, questions = 0, answers = 0, host_bytes = 0, disk_bytes = 0;
  for (const StreamPtr& stream : streams) {
    frames += static_cast<int64_t>(stream->frames.size());
    frame_bytes += stream->queued_bytes;
    questions += static_cast<int64_t>(stream->questions.size());
    answers += stream->asked ? 1 : 0;
    if (!stream->session) continue;
    const Session& session = *stream->session;
    StreamReport& report = stream->report;
    report.session_bytes = session.SizeBytes();
    report.kv_bytes = session.cache.SizeBytes();
    report.last_time = session.last_time;
    instruments.visual_tokens->Add(session.visual_tokens - report.visual_tokens);
    report.visual_tokens = session.visual_tokens;
    if (session.memory) {
      const StreamMemory::Counts memory = session.memory->counts();
      host_bytes += memory.host_bytes;
      disk_bytes += memory.disk_bytes;
      instruments.forgotten->Add(memory.dropped - stream->forgotten);
      stream->forgotten = memory.dropped;
    }
    if (!session.reuse) continue;
    const StcCacher::Counts reuse = session.reuse->counts();
    instruments.patches->Add(reuse.patches - stream->reuse.patches);
    instruments.fresh->Add(reuse.fresh - stream->reuse.fresh);
    stream->reuse = reuse;
  }
  instruments.queued_frames->Set(static_cast<double>(frames));
  instruments.queued_bytes->Set(static_cast<double>(frame_bytes));
  instruments.queued_questions->Set(static_cast<double>(questions));
  instruments.in_progress->Set(static_cast<double>(answers));
  instruments.device_bytes->Set(static_cast<double>(engine->pool().bytes_in_use()));
  instruments.host_bytes->Set(static_cast<double>(host_bytes));
  instruments.disk_bytes->Set(static_cast<double>(disk_bytes));
}

void Scheduler::State::Work() {
  for (;;) {
    {
      std::unique_lock lock(mutex);
      changed.wait(lock, [&] { return stopping || HasWork(); });
      if (stopping) return;
    }
    const Exclusive round(*this);
    RunRound();
  }
}

// ---- Calls -----------------------------------------------------------------------------------

Scheduler::Scheduler(std::shared_ptr<const Engine> engine, const SchedulerOptions& options,
                     const Clock& clock, Metrics& metrics, bool manual) {
  CheckOptions(options);
  state_ = std::make_unique<State>(std::move(engine), options, clock, metrics);
  state_->manual = manual;
  if (manual) return;
  state_->thread = std::thread([state = state_.get()] {
    NameThread("scheduler");
    state->Work();
  });
}

Scheduler::~Scheduler() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->stopping = state_->draining = true;
  }
  state_->changed.notify_all();
  if (state_->thread.joinable()) state_->thread.join();
  for (const auto& stream : state_->streams) {
    const bool unfinished = stream->asked || !stream->frames.empty() || !stream->questions.empty();
    state_->End(*stream, AnswerEnd::kCancelled,
                unfinished ? "[scheduler] the scheduler is closing" : "");
  }
}

StreamId Scheduler::Open(const SessionOptions& options, const StreamBudget& budget,
                         std::shared_ptr<StreamEvents> events) {
  CheckBudget(budget);
  CheckGenerateOptions(options.generate);
  auto stream = std::make_shared<Stream>();
  stream->id = NewId();
  stream->budget = budget;
  stream->events = std::move(events);
  stream->session = state_->engine->NewSession(options);
  state_->Add(stream);
  return stream->id;
}

// With its session, budget and events.
void Scheduler::State::Add(const StreamPtr& stream) {
  stream->options = stream->session->options;
  stream->session->on_warning = [owner = stream.get()](std::string_view line) {
    owner->TellWarning(line);
  };
  stream->question_tokens = MostQuestionTokens(*stream->session);
  stream->tokens_per_frame = engine->vlm()->encoder().tokens_per_frame();
  for (const auto& compressor : stream->session->compressors) {
    stream->tokens_per_frame = compressor->TokensLeft(stream->tokens_per_frame);
  }
  stream->allowance = std::max(1.0, stream->budget.frames_per_second);
  stream->filled = clock.Now();
  const std::lock_guard lock(mutex);
  if (draining) throw ResourceExhausted("[scheduler] the scheduler is closing");
  if (static_cast<int>(streams.size()) >= options.max_streams) {
    throw ResourceExhausted("[scheduler] " + std::to_string(options.max_streams) +
                            " streams are open, as many as max_streams allows; close one");
  }
  for (const StreamPtr& other : streams) {
    if (other->id == stream->id) {
      throw InputError("[scheduler] stream " + stream->id + " is open already");
    }
  }
  streams.push_back(stream);
  instruments.streams->Set(static_cast<double>(streams.size()));
}

namespace {

// What a scheduler knows of a stream, beside its session.
void Persist(Archive& archive, StreamId& id, StreamBudget& budget, StreamReport& report,
             std::vector<Standing>& standing) {
  archive.Text("id", id);
  archive.Number("kv_bytes", budget.kv_bytes);
  archive.Number("queued_frames", budget.queued_frames);
  archive.Number("queued_questions", budget.queued_questions);
  archive.Number("answer_tokens", budget.answer_tokens);
  archive.Number("answer_seconds", budget.answer_seconds);
  archive.Number("frames_per_second", budget.frames_per_second);
  archive.Number("frames_encoded", report.frames.encoded, int64_t{0}, kMostCounted);
  archive.Number("frames_dropped", report.frames.dropped, int64_t{0}, kMostCounted);
  archive.Number("questions", report.questions, int64_t{0}, kMostCounted);
  archive.Number("answer_tokens", report.answer_tokens, int64_t{0}, kMostCounted);
  archive.Resize("standing", standing, kMostStanding);
  for (Standing& each : standing) {
    StreamQuestion& question = each.what.question;
    archive.Number("question", question.id);
    archive.Text("text", question.text);
    bool own = question.generate.has_value(), asked = each.due.has_value(),
         answered = each.last.has_value();
    archive.Flag("own_generation", own);
    if (archive.loading() && own) question.generate.emplace();
    if (own) Persist(archive, *question.generate);
    archive.Number("interval_seconds", each.what.interval_seconds, 1e-9, 1e9);
    archive.Flag("only_when_changed", each.what.only_when_changed);
    archive.Flag("asked", asked);
    int64_t due = asked && each.due ? each.due->nanoseconds() : 0;
    archive.Number("due", due);
    if (asked) each.due = MediaTime::FromNanoseconds(due);
    archive.Flag("answered", answered);
    std::string last = each.last.value_or("");
    archive.Text("last", last);
    if (answered) each.last = last;
  }
}

}  // namespace

void Scheduler::Save(const StreamId& id, const std::filesystem::path& file,
                     const std::function<void(Archive&)>& owner) {
  const State::Exclusive exclusive(*state_);
  State::StreamPtr stream;
  StreamReport report;
  std::vector<Standing> standing;
  {
    const std::lock_guard lock(state_->mutex);
    stream = state_->Find(id);
    report = stream->report;
    standing = stream->standing;
  }
  if (!stream->session) throw Error("[scheduler] a stream that failed cannot be saved");
  SaveSession(*state_->ctx, *stream->session, file, [&](Archive& archive) {
    StreamId name = id;
    Persist(archive, name, stream->budget, report, standing);
    owner(archive);
  });
}

StreamReport Scheduler::Restore(const std::filesystem::path& file, const BlockStoreOptions& most,
                                const Owner& owner) {
  const State::Exclusive exclusive(*state_);
  auto stream = std::make_shared<Stream>();
  stream->session = LoadSession(*state_->ctx, *state_->engine, file, most, [&](Archive& archive) {
    Persist(archive, stream->id, stream->budget, stream->report, stream->standing);
    stream->events = owner(archive, stream->id, stream->budget);
  });
  CheckBudget(stream->budget);
  CheckGenerateOptions(stream->session->options.generate);
  StreamReport& report = stream->report;
  report.frames.pushed = report.frames.encoded + report.frames.dropped;
  report.visual_tokens = stream->session->visual_tokens;
  report.last_time = stream->session->last_time;
  if (stream->session->reuse) stream->reuse = stream->session->reuse->counts();
  if (stream->session->frames_seen > 0) stream->newest = stream->session->last_time;
  stream->newest_index = -1;  // its owner counts on
  stream->unread = !stream->session->waiting.empty();
  for (Standing& standing : stream->standing) {
    standing.ids = std::make_shared<QuestionIds>(EncodeQuestion(
        *state_->engine->vlm(), standing.what.question.text, MostQuestionTokens(*stream->session)));
  }
  state_->Add(stream);
  return report;
}

void Scheduler::Attach(const StreamId& id, std::shared_ptr<StreamEvents> events) {
  State::StreamPtr stream;
  {
    const std::lock_guard lock(state_->mutex);
    stream = state_->Find(id);
  }
  const std::lock_guard lock(stream->events_mutex);
  stream->events.swap(events);
}

// Why the frame is not taken, or nothing. REQUIRES: mutex.
std::optional<DropReason> Scheduler::State::RefusalOf(Stream& stream, const Frame& frame) {
  if (draining || !stream.failure.empty()) return DropReason::kClosing;
  if (!IsWhole(frame)) return DropReason::kBadFrame;
  if (stream.newest && (frame.time <= *stream.newest || frame.index <= stream.newest_index)) {
    return DropReason::kOutOfOrder;
  }
  const double rate = stream.budget.frames_per_second;
  if (rate == 0) return std::nullopt;
  const WallTime now = clock.Now();
  stream.allowance =
      std::min(std::max(1.0, rate), stream.allowance + rate * Seconds(stream.filled, now));
  stream.filled = now;
  return stream.allowance < 1 ? std::optional(DropReason::kRate) : std::nullopt;
}

// The picture as the round needs it, and no larger: what the model sees is the same bit for bit.
FramePtr Scheduler::State::ForTheTower(const FramePtr& frame, bool compared) const {
  const PreprocessConfig& config = engine->vlm()->encoder().preprocess_config();
  if (frame->width <= config.width && frame->height <= config.height) return frame;
  ExecContext here{ExecOptions()};
  Frame resized = ResizeForTower(here, *frame, config);
  if (compared) resized.thumbnail = MakeThumbnail(*frame);
  return std::make_shared<const Frame>(std::move(resized));
}

// A frame that must go so that what waits is within queued_bytes, or nothing. REQUIRES: mutex.
std::optional<std::pair<Scheduler::State::StreamPtr, WaitingFrame>> Scheduler::State::TakeForBytes()
    const {
  int64_t bytes = 0;
  StreamPtr most;
  for (const StreamPtr& stream : streams) {
    bytes += stream->queued_bytes;
    if (!most || stream->queued_bytes > most->queued_bytes) most = stream;
  }
  if (options.queued_bytes == 0 || bytes <= options.queued_bytes) return std::nullopt;
  return std::pair(most, most->TakeFrame());
}

void Scheduler::Push(const StreamId& id, FrameNumber number, FramePtr frame) {
  State& state = *state_;
  State::StreamPtr stream;
  std::vector<std::pair<State::StreamPtr, WaitingFrame>> dropped;
  std::optional<DropReason> reason;
  bool compared = false;
  {
    const std::lock_guard lock(state.mutex);
    stream = state.Find(id);
    ++stream->report.frames.pushed;
    state.instruments.pushed->Add();
    reason = state.RefusalOf(*stream, *frame);
    compared = stream->options.duplicate_threshold.has_value();
  }
  // Without the lock, and only what is taken.
  if (!reason) {
    const auto trouble = Try([&] { frame = state.ForTheTower(frame, compared); }, false);
    if (trouble) reason = trouble->memory ? DropReason::kMemory : DropReason::kBadFrame;
  }
  {
    const std::lock_guard lock(state.mutex);
    if (!reason) reason = state.RefusalOf(*stream, *frame);  // it may have ended meanwhile
    if (reason) {
      dropped.emplace_back(stream, WaitingFrame{number, std::move(frame), 0});
    } else {
      if (stream->budget.frames_per_second > 0) stream->allowance -= 1;
      stream->newest = frame->time;
      stream->newest_index = frame->index;
      reason = DropReason::kQueueFull;  // of the ones that make room
      if (static_cast<int>(stream->frames.size()) >= stream->budget.queued_frames) {
        dropped.emplace_back(stream, stream->TakeFrame());
      }
      stream->AddFrame({number, std::move(frame), state.next_order++});
      while (auto too_many = state.TakeForBytes()) dropped.push_back(std::move(*too_many));
    }
  }
  state.changed.notify_all();
  for (auto& [of, waiting] : dropped) state.Drop(*of, {&waiting, 1}, *reason);
}

bool Scheduler::HasRoomForPictures() const {
  const std::lock_guard lock(state_->mutex);
  int64_t bytes = 0;
  for (const State::StreamPtr& stream : state_->streams) bytes += stream->queued_bytes;
  return state_->options.queued_bytes == 0 || bytes <= state_->options.queued_bytes / 2;
}

// Who may be asked that. REQUIRES: mutex.
Scheduler::State::StreamPtr Scheduler::State::FindToAsk(const StreamId& id,
                                                        const StreamQuestion& question) const {
  const StreamPtr stream = Find(id);
  const std::string place = "[scheduler] question " + std::to_string(question.id) + " ";
  if (question.text.find_first_not_of(" \t\r\n") == std::string::npos) {
    throw InputError(place + "is blank; expected some text");
  }
  if (question.generate) CheckGenerateOptions(*question.generate);
  if (draining) throw ResourceExhausted("[scheduler] the scheduler is closing");
  if (!stream->failure.empty()) {
    throw Error(place + "cannot be asked, the stream has ended: " + stream->failure);
  }
  const auto same = [&](const StreamQuestion& other) { return other.id == question.id; };
  bool in_use = stream->asked && same(stream->asked->question);
  for (const WaitingQuestion& waiting : stream->questions) in_use |= same(waiting.question);
  for (const Standing& standing : stream->standing) in_use |= same(standing.what.question);
  if (in_use) throw InputError(place + "has a number that is in use; give it another one");
  return stream;
}

// The ids of a question, made without the lock: it is checked before, so that what is refused
// anyway costs little, and by the caller after. check: REQUIRES mutex.
std::shared_ptr<const QuestionIds> Scheduler::State::Encode(
    const StreamQuestion& question, const std::function<StreamPtr()>& check) const {
  StreamPtr stream;
  {
    const std::lock_guard lock(mutex);
    stream = check();
  }
  return std::make_shared<QuestionIds>(
      EncodeQuestion(*engine->vlm(), question.text, stream->question_tokens));
}

void Scheduler::Ask(const StreamId& id, const StreamQuestion& question) {
  const auto check = [&] {  // REQUIRES: mutex
    const State::StreamPtr stream = state_->FindToAsk(id, question);
    const auto waiting =
        std::count_if(stream->questions.begin(), stream->questions.end(),
                      [](const WaitingQuestion& other) { return !other.standing; });
    if (waiting >= stream->budget.queued_questions) {
      throw ResourceExhausted("[scheduler] " + std::to_string(waiting) +
                              " questions wait, as many as the stream's budget allows; wait for "
                              "an answer or cancel one");
    }
    return stream;
  };
  const auto ids = state_->Encode(question, check);
  {
    const std::lock_guard lock(state_->mutex);
    const State::StreamPtr stream = check();
    stream->questions.push_back(
        {question, ids, state_->next_order++, state_->clock.Now(), false, false, false});
    ++stream->report.questions;
  }
  state_->changed.notify_all();
}

void Scheduler::AskAlways(const StreamId& id, const StandingQuestion& question) {
  if (!(question.interval_seconds > 0 && question.interval_seconds < 1e9)) {
    throw InputError("[scheduler] interval_seconds must be above 0 and below 1e9, got " +
                     std::to_string(question.interval_seconds));
  }
  const auto check = [&] {  // REQUIRES: mutex
    const State::StreamPtr stream = state_->FindToAsk(id, question.question);
    if (static_cast<int>(stream->standing.size()) >= stream->budget.queued_questions) {
      throw ResourceExhausted("[scheduler] " + std::to_string(stream->standing.size()) +
                              " standing questions are asked, as many as the stream's budget of "
                              "questions allows; cancel one");
    }
    return stream;
  };
  const auto ids = state_->Encode(question.question, check);
  const std::lock_guard lock(state_->mutex);
  check()->standing.push_back({question, ids, {}, {}});
}

void Scheduler::Cancel(const StreamId& id, QuestionId question) {
  {
    const std::lock_guard lock(state_->mutex);
    const State::StreamPtr stream = state_->Find(id);
    if (stream->asked && stream->asked->question.id == question) stream->asked->cancelled = true;
    for (WaitingQuestion& waiting : stream->questions) {
      if (waiting.question.id == question) waiting.cancelled = true;
    }
    std::erase_if(stream->standing,
                  [&](const Standing& standing) { return standing.what.question.id == question; });
  }
  state_->changed.notify_all();
}

void Scheduler::SetOptions(const StreamId& id, const SessionOptions& options) {
  const std::lock_guard lock(state_->mutex);
  const State::StreamPtr stream = state_->Find(id);
  CheckChange(stream->options, options);
  stream->options = options;
  stream->options_changed = true;
}

StreamReport Scheduler::Report(const StreamId& id) const {
  const std::lock_guard lock(state_->mutex);
  StreamReport report = state_->Find(id)->report;
  report.frames.waiting = report.frames.pushed - report.frames.encoded - report.frames.dropped;
  return report;
}

StreamReport Scheduler::Close(const StreamId& id) {
  const State::Exclusive exclusive(*state_);
  State::StreamPtr stream;
  {
    const std::lock_guard lock(state_->mutex);
    stream = state_->Find(id);
  }
  if (stream->session) state_->End(*stream, AnswerEnd::kCancelled, "");
  const StreamReport report = Report(id);
  {
    const std::lock_guard lock(state_->mutex);
    std::erase(state_->streams, stream);
    state_->instruments.streams->Set(static_cast<double>(state_->streams.size()));
  }
  state_->UpdateReports();
  return report;
}

std::vector<StreamId> Scheduler::streams() const {
  std::vector<StreamId> ids;
  for (const auto& stream : state_->Streams()) ids.push_back(stream->id);
  return ids;
}

void Scheduler::Drain(double seconds) {
  {
    const std::lock_guard lock(state_->mutex);
    state_->draining = true;
  }
  if (state_->manual) {
    const WallTime begin = state_->clock.Now();
    while (Seconds(begin, state_->clock.Now()) < seconds && RunRound()) {
    }
    return;
  }
  std::unique_lock lock(state_->mutex);
  state_->changed.wait_for(lock, std::chrono::duration<double>(seconds), [&] {
    return state_->turns_taken == state_->turns_over && !state_->HasWork();
  });
}

bool Scheduler::RunRound() {
  const State::Exclusive round(*state_);
  return state_->RunRound();
}

}  // namespace sluice
