// The service in this process with a real model, and clients that do what clients should not. In
// every case another client's session goes on.
#include "proto/service.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/impl/codegen/client_unary_call.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "proto/saved_streams.h"
#include "runtime/error.h"
#include "sluice/v1/service.grpc.pb.h"
#include "streaming/engine.h"
#include "tests/support/tiny_stream.h"

namespace sluice {
namespace {

using grpc::StatusCode;
using ::testing::HasSubstr;
using ::testing::Not;
using namespace std::chrono_literals;

constexpr int kSide = 24;  // pixels of test frames

std::shared_ptr<const Engine> TinyEngine() {
  static const auto engine = std::make_shared<const Engine>(TinyOptions());
  return engine;
}

v1::SessionRequest RawFrame(uint64_t number, double seconds) {
  std::mt19937 random(static_cast<uint32_t>(number) + 1);
  v1::SessionRequest request;
  v1::Frame& frame = *request.mutable_frame();
  frame.set_number(number);
  frame.set_media_seconds(seconds);
  frame.mutable_rgb()->set_width(kSide);
  frame.mutable_rgb()->set_height(kSide);
  std::string& data = *frame.mutable_rgb()->mutable_data();
  for (int i = 0; i < kSide * kSide * 3; ++i) data += static_cast<char>(random());
  return request;
}

v1::SessionRequest Question(uint64_t id, int tokens = 6) {
  v1::SessionRequest request;
  request.mutable_ask()->set_question_id(id);
  request.mutable_ask()->set_text("What is there?");
  request.mutable_ask()->mutable_generation()->set_max_new_tokens(tokens);
  return request;
}

// One client's connection and call.
class Client {
 public:
  Client(int port, const std::string& token = "", grpc::ChannelArguments arguments = {},
         std::shared_ptr<grpc::ChannelCredentials> credentials = nullptr) {
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // a connection of its own
    channel_ = grpc::CreateCustomChannel(
        "127.0.0.1:" + std::to_string(port),
        credentials ? credentials : grpc::InsecureChannelCredentials(), arguments);
    stub_ = v1::Sluice::NewStub(channel_);
    if (!token.empty()) context_.AddMetadata("authorization", "Bearer " + token);
    context_.set_deadline(std::chrono::system_clock::now() + 60s);  // ends a test that hangs
    call_ = stub_->Session(&context_);
  }

  bool Send(const v1::SessionRequest& request) { return call_->Write(request); }
  bool SendOpen(const std::function<void(v1::Open&)>& set = {}) {
    v1::SessionRequest request;
    request.mutable_open();
    if (set) set(*request.mutable_open());
    return Send(request);
  }
  // The stream's id.
  std::string Open(const std::function<void(v1::Open&)>& set = {}) {
    SendOpen(set);
    opened = Read().opened();
    EXPECT_EQ(opened.stream_id().size(), 32u);
    return opened.stream_id();
  }
  std::string Resume(const std::string& id, const std::vector<QuestionId>& awaited = {}) {
    return Open([&](v1::Open& open) {
      open.set_resume_stream_id(id);
      open.mutable_awaited_question_ids()->Add(awaited.begin(), awaited.end());
    });
  }
  // Empty at the end of the call.
  v1::SessionResponse Read() {
    v1::SessionResponse response;
    call_->Read(&response);
    return response;
  }
  v1::SessionResponse ReadUntil(v1::SessionResponse::MessageCase kind) {
    v1::SessionResponse response;
    while (call_->Read(&response)) {
      if (response.message_case() == kind) return response;
    }
    ADD_FAILURE() << "the call ended without a message of kind " << kind;
    return {};
  }
  void Close(bool at_once = false) {
    v1::SessionRequest request;
    request.mutable_close()->set_at_once(at_once);
    Send(request);
  }
  void Cancel() { context_.TryCancel(); }
  // Reads what is left.
  grpc::Status Finish() {
    v1::SessionResponse response;
    while (call_->Read(&response)) last = response;
    return call_->Finish();
  }
  grpc::ClientReaderWriter<v1::SessionRequest, v1::SessionResponse>& call() { return *call_; }
  v1::Sluice::Stub& stub() { return *stub_; }
  std::shared_ptr<grpc::Channel> channel() { return channel_; }

  v1::Opened opened;
  v1::SessionResponse last;

 private:
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::Sluice::Stub> stub_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::SessionRequest, v1::SessionResponse>> call_;
};

class ServiceTest : public ::testing::Test {
 protected:
  ServiceTest() {
    options_.listen = "127.0.0.1:0";
    options_.drain_seconds = 2;
  }
  void Start() {
    scheduler_ = std::make_unique<Scheduler>(TinyEngine(), SchedulerOptions{}, clock_, metrics_);
    service_ =
        std::make_unique<Service>(TinyEngine()->vlm(), *scheduler_, metrics_, clock_, options_);
  }
  int port() const { return service_->port(); }
  size_t streams() const { return scheduler_->streams().size(); }
  bool StreamsBecome(size_t count) const {
    for (int i = 0; i < 1000 && streams() != count; ++i) std::this_thread::sleep_for(10ms);
    return streams() == count;
  }

  // Starts a bystander, lets `fault` happen, then has the bystander ask.
  void OthersGoOnAfter(const std::function<void()>& fault) {
    Client other(port());
    other.Open();
    other.Send(RawFrame(1, 0));
    other.ReadUntil(v1::SessionResponse::kFrameAck);
    fault();
    other.Send(RawFrame(2, 0.5));
    other.Send(Question(7));
    const auto answer = other.ReadUntil(v1::SessionResponse::kAnswer).answer();
    EXPECT_EQ(answer.frames_seen(), 2);
    EXPECT_FALSE(answer.text().empty()) << answer.error();
    other.Close();
    EXPECT_TRUE(other.Finish().ok());
    EXPECT_EQ(other.last.closed().frames_encoded(), 2);
  }
  // A call whose `request` after Open ends it.
  void ExpectEnds(const v1::SessionRequest& request, StatusCode code, const std::string& part) {
    Client client(port());
    client.Open();
    client.Send(request);
    const grpc::Status status = client.Finish();
    EXPECT_EQ(status.error_code(), code) << status.error_message();
    EXPECT_THAT(status.error_message(), HasSubstr(part));
  }
  void ExpectOpenEnds(const std::function<void(v1::Open&)>& set, StatusCode code,
                      const std::string& part) {
    Client client(port());
    client.SendOpen(set);
    const grpc::Status status = client.Finish();
    EXPECT_EQ(status.error_code(), code) << status.error_message();
    EXPECT_THAT(status.error_message(), HasSubstr(part));
  }
  // A frame that is told to be bad, in a session that goes on.
  void ExpectBadFrame(const std::function<void(v1::Frame&)>& spoil, const std::string& part) {
    Client client(port());
    client.Open();
    v1::SessionRequest request = RawFrame(3, 0);
    spoil(*request.mutable_frame());
    client.Send(request);
    const auto dropped = client.ReadUntil(v1::SessionResponse::kFrameDropped).frame_dropped();
    EXPECT_EQ(dropped.number(), 3u);
    EXPECT_EQ(dropped.reason(), v1::DROP_REASON_BAD_FRAME);
    EXPECT_THAT(dropped.detail(), HasSubstr(part));
    client.Send(RawFrame(4, 1));
    EXPECT_EQ(client.ReadUntil(v1::SessionResponse::kFrameAck).frame_ack().number(), 4u);
    client.Close();
    EXPECT_TRUE(client.Finish().ok());
    EXPECT_EQ(client.last.closed().frames_received(), 2);
    EXPECT_EQ(client.last.closed().frames_dropped(), 1);
  }

