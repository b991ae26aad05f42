#include "proto/caption_call.h"

#include <utility>

#include "proto/convert.h"
#include "proto/json_log.h"
#include "proto/messages.h"
#include "runtime/error.h"

namespace sluice {
namespace {

constexpr double kDefaultInterval = 5, kMostInterval = 1e9;  // seconds
constexpr char kDefaultInstruction[] = "Describe what happens.";

MediaTime IntervalOf(const v1::CaptionRequest& request) {
  const double asked = request.interval_media_seconds();
  if (!(asked >= 0 && asked < kMostInterval)) {
    throw InputError("[caption] expected interval_media_seconds above 0 and below 1e9, got " +
                     std::to_string(asked));
  }
  return MediaTime::FromSeconds(asked == 0 ? kDefaultInterval : asked);
}

}  // namespace

// What is under way. Thread-safe.
class CaptionCall::Events final : public StreamEvents {
 public:
  void OnFrame(FrameNumber, MediaTime) override { FrameDone(); }
  void OnDropped(FrameNumber, MediaTime, DropReason) override { FrameDone(); }
  void OnText(QuestionId, std::string_view) override {}
  void OnAnswer(const StreamAnswer& answer) override {
    Set([&] { answer_ = answer; });
  }
  void OnWarning(std::string_view) override {}
  void OnFailed(std::string_view error) override {
    Set([&] { error_ = std::string(error); });
  }

  void FrameBegins() {
    const std::lock_guard lock(mutex_);
    ++frames_;
  }
  void Stop() {
    Set([&] { stopped_ = true; });
  }
  // Waits until fewer than `most` frames are under way. False: the call has ended.
  bool WaitForRoom(int most) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return stopped_ || error_ || frames_ < most; });
    Check();
    return !stopped_;
  }
  // Waits for an answer; none: the call has ended.
  std::optional<StreamAnswer> WaitForAnswer() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return stopped_ || error_ || answer_; });
    Check();
    return std::exchange(answer_, std::nullopt);
  }

 private:
  void FrameDone() {
    Set([&] { --frames_; });
  }
  void Check() const {
    if (error_) throw Error(*error_);
  }
  template <typename Change>
  void Set(const Change& change) {
    {
      const std::lock_guard lock(mutex_);
      change();
    }
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  int frames_ = 0;
  bool stopped_ = false;
  std::optional<StreamAnswer> answer_;
  std::optional<std::string> error_;
};

CaptionCall* CaptionCall::Begin(StreamHub& hub, std::shared_ptr<Account> account) {
  auto call = std::shared_ptr<CaptionCall>(new CaptionCall(hub, std::move(account)));
  call->self_ = call;
  call->StartRead(&call->in_);
  hub.LookAfter(call);
  return call.get();
}

CaptionCall::CaptionCall(StreamHub& hub, std::shared_ptr<Account> account)
    : hub_(hub),
      begun_(hub.clock.Now()),
      account_(std::move(account)),
      events_(std::make_shared<Events>()) {
  hub_.calls.Add(1);
}

void CaptionCall::OnReadDone(bool ok) {
  if (!ok) {
    return End({grpc::StatusCode::INVALID_ARGUMENT, "[caption] expected a request, got none"});
  }
  if (!grpc::SerializationTraits<v1::CaptionRequest>::Deserialize(&in_, &request_).ok()) {
    return End({grpc::StatusCode::INVALID_ARGUMENT,
                "[caption] expected a sluice.v1.CaptionRequest, got other bytes"});
  }
  if (hub_.draining()) {
    return End({grpc::StatusCode::UNAVAILABLE, "[caption] the server shuts down"});
  }
  {
    const std::lock_guard lock(mutex_);
    if (finished_) return;
    running_ = true;
  }
  try {
    hub_.Spawn(account_, [call = shared_from_this()] { call->Run(); });
  } catch (const ResourceExhausted& error) {
    {
      const std::lock_guard lock(mutex_);
      running_ = false;
    }
    End({grpc::StatusCode::RESOURCE_EXHAUSTED, ErrorLine(error.what())});
  }
}

std::optional<WallTime> CaptionCall::waiting_since() const {
  const std::lock_guard lock(mutex_);
  return running_ || finished_ ? std::nullopt : std::optional(begun_);
}

void CaptionCall::OnDone() {
  hub_.calls.Add(-1);
  const auto self = std::move(self_);
}

void CaptionCall::OnCancel() { End(grpc::Status::CANCELLED); }

// While it runs its thread is the one that finishes the call, as soon as it sees this.
void CaptionCall::End(const grpc::Status& status) {
  std::shared_ptr<Source> source;
  bool finish = false;
  {
    const std::lock_guard lock(mutex_);
    if (!end_) end_ = status;
    cancelled_ = true;
    source = source_;
    finish = !running_ && !std::exchange(finished_, true);
  }
  changed_.notify_all();
  events_->Stop();
  if (source) source->Cancel();
  if (finish) Finish(status);
}

