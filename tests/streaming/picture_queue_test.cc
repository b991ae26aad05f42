// Pictures on their way to the model: brought to its size by who pushes them, and bounded in bytes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "compression/duplicate_frame_filter.h"
#include "streaming/scheduler.h"
#include "tests/streaming/fakes.h"

namespace sluice {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

struct Listener : StreamEvents {
  void OnFrame(FrameNumber frame, MediaTime) override { frames.push_back(frame); }
  void OnDropped(FrameNumber frame, MediaTime, DropReason reason) override {
    dropped.emplace_back(frame, Name(reason));
  }
  void OnText(QuestionId, std::string_view) override {}
  void OnAnswer(const StreamAnswer&) override {}
  void OnWarning(std::string_view) override {}
  void OnFailed(std::string_view error) override { failures.emplace_back(error); }

  std::vector<FrameNumber> frames;
  std::vector<std::pair<FrameNumber, std::string>> dropped;
  std::vector<std::string> failures;
};
using Dropped = std::pair<FrameNumber, std::string>;

// Noise of any size, at the time of its index.
FramePtr Noise(int width, int height, int index) {
  auto frame = std::make_shared<Frame>(*FakeFrame(index, 0));
  frame->width = width;
  frame->height = height;
  frame->rgb.resize(size_t{3} * width * height);
  std::mt19937 random(index);
  for (uint8_t& value : frame->rgb) value = random() >> 24;
  return frame;
}

class PictureQueueTest : public testing::Test {
 protected:
  struct Client {
    StreamId id;
    std::shared_ptr<Listener> heard;
  };
  void Start(int64_t queued_bytes) {
    const EngineOptions options{.model = {}, .vlm = {}, .num_threads = 1};
    scheduler_ = std::make_unique<Scheduler>(std::make_shared<Engine>(vlm_, options),
                                             SchedulerOptions{.queued_bytes = queued_bytes}, clock_,
                                             metrics_, /*manual=*/true);
  }
  Client Open(const SessionOptions& options = {}) {
    auto heard = std::make_shared<Listener>();
    return {scheduler_->Open(options, {}, heard), heard};
  }
  void RunAll() {
    while (scheduler_->RunRound()) {
    }
  }

