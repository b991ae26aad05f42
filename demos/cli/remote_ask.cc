#include "demos/cli/remote_ask.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <fstream>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "proto/image_decoder.h"
#include "proto/messages.h"
#include "runtime/error.h"

namespace sluice::cli {
namespace {

std::string ReadText(const std::string& file) {
  if (file.empty()) return "";
  std::ifstream in(file, std::ios::binary);
  std::stringstream text;
  text << in.rdbuf();
  if (!in) throw InputError("[client] cannot read " + file);
  return text.str();
}

// The first line, as a header may hold it: visible ASCII.
std::string ReadToken(const std::string& file) {
  std::string token = ReadText(file);
  token.resize(std::min(token.size(), token.find('\n')));
  if (token.ends_with('\r')) token.pop_back();
  for (size_t i = 0; i < token.size(); ++i) {
    const auto c = static_cast<unsigned char>(token[i]);
    if (c > ' ' && c < 0x7f) continue;
    throw InputError("[client] the first line of " + file +
                     " must be a token of visible ASCII characters, got byte " +
                     std::to_string(int{c}) + " as number " + std::to_string(i + 1));
  }
  if (!file.empty() && token.empty()) {
    throw InputError("[client] the first line of " + file + " must be a token, got an empty one");
  }
  return token;
}

// One run. Frames go out as long as the server has room for them; questions are waited for.
class RemoteRun {
 public:
  RemoteRun(client::Session& session, const RunObserver& observer, RunResult& result)
      : session_(session), observer_(observer), result_(result) {}

  void Push(const Frame& frame) {
    v1::SessionRequest request;
    v1::Frame& message = *request.mutable_frame();
    message.set_number(static_cast<uint64_t>(result_.queue.pushed));
    message.set_media_seconds(frame.time.seconds());
    const v1::Limits& limits = session_.opened().limits();
    constexpr int64_t kEnvelope = 1024;  // bytes of a message beside the picture, and to spare
    if (static_cast<int64_t>(frame.rgb.size()) + kEnvelope <= limits.message_bytes()) {
      message.mutable_rgb()->set_width(frame.width);
      message.mutable_rgb()->set_height(frame.height);
      message.mutable_rgb()->set_data(frame.rgb.data(), frame.rgb.size());
    } else {
      message.set_jpeg(EncodeJpeg(frame));
    }
    while (under_way_ >= limits.budgets().queued_frames()) ReadOne();
    Send(request);
    ++under_way_;
    ++result_.queue.pushed;
    ++result_.frames;
    last_ = frame.time;
    if (observer_.on_frame) observer_.on_frame(frame, result_.frames);
  }

  // source: once it has ended.
  void Ask(const TimedQuestion& question, const SourceInfo* source = nullptr) {
    note_ = source ? NoteOfLateTime(question, *source, last_) : "";
    if (observer_.on_question) observer_.on_question(question, last_);
    v1::SessionRequest request;
    request.mutable_ask()->set_question_id(++questions_);
    request.mutable_ask()->set_text(question.text);
    Send(request);
    asked_ = question;
    while (asked_) ReadOne();
  }

  void Close() {
    v1::SessionRequest request;
    request.mutable_close();
    Send(request);
    while (!closed_) ReadOne();
    session_.Finish();
  }

 private:
  void Send(const v1::SessionRequest& request) {
    if (session_.Send(request)) return;
    while (session_.Read()) continue;
    session_.Finish();  // throws what the server said
  }

  void ReadOne() {
    const auto message = session_.Read();
    if (!message) {
      session_.Finish();
      throw Error("[ask] the server ended the session");
    }
    if (message->has_frame_ack()) --under_way_;
    if (message->has_frame_dropped()) OnDropped(message->frame_dropped());
    if (message->has_text() && observer_.on_text && !observer_.on_text(message->text().text())) {
      v1::SessionRequest request;
      request.mutable_cancel()->set_question_id(message->text().question_id());
      Send(request);
    }
    if (message->has_answer()) OnAnswer(message->answer());
    if (message->has_refused()) throw InputError(message->refused().error());
    if (message->has_warning()) result_.warnings.push_back(message->warning().line());
    closed_ |= message->has_closed();
  }

