// sluice ask: plays a source and answers questions at their times.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "demos/cli/commands.h"
#include "demos/cli/common.h"
#include "demos/cli/help.h"
#include "demos/cli/methods.h"
#include "demos/cli/questions.h"
#include "demos/cli/remote_ask.h"
#include "proto/convert.h"
#include "proto/messages.h"
#include "runtime/error.h"
#include "streaming/defaults.h"
#include "streaming/logging.h"
#include "streaming/source.h"

namespace sluice::cli {
namespace {

struct AskFlags {
  RemoteServer remote;
  ModelFlags model;
  MethodFlags methods;
  std::string source;
  std::vector<std::string> questions;
  std::string question_file;
  SamplingRate rate;
  std::string begin, end;  // empty: none
  double stall_seconds = 10;
  int reconnect = ReconnectOptions().most_tries;
  int64_t max_frames = 0;
  std::optional<float> temperature, top_p;
  std::optional<int> top_k, max_new_tokens;
  uint64_t seed = 0;
  bool no_dialogue = false;
  bool no_memory = false;
  std::string system_prompt;
  int require_right = 0;
  bool json = false;
  bool stats = false;
};

volatile std::sig_atomic_t interrupted = 0;

// The first Ctrl-C ends the source, so that questions about its end are still answered; a second
// one ends the program.
extern "C" void OnInterrupt(int) {
  interrupted = 1;
  std::signal(SIGINT, SIG_DFL);
}

// Of --begin and --end.
MediaTime TimeOfFlag(const std::string& flag, const std::string& text) {
  const std::optional<double> seconds = ParseTime(text);
  if (!seconds) {
    throw InputError("[ask] " + flag + ": expected a time, as 75, 75.5, 1:15 or 0:01:15.5, got '" +
                     text + "'");
  }
  return MediaTime::FromSeconds(*seconds);
}

// What a source tells while it is read: at once on stderr, and all of it for the report.
// Thread-safe.
class Warnings {
 public:
  void Add(const std::string& line) {
    constexpr size_t kMost = 1000;  // of a stream that runs for days
    Logger()->warn("{}", line);
    const std::lock_guard lock(mutex_);
    if (lines_.size() < kMost) lines_.push_back(line);
  }
  std::vector<std::string> Take() {
    const std::lock_guard lock(mutex_);
    return std::move(lines_);
  }

 private:
  std::mutex mutex_;
  std::vector<std::string> lines_;
};

// What the flags say.
void ApplyGeneration(const AskFlags& flags, GenerateOptions& options) {
  if (flags.max_new_tokens) options.max_new_tokens = *flags.max_new_tokens;
  if (flags.temperature) options.sampling.temperature = *flags.temperature;
  if (flags.top_k) options.sampling.top_k = *flags.top_k;
  if (flags.top_p) options.sampling.top_p = *flags.top_p;
  options.sampling.seed = flags.seed;
}

std::vector<ExpectedQuestion> GatherQuestions(const AskFlags& flags) {
  std::vector<ExpectedQuestion> questions;
  for (const std::string& argument : flags.questions) {
    questions.push_back({ParseTimedQuestion(argument), std::nullopt});
  }
  if (!flags.question_file.empty()) {
    for (auto& question : ReadQuestions(flags.question_file, flags.source)) {
      questions.push_back(std::move(question));
    }
  }
  if (questions.empty()) {
    throw InputError("[ask] expected at least one --question or --questions, found none");
  }
  return questions;
}

// Prints the run as it goes on: answers on stdout, the progress bar on stderr.
class Narrator {
 public:
  Narrator(bool quiet, const std::vector<ExpectedQuestion>& questions, Source& source)
      : quiet_(quiet), questions_(questions), source_(source) {}

