#include "streaming/frame_queue.h"

#include <gtest/gtest.h>

#include <thread>

#include "runtime/error.h"
#include "tests/streaming/fakes.h"

namespace sluice {
namespace {

TEST(FrameQueueTest, GivesFramesInOrderAndDrainsAfterTheInputCloses) {
  FrameQueue queue(3, DropPolicy::kNone);
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(queue.Push(FakeFrame(i, i)));
  queue.CloseInput();
  EXPECT_EQ(queue.waiting(), 3u);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(queue.Pop()->index, i);
  EXPECT_EQ(queue.Pop(), nullptr);
  EXPECT_EQ(queue.Pop(), nullptr);
}

TEST(FrameQueueTest, LosesItsOldestFramesWhenALiveSourceIsFaster) {
  FrameQueue queue(2, DropPolicy::kDropOldest);
  for (int i = 0; i < 7; ++i) EXPECT_TRUE(queue.Push(FakeFrame(i, i)));
  EXPECT_EQ(queue.Pop()->index, 5);
  EXPECT_EQ(queue.Pop()->index, 6);
  const FrameQueue::Counts counts = queue.counts();
  EXPECT_EQ(counts.pushed, 7);
  EXPECT_EQ(counts.popped, 2);
  EXPECT_EQ(counts.dropped, 5);
}

TEST(FrameQueueTest, MakesTheProducerWaitRatherThanLoseAFrameOfAFile) {
  FrameQueue queue(2, DropPolicy::kNone);
  std::thread producer([&] {
    for (int i = 0; i < 500; ++i) ASSERT_TRUE(queue.Push(FakeFrame(i, 0)));
    queue.CloseInput();
  });
  for (int i = 0; i < 500; ++i) {
    ASSERT_LE(queue.waiting(), 2u);
    ASSERT_EQ(queue.Pop()->index, i);
  }
  EXPECT_EQ(queue.Pop(), nullptr);
  producer.join();
  EXPECT_EQ(queue.counts().dropped, 0);
}

TEST(FrameQueueTest, CancelWakesAProducerThatWaits) {
  FrameQueue queue(1, DropPolicy::kNone);
  std::thread producer([&] {
    while (queue.Push(FakeFrame(0, 0))) {
    }
  });
  ASSERT_NE(queue.Pop(), nullptr);
  queue.Cancel();
  producer.join();
  EXPECT_EQ(queue.Pop(), nullptr) << "what waited is not wanted any more";
  EXPECT_FALSE(queue.Push(FakeFrame(1, 1)));
}

TEST(FrameQueueTest, CancelWakesAConsumerThatWaits) {
  FrameQueue queue(1, DropPolicy::kNone);
  std::thread consumer([&] { EXPECT_EQ(queue.Pop(), nullptr); });
  queue.Cancel();
  consumer.join();
}

TEST(FrameQueueTest, HoldsAtLeastOneFrame) {
  EXPECT_THROW(FrameQueue(0, DropPolicy::kNone), Error);
}

}  // namespace
}  // namespace sluice
