// One connection of the call Session. Lives until gRPC is done with it.
#ifndef SLUICE_PROTO_SESSION_CALL_H_
#define SLUICE_PROTO_SESSION_CALL_H_

#include <grpcpp/grpcpp.h>
#include <grpcpp/impl/codegen/proto_utils.h>
#include <grpcpp/support/server_callback.h>

#include <memory>
#include <mutex>
#include <optional>

#include "proto/stream_hub.h"

namespace sluice {

// Messages are taken as bytes and parsed on the pool: gRPC would not tell a malformed message from
// the end of the call. One message is under way at a time, so they take effect in order.
class SessionCall final : public grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>,
                          public LiveStream::Listener,
                          public std::enable_shared_from_this<SessionCall> {
 public:
  // account: null if the call brought no valid token.
  static SessionCall* Begin(StreamHub& hub, std::shared_ptr<Account> account);

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;
  void Wake() override;
  void Replaced() override;

 private:
  SessionCall(StreamHub& hub, std::shared_ptr<Account> account);
  void ReadNext();
  void TakeMessage();
  void Handle(const v1::SessionRequest& request, int64_t bytes);
  void HandleOpen(const v1::Open& open);
  void HandleFrame(const v1::Frame& frame, int64_t bytes);
  void HandleAsk(const char* request, const v1::Ask& ask, const v1::StandingQuestion* standing);
  void HandleCancel(QuestionId question);
  void HandleSource(const v1::OpenSource& request);
  void HandleSave();
  void HandleOptions(const v1::ModelOptions& options);
  void Refuse(const char* request, QuestionId question, const std::string& error);
  void End(const grpc::Status& status);

  StreamHub& hub_;
  const std::shared_ptr<Account> account_;
  std::shared_ptr<SessionCall> self_;   // until OnDone
  std::shared_ptr<LiveStream> stream_;  // set once, under mutex_, by the pool

  // gRPC may call back from within what it is asked to do.
  std::recursive_mutex mutex_;
  bool writing_ = false, done_ = false;
  v1::SessionResponse sending_;
  grpc::ByteBuffer in_, out_;
};

}  // namespace sluice

#endif  // SLUICE_PROTO_SESSION_CALL_H_
