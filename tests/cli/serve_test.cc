// The server as a process: what signals do to it and to its streams, and `sluice load` against it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "demos/clients/cpp/client.h"
#include "proto/access.h"

namespace sluice {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using namespace std::chrono_literals;

std::string ReadFile(const std::filesystem::path& path) {
  std::stringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

class Server {
 public:
  // Returns when it listens.
  Server(const std::filesystem::path& directory, std::vector<std::string> more = {})
      : log_(directory / "log") {
    std::filesystem::remove(log_);
    std::vector<std::string> arguments = {
        SLUICE_PROGRAM,      "serve",
        "--listen",          "127.0.0.1:0",
        "--metrics",         "",
        "--model",           SLUICE_SOURCE_DIR "/tests/golden/tiny_tied",
        "--state-directory", (directory / "state").string()};
    arguments.insert(arguments.end(), more.begin(), more.end());
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    pid_ = fork();
    if (pid_ == 0) {
      if (!freopen(log_.c_str(), "w", stderr)) _exit(126);
      execv(argv[0], argv.data());
      _exit(127);
    }
    port_ = WaitForEvent("listening")["port"];
  }
  ~Server() {
    if (pid_ <= 0) return;
    Signal(SIGKILL);
    Wait();
  }
  std::string address() const { return "127.0.0.1:" + std::to_string(port_); }
  // The first of this name in its log, once it is there.
  json WaitForEvent(const std::string& name) const {
    for (int i = 0; i < 3000; ++i) {
      std::this_thread::sleep_for(10ms);
      std::ifstream in(log_);
      for (std::string line; std::getline(in, line);) {
        json event = json::parse(line, nullptr, false);
        if (event.is_object() && event.value("event", "") == name) return event;
      }
    }
    throw std::runtime_error("the server does not tell " + name + ": " + ReadFile(log_));
  }
  void Signal(int number) const { kill(pid_, number); }
  int Wait() {  // for its end
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = -1;
    return status;
  }

 private:
  const std::filesystem::path log_;
  pid_t pid_ = -1;
  int port_ = 0;
};

class ServeTest : public ::testing::Test {
 protected:
  ServeTest()
      : directory_(std::filesystem::path(::testing::TempDir()) /
                   ("serve_test_" + std::to_string(getpid()))) {
    std::filesystem::remove_all(directory_);
    std::filesystem::create_directories(directory_);
  }
  ~ServeTest() override { std::filesystem::remove_all(directory_); }

  static v1::Open WithMemory() {
    v1::Open open;
    open.mutable_options()->mutable_memory()->set_window_tokens(16);
    open.mutable_options()->mutable_memory()->set_recall_frames(8);
    open.mutable_options()->mutable_generation()->set_temperature(0);
    return open;
  }
  static std::optional<v1::SessionResponse> ReadUntil(client::Session& session,
                                                      v1::SessionResponse::MessageCase kind) {
    while (auto message = session.Read()) {
      if (message->message_case() == kind) return message;
    }
    return std::nullopt;
  }
  // Frames that were acknowledged.
  static void Push(client::Session& session, int first, int count) {
    for (int i = first; i < first + count; ++i) {
      v1::SessionRequest request;
      v1::Frame& frame = *request.mutable_frame();
      frame.set_number(i);
      frame.set_media_seconds(0.5 * i);
      frame.mutable_rgb()->set_width(40);
      frame.mutable_rgb()->set_height(30);
      std::string& data = *frame.mutable_rgb()->mutable_data();
      std::mt19937 random(i);
      for (int b = 0; b < 40 * 30 * 3; ++b) data.push_back(static_cast<char>(random()));
      session.Send(request);
      ASSERT_TRUE(ReadUntil(session, v1::SessionResponse::kFrameAck)) << i;
    }
  }
  static void Ask(client::Session& session, uint64_t id, int tokens) {
    v1::SessionRequest request;
    request.mutable_ask()->set_question_id(id);
    request.mutable_ask()->set_text("What is there?");
    request.mutable_ask()->mutable_generation()->set_max_new_tokens(tokens);
    session.Send(request);
  }
  static std::string Answer(client::Session& session, uint64_t id) {
    Ask(session, id, 8);
    const auto message = ReadUntil(session, v1::SessionResponse::kAnswer);
    return message ? message->answer().text() : "(none)";
  }

  const std::filesystem::path directory_;
};

TEST_F(ServeTest, AStreamGoesOnInAnotherProcessAsIfNothingHadHappened) {
  std::string unbroken, id;
  {
    Server server(directory_);
    client::Session whole({.server = server.address(), .token = "", .ca = ""}, WithMemory());
    Push(whole, 0, 30);
    unbroken = Answer(whole, 1);

    client::Session session({.server = server.address(), .token = "", .ca = ""}, WithMemory());
    id = session.opened().stream_id();
    Push(session, 0, 20);
    server.Signal(SIGTERM);
    ASSERT_TRUE(ReadUntil(session, v1::SessionResponse::kGoingAway));
    while (session.Read()) continue;
    EXPECT_THROW(session.Finish(), std::runtime_error);
    const int status = server.Wait();
    EXPECT_TRUE(WIFEXITED(status));
    EXPECT_EQ(WEXITSTATUS(status), 0);
  }
  Server server(directory_);
  v1::Open open;
  open.set_resume_stream_id(id);
  client::Session session({.server = server.address(), .token = "", .ca = ""}, open);
  EXPECT_EQ(session.opened().last_frame(), 19u);
  Push(session, 20, 10);
  EXPECT_EQ(Answer(session, 1), unbroken);
}

TEST_F(ServeTest, ASecondSignalEndsItAtOnce) {
  Server server(directory_,
                {"--drain-seconds", "600", "--answer-seconds", "600", "--answer-tokens", "100000"});
  v1::Open open = WithMemory();
  client::Session session({.server = server.address(), .token = "", .ca = ""}, open);
  Push(session, 0, 2);
  // So many questions that draining takes longer than anybody waits.
  for (int i = 1; i <= 8; ++i) Ask(session, i, 100000);
  ASSERT_TRUE(ReadUntil(session, v1::SessionResponse::kText));
  server.Signal(SIGTERM);
  ASSERT_TRUE(ReadUntil(session, v1::SessionResponse::kGoingAway));
  std::this_thread::sleep_for(50ms);
  server.Signal(SIGTERM);
  const int status = server.Wait();
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 128 + SIGTERM);
}

TEST_F(ServeTest, ASignalReadsTokensAgainAndAFileThatMakesNoSenseChangesNothing) {
  const auto config = directory_ / "serve.json";
  const auto write = [&config](const std::string& token) {
    const json file = {{"tokens", {{{"name", "client"}, {"sha256", Sha256Hex(token)}}}}};
    std::ofstream(config) << file.dump();
  };
  write("old");
  Server server(directory_, {"--config", config.string()});
  const auto target = [&server](const char* token) {
    return client::Target{.server = server.address(), .token = token, .ca = ""};
  };
  client::Session session(target("old"), WithMemory());
  EXPECT_THROW(client::Session(target("new"), WithMemory()), client::Refused);

  write("new");
  server.Signal(SIGHUP);
  server.WaitForEvent("reloaded");
  while (session.Read()) continue;  // what runs with a token that is gone ends
  EXPECT_THROW(session.Finish(), client::Refused);
  EXPECT_THROW(client::Session(target("old"), WithMemory()), client::Refused);
  const client::Session after(target("new"), WithMemory());

  std::ofstream(config) << "{";
  server.Signal(SIGHUP);
  EXPECT_THAT(server.WaitForEvent("not_reloaded")["error"], HasSubstr("serve.json"));
  const client::Session still(target("new"), WithMemory());
}

TEST_F(ServeTest, TheClientOfOnePageGetsItsAnswer) {
  Server server(directory_);
  const auto out = directory_ / "out";
  const std::filesystem::path jpeg = directory_ / "picture.jpg";
  std::filesystem::copy_file(SLUICE_SOURCE_DIR "/tests/fuzz/corpus/jpeg/seed_baseline", jpeg);
  const std::string command = SLUICE_CLIENT_SESSION " " + server.address() + " 'What is there?' " +
                              jpeg.string() + " " + jpeg.string() + " >" + out.string() + " 2>&1";
  EXPECT_EQ(std::system(command.c_str()), 0);
  EXPECT_FALSE(ReadFile(out).empty());
  EXPECT_NE(std::system(
                (SLUICE_CLIENT_SESSION " " + server.address() + " x /no/such.jpg 2>" + out.string())
                    .c_str()),
            0);
  EXPECT_EQ(ReadFile(out), "cannot read /no/such.jpg\n");
}

TEST_F(ServeTest, ALoadOfManySessionsIsAccountedFor) {
  Server server(directory_);
  const auto out = directory_ / "out";
  const std::string command = SLUICE_PROGRAM
                              " load --json --sessions 6 --fps 0 --frames 30 "
                              "--ask-every 5 --max-new-tokens 4 --memory --memory-window 64 "
                              "--memory-recall 4 --server " +
                              server.address() + " >" + out.string();
  EXPECT_EQ(std::system(command.c_str()), 0);
  const json report = json::parse(ReadFile(out));
  EXPECT_EQ(report["failed_sessions"], 0);
  EXPECT_EQ(report["frames"]["pushed"], 180);
  EXPECT_EQ(report["frames"]["encoded"], 180);
  EXPECT_EQ(report["answers"], 6 * 3);
  EXPECT_GT(report["first_text_ms"]["p99"], 0);
  // Nobody is there.
  server.Signal(SIGKILL);
  server.Wait();
  EXPECT_NE(std::system((command + " 2>&1").c_str()), 0);
  EXPECT_THAT(ReadFile(out), HasSubstr("\"failed_sessions\": 6"));
}

}  // namespace
}  // namespace sluice
