#include "demos/clients/cpp/client.h"

#include <stdexcept>

namespace sluice::client {

Session::Session(const Target& target, const v1::Open& open) {
  std::shared_ptr<grpc::ChannelCredentials> credentials = grpc::InsecureChannelCredentials();
  if (!target.ca.empty()) {
    grpc::SslCredentialsOptions ssl;
    ssl.pem_root_certs = target.ca;
    credentials = grpc::SslCredentials(ssl);
  }
  stub_ = v1::Sluice::NewStub(grpc::CreateChannel(target.server, credentials));
  if (!target.token.empty()) context_.AddMetadata("authorization", "Bearer " + target.token);
  call_ = stub_->Session(&context_);
  v1::SessionRequest request;
  *request.mutable_open() = open;
  Send(request);
  const auto first = Read();
  if (!first || !first->has_opened()) {
    context_.TryCancel();
    const grpc::Status status = call_->Finish();
    call_.reset();
    throw std::runtime_error("[client] " + target.server + ": " + status.error_message());
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
  if (!status.ok()) throw std::runtime_error("[client] " + status.error_message());
}

}  // namespace sluice::client