  RunObserver Observer() {
    RunObserver observer;
    observer.on_open = [this](const SourceInfo& info) {
      duration_ = info.duration;
      begin_ = std::chrono::steady_clock::now();
    };
    observer.on_frame = [this](const Frame& frame, int64_t seen) { OnFrame(frame, seen); };
    observer.on_question = [this](const TimedQuestion& question, MediaTime now) {
      progress_.Clear();
      if (!quiet_) std::printf("[%s] %s\n  ", now.ToString().c_str(), question.text.c_str());
    };
    observer.on_text = [this](std::string_view piece) {
      if (!quiet_) {
        std::fwrite(piece.data(), 1, piece.size(), stdout);
        std::fflush(stdout);
      }
      return true;
    };
    observer.on_answer = [this](const TimedAnswer& answer) { OnAnswer(answer); };
    return observer;
  }

  int right() const { return right_; }
  int judged() const { return judged_; }
  void Finish() { progress_.Clear(); }

 private:
  void OnFrame(const Frame& frame, int64_t seen) {
    if (interrupted) source_.Cancel();
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin_;
    char rate[32];
    std::snprintf(rate, sizeof rate, "%.1f", static_cast<double>(seen) / elapsed.count());
    const double fraction = duration_ && duration_->nanoseconds() > 0
                                ? frame.time.seconds() / duration_->seconds()
                                : -1;
    progress_.Show(fraction, frame.time.ToString() +
                                 (duration_ ? " of " + duration_->ToString() : "") + "  " +
                                 std::to_string(seen) + " frames  " + rate + " frames/s");
  }

  void OnAnswer(const TimedAnswer& answer) {
    const std::string* expected = Expected(answer.question);
    const bool right = expected != nullptr && *expected == answer.generated.text;
    if (expected != nullptr) {
      ++judged_;
      right_ += right ? 1 : 0;
    }
    if (quiet_) return;
    if (answer.generated.reason != FinishReason::kStop) {
      std::printf(" [%s]", Name(answer.generated.reason));
    }
    if (expected == nullptr) {
      std::printf("\n");
    } else if (right) {
      std::printf("  (right)\n");
    } else {
      std::printf("  (wrong: it is \"%s\")\n", expected->c_str());
    }
    PrintEvidence(answer.generated);
    std::fflush(stdout);
  }

  // The moments that an answer rests on most.
  static void PrintEvidence(const Generated& generated) {
    constexpr size_t kMost = 3;
    std::vector<Evidence> evidence = generated.evidence;
    std::stable_sort(evidence.begin(), evidence.end(),
                     [](const Evidence& a, const Evidence& b) { return a.weight > b.weight; });
    if (evidence.size() > kMost) evidence.resize(kMost);
    for (const Evidence& e : evidence) {
      std::printf("  from %s to %s: %s %% of the attention to recalled frames\n",
                  e.begin.ToString().c_str(), e.end.ToString().c_str(), Percent(e.weight).c_str());
    }
  }

  // The answer that is right for this question at this time, if the question file told it.
  const std::string* Expected(const TimedQuestion& question) const {
    for (const ExpectedQuestion& known : questions_) {
      if (known.answer && known.question.text == question.text &&
          known.question.at == question.at) {
        return &*known.answer;
      }
    }
    return nullptr;
  }