  std::shared_ptr<FakeVlm> vlm_ = std::make_shared<FakeVlm>();
  SystemClock clock_;
  Metrics metrics_;
  std::unique_ptr<Scheduler> scheduler_;
};

constexpr int64_t kFakeBytes = 4 * 4 * 3;  // of a picture of the fake model's size

TEST_F(PictureQueueTest, LargePicturesWaitInTheModelsSize) {
  Start(4 * kFakeBytes);
  const Client client = Open();
  for (int i = 0; i < 4; ++i) scheduler_->Push(client.id, i, Noise(300, 200, i));
  EXPECT_THAT(client.heard->dropped, IsEmpty());  // as they came they were 180,000 bytes each
  std::vector<int> widths;                        // that the round has to do with
  vlm_->encoder().before_encode = [&](std::span<const FramePtr> frames) {
    for (const FramePtr& frame : frames) widths.push_back(frame->width);
  };
  RunAll();
  EXPECT_THAT(widths, ElementsAre(4, 4, 4, 4));
  EXPECT_THAT(client.heard->frames, ElementsAre(0, 1, 2, 3));
}

TEST_F(PictureQueueTest, TheStreamWithTheMostBytesLosesItsOldestFrame) {
  Start(4 * kFakeBytes);
  const Client greedy = Open(), modest = Open();
  for (int i = 0; i < 4; ++i) scheduler_->Push(greedy.id, i, FakeFrame(i, i));
  for (int i = 0; i < 2; ++i) scheduler_->Push(modest.id, i, FakeFrame(i, i));
  EXPECT_THAT(greedy.heard->dropped,
              ElementsAre(Dropped{0, "queue_full"}, Dropped{1, "queue_full"}));
  EXPECT_THAT(modest.heard->dropped, IsEmpty());
  RunAll();  // which makes room
  for (int i = 4; i < 8; ++i) scheduler_->Push(greedy.id, i, FakeFrame(i, i));
  EXPECT_EQ(greedy.heard->dropped.size(), 2u);
  RunAll();
  EXPECT_THAT(greedy.heard->frames, ElementsAre(2, 3, 4, 5, 6, 7));
  EXPECT_THAT(modest.heard->frames, ElementsAre(0, 1));
}

TEST_F(PictureQueueTest, AStreamThatClosesLeavesItsBytesToTheOthers) {
  Start(2 * kFakeBytes);
  const Client gone = Open(), other = Open();
  for (int i = 0; i < 2; ++i) scheduler_->Push(gone.id, i, FakeFrame(i, i));
  scheduler_->Close(gone.id);
  for (int i = 0; i < 2; ++i) scheduler_->Push(other.id, i, FakeFrame(i, i));
  EXPECT_THAT(other.heard->dropped, IsEmpty());
}

TEST_F(PictureQueueTest, APictureThatNothingIsLeftForIsDroppedItself) {
  Start(kFakeBytes - 1);
  const Client client = Open();
  scheduler_->Push(client.id, 7, FakeFrame(0, 0));
  EXPECT_THAT(client.heard->dropped, ElementsAre(Dropped{7, "queue_full"}));
  EXPECT_FALSE(scheduler_->RunRound());
}

TEST_F(PictureQueueTest, WhatCanWaitIsToldToAtHalfOfTheLimit) {
  Start(4 * kFakeBytes);
  const Client client = Open();
  for (int i = 0; i < 2; ++i) scheduler_->Push(client.id, i, FakeFrame(i, i));
  EXPECT_TRUE(scheduler_->HasRoomForPictures());
  scheduler_->Push(client.id, 2, FakeFrame(2, 2));
  EXPECT_FALSE(scheduler_->HasRoomForPictures());
  RunAll();
  EXPECT_TRUE(scheduler_->HasRoomForPictures());
}

TEST_F(PictureQueueTest, WhatWaitsIsInTheMetrics) {
  Start(0);
  const Client client = Open();
  int next = 1;
  vlm_->encoder().before_encode = [&](std::span<const FramePtr>) {
    for (; next < 4; ++next) scheduler_->Push(client.id, next, Noise(300, 200, next));
  };
  scheduler_->Push(client.id, 0, FakeFrame(0, 0));
  scheduler_->RunRound();  // at its end three wait
  EXPECT_EQ(metrics_.gauge("sluice_queued_frame_bytes", "").value(), 3.0 * kFakeBytes);
  RunAll();
  EXPECT_EQ(metrics_.gauge("sluice_queued_frame_bytes", "").value(), 0);
}

TEST_F(PictureQueueTest, APictureLongerThanAnyIsDroppedAlone) {
  Start(0);
  const Client client = Open();
  scheduler_->Push(client.id, 0, FakeFrame(0, 1));
  scheduler_->Push(client.id, 1, Noise(1, kMaxPictureSide + 1, 1));
  scheduler_->Push(client.id, 2, Noise(1, kMaxPictureSide, 2));
  RunAll();
  EXPECT_THAT(client.heard->frames, ElementsAre(0, 2));
  EXPECT_THAT(client.heard->dropped, ElementsAre(Dropped{1, "bad_frame"}));
}

TEST_F(PictureQueueTest, DuplicatesAreFoundInThePicturesThatCame) {
  Start(0);
  SessionOptions options;
  options.duplicate_threshold = 0;
  const Client client = Open(options);
  // They differ in pixels that the model's small picture does not show.
  auto changed = std::make_shared<Frame>(*Noise(256, 256, 0));
  changed->index = 2;
  changed->time = MediaTime::FromSeconds(2);
  changed->rgb[0] ^= 0x80;
  auto same = std::make_shared<Frame>(*Noise(256, 256, 0));
  same->index = 1;
  same->time = MediaTime::FromSeconds(1);
  DuplicateFrameFilter filter(0);
  const bool expected[] = {filter.Passes(*Noise(256, 256, 0)), filter.Passes(*same),
                           filter.Passes(*changed)};
  EXPECT_THAT(expected, ElementsAre(true, false, true));
  scheduler_->Push(client.id, 0, Noise(256, 256, 0));
  scheduler_->Push(client.id, 1, same);
  scheduler_->Push(client.id, 2, changed);
  RunAll();
  EXPECT_THAT(client.heard->frames, ElementsAre(0, 2));
  EXPECT_THAT(client.heard->dropped, ElementsAre(Dropped{1, "duplicate"}));
}

}  // namespace
}  // namespace sluice
