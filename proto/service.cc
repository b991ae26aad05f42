#include "proto/service.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include <chrono>
#include <fstream>
#include <mutex>
#include <sstream>

#include "proto/caption_call.h"
#include "proto/json_log.h"
#include "proto/messages.h"
#include "proto/session_call.h"
#include "proto/stream_hub.h"
#include "runtime/error.h"
#include "sluice/v1/service.grpc.pb.h"

namespace sluice {
namespace {

std::string ReadPem(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::stringstream text;
  text << in.rdbuf();
  if (!in || text.str().empty()) {
    throw InputError("[serve] expected a PEM file at " + path.string() + ", cannot read one");
  }
  return text.str();
}

std::shared_ptr<grpc::ServerCredentials> Credentials(const ServiceOptions& options) {
  if (options.certificate.empty() != options.key.empty()) {
    throw InputError("[serve] expected both a certificate and its key, got one of them");
  }
  if (options.certificate.empty()) {
    if (!options.client_ca.empty()) {
      throw InputError("[serve] client certificates need a certificate and key of the server's");
    }
    return grpc::InsecureServerCredentials();
  }
  grpc::SslServerCredentialsOptions ssl(
      options.client_ca.empty() ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                                : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  ssl.pem_key_cert_pairs.push_back({ReadPem(options.key), ReadPem(options.certificate)});
  if (!options.client_ca.empty()) ssl.pem_root_certs = ReadPem(options.client_ca);
  return grpc::SslServerCredentials(ssl);
}

std::shared_ptr<Account> AccountOf(const StreamHub& hub, const grpc::CallbackServerContext& call) {
  const auto found = call.client_metadata().find("authorization");
  const bool told = found != call.client_metadata().end();
  return hub.Authenticate(told ? std::string_view(found->second.data(), found->second.size()) : "");
}

using Methods = v1::Sluice::WithRawCallbackMethod_Session<v1::Sluice::WithCallbackMethod_Caption<
    v1::Sluice::WithCallbackMethod_GetModel<v1::Sluice::Service>>>;

class Calls final : public Methods {
 public:
  explicit Calls(StreamHub& hub) : hub_(hub) {}

  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* Session(
      grpc::CallbackServerContext* call) override {
    return SessionCall::Begin(hub_, AccountOf(hub_, *call));
  }

  grpc::ServerWriteReactor<v1::CaptionResponse>* Caption(
      grpc::CallbackServerContext* call, const v1::CaptionRequest* request) override {
    return CaptionCall::Begin(hub_, AccountOf(hub_, *call), *request);
  }

  grpc::ServerUnaryReactor* GetModel(grpc::CallbackServerContext* call, const v1::GetModelRequest*,
                                     v1::GetModelResponse* response) override {
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    if (!AccountOf(hub_, *call)) {
      reactor->Finish({grpc::StatusCode::UNAUTHENTICATED,
                       "[model] expected metadata \"authorization: Bearer TOKEN\" with a token "
                       "that is known and has not expired"});
      return reactor;
    }
    *response->mutable_model() = ToProto(*hub_.vlm);
    *response->mutable_limits() = hub_.LimitsOf(hub_.options.budget);
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }

 private:
  StreamHub& hub_;
};

void Check(bool ok, const char* expected) {
  if (!ok) throw InputError(std::string("[serve] expected ") + expected);
}

}  // namespace

struct Service::State {
  State(std::shared_ptr<const Vlm> vlm, Scheduler& scheduler, Metrics& metrics, const Clock& clock,
        const ServiceOptions& options)
      : hub(std::move(vlm), scheduler, metrics, clock, options), calls(hub) {}
  StreamHub hub;
  Calls calls;
  int port = 0;
  std::unique_ptr<grpc::Server> server;
  std::once_flag shut_down;
};

Service::Service(std::shared_ptr<const Vlm> vlm, Scheduler& scheduler, Metrics& metrics,
                 const Clock& clock, const ServiceOptions& options) {
  Check(options.message_bytes >= 1 << 10 && options.message_bytes <= 1 << 30,
        "message_bytes from 1024 to 2^30");
  Check(options.frame_pixels >= 1 && options.frame_pixels <= 1 << 28,
        "frame_pixels from 1 to 2^28");
  Check(options.outgoing_bytes >= 1 << 10, "outgoing_bytes from 1024");
  Check(options.linger_seconds >= 0 && options.drain_seconds >= 0,
        "linger_seconds and drain_seconds from 0");
  Check(options.keepalive_seconds >= 1 && options.keepalive_seconds <= 1e6,
        "keepalive_seconds from 1 to 1e6");
  Check(options.workers >= 1 && options.max_sources >= 0, "workers from 1, max_sources from 0");
  const auto credentials = Credentials(options);
  state_ = std::make_unique<State>(std::move(vlm), scheduler, metrics, clock, options);

  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  builder.AddListeningPort(options.listen, credentials, &state_->port);
  builder.RegisterService(&state_->calls);
  builder.SetMaxReceiveMessageSize(static_cast<int>(options.message_bytes));
  // The limit holds for what comes over the wire; unpacked it could be a thousand times as much.
  builder.SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_DEFLATE, false);
  builder.SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_GZIP, false);
  // A peer that has vanished without a word is found out.
  const int keepalive_ms = static_cast<int>(options.keepalive_seconds * 1000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, keepalive_ms);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10000);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 5000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, 100);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // two servers on one port: an error
  state_->server = builder.BuildAndStart();
  if (!state_->server || state_->port == 0) {
    throw InputError("[serve] cannot listen on " + options.listen +
                     "; expected HOST:PORT that nobody listens on, and valid PEM files");
  }
  state_->server->GetHealthCheckService()->SetServingStatus(true);
  LogEvent(spdlog::level::info, "listening",
           {{"address", options.listen},
            {"port", state_->port},
            {"tls", !options.certificate.empty()},
            {"tokens", options.tokens.size()}});
}

Service::~Service() { Shutdown(); }

int Service::port() const { return state_->port; }

void Service::Shutdown() {
  std::call_once(state_->shut_down, [this] {
    state_->server->GetHealthCheckService()->SetServingStatus(false);
    state_->hub.Drain();
    // Calls have their last messages on the way; whoever does not take them is cut off.
    state_->server->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(1));
    state_->server->Wait();
    LogEvent(spdlog::level::info, "shut_down");
  });
}

}  // namespace sluice
