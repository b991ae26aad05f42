// sluice load: many sessions against a server at once, and what they got.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "demos/cli/commands.h"
#include "demos/cli/common.h"
#include "demos/cli/help.h"
#include "demos/cli/methods.h"
#include "demos/cli/remote_ask.h"
#include "demos/clients/cpp/client.h"
#include "proto/image_decoder.h"
#include "proto/messages.h"
#include "runtime/error.h"
#include "streaming/source.h"

namespace sluice::cli {
namespace {

using Clock = std::chrono::steady_clock;

struct LoadFlags {
  std::string source;
  RemoteServer remote;
  MethodFlags methods;
  std::string question = "What is there?";
  int sessions = 1;
  double fps = 2;         // pushed a second of wall time by each; 0: as fast as they are taken
  double ask_every = 10;  // seconds of media time; 0: never
  double seconds = 60;
  int64_t frames = 0;  // of each session; 0: as `seconds` say
  std::optional<int> max_new_tokens;
  bool json = false;
};

double Since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// What one session saw. Times in seconds of wall time, at this end.
struct Tally {
  int64_t pushed = 0, encoded = 0, asked = 0, answered = 0, answer_tokens = 0;
  std::map<std::string, int64_t> dropped;  // by reason
  std::vector<double> first_text;          // from asking
  std::vector<double> taken;               // from pushing a frame to its acknowledgement
  std::string error;                       // empty: it ended as it should
  int64_t all_dropped() const {
    int64_t sum = 0;
    for (const auto& [reason, count] : dropped) sum += count;
    return sum;
  }
};

// The pictures of the source, over and over, at times that go on.
class LoadSession {
 public:
  LoadSession(const LoadFlags& flags, const client::Target& target, const v1::Open& open,
              const std::vector<std::string>& pictures, double media_step)
      : flags_(flags),
        pictures_(pictures),
        media_step_(media_step),
        session_(target, open),
        room_(session_.opened().limits().budgets().queued_frames()) {}

  // `offset` seconds after the others' begin, so that they do not push at the same moment.
  Tally Play(double offset) {
    std::thread reader([this] { Read(); });
    try {
      Write(offset);
    } catch (const std::exception& error) {
      Fail(error.what());
    }
    reader.join();
    try {
      session_.Finish();
    } catch (const std::exception& error) {
      Fail(error.what());
    }
    if (tally_.error.empty()) {
      if (!closed_) Fail("[load] the call ended before the stream was closed");
      if (tally_.pushed != tally_.encoded + tally_.all_dropped()) {
        Fail("[load] frames are missing: " + std::to_string(tally_.pushed) + " pushed, " +
             std::to_string(tally_.encoded) + " encoded, " + std::to_string(tally_.all_dropped()) +
             " dropped");
      }
      if (tally_.asked != tally_.answered) {
        Fail("[load] " + std::to_string(tally_.asked) + " questions, but " +
             std::to_string(tally_.answered) + " answers");
      }
    }
    return std::move(tally_);
  }

 private:
  void Fail(const std::string& error) {
    const std::lock_guard lock(mutex_);
    if (tally_.error.empty()) tally_.error = error;
  }

  void Write(double offset) {
    const auto begin = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                          std::chrono::duration<double>(offset));
    double next_question = flags_.ask_every;
    for (int64_t i = 0; flags_.frames > 0 ? i < flags_.frames : Since(begin) < flags_.seconds;
         ++i) {
      if (flags_.fps > 0) {
        std::this_thread::sleep_until(
            begin + std::chrono::duration_cast<Clock::duration>(
                        std::chrono::duration<double>(static_cast<double>(i) / flags_.fps)));
      }
      const double media = static_cast<double>(i) * media_step_;
      {
        std::unique_lock lock(mutex_);
        if (flags_.fps == 0) {
          changed_.wait(lock,
                        [&] { return static_cast<int>(under_way_.size()) < room_ || ended_; });
        }
        if (ended_) return;
        under_way_[i] = Clock::now();
        ++tally_.pushed;
      }
      v1::SessionRequest request;
      request.mutable_frame()->set_number(static_cast<uint64_t>(i));
      request.mutable_frame()->set_media_seconds(media);
      request.mutable_frame()->set_jpeg(pictures_[i % pictures_.size()]);
      if (!session_.Send(request)) return;
      if (flags_.ask_every > 0 && media + media_step_ >= next_question) {
        next_question += flags_.ask_every;
        Ask();
      }
    }
    v1::SessionRequest request;
    request.mutable_close();
    session_.Send(request);
  }

