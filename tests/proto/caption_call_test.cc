// Captions over gRPC, of a model that answers for as long as it is let.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <limits>
#include <thread>

#include "proto/service.h"
#include "sluice/v1/service.grpc.pb.h"
#include "streaming/engine.h"
#include "tests/streaming/fakes.h"

namespace sluice {
namespace {

using ::testing::HasSubstr;

class CaptionCallTest : public ::testing::Test {
 protected:
  static constexpr int kEndless = 1 << 20;

  void Start() {
    vlm_->decoder().positions = 4 * kEndless;
    vlm_->decoder().answer_tokens = kEndless;
    vlm_->decoder().before_step = [this](std::span<const SequenceStep> steps) {
      if (!steps[0].logits.empty()) ++steps_;
    };
    options_.listen = "127.0.0.1:0";
    options_.sources.urls = {"test:*"};
    options_.budget.answer_tokens = kEndless;
    options_.budget.answer_seconds = 0;
    const EngineOptions engine{.model = {}, .vlm = {}, .num_threads = 1};
    scheduler_ = std::make_unique<Scheduler>(std::make_shared<Engine>(vlm_, engine),
                                             SchedulerOptions{}, clock_, metrics_);
    service_ = std::make_unique<Service>(vlm_, *scheduler_, metrics_, clock_, options_);
    stub_ = v1::Sluice::NewStub(grpc::CreateChannel("127.0.0.1:" + std::to_string(service_->port()),
                                                    grpc::InsecureChannelCredentials()));
    context_.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
    request_.set_url("test:ball:3");
    request_.mutable_options()->set_no_memory(true);
    request_.mutable_options()->mutable_generation()->set_max_new_tokens(kEndless);
  }
  static bool Becomes(const std::function<bool()>& holds) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (!holds() && std::chrono::steady_clock::now() < end) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return holds();
  }

  ServiceOptions options_;
  SystemClock clock_;
  Metrics metrics_;
  std::atomic<int64_t> steps_ = 0;
  std::shared_ptr<FakeVlm> vlm_ = std::make_shared<FakeVlm>();
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<Service> service_;
  std::unique_ptr<v1::Sluice::Stub> stub_;
  grpc::ClientContext context_;
  v1::CaptionRequest request_;
};

TEST_F(CaptionCallTest, ACancelledCallEndsItsAnswerAtOnce) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "GStreamer is not instrumented, each of its handovers would look like a race";
#endif
  Start();
  const auto call = stub_->Caption(&context_, request_);
  ASSERT_TRUE(Becomes([&] { return steps_ > 3; }));  // into an answer that would never end
  context_.TryCancel();
  EXPECT_TRUE(Becomes([&] { return scheduler_->streams().empty(); }));
  EXPECT_EQ(metrics_.counter("sluice_answers_total", "", {{"end", "cancelled"}}).value(), 1);
  EXPECT_EQ(call->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(CaptionCallTest, PicturesOfASourceHaveAsManyPixelsAsThoseOfClients) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "GStreamer is not instrumented, each of its handovers would look like a race";
#endif
  options_.frame_pixels = 640 * 360 - 1;
  Start();
  v1::CaptionResponse caption;
  const auto call = stub_->Caption(&context_, request_);
  EXPECT_FALSE(call->Read(&caption));
  EXPECT_THAT(call->Finish().error_message(), HasSubstr("expected at most 230399 pixels"));
}

TEST_F(CaptionCallTest, AnIntervalThatIsNoNumberOfSecondsIsRefusedBeforeTheSourceIsOpened) {
  Start();
  for (const double interval : {-1.0, 1e9, std::numeric_limits<double>::infinity(),
                                std::numeric_limits<double>::quiet_NaN()}) {
    grpc::ClientContext context;
    request_.set_url("http://192.0.2.1/");  // which the rules do not allow
    request_.set_interval_media_seconds(interval);
    v1::CaptionResponse caption;
    const auto call = stub_->Caption(&context, request_);
    EXPECT_FALSE(call->Read(&caption));
    const grpc::Status status = call->Finish();
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_THAT(status.error_message(), HasSubstr("[caption] expected interval_media_seconds"))
        << interval;
  }
}

}  // namespace
}  // namespace sluice
