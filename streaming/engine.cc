#include "streaming/engine.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <thread>
#include <utility>

#include "runtime/cpu_info.h"
#include "runtime/error.h"
#include "streaming/pipeline.h"

namespace sluice {
namespace {

using std::chrono::steady_clock;

double SecondsSince(steady_clock::time_point begin) {
  return std::chrono::duration<double>(steady_clock::now() - begin).count();
}

std::string LineOf(const std::exception_ptr& failure) {
  try {
    std::rethrow_exception(failure);
  } catch (const std::exception& error) {
    return error.what();
  }
}

// Decodes `source` into `queue` on a thread of its own until the stream ends or either side stops.
class Producer {
 public:
  Producer(Source& source, FrameQueue& queue) : source_(source), queue_(queue) {
    thread_ = std::thread([this] { Produce(); });
  }
  // Leaving early, by an exception, stops the source.
  ~Producer() {
    if (!thread_.joinable()) return;
    source_.Cancel();
    queue_.Cancel();
    thread_.join();
  }
  Producer(const Producer&) = delete;
  Producer& operator=(const Producer&) = delete;

  // Waits for the end and returns what went wrong there, if anything.
  std::exception_ptr Finish() {
    thread_.join();
    return error_;
  }

 private:
  void Produce() {
    try {
      while (FramePtr frame = source_.Next()) {
        if (!queue_.Push(std::move(frame))) break;
      }
    } catch (...) {
      error_ = std::current_exception();
    }
    queue_.CloseInput();
  }

  Source& source_;
  FrameQueue& queue_;
  std::exception_ptr error_;
  std::thread thread_;
};

// One run: batches on their way into the session, questions on their way to be asked.
class Player {
 public:
  Player(ExecContext& ctx, Session& session, std::vector<TimedQuestion> questions,
         const RunObserver& observer)
      : ctx_(ctx), session_(session), questions_(std::move(questions)), observer_(observer) {
    std::stable_sort(questions_.begin(), questions_.end(),
                     [](const TimedQuestion& a, const TimedQuestion& b) {
                       return a.at && (!b.at || *a.at < *b.at);
                     });
  }

  // Questions that are due before `frame` see what came before it, so they cut the batch.
  void Add(FramePtr frame) {
    if (next_ < questions_.size() && questions_[next_].at && *questions_[next_].at < frame->time) {
      Flush();
      AskBefore(frame->time);
    }
    batch_.push_back(std::move(frame));
    if (static_cast<int>(batch_.size()) >= session_.options.frames_per_batch) Flush();
  }

  void Flush() {
    Ingest(ctx_, session_, batch_);
    const auto before = session_.frames_seen - static_cast<int64_t>(batch_.size());
    for (size_t i = 0; i < batch_.size() && observer_.on_frame; ++i) {
      observer_.on_frame(*batch_[i], before + static_cast<int64_t>(i) + 1);
    }
    batch_.clear();
  }

  // Nothing is left to do before the next frame.
  void CatchUp() {
    Flush();
    ReadWaiting(ctx_, session_);
  }

  int64_t left() const { return static_cast<int64_t>(questions_.size() - next_); }

  void AskTheRest(const SourceInfo& source) {
    while (next_ < questions_.size()) {
      AskNext(NoteOfLateTime(questions_[next_], source, session_.last_time));
    }
  }

  std::vector<TimedAnswer> answers;

 private:
  void AskBefore(MediaTime time) {
    while (next_ < questions_.size() && questions_[next_].at && *questions_[next_].at < time) {
      AskNext();
    }
  }

