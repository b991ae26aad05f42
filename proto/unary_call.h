// A call with one request and one answer.
//
// gRPC's own way to serve these reads the request, megabytes of it, before anybody can look at the
// token. So to gRPC it is a stream both ways, which is the same on the wire: nothing is read before
// the token is known.
#ifndef SLUICE_PROTO_UNARY_CALL_H_
#define SLUICE_PROTO_UNARY_CALL_H_

#include <grpcpp/grpcpp.h>
#include <grpcpp/support/server_callback.h>

#include <functional>
#include <memory>
#include <mutex>

#include "proto/open_call.h"
#include "proto/stream_hub.h"

namespace sluice {

class UnaryCall final : public grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>,
                        public OpenCall,
                        public std::enable_shared_from_this<UnaryCall> {
 public:
  // Turns the request's bytes into the answer's. Must not wait or throw.
  using Answer = std::function<grpc::Status(grpc::ByteBuffer& request, grpc::ByteBuffer& answer)>;

  // account: null for a call that needs none. The hub ends it when the request does not come.
  static std::shared_ptr<UnaryCall> Begin(StreamHub& hub, std::shared_ptr<Account> account,
                                          Answer answer);

  void OnReadDone(bool ok) override;
  void OnCancel() override { End(grpc::Status::CANCELLED); }
  void OnDone() override;
  const Account* account() const override { return account_.get(); }
  std::optional<WallTime> waiting_since() const override;
  void End(const grpc::Status& status) override;

 private:
  UnaryCall(WallTime now, std::shared_ptr<Account> account, Answer answer);

  const WallTime begun_;
  const std::shared_ptr<Account> account_;
  const Answer answer_;
  std::shared_ptr<UnaryCall> self_;  // until OnDone
  mutable std::mutex mutex_;
  bool answered_ = false;
  grpc::ByteBuffer in_, out_;
};

// A call that ends before anything of it is read.
class RefusedCall final : public grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer> {
 public:
  explicit RefusedCall(const grpc::Status& status) { Finish(status); }
  void OnDone() override { delete this; }
};

}  // namespace sluice

#endif  // SLUICE_PROTO_UNARY_CALL_H_
