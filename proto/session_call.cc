#include "proto/session_call.h"

#include <chrono>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "proto/convert.h"
#include "proto/messages.h"
#include "runtime/error.h"

namespace sluice {
namespace {

using grpc::Status;
using grpc::StatusCode;

// As service.proto promises.
constexpr size_t kMostAwaited = 64;

class Reactor final : public grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>,
                      public SessionWire {
 public:
  Reactor(StreamHub& hub, std::shared_ptr<Account> account)
      : call_(SessionCall::Begin(hub, std::move(account), *this)) {}

  void OnReadDone(bool ok) override { call_->OnReadDone(ok); }
  void OnWriteDone(bool ok) override { call_->OnWriteDone(ok); }
  void OnCancel() override { call_->OnCancel(); }
  void OnDone() override {
    call_->OnDone();
    delete this;
  }
  void Read(grpc::ByteBuffer* message) override { StartRead(message); }
  void Write(const grpc::ByteBuffer* message) override { StartWrite(message); }
  void EndWith(const Status& status) override { Finish(status); }

 private:
  const std::shared_ptr<SessionCall> call_;
};

}  // namespace

grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* SessionCall::Begin(
    StreamHub& hub, std::shared_ptr<Account> account) {
  return new Reactor(hub, std::move(account));
}

std::shared_ptr<SessionCall> SessionCall::Begin(StreamHub& hub, std::shared_ptr<Account> account,
                                                SessionWire& wire) {
  auto call = std::shared_ptr<SessionCall>(new SessionCall(hub, std::move(account), wire));
  call->self_ = call;
  call->ReadNext();
  hub.LookAfter(call);
  return call;
}

SessionCall::SessionCall(StreamHub& hub, std::shared_ptr<Account> account, SessionWire& wire)
    : hub_(hub), begun_(hub.clock.Now()), account_(std::move(account)), wire_(wire) {
  hub_.calls.Add(1);
}

SessionCall::~SessionCall() { hub_.calls.Add(-1); }

void SessionCall::OnDone() {
  const auto self = std::move(self_);  // may be the last one, at the end of this line's scope
}

std::optional<WallTime> SessionCall::waiting_since() const {
  const std::lock_guard lock(mutex_);
  return heard_ ? std::nullopt : std::optional(begun_);
}

void SessionCall::ReadNext() {
  const std::lock_guard lock(mutex_);
  if (done_) return;
  in_.Clear();
  wire_.Read(&in_);
}

void SessionCall::OnReadDone(bool ok) {
  {
    const std::lock_guard lock(mutex_);
    heard_ = true;
  }
  hub_.requests().Post(account_.get(), [self = shared_from_this(), ok] {
    if (ok) {
      self->TakeMessage();
    } else if (self->stream_) {  // no more input: what is under way is finished
      self->stream_->LeaveWhenSettled(self.get());
    } else {
      self->End(Status::OK);
    }
  });
}

void SessionCall::OnCancel() { End(Status::CANCELLED); }

void SessionCall::Replaced() {
  End({StatusCode::ABORTED, "[session] another call goes on with this stream"});
}

void SessionCall::End(const Status& status) {
  const auto self = shared_from_this();
  const std::lock_guard lock(mutex_);
  if (std::exchange(done_, true)) return;
  if (stream_) {
    std::optional<v1::SessionResponse> unsent;
    if (writing_) unsent = std::move(sending_);
    stream_->Detach(this, std::move(unsent), hub_.clock.Now());
  }
  wire_.EndWith(status);
}

void SessionCall::Wake() {
  const auto self = shared_from_this();
  const std::lock_guard lock(mutex_);
  if (done_ || !stream_) return;
  if (stream_->overloaded()) {
    return End({StatusCode::RESOURCE_EXHAUSTED,
                "[session] more than " + std::to_string(hub_.options.outgoing_bytes) +
                    " bytes wait for this client; read faster, then resume the stream"});
  }
  if (writing_) return;
  if (auto message = stream_->Take(this)) {
    sending_ = std::move(*message);
    bool own_buffer = false;
    out_.Clear();
    const Status status =
        grpc::SerializationTraits<v1::SessionResponse>::Serialize(sending_, &out_, &own_buffer);
    if (!status.ok()) return End(status);
    writing_ = true;
    wire_.Write(&out_);
  } else if (const auto ended = stream_->ended()) {
    End(*ended);
  }
}

void SessionCall::OnWriteDone(bool ok) {
  const auto self = shared_from_this();
  const std::lock_guard lock(mutex_);
  if (!ok) return End(Status::CANCELLED);  // with writing_ still set: the message was not sent
  writing_ = false;
  Wake();
}

void SessionCall::TakeMessage() {
  Guard([this] {
    if (account_->ExpiredAt(std::chrono::system_clock::now())) {
      return End({StatusCode::UNAUTHENTICATED, "[session] the token has expired or was withdrawn"});
    }
    const auto bytes = static_cast<int64_t>(in_.Length());
    const auto request = std::make_shared<v1::SessionRequest>();
    if (!grpc::SerializationTraits<v1::SessionRequest>::Deserialize(&in_, request.get()).ok()) {
      throw InputError("[session] expected a sluice.v1.SessionRequest, got other bytes");
    }
    if (!request->has_frame()) return HandleAndReadNext(*request, bytes);
    // in_ is kept until it is decoded: what waits for that counts as what gRPC may hold.
    hub_.pictures().Post(account_.get(), [self = shared_from_this(), request, bytes] {
      self->Guard([&] { self->HandleAndReadNext(*request, bytes); });
    });
  });
}

void SessionCall::HandleAndReadNext(const v1::SessionRequest& request, int64_t bytes) {
  Handle(request, bytes);
  ReadNext();
}

void SessionCall::Guard(const std::function<void()>& work) {
  try {
    work();
  } catch (const InputError& error) {
    End({StatusCode::INVALID_ARGUMENT, ErrorLine(error.what())});
  } catch (const ResourceExhausted& error) {
    End({StatusCode::RESOURCE_EXHAUSTED, ErrorLine(error.what())});
  } catch (const std::bad_alloc&) {
    End({StatusCode::RESOURCE_EXHAUSTED, "[session] this machine has no memory left"});
  } catch (const std::exception& error) {
    End({StatusCode::INTERNAL, ErrorLine(error.what())});
  }
}

void SessionCall::Handle(const v1::SessionRequest& request, int64_t bytes) {
  if (request.has_open()) return HandleOpen(request.open());
  if (request.message_case() == v1::SessionRequest::MESSAGE_NOT_SET) {
    throw InputError(
        "[session] expected one of SessionRequest's messages, found none that this "
        "version knows");
  }
  if (!stream_) throw InputError("[session] expected open as the first message, got another one");
  switch (request.message_case()) {
    case v1::SessionRequest::kFrame:
      return HandleFrame(request.frame(), bytes);
    case v1::SessionRequest::kOpenSource:
      return HandleSource(request.open_source());
    case v1::SessionRequest::kAsk:
      return HandleAsk("ask", request.ask(), nullptr);
    case v1::SessionRequest::kStandingQuestion:
      return HandleAsk("standing_question", request.standing_question().ask(),
                       &request.standing_question());
    case v1::SessionRequest::kCancel:
      return HandleCancel(request.cancel().question_id());
    case v1::SessionRequest::kSetOptions:
      return HandleOptions(request.set_options().options());
    case v1::SessionRequest::kSave:
      return HandleSave();
    case v1::SessionRequest::kClose:
      if (request.close().at_once()) {
        return hub_.Close(stream_);
      }
      return stream_->CloseWhenSettled();
    case v1::SessionRequest::kOpen:
    case v1::SessionRequest::MESSAGE_NOT_SET:
      break;
  }
}

void SessionCall::HandleOpen(const v1::Open& open) {
  if (stream_) throw InputError("[session] expected one open in a call, got a second one");
  if (hub_.draining()) {
    return End({StatusCode::UNAVAILABLE, "[session] the server shuts down; try again later"});
  }
  const bool resumes = !open.resume_stream_id().empty();
  const std::vector<QuestionId> awaited(open.awaited_question_ids().begin(),
                                        open.awaited_question_ids().end());
  if (awaited.size() > (resumes ? kMostAwaited : 0)) {
    throw InputError(
        "[session] expected awaited_question_ids only with resume_stream_id, at most " +
        std::to_string(kMostAwaited) + ", got " + std::to_string(awaited.size()));
  }
  std::shared_ptr<LiveStream> stream;
  if (resumes) {
    if (open.has_options() || open.has_budgets()) {
      throw InputError("[session] a resumed stream keeps its options and budgets; send neither");
    }
    try {
      stream = hub_.Find(open.resume_stream_id(), account_);
    } catch (const InputError& error) {  // of the file: another model, a damaged one
      return End({StatusCode::FAILED_PRECONDITION, ErrorLine(error.what())});
    }
    if (!stream) {
      return End({StatusCode::NOT_FOUND,
                  "[session] there is no stream of this id to go on with; open a new one"});
    }
  } else {
    stream = hub_.Open(open, account_);
  }

  v1::SessionResponse message;
  v1::Opened& opened = *message.mutable_opened();
  opened.set_stream_id(stream->id);
  *opened.mutable_model() = ToProto(*hub_.vlm);
  *opened.mutable_limits() = hub_.LimitsOf(stream->budget());
  opened.set_resumed(resumes);
  if (resumes) stream->AddCounts(message);
  bool nobody_knows_it = false;
  {
    // Both or neither: a call that ended in between leaves a stream that waits for its client.
    const std::lock_guard lock(mutex_);
    stream_ = stream;
    stream->Attach(shared_from_this(), std::move(message), awaited);
    if (done_) stream->Detach(this, std::nullopt, hub_.clock.Now());
    nobody_knows_it = done_ && !resumes;
  }
  if (nobody_knows_it) return hub_.Close(stream);
  Wake();
}

void SessionCall::HandleFrame(const v1::Frame& message, int64_t bytes) {
  const int64_t index = stream_->FrameReceived();
  const auto refuse = [&](v1::DropReason reason, const char* label, const std::string& detail) {
    hub_.CountRefusedFrame(label);
    stream_->FrameRefused(message.number(), message.media_seconds(), reason, ErrorLine(detail));
  };
  if (!account_->TakeFrame(bytes, hub_.clock.Now())) {
    return refuse(v1::DROP_REASON_QUOTA, "quota", "");
  }
  auto frame = std::make_shared<Frame>();
  frame->index = index;
  try {
    FromProto(message, hub_.options.frame_pixels, *frame);
  } catch (const InputError& error) {
    return refuse(v1::DROP_REASON_BAD_FRAME, "bad_frame", error.what());
  }
  try {
    hub_.scheduler.Push(stream_->id, message.number(), std::move(frame));
  } catch (const InputError&) {  // it was closed or has failed meanwhile
    refuse(v1::DROP_REASON_CLOSING, "closing", "");
  }
}

void SessionCall::HandleAsk(const char* request, const v1::Ask& ask,
                            const v1::StandingQuestion* standing) {
  const QuestionId id = ask.question_id();
  if (!stream_->QuestionBegins(id, standing != nullptr)) {
    return Refuse(request, id,
                  "[ask] expected a question_id that is not in use, got " + std::to_string(id));
  }
  try {
    StreamQuestion question{.id = id, .text = ask.text(), .generate = {}};
    if (ask.has_generation()) {
      question.generate = FromProto(ask.generation(), stream_->generate());
    }
    if (standing == nullptr) return hub_.scheduler.Ask(stream_->id, question);
    StandingQuestion always{.question = std::move(question),
                            .only_when_changed = standing->only_when_changed()};
    if (standing->interval_media_seconds() != 0) {
      always.interval_seconds = standing->interval_media_seconds();
    }
    hub_.scheduler.AskAlways(stream_->id, always);
  } catch (const Error& error) {
    stream_->QuestionRefused(id);
    Refuse(request, id, error.what());
  }
}

void SessionCall::HandleCancel(QuestionId question) {
  hub_.scheduler.Cancel(stream_->id, question);
  stream_->StandingEnds(question);
}

void SessionCall::HandleSource(const v1::OpenSource& request) {
  if (!stream_->SourceBegins()) {
    return Refuse("open_source", 0, "[source] expected one source at a time, another is open");
  }
  try {
    hub_.Play(stream_, request);
  } catch (const Error& error) {
    Refuse("open_source", 0, error.what());
    stream_->SourceEnds();
  }
}

void SessionCall::HandleOptions(const v1::ModelOptions& message) {
  try {
    std::string note;
    const SessionOptions options = hub_.OptionsOf(message, stream_->budget(), note);
    hub_.scheduler.SetOptions(stream_->id, options);
    stream_->SetGenerate(options.generate);
  } catch (const Error& error) {
    Refuse("set_options", 0, error.what());
  }
}

void SessionCall::HandleSave() {
  try {
    hub_.Save(*stream_);
    v1::SessionResponse message;
    message.mutable_saved();
    stream_->Send(std::move(message));
  } catch (const Error& error) {
    Refuse("save", 0, error.what());
  }
}

void SessionCall::Refuse(const char* request, QuestionId question, const std::string& error) {
  stream_->Send(Refused(request, question, ErrorLine(error)));
}

}  // namespace sluice
