// Calls by themselves: the test is the network, and the model answers for as long as it is let.
#include "proto/session_call.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <future>
#include <mutex>
#include <optional>
#include <thread>

#include "streaming/engine.h"
#include "tests/streaming/fakes.h"

namespace sluice {
namespace {

using Kind = v1::SessionResponse::MessageCase;

constexpr std::chrono::seconds kPatience{60};  // with what would hang

class FakeClock : public Clock {
 public:
  WallTime Now() const override { return WallTime(std::chrono::nanoseconds(now_ns_)); }
  void Advance(double seconds) { now_ns_ += static_cast<int64_t>(seconds * 1e9); }

 private:
  std::atomic<int64_t> now_ns_ = 0;
};

// One client, and the wire to it. Its end cancels the call, as gRPC does when a client is gone.
class Client final : public SessionWire {
 public:
  Client(StreamHub& hub, std::shared_ptr<Account> account)
      : call_(SessionCall::Begin(hub, std::move(account), *this)) {}
  ~Client() override {
    call_->OnCancel();
    Wait([this] { return ended_; });
    if (reading_ != nullptr) call_->OnReadDone(false);
    if (written_) call_->OnWriteDone(false);
    call_->OnDone();
  }

  void Read(grpc::ByteBuffer* message) override {
    Set([&] { reading_ = message; });
  }
  void Write(const grpc::ByteBuffer* message) override {
    grpc::ByteBuffer copy(*message);
    v1::SessionResponse response;
    EXPECT_TRUE(grpc::SerializationTraits<v1::SessionResponse>::Deserialize(&copy, &response).ok());
    Set([&] { written_ = response; });
  }
  void EndWith(const grpc::Status&) override {
    Set([&] { ended_ = true; });
  }

  void Send(const v1::SessionRequest& request) {
    Wait([this] { return reading_ != nullptr; });
    bool own_buffer = false;
    EXPECT_TRUE(grpc::SerializationTraits<v1::SessionRequest>::Serialize(
                    request, std::exchange(reading_, nullptr), &own_buffer)
                    .ok());
    call_->OnReadDone(true);
  }
  v1::SessionResponse Receive() {
    Wait([this] { return written_.has_value(); });
    const v1::SessionResponse response = *std::exchange(written_, std::nullopt);
    call_->OnWriteDone(true);
    return response;
  }
  v1::SessionResponse ReceiveUntil(Kind kind) {
    v1::SessionResponse response = Receive();
    while (response.message_case() != kind) {
      if (response.has_answer()) throw Error("[test] answered: " + response.ShortDebugString());
      response = Receive();
    }
    return response;
  }

  std::string Open(const std::string& resume = "") {
    v1::SessionRequest request;
    v1::Open& open = *request.mutable_open();
    open.set_resume_stream_id(resume);
    if (resume.empty()) open.mutable_options()->set_no_memory(true);
    Send(request);
    return Receive().opened().stream_id();
  }
  void SendFrame(uint64_t number) {
    v1::SessionRequest request;
    request.mutable_frame()->set_number(number);
    request.mutable_frame()->set_media_seconds(static_cast<double>(number));
    v1::RawPicture& picture = *request.mutable_frame()->mutable_rgb();
    picture.set_width(4);
    picture.set_height(4);
    picture.set_data(std::string(4 * 4 * 3, 'x'));
    Send(request);
  }
  void Ask(uint64_t id, int tokens) {
    v1::SessionRequest request;
    request.mutable_ask()->set_question_id(id);
    request.mutable_ask()->set_text("What?");
    request.mutable_ask()->mutable_generation()->set_max_new_tokens(tokens);
    Send(request);
  }

 private:
  void Set(const std::function<void()>& change) {
    {
      const std::lock_guard lock(mutex_);
      change();
    }
    changed_.notify_all();
  }
  // Afterwards the other side does not touch what was waited for.
  void Wait(const std::function<bool()>& holds) {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_for(lock, kPatience, holds)) throw Error("[test] nothing came");
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  grpc::ByteBuffer* reading_ = nullptr;
  std::optional<v1::SessionResponse> written_;
  bool ended_ = false;
  const std::shared_ptr<SessionCall> call_;
};

class SessionCallTest : public ::testing::Test {
 protected:
  SessionCallTest() {
    vlm_->decoder().positions = 4 * kEndless;
    vlm_->decoder().answer_tokens = kEndless;
    vlm_->decoder().before_step = [this](std::span<const SequenceStep>) { ++steps_; };
    options_.budget.answer_tokens = kEndless;
    options_.budget.answer_seconds = 0;
    options_.workers = 1;
    const EngineOptions engine{.model = {}, .vlm = {}, .num_threads = 1};
    scheduler_ = std::make_unique<Scheduler>(std::make_shared<Engine>(vlm_, engine),
                                             SchedulerOptions{}, clock_, metrics_);
    hub_ = std::make_unique<StreamHub>(vlm_, *scheduler_, metrics_, clock_, options_);
  }
  static bool Becomes(const std::function<bool()>& holds) {
    const auto end = std::chrono::steady_clock::now() + kPatience;
    while (!holds() && std::chrono::steady_clock::now() < end) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return holds();
  }

  static constexpr int kEndless = 1 << 20;
  ServiceOptions options_;
  FakeClock clock_;
  Metrics metrics_;
  std::atomic<int64_t> steps_ = 0;
  const std::shared_ptr<Account> account_ =
      std::make_shared<Account>(AccessToken{.name = "one", .sha256 = {}});
  std::shared_ptr<FakeVlm> vlm_ = std::make_shared<FakeVlm>();
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<StreamHub> hub_;
};

TEST_F(SessionCallTest, PicturesThatAreSlowToDecodeHoldUpPicturesAlone) {
  std::promise<void> gate;
  Client sends(*hub_, account_), asks(*hub_, account_);
  sends.Open();
  asks.Open();
  asks.SendFrame(1);
  EXPECT_TRUE(asks.Receive().has_frame_ack());
  hub_->pictures().Post(nullptr, [slow = gate.get_future().share()] { slow.wait(); });
  sends.SendFrame(1);
  asks.Ask(7, 3);
  EXPECT_EQ(asks.ReceiveUntil(Kind::kAnswer).answer().frames_seen(), 1);
  Client late(*hub_, account_);
  EXPECT_EQ(late.Open().size(), 32u);
  gate.set_value();
  EXPECT_TRUE(sends.Receive().has_frame_ack());
}

TEST_F(SessionCallTest, AVanishedClientsAnswerGoesOnWhileItsStreamMayBeResumedAndNoLonger) {
  std::string id;
  {
    Client client(*hub_, account_);
    id = client.Open();
    client.SendFrame(1);
    client.Ask(7, kEndless);
    client.ReceiveUntil(Kind::kText);
  }
  const int64_t before = steps_;
  EXPECT_TRUE(Becomes([&] { return steps_ > before + 1; }));
  {
    Client again(*hub_, account_);
    EXPECT_EQ(again.Open(id), id);
    EXPECT_EQ(again.ReceiveUntil(Kind::kText).text().question_id(), 7u);
  }
  Counter& cancelled = metrics_.counter("sluice_answers_total", "", {{"end", "cancelled"}});
  clock_.Advance(options_.linger_seconds / 2);
  EXPECT_EQ(cancelled.value(), 0);
  clock_.Advance(options_.linger_seconds);
  EXPECT_TRUE(Becomes([&] { return scheduler_->streams().empty(); }));
  EXPECT_EQ(cancelled.value(), 1);
}

}  // namespace
}  // namespace sluice
