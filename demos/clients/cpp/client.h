// One session with a Sluice server, from C++. Needs gRPC and the messages, nothing of the engine.
#ifndef SLUICE_DEMOS_CLIENTS_CPP_CLIENT_H_
#define SLUICE_DEMOS_CLIENTS_CPP_CLIENT_H_

#include <grpcpp/grpcpp.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "sluice/v1/service.grpc.pb.h"

namespace sluice::client {

struct Target {
  std::string server;  // HOST:PORT
  std::string token;   // empty: none
  std::string ca;      // PEM text of who signed the server's certificate; empty: no TLS
};

// Why the server turned a session away or ended it, in one line: its status and its message.
class Refused : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// One thread may send while another reads.
class Session {
 public:
  // Opens a stream, or goes on with open.resume_stream_id. Throws Refused when the server
  // cannot be reached or refuses.
  Session(const Target& target, const v1::Open& open);
  // Ends the call; without a Close before, the stream can be resumed for a while.
  ~Session();

  const v1::Opened& opened() const { return opened_; }
  // False when the call has ended: Finish tells why.
  bool Send(const v1::SessionRequest& request) { return call_->Write(request); }
  // The next message; none at the end of the call.
  std::optional<v1::SessionResponse> Read();
  // Waits for the end of the call. Throws Refused unless it ended well.
  void Finish();

 private:
  std::string server_;
  grpc::ClientContext context_;
  std::unique_ptr<v1::Sluice::Stub> stub_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::SessionRequest, v1::SessionResponse>> call_;
  v1::Opened opened_;
};

}  // namespace sluice::client

#endif  // SLUICE_DEMOS_CLIENTS_CPP_CLIENT_H_
