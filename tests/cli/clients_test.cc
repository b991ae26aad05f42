// The clients as a script sees them: why a server turned them away, what their exit codes are.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>

#include "demos/clients/cpp/client.h"

namespace sluice {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

struct Outcome {
  int exit_code = -1;
  std::string err;
};

// A server that answers every session with one status.
class TurnsAway : public v1::Sluice::Service {
 public:
  explicit TurnsAway(grpc::Status status) : status_(std::move(status)) {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  std::string address() const { return "127.0.0.1:" + std::to_string(port_); }
  grpc::Status Session(
      grpc::ServerContext* context,
      grpc::ServerReaderWriter<v1::SessionResponse, v1::SessionRequest>* call) override {
    v1::SessionRequest request;
    call->Read(&request);
    const auto& metadata = context->client_metadata();
    const auto found = metadata.find("authorization");
    token_ = found == metadata.end() ? "" : std::string(found->second.data(), found->second.size());
    return status_;
  }
  std::string token() const { return token_; }

 private:
  const grpc::Status status_;
  int port_ = 0;
  std::string token_;
  std::unique_ptr<grpc::Server> server_;
};

class ClientsTest : public ::testing::Test {
 protected:
  ClientsTest()
      : directory_(std::filesystem::path(::testing::TempDir()) /
                   ("clients_test_" + std::to_string(getpid()) + "_" +
                    std::string(::testing::UnitTest::GetInstance()->current_test_info()->name()))) {
    std::filesystem::create_directories(directory_);
  }
  ~ClientsTest() override { std::filesystem::remove_all(directory_); }

  Outcome Run(const std::string& command, const std::string& out = "/dev/null") const {
    const auto err = directory_ / "stderr";
    const int status =
        std::system((command + " >" + out + " 2>" + err.string() + " </dev/null").c_str());
    std::stringstream text;
    text << std::ifstream(err).rdbuf();
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, text.str()};
  }
  Outcome Ask(const std::string& more) const {
    return Run(SLUICE_PROGRAM " ask --source test:smpte:1 --max-frames 1 --question What? " + more);
  }
  std::string TokenFile(const std::string& content) const {
    std::ofstream(directory_ / "token", std::ios::binary) << content;
    return (directory_ / "token").string();
  }

  const std::filesystem::path directory_;
};

TEST_F(ClientsTest, EveryClientSaysWhyTheServerTurnedItAway) {
  const TurnsAway server({grpc::StatusCode::UNAUTHENTICATED, "[access] the token has expired"});
  std::ofstream(directory_ / "a.jpg") << "picture";
  for (const std::string& command :
       {SLUICE_PROGRAM " ask --source test:smpte:1 --question What? --server " + server.address(),
        SLUICE_PROGRAM " load --sessions 1 --frames 1 --server " + server.address(),
        SLUICE_CLIENT_SESSION " " + server.address() + " What? " +
            (directory_ / "a.jpg").string()}) {
    const Outcome outcome = Run(command);
    EXPECT_EQ(outcome.exit_code, 1) << command;
    EXPECT_THAT(outcome.err, AllOf(HasSubstr("UNAUTHENTICATED"), HasSubstr("token has expired")));
    EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
  }
}

TEST_F(ClientsTest, ATokenIsTheFirstLineWhateverEndsIt) {
  const TurnsAway server({grpc::StatusCode::UNAUTHENTICATED, "no"});
  for (const char* content : {"secret\r\n", "secret\n", "secret", "secret\r\nmore\r\n"}) {
    Ask("--server " + server.address() + " --token-file " + TokenFile(content));
    EXPECT_EQ(server.token(), "Bearer secret");
  }
}

TEST_F(ClientsTest, LettersThatNoHeaderHoldsAreRefusedInOneLine) {
  for (const std::string& content :
       {std::string("a\tb\n"), std::string("\xc3\xa9"), std::string("a\0b", 3), std::string("\n"),
        std::string("a b")}) {
    const Outcome outcome = Ask("--server 127.0.0.1:9 --token-file " + TokenFile(content));
    EXPECT_EQ(outcome.exit_code, 2) << outcome.err;
    EXPECT_THAT(outcome.err, HasSubstr("token"));
    EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
  }
}

TEST_F(ClientsTest, AnswersThatCannotBeWrittenAreAFailure) {
  const std::string ask = SLUICE_PROGRAM
      " ask --source test:smpte:1 --max-frames 1 --question What?"
      " --max-new-tokens 2 --model " SLUICE_SOURCE_DIR "/tests/golden/tiny_tied";
  for (const char* json : {"", " --json"}) {
    const Outcome outcome = Run(ask + json, "/dev/full");
    EXPECT_EQ(outcome.exit_code, 1) << json;
    EXPECT_THAT(outcome.err, HasSubstr("[stdout]"));
  }
}

TEST_F(ClientsTest, APictureThatIsNotThereIsWrongInput) {
  const Outcome outcome =
      Run(SLUICE_CLIENT_SESSION " 127.0.0.1:9 What? " + (directory_ / "none.jpg").string());
  EXPECT_EQ(outcome.exit_code, 2);
  EXPECT_THAT(outcome.err, HasSubstr("none.jpg"));
}

}  // namespace
}  // namespace sluice
