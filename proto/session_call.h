// One connection of the call Session.
#ifndef SLUICE_PROTO_SESSION_CALL_H_
#define SLUICE_PROTO_SESSION_CALL_H_

#include <grpcpp/grpcpp.h>
#include <grpcpp/impl/codegen/proto_utils.h>
#include <grpcpp/support/server_callback.h>

#include <functional>
#include <memory>
#include <mutex>
#include <optional>

#include "proto/open_call.h"
#include "proto/stream_hub.h"

namespace sluice {

// What a SessionCall needs of the network: gRPC's reactor, or a test in its place. Each call is
// answered by one of SessionCall's On...; they may come from within the call.
class SessionWire {
 public:
  virtual ~SessionWire() = default;
  virtual void Read(grpc::ByteBuffer* message) = 0;         // OnReadDone
  virtual void Write(const grpc::ByteBuffer* message) = 0;  // OnWriteDone
  // OnDone, when nothing else is under way. Nothing is asked of the wire after this.
  virtual void EndWith(const grpc::Status& status) = 0;
};

// Messages are taken as bytes and parsed on a thread for requests: gRPC would not tell a malformed
// message from the end of the call. Pictures are then decoded on a thread of theirs. One message is
// under way at a time, so they take effect in order.
class SessionCall final : public LiveStream::Listener,
                          public OpenCall,
                          public std::enable_shared_from_this<SessionCall> {
 public:
  // The call as gRPC wants it; lives until gRPC is done with it.
  static grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* Begin(
      StreamHub& hub, std::shared_ptr<Account> account);
  // Reads its first message. The wire lives until it has called OnDone.
  static std::shared_ptr<SessionCall> Begin(StreamHub& hub, std::shared_ptr<Account> account,
                                            SessionWire& wire);
  ~SessionCall() override;

  void OnReadDone(bool ok);
  void OnWriteDone(bool ok);
  void OnCancel();
  void OnDone();
  void Wake() override;
  void Replaced() override;
  const Account* account() const override { return account_.get(); }
  std::optional<WallTime> waiting_since() const override;
  void End(const grpc::Status& status) override;

 private:
  SessionCall(StreamHub& hub, std::shared_ptr<Account> account, SessionWire& wire);
  void ReadNext();
  void TakeMessage();
  void HandleAndReadNext(const v1::SessionRequest& request, int64_t bytes);
  // Runs `work` and ends the call with what it throws.
  void Guard(const std::function<void()>& work);
  void Handle(const v1::SessionRequest& request, int64_t bytes);
  void HandleOpen(const v1::Open& open);
  void HandleFrame(const v1::Frame& frame, int64_t bytes);
  void HandleAsk(const char* request, const v1::Ask& ask, const v1::StandingQuestion* standing);
  void HandleCancel(QuestionId question);
  void HandleSource(const v1::OpenSource& request);
  void HandleSave();
  void HandleOptions(const v1::ModelOptions& options);
  void Refuse(const char* request, QuestionId question, const std::string& error);

  StreamHub& hub_;
  const WallTime begun_;
  const std::shared_ptr<Account> account_;
  SessionWire& wire_;                   // not after its EndWith
  std::shared_ptr<SessionCall> self_;   // until OnDone
  std::shared_ptr<LiveStream> stream_;  // set once, under mutex_, by the pool

  // gRPC may call back from within what it is asked to do.
  mutable std::recursive_mutex mutex_;
  bool heard_ = false, writing_ = false, done_ = false;
  v1::SessionResponse sending_;
  grpc::ByteBuffer in_, out_;
};

}  // namespace sluice

#endif  // SLUICE_PROTO_SESSION_CALL_H_