  void Ask() {
    v1::SessionRequest request;
    {
      const std::lock_guard lock(mutex_);
      request.mutable_ask()->set_question_id(static_cast<uint64_t>(++tally_.asked));
      questions_[request.ask().question_id()] = Clock::now();
    }
    request.mutable_ask()->set_text(flags_.question);
    session_.Send(request);
  }

  void Read() {
    while (const auto message = session_.Read()) {
      const std::lock_guard lock(mutex_);
      Take(*message);
      changed_.notify_all();
    }
    const std::lock_guard lock(mutex_);
    ended_ = true;
    changed_.notify_all();
  }

  void Take(const v1::SessionResponse& message) {
    if (message.has_frame_ack()) {
      const auto frame = under_way_.extract(static_cast<int64_t>(message.frame_ack().number()));
      if (!frame.empty()) tally_.taken.push_back(Since(frame.mapped()));
      ++tally_.encoded;
    } else if (message.has_frame_dropped()) {
      under_way_.erase(static_cast<int64_t>(message.frame_dropped().number()));
      ++tally_.dropped[v1::DropReason_Name(message.frame_dropped().reason())];
    } else if (message.has_text()) {
      FirstText(message.text().question_id());
    } else if (message.has_answer()) {
      const v1::StreamAnswer& answer = message.answer();
      FirstText(answer.question_id());
      ++tally_.answered;
      tally_.answer_tokens += answer.usage().answer_tokens();
      if (!answer.error().empty() && tally_.error.empty()) tally_.error = answer.error();
    } else if (message.has_refused() && tally_.error.empty()) {
      tally_.error = message.refused().error();
    } else if (message.has_closed()) {
      closed_ = true;
    }
  }

  void FirstText(uint64_t question) {
    const auto asked = questions_.extract(question);
    if (!asked.empty()) tally_.first_text.push_back(Since(asked.mapped()));
  }