  void OnDropped(const v1::FrameDropped& dropped) {
    --under_way_;
    if (dropped.reason() == v1::DROP_REASON_DUPLICATE) {
      ++result_.duplicates;
      return;
    }
    if (dropped.reason() == v1::DROP_REASON_BAD_FRAME) throw InputError(dropped.detail());
    ++result_.queue.dropped;
  }

  void OnAnswer(const v1::StreamAnswer& answer) {
    if (answer.end() == v1::ANSWER_END_FAILED || answer.end() == v1::ANSWER_END_MEMORY) {
      throw Error(answer.error());
    }
    TimedAnswer timed;
    timed.question = *asked_;
    timed.asked_at = MediaTimeOf(answer.asked_at_media_seconds());
    timed.frames_seen = answer.frames_seen();
    timed.generated.text = answer.text();
    timed.generated.reason = answer.end() == v1::ANSWER_END_STOP     ? FinishReason::kStop
                             : answer.end() == v1::ANSWER_END_LENGTH ? FinishReason::kLength
                                                                     : FinishReason::kCancelled;
    for (const v1::Evidence& moment : answer.evidence()) {
      timed.generated.evidence.push_back(FromProto(moment));
    }
    timed.generated.no_evidence = answer.no_evidence();
    timed.note = std::move(note_);
    timed.first_token_seconds = answer.usage().first_token_seconds();
    timed.total_seconds = answer.usage().total_seconds();
    result_.answers.push_back(timed);
    if (observer_.on_answer) observer_.on_answer(timed);
    asked_.reset();
  }

  client::Session& session_;
  const RunObserver& observer_;
  RunResult& result_;
  int64_t under_way_ = 0;
  uint64_t questions_ = 0;
  MediaTime last_;
  std::optional<TimedQuestion> asked_;
  std::string note_;
  bool closed_ = false;
};

}  // namespace

CLI::Option* AddServerFlags(CLI::App& command, RemoteServer& flags) {
  auto* server = command.add_option("--server", flags.server,
                                    "Let the server at HOST:PORT answer (sluice serve)");
  command.add_option("--token-file", flags.token_file, "File that holds its token")->needs(server);
  command
      .add_option("--ca-file", flags.ca_file,
                  "Connect with TLS to a server whose certificate this authority signed (PEM)")
      ->needs(server);
  return server;
}

client::Target TargetOf(const RemoteServer& server) {
  return {server.server, ReadToken(server.token_file), ReadText(server.ca_file)};
}

RunResult RunRemote(const RemoteServer& server, const v1::ModelOptions& options, Source& source,
                    std::vector<TimedQuestion> questions, const RunObserver& observer) {
  v1::Open open;
  *open.mutable_options() = options;
  try {
    client::Session session(TargetOf(server), open);
    // Those without a time come last, at the end.
    std::stable_sort(questions.begin(), questions.end(),
                     [](const auto& a, const auto& b) { return a.at && (!b.at || *a.at < *b.at); });
    RunResult result;
    result.source = source.info();
    if (observer.on_open) observer.on_open(result.source);
    RemoteRun run(session, observer, result);
    auto next = questions.begin();
    const auto next_frame = [&]() -> FramePtr {
      try {
        return source.Next();
      } catch (const Error& error) {
        if (result.answers.empty()) throw;
        result.error = error.what();
        return nullptr;
      }
    };
    while (const FramePtr frame = next_frame()) {
      for (; next != questions.end() && next->at && *next->at < frame->time; ++next) {
        run.Ask(*next);
      }
      run.Push(*frame);
    }
    if (!result.error.empty()) result.not_asked = questions.end() - next;
    for (; result.error.empty() && next != questions.end(); ++next) run.Ask(*next, &result.source);
    run.Close();
    if (source.warning()) result.warning = source.warning();
    return result;
  } catch (const Error&) {
    throw;
  } catch (const client::Refused& error) {
    throw Error(error.what());
  }
}

}  // namespace sluice::cli
