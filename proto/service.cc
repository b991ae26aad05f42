#include "proto/service.h"

#include <google/protobuf/wrappers.pb.h>
#include <grpcpp/create_channel_posix.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/impl/codegen/client_unary_call.h>
#include <grpcpp/impl/codegen/proto_utils.h>
#include <grpcpp/resource_quota.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>

#include "proto/caption_call.h"
#include "proto/json_log.h"
#include "proto/messages.h"
#include "proto/session_call.h"
#include "proto/stream_hub.h"
#include "proto/unary_call.h"
#include "runtime/error.h"
#include "sluice/v1/service.grpc.pb.h"

namespace sluice {
namespace {

using grpc::ByteBuffer;
using grpc::Status;
using grpc::StatusCode;
using Reactor = grpc::ServerBidiReactor<ByteBuffer, ByteBuffer>;

constexpr char kHealthCheck[] = "/grpc.health.v1.Health/Check";
constexpr auto kPatience = std::chrono::seconds(5);  // of the watchdog

// grpc.health.v1: HealthCheckRequest is {string service = 1} and HealthCheckResponse {enum status =
// 1}, on the wire the same as these.
using HealthRequest = google::protobuf::StringValue;
using HealthResponse = google::protobuf::Int32Value;
enum HealthStatus { kServing = 1, kNotServing = 2 };

template <typename Message>
Status Pack(const Message& message, ByteBuffer& bytes) {
  bool own_buffer = false;
  return grpc::SerializationTraits<Message>::Serialize(message, &bytes, &own_buffer);
}

// Every method is a stream both ways of bytes to gRPC: then a call begins with its headers, and
// nothing more of it is read before its token is known.
class Methods : public grpc::Service {
 protected:
  template <typename Begin>
  void Add(const char* name, const Begin& begin) {
    AddMethod(new grpc::internal::RpcServiceMethod(name, grpc::internal::RpcMethod::BIDI_STREAMING,
                                                   nullptr));
    MarkMethodRawCallback(count_++,
                          new grpc::internal::CallbackBidiHandler<ByteBuffer, ByteBuffer>(begin));
  }

 private:
  int count_ = 0;
};

class HealthMethods final : public Methods {
 public:
  explicit HealthMethods(StreamHub& hub) : hub_(hub) {
    Add(kHealthCheck, [this](grpc::CallbackServerContext*) {
      return UnaryCall::Begin(
                 hub_, nullptr,
                 [this](ByteBuffer& request, ByteBuffer& answer) { return Check(request, answer); })
          .get();
    });
  }
  void Set(bool serving) { serving_ = serving; }

 private:
  Status Check(ByteBuffer& bytes, ByteBuffer& answer) {
    HealthRequest request;
    if (!grpc::SerializationTraits<HealthRequest>::Deserialize(&bytes, &request).ok()) {
      return {StatusCode::INVALID_ARGUMENT, "[health] expected a HealthCheckRequest"};
    }
    if (!request.value().empty() && request.value() != v1::Sluice::service_full_name()) {
      return {StatusCode::NOT_FOUND,
              "[health] expected no service or " + std::string(v1::Sluice::service_full_name())};
    }
    HealthResponse response;
    response.set_value(serving_ ? kServing : kNotServing);
    return Pack(response, answer);
  }

  StreamHub& hub_;
  std::atomic<bool> serving_ = false;
};

class SluiceMethods final : public Methods {
 public:
  SluiceMethods(StreamHub& hub, Connections& connections) : hub_(hub), connections_(connections) {
    Add("/sluice.v1.Sluice/Session", [this](grpc::CallbackServerContext* call) {
      return WithAccount(*call, "session", [this](const std::shared_ptr<Account>& account) {
        return SessionCall::Begin(hub_, account);
      });
    });
    Add("/sluice.v1.Sluice/Caption", [this](grpc::CallbackServerContext* call) {
      return WithAccount(*call, "caption", [this](const std::shared_ptr<Account>& account) {
        return CaptionCall::Begin(hub_, account);
      });
    });
    Add("/sluice.v1.Sluice/GetModel", [this](grpc::CallbackServerContext* call) {
      return WithAccount(*call, "model", [this](const std::shared_ptr<Account>& account) {
        return UnaryCall::Begin(hub_, account,
                                [this](ByteBuffer&, ByteBuffer& answer) {
                                  v1::GetModelResponse response;
                                  *response.mutable_model() = ToProto(*hub_.vlm);
                                  *response.mutable_limits() = hub_.LimitsOf(hub_.options.budget);
                                  return Pack(response, answer);
                                })
            .get();
      });
    });
  }