  const bool quiet_;
  const std::vector<ExpectedQuestion>& questions_;
  Source& source_;
  Progress progress_;
  std::optional<MediaTime> duration_;
  std::chrono::steady_clock::time_point begin_;
  int right_ = 0, judged_ = 0;
};

void Ask(const AskFlags& flags) {
  const std::vector<ExpectedQuestion> questions = GatherQuestions(flags);
  SourceOptions source_options;
  source_options.rate = flags.rate;
  if (!flags.begin.empty()) source_options.begin = TimeOfFlag("--begin", flags.begin);
  if (!flags.end.empty()) source_options.end = TimeOfFlag("--end", flags.end);
  source_options.stall_timeout =
      std::chrono::milliseconds(std::llround(flags.stall_seconds * 1000));
  source_options.reconnect.most_tries = flags.reconnect;
  Warnings warnings;
  source_options.on_warning = [&warnings](const std::string& line) { warnings.Add(line); };
  source_options.max_frames = flags.max_frames;
  // The source first: a mistyped path should not wait for a large checkpoint.
  const std::unique_ptr<Source> source = Source::Open(flags.source, source_options);

  SessionOptions session_options;
  session_options.system_prompt = flags.system_prompt;
  session_options.keep_dialogue = !flags.no_dialogue;
  ApplyMethods(flags.methods, session_options);
  std::vector<TimedQuestion> timed;
  timed.reserve(questions.size());
  for (const ExpectedQuestion& question : questions) timed.push_back(question.question);
  const bool default_memory = !flags.methods.memory && !flags.no_memory;
  Narrator narrator(flags.json, questions, *source);
  Tracer tracer;
  RunResult result;
  if (!flags.remote.server.empty()) {
    v1::ModelOptions options = ToProto(session_options);
    v1::Generation& generation = *options.mutable_generation();
    generation.Clear();
    // What is not set is as the server's checkpoint says.
    if (flags.max_new_tokens) generation.set_max_new_tokens(*flags.max_new_tokens);
    if (flags.temperature) generation.set_temperature(*flags.temperature);
    if (flags.top_k) generation.set_top_k(*flags.top_k);
    if (flags.top_p) generation.set_top_p(*flags.top_p);
    generation.set_seed(flags.seed);
    std::signal(SIGINT, OnInterrupt);
    if (default_memory) options.clear_no_memory();  // the server has its own
    result = RunRemote(flags.remote, options, *source, timed, narrator.Observer());
  } else {
    const Engine engine = OpenEngine(flags.model);
    session_options.generate = RecommendedGeneration(engine.vlm()->generation_defaults());
    ApplyGeneration(flags, session_options.generate);
    std::optional<std::string> no_memory;
    if (default_memory) {
      no_memory = AddDefaultMemory(*engine.vlm(), BlockStoreOptions(), 0, session_options);
    }
    const auto session = engine.NewSession(session_options);
    for (const std::string& line : {no_memory.value_or(""), engine.vlm()->info().notice}) {
      if (!line.empty()) warnings.Add(line);
    }
    const auto context = engine.NewContext();
    std::signal(SIGINT, OnInterrupt);
    result = Run(*context, *session, *source, timed, narrator.Observer());
    tracer = context->tracer();
  }
  narrator.Finish();
  std::signal(SIGINT, SIG_DFL);

  for (const std::string& line : result.warnings) Logger()->warn("{}", line);  // of a server
  for (std::string& line : warnings.Take()) result.warnings.push_back(std::move(line));
  if (result.warning) Logger()->warn("{}", *result.warning);
  for (const TimedAnswer& answer : result.answers) {
    if (!answer.note.empty()) Logger()->warn("{}", answer.note);
  }
  if (result.queue.dropped > 0) {
    Logger()->warn("{} of {} frames were dropped: the source is faster than this machine",
                   result.queue.dropped, result.queue.pushed);
  }
  if (flags.json) {
    std::printf("%s\n", RunReportJson(result, tracer).c_str());
  } else if (flags.stats) {
    std::printf("\n%s", StageTable(tracer).c_str());
  }
  if (narrator.judged() > 0 && !flags.json) {
    std::printf("\n%d of %d answers are right\n", narrator.right(), narrator.judged());
  }
  if (!result.error.empty()) {
    throw Error(result.error +
                " (questions that were not asked: " + std::to_string(result.not_asked) + ")");
  }
  if (narrator.right() < flags.require_right) {
    throw Error("[ask] expected at least " + std::to_string(flags.require_right) +
                " right answers, got " + std::to_string(narrator.right()) + " of " +
                std::to_string(narrator.judged()));
  }
}

}  // namespace

void AddAsk(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("ask", "Play a source and answer questions about it at their times");
  auto flags = std::make_shared<AskFlags>();
  command
      ->add_option("--source", flags->source,
                   "File, named pipe, - (standard input), file://, http(s)://, rtsp://, "
                   "camera[:/dev/videoN] or test[:PATTERN[:S]]")
      ->required();
  command
      ->add_option(
          "--question", flags->questions,
          "Question, asked at the end or @TIME of the video, in seconds or as 1:15: \"What "
          "is there?@3.5\"; may be given several times")
      ->allow_extra_args(false);
  command->add_option("--questions", flags->question_file,
                      "JSONL file of questions with their times and right answers, as `sluice "
                      "render` writes it");
  command->add_option("--require-right", flags->require_right,
                      "Fail unless at least so many answers equal the file's");
  auto* server = AddServerFlags(*command, flags->remote);
  AddModelFlags(*command, flags->model);
  for (const char* local : {"--model", "--dtype", "--weights", "--threads", "--attention"}) {
    command->get_option(local)->excludes(server);
  }
  AddMethodFlags(*command, flags->methods);
  command
      ->add_flag("--no-memory", flags->no_memory,
                 "End with the context: without it, the oldest frames of a video that is longer "
                 "leave the context and are recalled for each question")
      ->excludes("--memory")
      ->group(kMethodGroup);
  auto* fps = command->add_option("--fps", flags->rate.fps, "Frames to look at per second of media")
                  ->capture_default_str()
                  ->check(FiniteRange(0.001, 1000.0));
  command->add_option("--every-nth", flags->rate.every_nth, "Look at every N-th frame instead")
      ->check(CLI::Range(1, 1000000))
      ->excludes(fps);
  command->add_option("--begin", flags->begin,
                      "Begin at this time of a file: seconds or [HOURS:]MINUTES:SECONDS");
  command->add_option("--end", flags->end, "End at this time of a file");
  command
      ->add_option("--stall-seconds", flags->stall_seconds,
                   "A source that delivers nothing for so long has failed; pipes are waited for")
      ->capture_default_str()
      ->check(FiniteRange(0.1, 86400.0));
  command
      ->add_option(
          "--reconnect", flags->reconnect,
          "How often in a row a live source that broke is opened again, after pauses of 1, "
          "2, 4 to 30 s; 0: never, -1: for ever")
      ->capture_default_str()
      ->check(CLI::Range(-1, 1000000));
  command->add_option("--max-frames", flags->max_frames, "End after so many frames")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40));
  command
      ->add_option("--max-new-tokens", flags->max_new_tokens,
                   "Longest answer (default: what the checkpoint says, else 128)")
      ->check(CLI::Range(1, 1 << 20));
  command->add_option("--temperature", flags->temperature,
                      "0: always the likeliest token (default: what the checkpoint says)");
  command->add_option(
      "--top-k", flags->top_k,
      "Choose among the k likeliest tokens; 0: among all (default: what the checkpoint "
      "says, else 50)");
  command->add_option("--top-p", flags->top_p, "Choose among the likeliest tokens of this mass");
  command->add_option("--seed", flags->seed, "Of the choice")->capture_default_str();
  command->add_flag("--no-dialogue", flags->no_dialogue,
                    "Each question on its own, without earlier ones and their answers");
  command->add_option("--system", flags->system_prompt, "System prompt");
  command->add_flag("--json", flags->json,
                    "Print one JSON object (sluice.v1.RunReport) at the end");
  command->add_flag("--stats", flags->stats, "Print what each stage cost");
  ShowFirst(*command, {"--source", "--question", "--model", "--device", "--server", "--token-file",
                       "--fps", "--preset", "--max-new-tokens", "--system", "--json"});
  command->callback([flags] { Ask(*flags); });
}

}  // namespace sluice::cli