  const LoadFlags& flags_;
  const std::vector<std::string>& pictures_;
  const double media_step_;
  client::Session session_;
  const int room_;  // frames that may be under way
  std::mutex mutex_;
  std::condition_variable changed_;
  Tally tally_;
  std::map<int64_t, Clock::time_point> under_way_;
  std::map<uint64_t, Clock::time_point> questions_;
  bool closed_ = false, ended_ = false;
};

// Of values in any order, in milliseconds; null of none.
Json Quantile(std::vector<double> values, double share) {
  if (values.empty()) return nullptr;
  std::sort(values.begin(), values.end());
  const double at = std::ceil(share * static_cast<double>(values.size())) - 1;
  return 1e3 * values[static_cast<size_t>(std::max(at, 0.0))];
}

Json Quantiles(const std::vector<double>& seconds) {
  return {{"p50", Quantile(seconds, 0.5)}, {"p99", Quantile(seconds, 0.99)}};
}

void PrintQuantiles(const char* what, const Json& ms) {
  if (ms["p50"].is_null()) {
    std::printf("%s: none\n", what);
    return;
  }
  std::printf("%s: %.0f ms (p50), %.0f ms (p99)\n", what, ms["p50"].get<double>(),
              ms["p99"].get<double>());
}

std::vector<std::string> Pictures(const std::string& name, double fps) {
  SourceOptions options;
  options.rate.fps = fps;
  options.max_frames = 256;
  const auto source = Source::Open(name, options);
  std::vector<std::string> pictures;
  while (const FramePtr frame = source->Next()) pictures.push_back(EncodeJpeg(*frame));
  return pictures;
}

void Load(const LoadFlags& flags) {
  constexpr double kMediaFps = 2;  // of sessions that push as fast as they can
  const double fps = flags.fps > 0 ? flags.fps : kMediaFps;
  const std::vector<std::string> pictures = Pictures(
      flags.source.empty() ? BundledPath("demos/clips/parade.mp4").string() : flags.source, fps);
  const client::Target target = TargetOf(flags.remote);
  v1::Open open;
  SessionOptions options;
  ApplyMethods(flags.methods, options);
  *open.mutable_options() = ToProto(options);
  v1::Generation& generation = *open.mutable_options()->mutable_generation();
  generation.Clear();  // as the server's checkpoint says
  if (flags.max_new_tokens) generation.set_max_new_tokens(*flags.max_new_tokens);

  std::vector<Tally> tallies(flags.sessions);
  const auto begin = Clock::now();
  {
    std::vector<std::thread> threads;
    for (int s = 0; s < flags.sessions; ++s) {
      threads.emplace_back([&, s] {
        try {
          LoadSession session(flags, target, open, pictures, 1 / fps);
          tallies[s] = session.Play(s / fps / flags.sessions);
        } catch (const std::exception& error) {
          tallies[s].error = error.what();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  const double seconds = Since(begin);

  Tally all;
  int64_t failed = 0;
  for (const Tally& tally : tallies) {
    all.pushed += tally.pushed;
    all.encoded += tally.encoded;
    all.answered += tally.answered;
    all.answer_tokens += tally.answer_tokens;
    for (const auto& [reason, count] : tally.dropped) all.dropped[reason] += count;
    all.first_text.insert(all.first_text.end(), tally.first_text.begin(), tally.first_text.end());
    all.taken.insert(all.taken.end(), tally.taken.begin(), tally.taken.end());
    if (tally.error.empty()) continue;
    ++failed;
    if (all.error.empty()) all.error = tally.error;
  }
  Json json = {
      {"sessions", flags.sessions},
      {"failed_sessions", failed},
      {"seconds", seconds},
      {"frames", {{"pushed", all.pushed}, {"encoded", all.encoded}, {"dropped", all.dropped}}},
      {"frames_per_second", static_cast<double>(all.encoded) / seconds},
      {"answers", all.answered},
      {"answer_tokens_per_second", static_cast<double>(all.answer_tokens) / seconds},
      {"first_text_ms", Quantiles(all.first_text)},
      {"frame_taken_ms", Quantiles(all.taken)}};
  if (flags.json) {
    PrintJson(json);
  } else {
    std::printf("%d sessions for %.1f s, %lld of them failed\n", flags.sessions, seconds,
                static_cast<long long>(failed));
    std::printf("frames: %lld pushed = %lld encoded + %lld dropped; %.1f encoded a second\n",
                static_cast<long long>(all.pushed), static_cast<long long>(all.encoded),
                static_cast<long long>(all.all_dropped()),
                static_cast<double>(all.encoded) / seconds);
    for (const auto& [reason, count] : all.dropped) {
      std::printf("  %s: %lld\n", reason.c_str(), static_cast<long long>(count));
    }
    std::printf("answers: %lld, %.1f tokens a second\n", static_cast<long long>(all.answered),
                static_cast<double>(all.answer_tokens) / seconds);
    PrintQuantiles("from asking to the first text", json["first_text_ms"]);
    PrintQuantiles("from pushing a frame to its place in memory", json["frame_taken_ms"]);
  }
  if (failed > 0) throw Error(all.error);
}

}  // namespace

void AddLoad(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "load", "Play many sessions against a server at once and print what they got");
  auto flags = std::make_shared<LoadFlags>();
  AddServerFlags(*command, flags->remote)->required();
  command->add_option("--source", flags->source,
                      "What each session sees, over and over (as of sluice ask; default: the "
                      "bundled clip)");
  command->add_option("--sessions", flags->sessions, "Sessions at a time")
      ->capture_default_str()
      ->check(CLI::Range(1, 10000));
  command
      ->add_option("--fps", flags->fps,
                   "Frames a second that each pushes; 0: the next when there is room for it")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1000.0));
  command
      ->add_option("--ask-every", flags->ask_every,
                   "Seconds of media time between questions; 0: none")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1e6));
  command->add_option("--question", flags->question, "What is asked")->capture_default_str();
  command
      ->add_option("--max-new-tokens", flags->max_new_tokens,
                   "Longest answer (default: what the server's checkpoint says, else 128)")
      ->check(CLI::Range(1, 100000));
  auto* seconds = command->add_option("--seconds", flags->seconds, "How long they go on")
                      ->capture_default_str()
                      ->check(CLI::Range(0.1, 1e6));
  command->add_option("--frames", flags->frames, "Frames that each pushes, however long it takes")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40))
      ->excludes(seconds);
  AddMethodFlags(*command, flags->methods);
  command->add_flag("--json", flags->json, "Print one JSON object");
  ShowFirst(*command, {"--server", "--token-file", "--source", "--sessions", "--fps", "--seconds",
                       "--question", "--json"});
  command->callback([flags] { Load(*flags); });
}

}  // namespace sluice::cli