 private:
  template <typename Begin>
  Reactor* WithAccount(const grpc::CallbackServerContext& call, const char* place,
                       const Begin& begin) {
    const auto found = call.client_metadata().find("authorization");
    const bool told = found != call.client_metadata().end();
    const std::string peer = call.peer();
    const auto account = hub_.Authenticate(
        told ? std::string_view(found->second.data(), found->second.size()) : "", peer);
    if (!account) {
      return new RefusedCall(
          {StatusCode::UNAUTHENTICATED,
           "[" + std::string(place) +
               "] expected metadata \"authorization: Bearer TOKEN\" with a token "
               "that is known and has not expired"});
    }
    connections_.ShownToken(peer);
    return begin(account);
  }

  StreamHub& hub_;
  Connections& connections_;
};

void Check(bool ok, const char* expected) {
  if (!ok) throw InputError(std::string("[serve] expected ") + expected);
}

// Asks again and again whether the service answers, on a thread of its own.
class Watchdog {
 public:
  Watchdog(double seconds, std::function<void()> ask)
      : period_(seconds), ask_(std::move(ask)), thread_([this] { Run(); }) {}
  ~Watchdog() {
    {
      const std::lock_guard lock(mutex_);
      ending_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

 private:
  void Run() {
    std::unique_lock lock(mutex_);
    while (!changed_.wait_for(lock, period_, [this] { return ending_; })) {
      lock.unlock();
      ask_();
      lock.lock();
    }
  }

  const std::chrono::duration<double> period_;
  const std::function<void()> ask_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool ending_ = false;
  std::thread thread_;
};

}  // namespace

void CheckExposure(const ServiceOptions& options) {
  const ListenAddress listen = ParseListen("listen", options.listen);
  if (options.tls.certificate.empty() != options.tls.key.empty()) {
    throw InputError("[serve] expected both a certificate and its key, got one of them");
  }
  const bool encrypted = !options.tls.certificate.empty();
  if (!encrypted && !options.tls.client_ca.empty()) {
    throw InputError("[serve] client certificates need a certificate and key of the server's");
  }
  if (!IsOpenToOthers(listen)) return;
  if (!encrypted && !options.allow_plain_text) {
    throw InputError(
        "[serve] others can connect to " + options.listen +
        ": expected certificate and key, got none, so that tokens and pictures could "
        "be read on the way; set them, or allow_plain_text if something in front of it "
        "encrypts");
  }
  if (options.tokens.empty() && options.tls.client_ca.empty() && !options.allow_everybody) {
    throw InputError("[serve] others can connect to " + options.listen +
                     ": expected tokens or client_ca, got neither, so that everybody could use it; "
                     "make a token with sluice token, or set allow_everybody");
  }
}

struct Service::State {
  State(std::shared_ptr<const Vlm> vlm, Scheduler& scheduler, Metrics& metrics, const Clock& clock,
        const ServiceOptions& options)
      : connections(ParseListen("listen", options.listen), options.connections, metrics, clock),
        hub(std::move(vlm), scheduler, metrics, clock, options),
        calls(hub, connections),
        health(hub),
        answers(metrics.gauge("sluice_service_answers",
                              "1: the service answered the watchdog's last question, 0: it did "
                              "not.")),
        unanswered(metrics.counter("sluice_watchdog_failures_total",
                                   "Questions of the watchdog that were not answered in time.")) {}
  Connections connections;
  StreamHub hub;
  SluiceMethods calls;
  HealthMethods health;
  Gauge& answers;
  Counter& unanswered;
  std::optional<ReloadableTls> tls;
  std::unique_ptr<grpc::experimental::ExternalConnectionAcceptor> acceptor, own_acceptor;
  std::unique_ptr<grpc::Server> server;
  std::unique_ptr<Watchdog> watchdog;
  std::once_flag shut_down;
};

Service::Service(std::shared_ptr<const Vlm> vlm, Scheduler& scheduler, Metrics& metrics,
                 const Clock& clock, const ServiceOptions& options) {
  Check(options.message_bytes >= 1 << 10 && options.message_bytes <= 1 << 30,
        "message_bytes from 1024 to 2^30");
  Check(options.frame_pixels >= 1 && options.frame_pixels <= 1 << 28,
        "frame_pixels from 1 to 2^28");
  Check(options.outgoing_bytes >= 1 << 10, "outgoing_bytes from 1024");
  Check(options.linger_seconds >= 0 && options.linger_seconds <= 1e6 &&
            options.drain_seconds >= 0 && options.drain_seconds <= 1e6,
        "linger_seconds and drain_seconds from 0 to 1e6");
  Check(options.keepalive_seconds >= 1 && options.keepalive_seconds <= 1e6,
        "keepalive_seconds from 1 to 1e6");
  Check(options.workers >= 1 && options.max_sources >= 0, "workers from 1, max_sources from 0");
  Check(options.connections.all >= 1 && options.connections.per_address >= 1,
        "connections and connections_per_address from 1");
  Check(options.connections.token_seconds > 0 && options.connections.token_seconds <= 1e6 &&
            options.first_message_seconds > 0 && options.first_message_seconds <= 1e6,
        "token_seconds and first_message_seconds above 0, at most 1e6");
  Check(options.idle_seconds > 0 && options.idle_seconds <= 1e6 && options.watchdog_seconds >= 0 &&
            options.watchdog_seconds <= 1e6,
        "idle_seconds above 0, watchdog_seconds from 0, at most 1e6");
  Check(options.network_bytes >= 2 * options.message_bytes,
        "network_bytes from twice message_bytes");
  CheckExposure(options);
  std::optional<TlsIdentity> identity;
  if (!options.tls.certificate.empty()) identity = ReadTlsFiles(options.tls);
  state_ = std::make_unique<State>(std::move(vlm), scheduler, metrics, clock, options);
  if (identity) state_->tls.emplace(std::move(*identity));

  grpc::ServerBuilder builder;
  using Type = grpc::ServerBuilder::experimental_type::ExternalConnectionType;
  state_->acceptor = builder.experimental().AddExternalConnectionAcceptor(
      Type::FROM_FD, state_->tls ? state_->tls->credentials() : grpc::InsecureServerCredentials());
  // The watchdog has no certificate that a client_ca has signed; its connections never leave this
  // process.
  state_->own_acceptor = builder.experimental().AddExternalConnectionAcceptor(
      Type::FROM_FD, grpc::InsecureServerCredentials());
  builder.RegisterService(&state_->calls);
  builder.RegisterService(&state_->health);
  builder.SetMaxReceiveMessageSize(static_cast<int>(options.message_bytes));
  builder.SetResourceQuota(
      grpc::ResourceQuota("sluice").Resize(static_cast<size_t>(options.network_bytes)));
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
  builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_IDLE_MS,
                             static_cast<int>(options.idle_seconds * 1000));
  state_->server = builder.BuildAndStart();
  if (!state_->server) throw Error("[serve] gRPC does not start; the log tells why");
  state_->connections.Start([state = state_.get()](int descriptor, bool own) {
    grpc::experimental::ExternalConnectionAcceptor::NewConnectionParameters connection;
    connection.fd = descriptor;
    (own ? state->own_acceptor : state->acceptor)->HandleNewConnection(&connection);
  });
  state_->health.Set(true);
  state_->answers.Set(1);
  if (options.watchdog_seconds > 0) {
    state_->watchdog = std::make_unique<Watchdog>(options.watchdog_seconds, [this] { Answers(); });
  }
  LogEvent(spdlog::level::info, "listening",
           {{"address", options.listen},
            {"port", port()},
            {"tls", !options.tls.certificate.empty()},
            {"tokens", options.tokens.size()}});
}

Service::~Service() { Shutdown(); }

int Service::port() const { return state_->connections.port(); }

void Service::Reload(const std::optional<std::vector<AccessToken>>& tokens) {
  std::optional<TlsIdentity> identity;
  if (state_->tls) identity = ReadTlsFiles(state_->hub.options.tls);
  if (tokens) {
    ServiceOptions options = state_->hub.options;
    options.tokens = *tokens;
    CheckExposure(options);
    if (tokens->empty() && state_->hub.needs_token() && !options.allow_everybody) {
      throw InputError(
          "[serve] tokens: expected at least one, got none, which would let everybody "
          "in; make one with sluice token, or set allow_everybody");
    }
    state_->hub.ReplaceTokens(*tokens);
  }
  if (identity) state_->tls->Set(std::move(*identity));
}

bool Service::Answers() {
  Status status(StatusCode::UNAVAILABLE, "no connection to the listening socket");
  const int descriptor = state_->connections.Dial(kPatience);
  if (descriptor >= 0) {
    const auto channel = grpc::CreateInsecureChannelFromFd("watchdog", descriptor);
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + kPatience);
    HealthResponse response;
    const grpc::internal::RpcMethod method(kHealthCheck, grpc::internal::RpcMethod::NORMAL_RPC);
    status = grpc::internal::BlockingUnaryCall<HealthRequest, HealthResponse,
                                               google::protobuf::MessageLite,
                                               google::protobuf::MessageLite>(
        channel.get(), method, &context, HealthRequest(), &response);
  }
  state_->answers.Set(status.ok() ? 1 : 0);
  if (status.ok()) return true;
  state_->unanswered.Add();
  LogEvent(spdlog::level::err, "service_does_not_answer", {{"error", status.error_message()}});
  return false;
}

void Service::Shutdown() {
  std::call_once(state_->shut_down, [this] {
    state_->watchdog.reset();
    state_->health.Set(false);
    state_->hub.Drain();
    // Calls have their last messages on the way; whoever does not take them is cut off.
    state_->connections.Stop();
    state_->server->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(1));
    state_->server->Wait();
    LogEvent(spdlog::level::info, "shut_down");
  });
}

}  // namespace sluice
