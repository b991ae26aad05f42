#include "proto/live_stream.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "proto/convert.h"
#include "proto/messages.h"
#include "streaming/session_file.h"

namespace sluice {
namespace {

// A message's own fields and what a list node costs, about.
constexpr int64_t kMessageBytes = 128;

// As service.proto promises.
constexpr size_t kAnswersKept = 16;

int64_t BytesOf(const v1::SessionResponse& message) {
  return kMessageBytes + static_cast<int64_t>(message.ByteSizeLong());
}

v1::SessionResponse Dropped(FrameNumber frame, double media_seconds, v1::DropReason reason) {
  v1::SessionResponse message;
  v1::FrameDropped& dropped = *message.mutable_frame_dropped();
  dropped.set_number(frame);
  dropped.set_media_seconds(media_seconds);
  dropped.set_reason(reason);
  return message;
}

}  // namespace

GenerateOptions LiveStream::generate() const {
  const std::lock_guard lock(mutex_);
  return generate_;
}

void LiveStream::SetGenerate(const GenerateOptions& generate) {
  const std::lock_guard lock(mutex_);
  generate_ = generate;
}

// Wakes whoever should know, after the lock is released: listeners may call back.
void LiveStream::Tell(std::unique_lock<std::mutex>& lock, bool attend) {
  const auto listener = listener_;
  const bool duty = attend && (failed_ || (afterwards_ != Afterwards::kGoOn && Settled()));
  lock.unlock();
  changed_.notify_all();
  if (listener) listener->Wake();
  if (duty) terms_.attend();
}

void LiveStream::Queue(v1::SessionResponse message) {
  if (end_) return;
  bytes_ += BytesOf(message);
  messages_.push_back(std::move(message));
  if (messages_.back().has_text()) {
    texts_[messages_.back().text().question_id()] = std::prev(messages_.end());
  }
  if (!listener_) Trim();
}

void LiveStream::Erase(Messages::iterator message) {
  bytes_ -= BytesOf(*message);
  if (message->has_text()) {
    const auto text = texts_.find(message->text().question_id());
    if (text != texts_.end() && text->second == message) texts_.erase(text);
  }
  messages_.erase(message);
}

void LiveStream::Trim() {
  for (const bool answers : {false, true}) {
    for (auto it = messages_.begin(); it != messages_.end() && bytes_ > terms_.max_bytes / 2;) {
      const auto message = it++;
      if (!answers && (message->has_answer() || message->has_alert())) continue;
      Erase(message);
      ++lost_;
    }
  }
}

void LiveStream::OnFrame(FrameNumber frame, MediaTime time) {
  std::unique_lock lock(mutex_);
  --under_way_;
  last_frame_ = frame;
  last_time_ = time;
  v1::SessionResponse message;
  message.mutable_frame_ack()->set_number(frame);
  message.mutable_frame_ack()->set_media_seconds(time.seconds());
  Queue(std::move(message));
  Tell(lock, true);
}

void LiveStream::OnDropped(FrameNumber frame, MediaTime time, DropReason reason) {
  std::unique_lock lock(mutex_);
  --under_way_;
  Queue(Dropped(frame, time.seconds(), ToProto(reason)));
  Tell(lock, true);
}

void LiveStream::OnText(QuestionId question, std::string_view piece) {
  std::unique_lock lock(mutex_);
  if (standing_.contains(question) || end_) return;  // an answer may turn out not to be told
  const std::string text = Utf8(piece);
  if (const auto waiting = texts_.find(question); waiting != texts_.end()) {
    bytes_ -= BytesOf(*waiting->second);
    waiting->second->mutable_text()->mutable_text()->append(text);
    bytes_ += BytesOf(*waiting->second);
    if (!listener_) Trim();
  } else {
    v1::SessionResponse message;
    message.mutable_text()->set_question_id(question);
    message.mutable_text()->set_text(text);
    Queue(std::move(message));
  }
  Tell(lock, false);
}

void LiveStream::OnAnswer(const StreamAnswer& answer) {
  std::unique_lock lock(mutex_);
  v1::SessionResponse message;
  if (answer.standing) {
    *message.mutable_alert()->mutable_answer() = ToProto(answer);
    message.mutable_alert()->set_changed(answer.changed);
  } else {
    *message.mutable_answer() = ToProto(answer);
    questions_.erase(answer.id);
    answered_.push_back(message);
    if (answered_.size() > kAnswersKept) answered_.pop_front();
  }
  Queue(std::move(message));
  Tell(lock, true);
}

void LiveStream::OnWarning(std::string_view line) {
  v1::SessionResponse message;
  message.mutable_warning()->set_line(Utf8(line));
  Send(std::move(message));
}

void LiveStream::OnFailed(std::string_view error) {
  std::unique_lock lock(mutex_);
  if (!end_) end_ = grpc::Status(grpc::StatusCode::INTERNAL, Utf8(error));
  failed_ = true;
  stopping_ = true;
  Tell(lock, true);
}

void LiveStream::Send(v1::SessionResponse message) {
  std::unique_lock lock(mutex_);
  Queue(std::move(message));
  Tell(lock, false);
}

void LiveStream::End(const grpc::Status& status) {
  std::unique_lock lock(mutex_);
  if (!end_) end_ = status;
  Tell(lock, false);
}

std::optional<v1::SessionResponse> LiveStream::Take(const Listener* listener) {
  const std::lock_guard lock(mutex_);
  if (listener_.get() != listener || messages_.empty()) return std::nullopt;
  bytes_ -= BytesOf(messages_.front());
  v1::SessionResponse message = std::move(messages_.front());
  if (message.has_text()) texts_.erase(message.text().question_id());
  messages_.pop_front();
  return message;
}

std::optional<grpc::Status> LiveStream::ended() const {
  const std::lock_guard lock(mutex_);
  return messages_.empty() ? end_ : std::nullopt;
}

bool LiveStream::overloaded() const {
  const std::lock_guard lock(mutex_);
  return bytes_ > terms_.max_bytes;
}

void LiveStream::TellAgain(QuestionId question) {
  const auto answers = [question](const v1::SessionResponse& message) {
    return message.has_answer() && message.answer().question_id() == question;
  };
  if (questions_.contains(question) || std::ranges::any_of(messages_, answers)) return;
  const auto kept = std::ranges::find_if(answered_.rbegin(), answered_.rend(), answers);
  Queue(kept != answered_.rend()
            ? *kept
            : Refused("open", question, "[open] this question is not known any more; ask again"));
}

void LiveStream::Attach(std::shared_ptr<Listener> listener, v1::SessionResponse opened,
                        std::span<const QuestionId> awaited) {
  std::unique_lock lock(mutex_);
  const auto before = std::exchange(listener_, std::move(listener));
  away_since_.reset();
  if (afterwards_ == Afterwards::kLeave) {  // it is wanted again
    afterwards_ = Afterwards::kGoOn;
    end_.reset();
  }
  if (lost_ > 0) {
    v1::SessionResponse warning;
    warning.mutable_warning()->set_line(std::to_string(std::exchange(lost_, 0)) +
                                        " messages were given up while nobody listened");
    bytes_ += BytesOf(warning);
    messages_.push_front(std::move(warning));
  }
  bytes_ += BytesOf(opened);
  messages_.push_front(std::move(opened));
  for (const QuestionId question : awaited) TellAgain(question);
  lock.unlock();
  if (before) before->Replaced();
}

void LiveStream::Detach(const Listener* listener, std::optional<v1::SessionResponse> unsent,
                        WallTime now) {
  const std::lock_guard lock(mutex_);
  if (listener_.get() != listener) return;
  listener_.reset();
  away_since_ = now;
  if (unsent && !unsent->has_opened()) {
    bytes_ += BytesOf(*unsent);
    messages_.push_front(std::move(*unsent));
  }
  Trim();
}

std::optional<WallTime> LiveStream::away_since() const {
  const std::lock_guard lock(mutex_);
  return away_since_;
}

int64_t LiveStream::FrameReceived() {
  const std::lock_guard lock(mutex_);
  ++under_way_;
  return received_++;
}

void LiveStream::FrameRefused(FrameNumber frame, double media_seconds, v1::DropReason reason,
                              const std::string& detail) {
  std::unique_lock lock(mutex_);
  --under_way_;
  ++refused_;
  v1::SessionResponse message = Dropped(frame, media_seconds, reason);
  message.mutable_frame_dropped()->set_detail(Utf8(detail));
  Queue(std::move(message));
  Tell(lock, true);
}

bool LiveStream::QuestionBegins(QuestionId question, bool standing) {
  const std::lock_guard lock(mutex_);
  if (questions_.contains(question) || standing_.contains(question)) return false;
  (standing ? standing_ : questions_).insert(question);
  return true;
}

void LiveStream::QuestionRefused(QuestionId question) {
  std::unique_lock lock(mutex_);
  questions_.erase(question);
  standing_.erase(question);
  Tell(lock, true);
}

void LiveStream::StandingEnds(QuestionId question) {
  const std::lock_guard lock(mutex_);
  standing_.erase(question);
}

bool LiveStream::SourceBegins() {
  const std::lock_guard lock(mutex_);
  return !stopping_ && !std::exchange(source_busy_, true);
}

bool LiveStream::SourceIsOpen(std::shared_ptr<Source> source) {
  const std::lock_guard lock(mutex_);
  source_ = std::move(source);
  return !stopping_;
}

void LiveStream::SourceEnds() {
  std::unique_lock lock(mutex_);
  source_busy_ = false;
  const auto source = std::move(source_);  // let go without the lock
  Tell(lock, true);
}

void LiveStream::StopSource() {
  std::shared_ptr<Source> source;
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    source = source_;
  }
  changed_.notify_all();
  if (source) source->Cancel();
}