  ServiceOptions options_;
  SystemClock clock_;
  Metrics metrics_;
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<Service> service_;
};

TEST_F(ServiceTest, FramesAreAcknowledgedQuestionsAnsweredAndEverythingIsCounted) {
  Start();
  Client client(port());
  client.Open();
  EXPECT_GT(client.opened.model().tokens_per_frame(), 0);
  EXPECT_EQ(client.opened.limits().message_bytes(), options_.message_bytes);
  for (int i = 0; i < 3; ++i) client.Send(RawFrame(10 + i, 0.5 * i));
  client.Send(Question(1));
  client.Close();
  std::string pieces;
  std::vector<uint64_t> acknowledged;
  v1::StreamAnswer answer;
  v1::Closed closed;
  for (auto message = client.Read(); message.message_case() != 0; message = client.Read()) {
    if (message.has_frame_ack()) acknowledged.push_back(message.frame_ack().number());
    if (message.has_text()) pieces += message.text().text();
    if (message.has_answer()) answer = message.answer();
    if (message.has_closed()) closed = message.closed();
  }
  EXPECT_TRUE(client.Finish().ok());
  EXPECT_THAT(acknowledged, ::testing::ElementsAre(10, 11, 12));
  EXPECT_EQ(answer.text(), pieces);
  EXPECT_EQ(answer.frames_seen(), 3);
  EXPECT_EQ(closed.frames_received(), 3);
  EXPECT_EQ(closed.frames_encoded(), 3);
  EXPECT_EQ(closed.frames_dropped(), 0);
  EXPECT_EQ(closed.questions(), 1);
  EXPECT_TRUE(StreamsBecome(0));
}

TEST_F(ServiceTest, StandingQuestionsAlertAndTellNoPieces) {
  Start();
  Client client(port());
  client.Open();
  v1::SessionRequest request;
  v1::StandingQuestion& standing = *request.mutable_standing_question();
  *standing.mutable_ask() = Question(5).ask();
  standing.set_interval_media_seconds(1);
  client.Send(request);
  for (int i = 0; i < 6; ++i) {
    client.Send(RawFrame(i, 0.5 * i));
    client.ReadUntil(v1::SessionResponse::kFrameAck);
    if (i == 2) {
      v1::SessionResponse message = client.Read();
      ASSERT_TRUE(message.has_alert()) << message.ShortDebugString();
      EXPECT_EQ(message.alert().answer().question_id(), 5u);
      break;
    }
  }
}

TEST_F(ServiceTest, WrongRequestsAreRefusedAndTheSessionGoesOn) {
  Start();
  Client client(port());
  client.Open();
  client.Send(RawFrame(1, 0));
  const auto refused = [&](const v1::SessionRequest& request, const std::string& name) {
    client.Send(request);
    const auto message = client.ReadUntil(v1::SessionResponse::kRefused).refused();
    EXPECT_EQ(message.request(), name);
    EXPECT_FALSE(message.error().empty());
  };
  v1::SessionRequest blank = Question(1);
  blank.mutable_ask()->set_text("  ");
  refused(blank, "ask");
  v1::SessionRequest save;
  save.mutable_save();
  refused(save, "save");
  v1::SessionRequest change;
  change.mutable_set_options()->mutable_options()->set_cacher(true);
  refused(change, "set_options");
  client.Send(Question(1));  // its number was not used up
  EXPECT_EQ(client.ReadUntil(v1::SessionResponse::kAnswer).answer().question_id(), 1u);
  client.Close();
  EXPECT_TRUE(client.Finish().ok());
}

TEST_F(ServiceTest, AStreamWithAMemoryLastsAndTellsWhatAnswersRestOn) {
  options_.memory.host_bytes = 1 << 20;
  Start();
  Client client(port());
  const auto remember = [](v1::ModelOptions& options, int64_t window) {
    options.mutable_memory()->set_window_tokens(window);
    options.mutable_memory()->set_recall_frames(4);
    options.mutable_generation()->set_max_new_tokens(4);
  };
  client.Open([&](v1::Open& open) { remember(*open.mutable_options(), 16); });
  EXPECT_EQ(client.opened.limits().memory_host_bytes(), 1 << 20);
  constexpr int kFrames = 60;
  for (int i = 0; i < kFrames; ++i) {
    client.Send(RawFrame(i, 0.5 * i));
    client.ReadUntil(v1::SessionResponse::kFrameAck);
  }
  client.Send(Question(1));
  const auto answer = client.ReadUntil(v1::SessionResponse::kAnswer).answer();
  EXPECT_EQ(answer.frames_seen(), kFrames);
  ASSERT_GT(answer.evidence_size(), 0);
  double weight = 0;
  for (const v1::Evidence& moment : answer.evidence()) {
    EXPECT_LE(moment.begin_media_seconds(), moment.end_media_seconds());
    EXPECT_GE(moment.layers(), 1);
    weight += moment.weight();
  }
  EXPECT_NEAR(weight, 1, 1e-6);
  // One frame in four of those recalled is the newest.
  EXPECT_NEAR(answer.evidence(answer.evidence_size() - 1).end_media_seconds(), 0.5 * (kFrames - 1),
              1e-8);  // times are whole nanoseconds

  v1::SessionRequest change;
  remember(*change.mutable_set_options()->mutable_options(), 32);
  client.Send(change);
  const auto refused = client.ReadUntil(v1::SessionResponse::kRefused).refused();
  EXPECT_EQ(refused.request(), "set_options");
  EXPECT_THAT(refused.error(), HasSubstr("memory"));
  change.Clear();
  remember(*change.mutable_set_options()->mutable_options(), 16);
  change.mutable_set_options()->mutable_options()->mutable_generation()->set_max_new_tokens(2);
  client.Send(change);
  v1::SessionRequest question = Question(2);
  question.mutable_ask()->clear_generation();
  client.Send(question);
  EXPECT_LE(client.ReadUntil(v1::SessionResponse::kAnswer).answer().usage().answer_tokens(), 2);
  client.Close();
  EXPECT_TRUE(client.Finish().ok());
}

// With a directory for saved streams.
class SavedStreamTest : public ServiceTest {
 protected:
  SavedStreamTest() {
    directory_ =
        std::filesystem::path(::testing::TempDir()) / ("streams_" + std::to_string(getpid()));
    std::filesystem::remove_all(directory_);
    options_.state_directory = directory_;
    Start();
  }
  ~SavedStreamTest() override {
    Stop();
    std::filesystem::remove_all(directory_);
  }
  void Stop() {
    if (service_) service_->Shutdown();
    service_.reset();
    scheduler_.reset();
  }
  void Restart() {
    Stop();
    Start();
  }
  size_t files() const {
    return static_cast<size_t>(std::distance(std::filesystem::directory_iterator(directory_), {}));
  }
  std::filesystem::path file(const std::string& id) const {
    return SavedStreams(directory_, {}).FileOf(id, "everybody");
  }

