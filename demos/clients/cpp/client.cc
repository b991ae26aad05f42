#include "demos/clients/cpp/client.h"

namespace sluice::client {
namespace {

const char* CodeName(grpc::StatusCode code) {
  switch (code) {
    case grpc::StatusCode::UNAUTHENTICATED:
      return "UNAUTHENTICATED";
    case grpc::StatusCode::PERMISSION_DENIED:
      return "PERMISSION_DENIED";
    case grpc::StatusCode::RESOURCE_EXHAUSTED:
      return "RESOURCE_EXHAUSTED";
    case grpc::StatusCode::INVALID_ARGUMENT:
      return "INVALID_ARGUMENT";
    case grpc::StatusCode::FAILED_PRECONDITION:
      return "FAILED_PRECONDITION";
    case grpc::StatusCode::NOT_FOUND:
      return "NOT_FOUND";
    case grpc::StatusCode::UNAVAILABLE:
      return "UNAVAILABLE";
    case grpc::StatusCode::DEADLINE_EXCEEDED:
      return "DEADLINE_EXCEEDED";
    case grpc::StatusCode::CANCELLED:
      return "CANCELLED";
    case grpc::StatusCode::UNIMPLEMENTED:
      return "UNIMPLEMENTED";
    default:
      return "ERROR";
  }
}

}  // namespace

Session::Session(const Target& target, const v1::Open& open) {
  std::shared_ptr<grpc::ChannelCredentials> credentials = grpc::InsecureChannelCredentials();
  if (!target.ca.empty()) {
    grpc::SslCredentialsOptions ssl;
    ssl.pem_root_certs = target.ca;
    credentials = grpc::SslCredentials(ssl);
  }
  server_ = target.server;
  stub_ = v1::Sluice::NewStub(grpc::CreateChannel(target.server, credentials));
  if (!target.token.empty()) context_.AddMetadata("authorization", "Bearer " + target.token);
  call_ = stub_->Session(&context_);
  v1::SessionRequest request;
  *request.mutable_open() = open;
  Send(request);
  const auto first = Read();
  if (!first) {  // the server ended the call: its status says why
    Finish();
    throw Refused("[client] " + server_ + " ended the call before it opened a session");
  }
  if (!first->has_opened()) {
    context_.TryCancel();
    call_->Finish();
    call_.reset();
    throw Refused("[client] " + server_ + " must first answer that a session is open, got " +
                  first->ShortDebugString().substr(0, 100));
  }
  opened_ = first->opened();
}

Session::~Session() {
  if (!call_) return;
  context_.TryCancel();
  call_->Finish();
}

std::optional<v1::SessionResponse> Session::Read() {
  v1::SessionResponse response;
  if (!call_->Read(&response)) return std::nullopt;
  return response;
}

void Session::Finish() {
  const grpc::Status status = call_->Finish();
  call_.reset();
  if (!status.ok()) {
    throw Refused("[client] " + server_ + " ended the call: " + CodeName(status.error_code()) +
                  ": " + status.error_message());
  }
}

}  // namespace sluice::client