bool LiveStream::WaitForRoom() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return stopping_ || under_way_ < terms_.budget.queued_frames; });
  return !stopping_;
}

bool LiveStream::Pause(std::chrono::milliseconds time) {
  std::unique_lock lock(mutex_);
  return !changed_.wait_for(lock, time, [this] { return stopping_; });
}

bool LiveStream::Settled() const { return under_way_ == 0 && questions_.empty() && !source_busy_; }

void LiveStream::CloseWhenSettled() {
  std::unique_lock lock(mutex_);
  afterwards_ = Afterwards::kClose;
  Tell(lock, true);
}

void LiveStream::LeaveWhenSettled(const Listener* listener) {
  std::unique_lock lock(mutex_);
  if (listener_.get() != listener || afterwards_ == Afterwards::kClose) return;
  afterwards_ = Afterwards::kLeave;
  Tell(lock, true);
}

LiveStream::Duty LiveStream::duty() const {
  const std::lock_guard lock(mutex_);
  if (failed_) return Duty::kBury;
  if (afterwards_ == Afterwards::kGoOn || !Settled()) return Duty::kNone;
  return afterwards_ == Afterwards::kClose ? Duty::kClose : Duty::kLeave;
}

void LiveStream::AddCounts(v1::SessionResponse& opened) const {
  const std::lock_guard lock(mutex_);
  if (last_frame_) opened.mutable_opened()->set_last_frame(*last_frame_);
  opened.mutable_opened()->set_last_media_seconds(last_time_.seconds());
}

int64_t LiveStream::received() const {
  const std::lock_guard lock(mutex_);
  return received_;
}

int64_t LiveStream::refused() const {
  const std::lock_guard lock(mutex_);
  return refused_;
}

void LiveStream::Persist(Archive& archive) {
  const std::lock_guard lock(mutex_);
  archive.Number("refused", refused_, int64_t{0}, int64_t{1} << 60);
  bool any = last_frame_.has_value();
  FrameNumber last = last_frame_.value_or(0);
  archive.Flag("has_last_frame", any);
  archive.Number("last_frame", last);
  if (any) last_frame_ = last;
  int64_t time = last_time_.nanoseconds();
  archive.Number("last_time", time);
  last_time_ = MediaTime::FromNanoseconds(time);
  std::vector<QuestionId> standing(standing_.begin(), standing_.end());
  archive.Array("standing", standing, 1 << 20);
  standing_ = {standing.begin(), standing.end()};
  sluice::Persist(archive, generate_);
}

void LiveStream::Resumed(const StreamReport& report, WallTime now) {
  const std::lock_guard lock(mutex_);
  received_ = report.frames.pushed + refused_;
  away_since_ = now;
}

}  // namespace sluice