  // With a memory that recalls, so that everything a stream can have is there.
  std::string OpenWithMemory(Client& client) {
    return client.Open([](v1::Open& open) {
      open.mutable_options()->mutable_memory()->set_window_tokens(16);
      open.mutable_options()->mutable_memory()->set_recall_frames(8);
      open.mutable_options()->mutable_generation()->set_max_new_tokens(8);
    });
  }
  static void Push(Client& client, int first, int count) {
    for (int i = first; i < first + count; ++i) {
      client.Send(RawFrame(i, 0.5 * i));
      client.ReadUntil(v1::SessionResponse::kFrameAck);
    }
  }
  static std::string Answer(Client& client, uint64_t id) {
    client.Send(Question(id));
    return client.ReadUntil(v1::SessionResponse::kAnswer).answer().text();
  }

  std::filesystem::path directory_;
};

TEST_F(SavedStreamTest, AServerThatStopsAndStartsAgainAnswersAsIfItHadNot) {
  Client unbroken(port());
  OpenWithMemory(unbroken);
  Push(unbroken, 0, 30);
  const std::string first = Answer(unbroken, 1);
  Push(unbroken, 30, 10);
  const std::string second = Answer(unbroken, 2);
  unbroken.Close();
  EXPECT_TRUE(unbroken.Finish().ok());
  EXPECT_EQ(files(), 0u);

  Client client(port());
  const std::string id = OpenWithMemory(client);
  Push(client, 0, 30);
  EXPECT_EQ(Answer(client, 1), first);
  v1::SessionRequest standing;
  *standing.mutable_standing_question()->mutable_ask() = Question(9).ask();
  standing.mutable_standing_question()->set_interval_media_seconds(1);
  client.Send(standing);
  // So that the question has arrived.
  client.Send(standing);
  EXPECT_EQ(client.ReadUntil(v1::SessionResponse::kRefused).refused().request(),
            "standing_question");
  std::thread stop([&] { Stop(); });
  client.ReadUntil(v1::SessionResponse::kGoingAway);
  const grpc::Status status = client.Finish();
  stop.join();
  EXPECT_EQ(status.error_code(), StatusCode::UNAVAILABLE);
  EXPECT_THAT(status.error_message(), HasSubstr("resume"));
  EXPECT_EQ(files(), 1u);

  Start();
  Client again(port());
  EXPECT_EQ(again.Resume(id), id);
  EXPECT_TRUE(again.opened.resumed());
  EXPECT_EQ(again.opened.last_frame(), 29u);
  again.Send(RawFrame(30, 15));
  const auto alert = again.ReadUntil(v1::SessionResponse::kAlert).alert();
  EXPECT_EQ(alert.answer().question_id(), 9u);
  EXPECT_EQ(alert.answer().frames_seen(), 31);
  v1::SessionRequest cancel;
  cancel.mutable_cancel()->set_question_id(9);
  again.Send(cancel);
  Push(again, 31, 9);
  EXPECT_EQ(Answer(again, 2), second);
  again.Close();
  EXPECT_TRUE(again.Finish().ok());
  EXPECT_EQ(again.last.closed().frames_received(), 40);
  EXPECT_EQ(again.last.closed().frames_encoded(), 40);
  EXPECT_EQ(files(), 0u);
}

TEST_F(SavedStreamTest, AClientSavesAndACrashGoesOnFromThere) {
  std::string id, later;
  {
    Client client(port());
    id = OpenWithMemory(client);
    Push(client, 0, 10);
    v1::SessionRequest save;
    save.mutable_save();
    client.Send(save);
    client.ReadUntil(v1::SessionResponse::kSaved);
    std::filesystem::copy_file(file(id), directory_ / "kept");
    Push(client, 10, 5);
    later = Answer(client, 1);
    client.Close();
    EXPECT_TRUE(client.Finish().ok());
  }
  // What a crash leaves: the file of the last save.
  std::filesystem::rename(directory_ / "kept", file(id));
  Restart();
  Client client(port());
  client.Resume(id);
  EXPECT_EQ(client.opened.last_frame(), 9u);
  Push(client, 10, 5);
  EXPECT_EQ(Answer(client, 1), later);
}

TEST_F(SavedStreamTest, AStreamWhoseClientStaysAwayIsPutAwayAndComesBack) {
  Stop();
  options_.linger_seconds = 0.05;
  Start();
  std::string id;
  {
    Client client(port());
    id = OpenWithMemory(client);
    Push(client, 0, 10);
    client.Cancel();
  }
  EXPECT_TRUE(StreamsBecome(0));
  EXPECT_EQ(files(), 1u);
  Client client(port());
  client.Resume(id);
  EXPECT_EQ(client.opened.last_frame(), 9u);
  Push(client, 10, 2);
  EXPECT_FALSE(Answer(client, 1).empty());
}

TEST_F(SavedStreamTest, OnlyWholeFilesAndRealIdsAreResumed) {
  std::string id;
  {
    Client client(port());
    id = OpenWithMemory(client);
    Push(client, 0, 3);
  }
  Restart();
  const auto resume = [&](const std::string& name) {
    Client client(port());
    client.SendOpen([&](v1::Open& open) { open.set_resume_stream_id(name); });
    return client.Finish();
  };
  for (const std::string& name : {std::string("../../etc/passwd"), "../" + id, id + ".stream",
                                  std::string(32, 'g'), std::string(32, '0')}) {
    EXPECT_EQ(resume(name).error_code(), StatusCode::NOT_FOUND) << name;
  }
  // Another stream's file under this name.
  const std::string other(32, 'a');
  std::filesystem::copy_file(file(id), file(other));
  EXPECT_EQ(resume(other).error_code(), StatusCode::FAILED_PRECONDITION);
  std::filesystem::resize_file(file(id), std::filesystem::file_size(file(id)) - 9);
  const grpc::Status damaged = resume(id);
  EXPECT_EQ(damaged.error_code(), StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(damaged.error_message(), HasSubstr("checksum"));
  EXPECT_THAT(damaged.error_message(), Not(HasSubstr(id)));
  EXPECT_THAT(damaged.error_message(), Not(HasSubstr(directory_.string())));
  EXPECT_TRUE(std::filesystem::exists(file(id)));
}

TEST_F(SavedStreamTest, AnotherAccountsStreamIsNotFound) {
  Stop();
  // Of "one" and "two".
  options_.tokens = {
      {.name = "first",
       .sha256 = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"},
      {.name = "second",
       .sha256 = "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3"}};
  Start();
  std::string id;
  {
    Client client(port(), "one");
    id = OpenWithMemory(client);
    Push(client, 0, 3);
  }
  Restart();
  Client thief(port(), "two");
  thief.SendOpen([&](v1::Open& open) { open.set_resume_stream_id(id); });
  EXPECT_EQ(thief.Finish().error_code(), StatusCode::NOT_FOUND);
  Client owner(port(), "one");
  owner.Resume(id);
  EXPECT_EQ(owner.opened.last_frame(), 2u);
}

TEST_F(SavedStreamTest, AnAccountThatOpensAndSavesAgainAndAgainReachesItsQuota) {
  Stop();
  // Of "one".
  options_.tokens = {
      {.name = "first",
       .sha256 = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"}};
  options_.tokens[0].saved_streams = 1;
  Start();
  v1::SessionRequest save;
  save.mutable_save();
  Client first(port(), "one"), second(port(), "one");
  OpenWithMemory(first);
  Push(first, 0, 1);
  OpenWithMemory(second);
  Push(second, 0, 1);
  for (int i = 0; i < 2; ++i) {  // the same stream again costs nothing
    first.Send(save);
    first.ReadUntil(v1::SessionResponse::kSaved);
  }
  second.Send(save);
  EXPECT_THAT(second.ReadUntil(v1::SessionResponse::kRefused).refused().error(),
              HasSubstr("expected at most 1 saved streams of this token"));
  EXPECT_EQ(files(), 1u);
  first.Close();  // and its file goes
  EXPECT_TRUE(first.Finish().ok());
  second.Send(save);
  second.ReadUntil(v1::SessionResponse::kSaved);
}

TEST_F(SavedStreamTest, ADirectoryThatIsGoneCostsTheSaveAndNothingElse) {
  std::filesystem::remove_all(directory_);
  OthersGoOnAfter([&] {
    Client client(port());
    OpenWithMemory(client);
    Push(client, 0, 3);
    v1::SessionRequest save;
    save.mutable_save();
    client.Send(save);
    const auto refused = client.ReadUntil(v1::SessionResponse::kRefused).refused();
    EXPECT_EQ(refused.request(), "save");
    EXPECT_THAT(refused.error(), HasSubstr("log"));
    EXPECT_THAT(refused.error(), Not(HasSubstr(directory_.string())));
    EXPECT_FALSE(Answer(client, 1).empty());
  });
}

TEST_F(SavedStreamTest, FilesThatNobodyCameForAreRemoved) {
  Stop();
  const auto old = file(std::string(32, 'b')), fresh = file(std::string(32, 'c'));
  for (const auto& path : {old, fresh}) std::ofstream(path) << "x";
  using Time = std::filesystem::file_time_type;
  std::filesystem::last_write_time(old, Time::clock::now() - std::chrono::hours(24 * 8));
  Start();
  for (int i = 0; i < 500 && std::filesystem::exists(old); ++i) std::this_thread::sleep_for(10ms);
  EXPECT_FALSE(std::filesystem::exists(old));
  EXPECT_TRUE(std::filesystem::exists(fresh));
}

TEST_F(ServiceTest, OnlyOneOpenAndOnlyAtTheBeginningMakesSense) {
  Start();
  OthersGoOnAfter([&] {
    v1::SessionRequest open;
    open.mutable_open();
    ExpectEnds(open, StatusCode::INVALID_ARGUMENT, "second");
    Client client(port());
    client.Send(RawFrame(1, 0));
    EXPECT_EQ(client.Finish().error_code(), StatusCode::INVALID_ARGUMENT);
  });
}

TEST_F(ServiceTest, ValuesOfAnotherVersionAreRefused) {
  Start();
  OthersGoOnAfter([&] {
    v1::SessionRequest empty;
    empty.GetReflection()->MutableUnknownFields(&empty)->AddVarint(99, 1);
    ExpectEnds(empty, StatusCode::INVALID_ARGUMENT, "this version");
    ExpectOpenEnds(
        [](v1::Open& open) { open.mutable_options()->set_preset(static_cast<v1::Preset>(77)); },
        StatusCode::INVALID_ARGUMENT, "preset");
    ExpectOpenEnds([](v1::Open& open) { open.mutable_options()->add_compress("no-such"); },
                   StatusCode::INVALID_ARGUMENT, "no-such");
    ExpectOpenEnds([](v1::Open& open) { open.mutable_budgets()->set_queued_frames(-3); },
                   StatusCode::INVALID_ARGUMENT, "queued_frames");
  });
}

TEST_F(ServiceTest, BytesThatAreNoMessageEndTheCall) {
  Start();
  OthersGoOnAfter([&] {
    for (const std::string& garbage : {std::string("\xFF\xFF\xFF\xFF\xFF\xFF\xFF"),
                                       std::string("\x12\x7F\x01"), std::string(1000, '\x0C')}) {
      const auto channel = grpc::CreateChannel("127.0.0.1:" + std::to_string(port()),
                                               grpc::InsecureChannelCredentials());
      grpc::ClientContext context;
      const grpc::internal::RpcMethod method("/sluice.v1.Sluice/Session",
                                             grpc::internal::RpcMethod::BIDI_STREAMING);
      const std::unique_ptr<grpc::ClientReaderWriter<grpc::ByteBuffer, grpc::ByteBuffer>> call(
          grpc::internal::ClientReaderWriterFactory<grpc::ByteBuffer, grpc::ByteBuffer>::Create(
              channel.get(), method, &context));
      const grpc::Slice slice(garbage);
      call->Write(grpc::ByteBuffer(&slice, 1));
      EXPECT_EQ(call->Finish().error_code(), StatusCode::INVALID_ARGUMENT);
    }
  });
}

TEST_F(ServiceTest, MessagesBeyondTheLimitEndTheCallWithoutBeingTaken) {
  Start();
  OthersGoOnAfter([&] {
    Client client(port());
    client.Open();
    v1::SessionRequest request = RawFrame(1, 0);
    request.mutable_frame()->mutable_rgb()->mutable_data()->assign(9 << 20, 'x');
    client.Send(request);
    EXPECT_EQ(client.Finish().error_code(), StatusCode::RESOURCE_EXHAUSTED);
  });
}

TEST_F(ServiceTest, BadFramesAreDroppedWithAReason) {
  Start();
  OthersGoOnAfter([&] {
    ExpectBadFrame([](v1::Frame& f) { f.set_jpeg("\xFF\xD8\xFF\xE0 and nothing more"); }, "JPEG");
    ExpectBadFrame([](v1::Frame& f) { f.set_png(std::string(100, 'p')); }, "PNG");
    ExpectBadFrame([](v1::Frame& f) { f.clear_picture(); }, "found none");
    ExpectBadFrame([](v1::Frame& f) { f.mutable_rgb()->set_width(kSide + 1); }, "bytes");
    ExpectBadFrame([](v1::Frame& f) { f.mutable_rgb()->set_width(-kSide); }, "pixels");
    ExpectBadFrame(
        [](v1::Frame& f) {
          f.mutable_rgb()->set_width(1 << 30);
          f.mutable_rgb()->set_height(1 << 30);
        },
        "pixels");
    for (const double time : {-1.0, 2e9, std::nan(""), std::numeric_limits<double>::infinity()}) {
      ExpectBadFrame([&](v1::Frame& f) { f.set_media_seconds(time); }, "media_seconds");
    }
  });
}

TEST_F(ServiceTest, AFrameWhoseTimeGoesBackwardsIsDropped) {
  Start();
  OthersGoOnAfter([&] {
    Client client(port());
    client.Open();
    client.Send(RawFrame(1, 5));
    for (const double time : {5.0, 4.5}) {
      client.Send(RawFrame(2, time));
      const auto dropped = client.ReadUntil(v1::SessionResponse::kFrameDropped).frame_dropped();
      EXPECT_EQ(dropped.reason(), v1::DROP_REASON_OUT_OF_ORDER);
    }
  });
}

TEST_F(ServiceTest, AClientKilledBetweenFramesCanGoOnWithItsStream) {
  Start();
  OthersGoOnAfter([&] {
    std::string id;
    {
      Client client(port());
      id = client.Open();
      client.Send(RawFrame(1, 0));
      client.ReadUntil(v1::SessionResponse::kFrameAck);
      client.Send(RawFrame(2, 0.5));
      client.Cancel();
      EXPECT_EQ(client.Finish().error_code(), StatusCode::CANCELLED);
    }
    Client again(port());
    EXPECT_EQ(again.Resume(id), id);
    EXPECT_TRUE(again.opened.resumed());
    EXPECT_GE(again.opened.last_frame(), 1u);
    again.Send(RawFrame(3, 1));
    again.Send(Question(1));
    EXPECT_GE(again.ReadUntil(v1::SessionResponse::kAnswer).answer().frames_seen(), 2);
    again.Close();
    EXPECT_TRUE(again.Finish().ok());
  });
}

// A wire to the server that breaks when so many bytes have gone through to it.
class BreakingWire {
 public:
  BreakingWire(int port, int64_t bytes)
      : bytes_(bytes), listener_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address = Loopback(0);
    socklen_t size = sizeof address;
    EXPECT_EQ(bind(listener_, reinterpret_cast<sockaddr*>(&address), size), 0);
    EXPECT_EQ(listen(listener_, 1), 0);
    getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size);
    port_ = ntohs(address.sin_port);
    thread_ = std::thread([this, port] { Carry(port); });
  }
  ~BreakingWire() {
    thread_.join();
    close(listener_);
  }
  int port() const { return port_; }

 private:
  static sockaddr_in Loopback(int port) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
  }
  void Carry(int port) {
    const int client = accept(listener_, nullptr, nullptr);
    const int server = socket(AF_INET, SOCK_STREAM, 0);
    const sockaddr_in address = Loopback(port);
    EXPECT_EQ(connect(server, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    pollfd ends[] = {{.fd = client, .events = POLLIN, .revents = 0},
                     {.fd = server, .events = POLLIN, .revents = 0}};
    std::array<char, 4096> buffer;
    for (int64_t sent = 0; sent < bytes_ && poll(ends, 2, 60'000) > 0;) {
      ssize_t got = 0;
      for (int i = 0; i < 2 && got >= 0; ++i) {
        if (ends[i].revents == 0) continue;
        got = read(ends[i].fd, buffer.data(), buffer.size());
        if (got <= 0 || write(ends[1 - i].fd, buffer.data(), got) != got) got = -1;
        if (i == 0) sent += got;
      }
      if (got < 0) break;
    }
    close(client);
    close(server);
  }

  const int64_t bytes_;
  const int listener_;
  int port_ = 0;
  std::thread thread_;
};

TEST_F(ServiceTest, AClientKilledInTheMiddleOfAFrameLosesThatFrameAlone) {
  Start();
  OthersGoOnAfter([&] {
    constexpr int kLarge = 600;  // pixels: a megabyte
    BreakingWire wire(port(), 500'000);
    std::string id;
    {
      Client client(wire.port());
      id = client.Open();
      client.Send(RawFrame(1, 0));
      client.ReadUntil(v1::SessionResponse::kFrameAck);
      v1::SessionRequest large = RawFrame(2, 0.5);
      v1::RawPicture& picture = *large.mutable_frame()->mutable_rgb();
      picture.set_width(kLarge);
      picture.set_height(kLarge);
      picture.set_data(std::string(kLarge * kLarge * 3, 'x'));
      client.Send(large);
      EXPECT_EQ(client.Finish().error_code(), StatusCode::UNAVAILABLE);
    }
    Client again(port());
    again.Resume(id);
    EXPECT_EQ(again.opened.last_frame(), 1u);
    again.Send(RawFrame(2, 0.5));
    again.Send(Question(1));
    EXPECT_EQ(again.ReadUntil(v1::SessionResponse::kAnswer).answer().frames_seen(), 2);
    again.Close();
    EXPECT_TRUE(again.Finish().ok());
    EXPECT_EQ(again.last.closed().frames_received(), 2);
  });
}

TEST_F(ServiceTest, AnAnswerWhoseClientWasKilledIsToldWhenItComesBack) {
  Start();
  OthersGoOnAfter([&] {
    std::string id;
    {
      Client client(port());
      id = client.Open();
      client.Send(RawFrame(1, 0));
      client.Send(Question(9, 40));
      client.ReadUntil(v1::SessionResponse::kText);
      client.Cancel();
      client.Finish();
    }
    Client again(port());
    again.Resume(id, {9, 10});  // whether or not all of 9 was on its way; 10 was never asked
    const auto answer = again.ReadUntil(v1::SessionResponse::kAnswer).answer();
    EXPECT_EQ(answer.question_id(), 9u);
    EXPECT_GT(answer.usage().answer_tokens() + static_cast<int>(answer.text().size()), 0);
  });
}

TEST_F(ServiceTest, AClientThatDoesNotReadIsCutOffAndItsStreamStays) {
  options_.outgoing_bytes = 4096;
  Start();
  OthersGoOnAfter([&] {
    grpc::ChannelArguments narrow;  // little fits on the way
    narrow.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 1024);
    narrow.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
    Client client(port(), "", narrow);
    const std::string id = client.Open();
    v1::SessionRequest bad = RawFrame(1, 0);
    bad.mutable_frame()->set_jpeg("no picture");
    // Each is answered with about fifty bytes; sending may fail when the call has ended.
    for (int i = 0; i < 20000 && client.Send(bad); ++i) continue;
    const grpc::Status status = client.Finish();
    EXPECT_EQ(status.error_code(), StatusCode::RESOURCE_EXHAUSTED) << status.error_message();
    EXPECT_THAT(status.error_message(), HasSubstr("resume"));

    Client again(port());
    again.Resume(id);
    again.Send(RawFrame(2, 0));
    EXPECT_EQ(again.ReadUntil(v1::SessionResponse::kFrameAck).frame_ack().number(), 2u);
  });
}

TEST_F(ServiceTest, AStreamWhoseClientDoesNotComeBackIsClosed) {
  options_.linger_seconds = 0.2;
  Start();
  std::string id;
  {
    Client client(port());
    id = client.Open();
    EXPECT_EQ(streams(), 1u);
    client.Cancel();
    client.Finish();
  }
  EXPECT_TRUE(StreamsBecome(0));
  ExpectOpenEnds([&](v1::Open& open) { open.set_resume_stream_id(id); }, StatusCode::NOT_FOUND, "");
}

TEST_F(ServiceTest, ACallThatEndsWithoutCloseFinishesWhatWasAskedAndLeavesTheStream) {
  Start();
  Client client(port());
  const std::string id = client.Open();
  client.Send(RawFrame(1, 0));
  client.Send(Question(1));
  client.call().WritesDone();
  client.ReadUntil(v1::SessionResponse::kAnswer);
  EXPECT_TRUE(client.Finish().ok());
  EXPECT_EQ(streams(), 1u);
  Client again(port());
  EXPECT_EQ(again.Resume(id), id);
  again.Close(true);
  EXPECT_TRUE(again.Finish().ok());
  EXPECT_TRUE(StreamsBecome(0));
}

TEST_F(ServiceTest, ASecondConnectionTakesAHalfOpenStreamOver) {
  Start();
  Client first(port());
  const std::string id = first.Open();
  Client second(port());
  EXPECT_EQ(second.Resume(id), id);
  EXPECT_EQ(first.Finish().error_code(), StatusCode::ABORTED);
  second.Send(RawFrame(1, 0));
  EXPECT_EQ(second.ReadUntil(v1::SessionResponse::kFrameAck).frame_ack().number(), 1u);
}

TEST_F(ServiceTest, TokensDecideWhoMayOpenHowMany) {
  AccessToken good{.name = "good", .sha256 = Sha256Hex("good"), .expires = {}};
  good.sessions = 1;
  AccessToken other{.name = "other", .sha256 = Sha256Hex("other"), .expires = {}};
  AccessToken old{.name = "old", .sha256 = Sha256Hex("old"), .expires = {}};
  old.expires = std::chrono::system_clock::now() - 1s;
  options_.tokens = {good, other, old};
  Start();
  for (const char* token : {"", "wrong", "old"}) {
    Client client(port(), token);
    client.SendOpen();
    EXPECT_EQ(client.Finish().error_code(), StatusCode::UNAUTHENTICATED) << token;
  }
  grpc::ClientContext context;
  v1::GetModelResponse model;
  Client owner(port(), "good");
  EXPECT_EQ(owner.stub().GetModel(&context, {}, &model).error_code(), StatusCode::UNAUTHENTICATED);
  const std::string id = owner.Open();
  Client second(port(), "good");
  second.SendOpen();
  EXPECT_EQ(second.Finish().error_code(), StatusCode::RESOURCE_EXHAUSTED);
  Client thief(port(), "other");
  thief.SendOpen([&](v1::Open& open) { open.set_resume_stream_id(id); });
  EXPECT_EQ(thief.Finish().error_code(), StatusCode::NOT_FOUND);
  owner.Send(RawFrame(1, 0));
  owner.ReadUntil(v1::SessionResponse::kFrameAck);
}

TEST_F(ServiceTest, ATokenThatExpiresEndsItsSession) {
  AccessToken token{.name = "t", .sha256 = Sha256Hex("t"), .expires = {}};
  token.expires = std::chrono::system_clock::now() + 1s;
  options_.tokens = {token};
  Start();
  Client client(port(), "t");
  client.Open();
  std::this_thread::sleep_until(*token.expires + 10ms);
  client.Send(RawFrame(1, 0));
  EXPECT_EQ(client.Finish().error_code(), StatusCode::UNAUTHENTICATED);
}

TEST_F(ServiceTest, FramesBeyondTheTokensRateAreDropped) {
  AccessToken token{.name = "t", .sha256 = Sha256Hex("t"), .expires = {}};
  token.frames_per_second = 1e-6;  // one at once, then none for days
  options_.tokens = {token};
  Start();
  Client client(port(), "t");
  client.Open();
  client.Send(RawFrame(1, 0));
  client.Send(RawFrame(2, 1));
  const auto dropped = client.ReadUntil(v1::SessionResponse::kFrameDropped).frame_dropped();
  EXPECT_EQ(dropped.number(), 2u);
  EXPECT_EQ(dropped.reason(), v1::DROP_REASON_QUOTA);
}

TEST_F(ServiceTest, SourcesThatTheRulesDoNotAllowAreNotOpened) {
  options_.sources.urls = {"http://169.254.169.254/*", "http://localhost/*"};
  Start();
  OthersGoOnAfter([&] {
    Client client(port());
    client.Open();
    for (const char* url : {"file:///etc/passwd", "http://169.254.169.254/latest/meta-data",
                            "http://localhost/x", "rtsp://example.com/", "camera", "/etc/passwd"}) {
      v1::SessionRequest request;
      request.mutable_open_source()->set_url(url);
      client.Send(request);
      const auto ended = client.ReadUntil(v1::SessionResponse::kSourceEnded).source_ended();
      EXPECT_THAT(ended.error(), HasSubstr("[source]")) << url;
      EXPECT_EQ(ended.frames(), 0) << url;
      std::this_thread::sleep_for(10ms);  // the source's thread has told, and is about to end
    }
    client.Close();
    EXPECT_TRUE(client.Finish().ok());
  });
}

TEST_F(ServiceTest, AnAccountsSourcesAreCountedAndFollowItsRate) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "GStreamer is not instrumented, each of its handovers would look like a race";
#endif
  options_.sources.urls = {"test:*"};
  // Of "one".
  options_.tokens = {
      {.name = "first",
       .sha256 = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"}};
  options_.tokens[0].sources = 1;
  options_.tokens[0].frames_per_second = 1e-6;  // one, and none for a long time
  Start();
  v1::SessionRequest request;
  request.mutable_open_source()->set_url("test:ball");  // live
  Client first(port(), "one"), second(port(), "one");
  first.Open();
  second.Open();
  first.Send(request);
  first.ReadUntil(v1::SessionResponse::kSourceOpened);
  second.Send(request);
  EXPECT_THAT(second.ReadUntil(v1::SessionResponse::kRefused).refused().error(),
              HasSubstr("expected at most 1 sources of this token"));
  const auto dropped = first.ReadUntil(v1::SessionResponse::kFrameDropped).frame_dropped();
  EXPECT_EQ(dropped.number(), 1u);
  EXPECT_EQ(dropped.reason(), v1::DROP_REASON_QUOTA);
}

TEST_F(ServiceTest, ASourceOfTheServersOwnIsPlayedAndCaptioned) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "GStreamer is not instrumented, each of its handovers would look like a race";
#endif
  options_.sources.urls = {"test:*"};
  Start();
  Client client(port());
  client.Open();
  v1::SessionRequest request;
  request.mutable_open_source()->set_url("test:ball:3");
  client.Send(request);
  client.Close();  // after the source's end
  EXPECT_EQ(client.ReadUntil(v1::SessionResponse::kSourceOpened).source_opened().width(), 640);
  const auto ended = client.ReadUntil(v1::SessionResponse::kSourceEnded).source_ended();
  EXPECT_EQ(ended.frames(), 6);
  EXPECT_EQ(ended.error(), "");
  EXPECT_TRUE(client.Finish().ok());
  EXPECT_EQ(client.last.closed().frames_encoded(), 6);

  grpc::ClientContext context;
  v1::CaptionRequest caption;
  caption.set_url("test:ball:3");
  caption.set_interval_media_seconds(1);
  caption.mutable_options()->mutable_generation()->set_max_new_tokens(4);
  const auto reader = client.stub().Caption(&context, caption);
  std::vector<v1::CaptionResponse> captions(1);
  while (reader->Read(&captions.back())) captions.emplace_back();
  EXPECT_TRUE(reader->Finish().ok());
  ASSERT_EQ(captions.size(), 4u);
  for (int i = 0; i < 3; ++i) {
    EXPECT_DOUBLE_EQ(captions[i].begin_media_seconds(), i);
    EXPECT_DOUBLE_EQ(captions[i].end_media_seconds(), i + 0.5);
    EXPECT_NE(captions[i].text(), "");
  }
  EXPECT_TRUE(StreamsBecome(0));
}

int HealthOf(grpc::Channel& channel) {
  grpc::ClientContext context;
  const grpc::internal::RpcMethod method("/grpc.health.v1.Health/Check",
                                         grpc::internal::RpcMethod::NORMAL_RPC);
  const grpc::Slice none("");
  grpc::ByteBuffer request(&none, 1), response;
  const grpc::Status status = grpc::internal::BlockingUnaryCall<grpc::ByteBuffer, grpc::ByteBuffer>(
      &channel, method, &context, request, &response);
  grpc::Slice slice;
  if (!status.ok() || !response.DumpToSingleSlice(&slice).ok() || slice.size() != 2) return -1;
  return slice.begin()[1];  // {status = 1: varint}
}

TEST_F(ServiceTest, ShuttingDownTellsEverybodyFinishesAndEndsTheCalls) {
  options_.drain_seconds = 20;
  Start();
  Client client(port());
  client.Open();
  constexpr int kServing = 1, kNotServing = 2;
  EXPECT_EQ(HealthOf(*client.channel()), kServing);
  client.Send(RawFrame(1, 0));
  client.Send(Question(1, 500));  // draining waits for it
  client.ReadUntil(v1::SessionResponse::kText);
  std::thread shutdown([&] { service_->Shutdown(); });
  bool going_away = false, answered = false;
  for (auto message = client.Read(); message.message_case() != 0; message = client.Read()) {
    if (message.has_going_away()) {
      going_away = true;
      EXPECT_EQ(HealthOf(*client.channel()), kNotServing);
    }
    answered |= message.has_answer();
  }
  EXPECT_TRUE(going_away);
  EXPECT_TRUE(answered);
  EXPECT_EQ(client.Finish().error_code(), StatusCode::UNAVAILABLE);
  shutdown.join();
}

TEST_F(ServiceTest, ManyConnectionsComeAndGoWithoutATrace) {
  constexpr int kConnections = 10'000;
  Start();
  OthersGoOnAfter([&] {
    for (int i = 0; i < kConnections; ++i) {
      if (i % 10 == 0) {
        Client client(port());
        client.SendOpen();
        if (i % 20 == 0) client.Read();
        client.Cancel();
        continue;
      }
      const int handle = socket(AF_INET, SOCK_STREAM, 0);
      ASSERT_GE(handle, 0);
      sockaddr_in address = {};
      address.sin_family = AF_INET;
      address.sin_port = htons(static_cast<uint16_t>(port()));
      address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
      ASSERT_EQ(connect(handle, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
      const std::string bytes =
          i % 3 == 0 ? "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" : "GET / HTTP/1.1\r\n";
      if (i % 3 != 1) {
        EXPECT_EQ(write(handle, bytes.data(), bytes.size()), ssize_t(bytes.size()));
      }
      close(handle);
    }
  });
}

// A key with a certificate for 127.0.0.1, signed by itself or by another such pair.
struct Pair {
  explicit Pair(const Pair* issuer) : key(EVP_EC_gen("P-256")), certificate(X509_new()) {
    X509_set_version(certificate, 2);
    ASN1_INTEGER_set(X509_get_serialNumber(certificate), issuer ? 2 : 1);
    X509_gmtime_adj(X509_getm_notBefore(certificate), -60);
    X509_gmtime_adj(X509_getm_notAfter(certificate), 3600);
    X509_set_pubkey(certificate, key);
    const auto* name = reinterpret_cast<const unsigned char*>(issuer ? "127.0.0.1" : "authority");
    X509_NAME_add_entry_by_txt(X509_get_subject_name(certificate), "CN", MBSTRING_ASC, name, -1, -1,
                               0);
    X509* const signer = issuer ? issuer->certificate : certificate;
    X509_set_issuer_name(certificate, X509_get_subject_name(signer));
    Extend(NID_basic_constraints, issuer ? "CA:FALSE" : "critical,CA:TRUE");
    if (issuer) Extend(NID_subject_alt_name, "IP:127.0.0.1");
    X509_sign(certificate, issuer ? issuer->key : key, EVP_sha256());
  }
  ~Pair() {
    X509_free(certificate);
    EVP_PKEY_free(key);
  }
  void Extend(int id, const char* value) {
    X509_EXTENSION* extension = X509V3_EXT_conf_nid(nullptr, nullptr, id, value);
    X509_add_ext(certificate, extension, -1);
    X509_EXTENSION_free(extension);
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
  std::string CertificatePem() const {
    return Pem([this](BIO* bio) { PEM_write_bio_X509(bio, certificate); });
  }
  std::string KeyPem() const {
    return Pem([this](BIO* bio) {
      PEM_write_bio_PrivateKey(bio, key, nullptr, nullptr, 0, nullptr, nullptr);
    });
  }
  EVP_PKEY* const key;
  X509* const certificate;
};

TEST_F(ServiceTest, OverTlsOnlyClientsWithACertificateOfTheAuthorityGetIn) {
  const Pair authority(nullptr), server(&authority), client(&authority), stranger(nullptr);
  const auto directory =
      std::filesystem::path(::testing::TempDir()) / ("service_test_" + std::to_string(getpid()));
  std::filesystem::create_directories(directory);
  const auto file = [&](const char* name, const std::string& text) {
    std::ofstream(directory / name) << text;
    return directory / name;
  };
  options_.tls.certificate = file("server.pem", server.CertificatePem());
  options_.tls.key = file("server.key", server.KeyPem());
  options_.tls.client_ca = file("ca.pem", authority.CertificatePem());
  Start();
  std::filesystem::remove_all(directory);

  const auto code = [&](const Pair* own) {
    grpc::SslCredentialsOptions ssl;
    ssl.pem_root_certs = authority.CertificatePem();
    if (own) {
      ssl.pem_cert_chain = own->CertificatePem();
      ssl.pem_private_key = own->KeyPem();
    }
    Client connection(port(), "", {}, grpc::SslCredentials(ssl));
    connection.SendOpen();
    connection.Close();
    return connection.Finish().error_code();
  };
  EXPECT_EQ(code(&client), StatusCode::OK);
  EXPECT_EQ(code(nullptr), StatusCode::UNAVAILABLE);
  EXPECT_EQ(code(&stranger), StatusCode::UNAVAILABLE);
  Client plain(port());
  plain.SendOpen();
  EXPECT_EQ(plain.Finish().error_code(), StatusCode::UNAVAILABLE);
}

TEST_F(ServiceTest, OptionsThatMakeNoSenseAreRefusedInOneLine) {
  options_.tls.certificate = "/nowhere/server.pem";
  EXPECT_THROW(Start(), InputError);  // without a key
  options_.tls.key = "/nowhere/server.key";
  EXPECT_THROW(Start(), InputError);
  options_.tls.certificate.clear();
  options_.tls.key.clear();
  options_.workers = 0;
  EXPECT_THROW(Start(), InputError);
}

int ThreadsOfThisProcess() {
  std::ifstream in("/proc/self/status");
  for (std::string word; in >> word;) {
    if (word == "Threads:") {
      int count = 0;
      in >> count;
      return count;
    }
  }
  return 0;
}

TEST_F(ServiceTest, IdleCallsCostNoThreads) {
  Start();
  std::vector<std::unique_ptr<Client>> clients;
  const auto add = [&](int count) {
    for (int i = 0; i < count; ++i) {
      clients.push_back(std::make_unique<Client>(port()));
      clients.back()->Open();
    }
  };
  add(10);
  const int before = ThreadsOfThisProcess();
  add(50);
  EXPECT_LT(ThreadsOfThisProcess(), before + 20);
  for (auto& client : clients) client->Cancel();
}

}  // namespace
}  // namespace sluice