  void AskNext(std::string note = "") {
    const TimedQuestion& question = questions_[next_++];
    TimedAnswer answer;
    answer.note = std::move(note);
    answer.question = question;
    answer.asked_at = session_.last_time;
    answer.frames_seen = session_.frames_seen;
    if (observer_.on_question) observer_.on_question(question, answer.asked_at);
    const auto begin = steady_clock::now();
    const TextSink sink = [&](std::string_view piece) {
      if (answer.first_token_seconds == 0) answer.first_token_seconds = SecondsSince(begin);
      return !observer_.on_text || observer_.on_text(piece);
    };
    answer.generated = Ask(ctx_, session_, question.text, sink);
    answer.total_seconds = SecondsSince(begin);
    if (observer_.on_answer) observer_.on_answer(answer);
    answers.push_back(std::move(answer));
  }

  ExecContext& ctx_;
  Session& session_;
  std::vector<TimedQuestion> questions_;  // in the order in which they are due
  size_t next_ = 0;
  std::vector<FramePtr> batch_;
  const RunObserver& observer_;
};

}  // namespace

Engine::Engine(const EngineOptions& options)
    : Engine(Vlm::Load(options.model, options.vlm), options) {}

Engine::Engine(std::shared_ptr<const Vlm> vlm, const EngineOptions& options)
    : vlm_(std::move(vlm)),
      num_threads_(options.num_threads > 0 ? options.num_threads
                                           : CpuInfo::Detect().physical_cores) {
  if (options.num_threads < 0 || options.kv_budget_bytes < 0) {
    throw InputError("[engine] num_threads and kv_budget_bytes must not be negative, got " +
                     std::to_string(options.num_threads) + " and " +
                     std::to_string(options.kv_budget_bytes));
  }
  pool_ = std::make_shared<KvBlockPool>(vlm_->decoder().kv_geometry(), options.kv_budget_bytes);
}

std::unique_ptr<Session> Engine::NewSession(const SessionOptions& options) const {
  return std::make_unique<Session>(vlm_, pool_, options);
}

std::unique_ptr<ExecContext> Engine::NewContext() const {
  return std::make_unique<ExecContext>(
      ExecOptions{.num_threads = num_threads_, .device = vlm_->info().device});
}

std::string NoteOfLateTime(const TimedQuestion& question, const SourceInfo& source,
                           MediaTime last) {
  // Frames are samples: the end lies a little after the last one.
  const MediaTime end = source.duration.value_or(last + MediaTime::FromSeconds(1));
  if (!question.at || *question.at <= std::max(end, last)) return "";
  return "[ask] '" + question.text.substr(0, 64) + "' was to be asked at " +
         question.at->ToString() + ", after the end of the video; it was asked at its end, about " +
         "all frames up to " + last.ToString();
}

RunResult Run(ExecContext& ctx, Session& session, Source& source,
              std::vector<TimedQuestion> questions, const RunObserver& observer) {
  RunResult result;
  result.source = source.info();
  if (observer.on_open) observer.on_open(result.source);
  for (const TimedQuestion& question : questions) {
    EncodeQuestion(*session.vlm, question.text, MostQuestionTokens(session));  // or refuses
  }
  const bool live = result.source.live;
  const int64_t frames_before = session.frames_seen;
  const auto duplicates = [&] {
    return session.duplicates ? session.duplicates->duplicates() : int64_t{0};
  };
  const int64_t duplicates_before = duplicates();

  FrameQueue queue(static_cast<size_t>(session.options.frames_per_batch),
                   live ? DropPolicy::kDropOldest : DropPolicy::kNone);
  Player player(ctx, session, std::move(questions), observer);
  Producer producer(source, queue);
  while (FramePtr frame = queue.Pop()) {
    player.Add(std::move(frame));
    if (live && queue.waiting() == 0) player.CatchUp();
  }
  player.Flush();
  if (const std::exception_ptr failure = producer.Finish()) {
    if (player.answers.empty()) std::rethrow_exception(failure);
    result.error = LineOf(failure);
    result.not_asked = player.left();
  } else {
    player.AskTheRest(result.source);
  }

  result.answers = std::move(player.answers);
  result.queue = queue.counts();
  result.frames = session.frames_seen - frames_before;
  result.duplicates = duplicates() - duplicates_before;
  result.warning = source.warning();
  return result;
}

}  // namespace sluice
