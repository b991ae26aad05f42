// The service's connections as strangers, clients and the watchdog see them.
#include "proto/connections.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/impl/codegen/client_unary_call.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "proto/service.h"
#include "runtime/error.h"
#include "sluice/v1/service.grpc.pb.h"
#include "streaming/engine.h"
#include "tests/support/temporary_directory.h"
#include "tests/support/tiny_stream.h"

namespace sluice {
namespace {

using grpc::ByteBuffer;
using grpc::StatusCode;
using ::testing::HasSubstr;
using namespace std::chrono_literals;

std::shared_ptr<const Engine> TinyEngine() {
  static const auto engine = std::make_shared<const Engine>(TinyOptions());
  return engine;
}

std::shared_ptr<grpc::Channel> NewChannel(int port,
                                          const std::shared_ptr<grpc::ChannelCredentials>&
                                              credentials = grpc::InsecureChannelCredentials()) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return grpc::CreateCustomChannel("127.0.0.1:" + std::to_string(port), credentials, arguments);
}

// A call of which only what the test writes is sent.
class RawCall {
 public:
  using Stream = grpc::ClientReaderWriter<ByteBuffer, ByteBuffer>;
  RawCall(const std::shared_ptr<grpc::Channel>& channel, const char* method,
          const std::string& token = "")
      : channel_(channel), method_(method, grpc::internal::RpcMethod::BIDI_STREAMING) {
    context_.set_deadline(std::chrono::system_clock::now() + 30s);  // ends a test that hangs
    if (!token.empty()) context_.AddMetadata("authorization", "Bearer " + token);
    call_.reset(grpc::internal::ClientReaderWriterFactory<ByteBuffer, ByteBuffer>::Create(
        channel_.get(), method_, &context_));
  }
  ~RawCall() {
    if (finished_) return;
    context_.TryCancel();
    call_->Finish();
  }
  bool Write(const std::string& bytes) {
    const grpc::Slice slice(bytes);
    return call_->Write(ByteBuffer(&slice, 1));
  }
  std::optional<std::string> Read() {
    ByteBuffer bytes;
    grpc::Slice slice;
    if (!call_->Read(&bytes) || !bytes.DumpToSingleSlice(&slice).ok()) return std::nullopt;
    return std::string(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  grpc::Status Finish() {
    finished_ = true;
    return call_->Finish();
  }

 private:
  const std::shared_ptr<grpc::Channel> channel_;
  const grpc::internal::RpcMethod method_;
  grpc::ClientContext context_;
  std::unique_ptr<Stream> call_;
  bool finished_ = false;
};

// A plain TCP connection.
class Socket {
 public:
  explicit Socket(int port) : handle_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    connected_ = connect(handle_, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0;
  }
  ~Socket() { close(handle_); }
  Socket(const Socket&) = delete;
  bool connected() const { return connected_; }
  // Waits until the other side has closed it.
  bool IsClosed(std::chrono::milliseconds patience = 20s) const {
    char bytes[4096];
    while (true) {
      pollfd ready = {.fd = handle_, .events = POLLIN, .revents = 0};
      if (poll(&ready, 1, static_cast<int>(patience.count())) != 1) return false;
      if (read(handle_, bytes, sizeof bytes) <= 0) return true;
    }
  }

 private:
  const int handle_;
  bool connected_ = false;
};

AccessToken Token(const std::string& secret) {
  return {.name = secret, .sha256 = Sha256Hex(secret), .expires = {}};
}

class ConnectionsTest : public ::testing::Test {
 protected:
  ConnectionsTest() {
    options_.listen = "127.0.0.1:0";
    options_.drain_seconds = 1;
    options_.watchdog_seconds = 0;
  }
  ~ConnectionsTest() override { service_.reset(); }
  void Start() {
    scheduler_ = std::make_unique<Scheduler>(TinyEngine(), SchedulerOptions{}, clock_, metrics_);
    service_ =
        std::make_unique<Service>(TinyEngine()->vlm(), *scheduler_, metrics_, clock_, options_);
  }
  int port() const { return service_->port(); }
  grpc::Status GetModel(const std::shared_ptr<grpc::Channel>& channel,
                        const std::string& authorization = "") {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + 30s);
    context.set_wait_for_ready(false);
    if (!authorization.empty()) context.AddMetadata("authorization", authorization);
    v1::GetModelResponse response;
    return v1::Sluice::NewStub(channel)->GetModel(&context, {}, &response);
  }
  int64_t Count(const char* name, const Metrics::Labels& labels = {}) {
    return metrics_.counter(name, "", labels).value();
  }

  ServiceOptions options_;
  SystemClock clock_;
  Metrics metrics_;
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<Service> service_;
};

TEST_F(ConnectionsTest, IdleConnectionsWithoutATokenAreClosedAndClientsStay) {
  options_.tokens = {Token("good")};
  options_.connections.token_seconds = 0.3;
  Start();
  const auto client = NewChannel(port());
  EXPECT_TRUE(GetModel(client, "Bearer good").ok());
  const Socket idle(port()), liar(port());
  EXPECT_TRUE(idle.IsClosed());
  EXPECT_TRUE(liar.IsClosed());
  EXPECT_EQ(Count("sluice_connections_closed_total", {{"reason", "no_token"}}), 2);
  // The same connection still.
  EXPECT_TRUE(GetModel(client, "Bearer good").ok());
  EXPECT_EQ(Count("sluice_connections_accepted_total"), 3);
}

TEST_F(ConnectionsTest, HoweverManyAreIdleAClientWithATokenGetsIn) {
  options_.tokens = {Token("good")};
  options_.connections = {.all = 8, .per_address = 8, .token_seconds = 600};
  Start();
  const auto first = NewChannel(port());
  EXPECT_TRUE(GetModel(first, "Bearer good").ok());
  std::vector<std::unique_ptr<Socket>> idle;
  for (int i = 0; i < 30; ++i) {
    idle.push_back(std::make_unique<Socket>(port()));
    EXPECT_TRUE(idle.back()->connected());
  }
  const auto second = NewChannel(port());
  EXPECT_TRUE(GetModel(second, "Bearer good").ok());
  EXPECT_TRUE(GetModel(first, "bearer good").ok());
  EXPECT_TRUE(idle.front()->IsClosed());
  EXPECT_EQ(Count("sluice_connections_closed_total", {{"reason", "no_token"}}), 0);
  EXPECT_GE(Count("sluice_connections_closed_total", {{"reason", "replaced"}}), 24);
}

TEST_F(ConnectionsTest, WhenAllHaveShownATokenANewcomerIsTurnedAwayUntilOneGoes) {
  options_.connections = {.all = 2, .per_address = 2, .token_seconds = 600};
  Start();
  auto first = NewChannel(port());
  const auto second = NewChannel(port());
  EXPECT_TRUE(GetModel(first).ok());
  EXPECT_TRUE(GetModel(second).ok());
  EXPECT_TRUE(Socket(port()).IsClosed());
  EXPECT_EQ(Count("sluice_connections_closed_total", {{"reason", "full"}}), 1);
  first.reset();
  // Its end reaches the server on its own time.
  bool in = false;
  for (int i = 0; i < 100 && !in; ++i) in = GetModel(NewChannel(port())).ok();
  EXPECT_TRUE(in);
}

TEST_F(ConnectionsTest, AfterAllDescriptorsWereTakenConnectionsAreAcceptedAgain) {
  Start();
  const auto channel = NewChannel(port());  // stays open: its end would give descriptors back
  EXPECT_TRUE(GetModel(channel).ok());
  rlimit before = {};
  getrlimit(RLIMIT_NOFILE, &before);
  std::vector<int> taken;
  const auto take_all = [&taken] {
    for (int handle; (handle = open("/dev/null", O_RDONLY | O_CLOEXEC)) >= 0;)
      taken.push_back(handle);
  };
  // What is open may lie above the new limit; nothing can be opened then.
  const rlimit none = {.rlim_cur = 16, .rlim_max = before.rlim_max};
  const int made = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
  take_all();
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port()));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  EXPECT_EQ(connect(made, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  // It was tried, and there was no descriptor for it; it is not tried in a loop.
  for (int i = 0; i < 2000 && Count("sluice_accept_failures_total") == 0; ++i) usleep(1000);
  EXPECT_GE(Count("sluice_accept_failures_total"), 1);
  EXPECT_LE(Count("sluice_accept_failures_total"), 25);
  take_all();                         // what the watchdog has given back meanwhile
  EXPECT_FALSE(service_->Answers());  // not even the watchdog gets a descriptor
  for (const int handle : taken) close(handle);
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
  EXPECT_TRUE(GetModel(NewChannel(port())).ok());
  EXPECT_TRUE(service_->Answers());
  close(made);
}

TEST_F(ConnectionsTest, TokensAreLookedAtBeforeAnythingElseIsRead) {
  options_.tokens = {Token("good")};
  Start();
  const auto channel = NewChannel(port());
  for (const char* method :
       {"/sluice.v1.Sluice/GetModel", "/sluice.v1.Sluice/Caption", "/sluice.v1.Sluice/Session"}) {
    RawCall call(channel, method, "bad");  // nothing is sent but the headers
    EXPECT_EQ(call.Finish().error_code(), StatusCode::UNAUTHENTICATED) << method;
  }
  EXPECT_EQ(Count("sluice_tokens_refused_total", {{"reason", "unknown"}}), 3);
  RawCall none(channel, "/sluice.v1.Sluice/GetModel");
  EXPECT_EQ(none.Finish().error_code(), StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(Count("sluice_tokens_refused_total", {{"reason", "missing"}}), 1);
}

TEST_F(ConnectionsTest, ACallWhoseFirstMessageDoesNotComeEnds) {
  options_.first_message_seconds = 0.2;
  Start();
  const auto channel = NewChannel(port());
  for (const char* method : {"/sluice.v1.Sluice/GetModel", "/sluice.v1.Sluice/Caption",
                             "/sluice.v1.Sluice/Session", "/grpc.health.v1.Health/Check"}) {
    RawCall call(channel, method);
    EXPECT_EQ(call.Finish().error_code(), StatusCode::DEADLINE_EXCEEDED) << method;
  }
}

TEST_F(ConnectionsTest, FewCallsWithoutATokenWaitAtATimeAndANewOneIsAnswered) {
  Start();
  const auto channel = NewChannel(port());
  std::vector<std::unique_ptr<RawCall>> waiting;
  for (int i = 0; i < 40; ++i) {
    waiting.push_back(std::make_unique<RawCall>(channel, "/grpc.health.v1.Health/Check"));
  }
  EXPECT_EQ(waiting.front()->Finish().error_code(), StatusCode::RESOURCE_EXHAUSTED);
  RawCall check(channel, "/grpc.health.v1.Health/Check");
  check.Write("");
  EXPECT_EQ(check.Read(), std::string("\x08\x01"));
  EXPECT_TRUE(check.Finish().ok());
}

TEST_F(ConnectionsTest, HealthAnswersForTheServiceByItsNameAndForNoOther) {
  options_.tokens = {Token("good")};  // it needs none
  Start();
  const auto channel = NewChannel(port());
  const std::string name = "sluice.v1.Sluice";
  RawCall named(channel, "/grpc.health.v1.Health/Check");
  named.Write("\x0A" + std::string(1, static_cast<char>(name.size())) + name);
  EXPECT_EQ(named.Read(), std::string("\x08\x01"));
  RawCall other(channel, "/grpc.health.v1.Health/Check");
  other.Write("\x0A\x01x");
  EXPECT_EQ(other.Finish().error_code(), StatusCode::NOT_FOUND);
  RawCall broken(channel, "/grpc.health.v1.Health/Check");
  broken.Write("\x0A\x7Fx");
  EXPECT_EQ(broken.Finish().error_code(), StatusCode::INVALID_ARGUMENT);
}

TEST_F(ConnectionsTest, ReflectionIsNotThere) {
  Start();
  RawCall call(NewChannel(port()),
               "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo");
  EXPECT_EQ(call.Finish().error_code(), StatusCode::UNIMPLEMENTED);
}

TEST_F(ConnectionsTest, TheWatchdogIsAnsweredAndItsConnectionTakesNobodysPlace) {
  options_.connections = {.all = 1, .per_address = 1, .token_seconds = 600};
  options_.tokens = {Token("good")};
  Start();
  const auto client = NewChannel(port());
  EXPECT_TRUE(GetModel(client, "Bearer good").ok());
  EXPECT_TRUE(service_->Answers());
  EXPECT_EQ(metrics_.gauge("sluice_service_answers", "").value(), 1);
  EXPECT_EQ(Count("sluice_connections_accepted_total"), 1);
  EXPECT_TRUE(GetModel(client, "Bearer good").ok());
  service_->Shutdown();
  EXPECT_FALSE(service_->Answers());
  EXPECT_EQ(metrics_.gauge("sluice_service_answers", "").value(), 0);
  EXPECT_EQ(Count("sluice_watchdog_failures_total"), 1);
}

TEST_F(ConnectionsTest, AnExpiredTokenEndsCallsThatWaitAndStreamsThatRun) {
  AccessToken token = Token("t");
  token.expires = std::chrono::system_clock::now() + 500ms;
  options_.tokens = {token};
  Start();
  const auto channel = NewChannel(port());
  RawCall idle(channel, "/sluice.v1.Sluice/Session", "t"),
      open(channel, "/sluice.v1.Sluice/Session", "t");
  v1::SessionRequest request;
  request.mutable_open();
  open.Write(request.SerializeAsString());
  ASSERT_TRUE(open.Read());
  EXPECT_EQ(scheduler_->streams().size(), 1u);
  // Neither sends anything more.
  EXPECT_EQ(idle.Finish().error_code(), StatusCode::UNAUTHENTICATED);
  while (open.Read()) continue;
  EXPECT_EQ(open.Finish().error_code(), StatusCode::UNAUTHENTICATED);
  for (int i = 0; i < 2000 && !scheduler_->streams().empty(); ++i) usleep(1000);
  EXPECT_TRUE(scheduler_->streams().empty());
}

TEST_F(ConnectionsTest, NewTokensCountAtOnceAndAWithdrawnOneEndsWhatRunsOnIt) {
  options_.tokens = {Token("old"), Token("kept")};
  Start();
  const auto channel = NewChannel(port());
  RawCall old(channel, "/sluice.v1.Sluice/Session", "old"),
      kept(channel, "/sluice.v1.Sluice/Session", "kept");
  v1::SessionRequest request;
  request.mutable_open();
  for (RawCall* call : {&old, &kept}) {
    call->Write(request.SerializeAsString());
    ASSERT_TRUE(call->Read());
  }
  EXPECT_EQ(GetModel(channel, "Bearer new").error_code(), StatusCode::UNAUTHENTICATED);
  service_->Reload(std::vector{Token("kept"), Token("new")});
  EXPECT_TRUE(GetModel(channel, "Bearer new").ok());
  EXPECT_EQ(GetModel(channel, "Bearer old").error_code(), StatusCode::UNAUTHENTICATED);
  while (old.Read()) continue;
  EXPECT_EQ(old.Finish().error_code(), StatusCode::UNAUTHENTICATED);
  request.mutable_close();
  kept.Write(request.SerializeAsString());
  ASSERT_TRUE(kept.Read());
  EXPECT_TRUE(kept.Finish().ok());
  // What makes no sense changes nothing.
  AccessToken wrong = Token("x");
  wrong.sha256 = "abc";
  EXPECT_THROW(service_->Reload(std::vector{wrong}), InputError);
  EXPECT_THROW(service_->Reload(std::vector<AccessToken>()), InputError);
  EXPECT_TRUE(GetModel(channel, "Bearer new").ok());
}

TEST_F(ConnectionsTest, AnAddressOpenToOthersNeedsEncryptionAndTokensUnlessToldOtherwise) {
  options_.listen = "0.0.0.0:0";
  const auto refused = [&](const char* part) {
    try {
      CheckExposure(options_);
      ADD_FAILURE() << "was taken, expected: " << part;
    } catch (const InputError& error) {
      EXPECT_THAT(error.what(), HasSubstr(part));
    }
  };
  refused("allow_plain_text");
  options_.allow_plain_text = true;
  refused("allow_everybody");
  options_.tokens = {Token("good")};
  EXPECT_NO_THROW(CheckExposure(options_));
  options_.tokens.clear();
  options_.allow_everybody = true;
  EXPECT_NO_THROW(CheckExposure(options_));
  options_.listen = "127.0.0.1:0";
  options_.allow_plain_text = options_.allow_everybody = false;
  EXPECT_NO_THROW(CheckExposure(options_));
}

// A key and a certificate for 127.0.0.1 signed by itself.
struct Identity {
  Identity() {
    EVP_PKEY* const pair = EVP_EC_gen("P-256");
    X509* const x509 = X509_new();
    X509_set_version(x509, 2);
    ASN1_INTEGER_set(X509_get_serialNumber(x509), 1);
    X509_gmtime_adj(X509_getm_notBefore(x509), -60);
    X509_gmtime_adj(X509_getm_notAfter(x509), 3600);
    X509_set_pubkey(x509, pair);
    X509_NAME_add_entry_by_txt(X509_get_subject_name(x509), "CN", MBSTRING_ASC,
                               reinterpret_cast<const unsigned char*>("localhost"), -1, -1, 0);
    X509_set_issuer_name(x509, X509_get_subject_name(x509));
    X509_EXTENSION* name =
        X509V3_EXT_conf_nid(nullptr, nullptr, NID_subject_alt_name, "IP:127.0.0.1");
    X509_add_ext(x509, name, -1);
    X509_EXTENSION_free(name);
    X509_sign(x509, pair, EVP_sha256());
    certificate = Pem([&](BIO* bio) { PEM_write_bio_X509(bio, x509); });
    key = Pem([&](BIO* bio) {
      PEM_write_bio_PrivateKey(bio, pair, nullptr, nullptr, 0, nullptr, nullptr);
    });
    X509_free(x509);
    EVP_PKEY_free(pair);
  }
  template <typename Write>
  static std::string Pem(const Write& write) {
    BIO* bio = BIO_new(BIO_s_mem());
    write(bio);
    char* data = nullptr;
    const auto size = static_cast<size_t>(BIO_get_mem_data(bio, &data));
    std::string pem(data, size);
    BIO_free(bio);
    return pem;
  }
  std::string certificate, key;
};

TEST_F(ConnectionsTest, CertificatesAreReadAgainForNewConnectionsAndBadOnesAreNotTaken) {
  const TemporaryDirectory directory;
  const auto certificate = directory.path() / "server.pem", key = directory.path() / "server.key";
  const auto write = [&](const std::string& first, const std::string& second) {
    std::ofstream(certificate) << first;
    std::ofstream(key) << second;
  };
  const Identity before, after;
  write(before.certificate, before.key);
  options_.tls = {.certificate = certificate, .key = key, .client_ca = {}};
  Start();
  const auto trusting = [&](const Identity& identity) {
    grpc::SslCredentialsOptions ssl;
    ssl.pem_root_certs = identity.certificate;
    return NewChannel(port(), grpc::SslCredentials(ssl));
  };
  const auto old = trusting(before);
  EXPECT_TRUE(GetModel(old).ok());
  EXPECT_TRUE(service_->Answers());  // beside the encryption
  write(after.certificate, before.key);
  EXPECT_THROW(service_->Reload(std::nullopt), InputError);
  EXPECT_TRUE(GetModel(trusting(before)).ok());
  write(after.certificate, after.key);
  service_->Reload(std::nullopt);
  EXPECT_TRUE(GetModel(trusting(after)).ok());
  EXPECT_FALSE(GetModel(trusting(before)).ok());
  EXPECT_TRUE(GetModel(old).ok());  // an open connection goes on
}

}  // namespace
}  // namespace sluice