void CaptionCall::OnWriteDone(bool ok) {
  {
    const std::lock_guard lock(mutex_);
    writing_ = false;
    if (!ok) cancelled_ = true;
  }
  changed_.notify_all();
}

bool CaptionCall::Write(const v1::CaptionResponse& caption) {
  bool own_buffer = false;
  out_.Clear();
  if (!grpc::SerializationTraits<v1::CaptionResponse>::Serialize(caption, &out_, &own_buffer)
           .ok()) {
    throw Error("[caption] a caption could not be written as a message");
  }
  {
    const std::lock_guard lock(mutex_);
    if (cancelled_) return false;
    writing_ = true;
  }
  StartWrite(&out_);
  std::unique_lock lock(mutex_);
  // An end is not held up by a client that does not read.
  changed_.wait(lock, [this] { return !writing_ || cancelled_; });
  return !cancelled_;
}

void CaptionCall::Run() {
  grpc::Status status;
  StreamId stream;
  try {
    const MediaTime interval = IntervalOf(request_);
    std::string note;
    const SessionOptions options = hub_.OptionsOf(request_.options(), hub_.options.budget, note);
    if (!note.empty()) LogEvent(spdlog::level::info, "caption_memory", {{"note", note}});
    const auto lease = Account::Open(account_);
    SourceOptions source_options = SourceOptionsOf(request_.fps(), hub_.options);
    source_options.on_warning = [](const std::string& line) {
      LogEvent(spdlog::level::warn, "caption_source", {{"warning", line}});
    };
    const std::shared_ptr<Source> source = hub_.sources.Open(request_.url(), source_options);
    bool wanted = false;
    {
      const std::lock_guard lock(mutex_);
      source_ = source;
      wanted = !cancelled_;
    }
    if (wanted) {
      stream = hub_.scheduler.Open(options, hub_.options.budget, events_);
      Play(*source, stream, interval);
    }
  } catch (const InputError& error) {
    status = {grpc::StatusCode::INVALID_ARGUMENT, ErrorLine(error.what())};
  } catch (const ResourceExhausted& error) {
    status = {grpc::StatusCode::RESOURCE_EXHAUSTED, ErrorLine(error.what())};
  } catch (const std::exception& error) {
    status = {grpc::StatusCode::INTERNAL, ErrorLine(error.what())};
  }
  if (!stream.empty()) hub_.scheduler.Close(stream);
  {
    const std::lock_guard lock(mutex_);
    finished_ = true;
    if (end_) status = *end_;
  }
  Finish(status);
}

bool CaptionCall::Pause() {
  std::unique_lock lock(mutex_);
  return !changed_.wait_for(lock, kPace, [this] { return cancelled_; });
}

void CaptionCall::Play(Source& source, const StreamId& stream, MediaTime interval) {
  Events& events = *events_;
  StreamQuestion question{
      .id = 0,
      .text = request_.instruction().empty() ? kDefaultInstruction : request_.instruction(),
      .generate = {}};
  std::optional<MediaTime> begin;
  MediaTime last;
  const auto caption = [&] {
    ++question.id;
    hub_.scheduler.Ask(stream, question);
    const auto answer = events.WaitForAnswer();
    if (!answer) return false;
    if (answer->end == AnswerEnd::kFailed || answer->end == AnswerEnd::kMemory) {
      throw Error(answer->error);
    }
    v1::CaptionResponse response;
    response.set_begin_media_seconds(begin->seconds());
    response.set_end_media_seconds(last.seconds());
    response.set_text(Utf8(answer->text));
    return Write(response);
  };

  FrameNumber number = 0;
  const int room = hub_.options.budget.queued_frames;
  while (source.info().live || events.WaitForRoom(room)) {
    FramePtr frame = source.Next();
    if (!frame) break;
    if (hub_.draining()) throw Error("[caption] the server shuts down");
    while (!source.info().live && !hub_.scheduler.HasRoomForPictures() && Pause()) continue;
    bool within = account_->TakeFrame(0, hub_.clock.Now());
    while (!within && !source.info().live && !hub_.draining() && Pause()) {
      within = account_->TakeFrame(0, hub_.clock.Now());
    }
    if (!within && source.info().live) {  // nothing of it can wait
      hub_.CountRefusedFrame("quota");
      continue;
    }
    if (!within) return;
    if (!begin) begin = frame->time;
    if (frame->time >= *begin + interval) {  // about everything before this frame
      if (!caption()) return;
      begin = frame->time;
    }
    last = frame->time;
    events.FrameBegins();
    hub_.scheduler.Push(stream, number++, std::move(frame));
  }
  if (begin) caption();
}

}  // namespace sluice
