#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <future>
#include <memory>
#include <thread>
#include <vector>

#include "streaming/scheduler.h"
#include "tests/support/temporary_directory.h"
#include "tests/support/tiny_stream.h"

namespace sluice {
namespace {

// Tells when a frame has come through.
struct FirstFrame final : StreamEvents {
  void OnFrame(FrameNumber, MediaTime) override { come.set_value(); }
  void OnDropped(FrameNumber, MediaTime, DropReason) override {}
  void OnText(QuestionId, std::string_view) override {}
  void OnAnswer(const StreamAnswer&) override {}
  void OnWarning(std::string_view) override {}
  void OnFailed(std::string_view) override {}
  std::promise<void> come;
};

TEST(SchedulerTurnsTest, StreamsThatAreSavedWithoutEndHoldUpNoOther) {
  const TemporaryDirectory directory;
  const auto engine = std::make_shared<const Engine>(TinyOptions());
  const SystemClock clock;
  Metrics metrics;
  Scheduler scheduler(engine, SchedulerOptions{}, clock, metrics);
  const StreamId saved = scheduler.Open({}, {}, nullptr);
  std::atomic<bool> done = false;
  std::atomic<int> saves = 0;
  std::vector<std::thread> savers;
  for (const char* name : {"one", "two", "three"}) {
    savers.emplace_back([&, file = directory.path() / name] {
      while (!done) {
        scheduler.Save(saved, file, [](Archive&) {});
        ++saves;
      }
    });
  }
  while (saves < 10) std::this_thread::yield();  // they are at it

  const auto events = std::make_shared<FirstFrame>();
  const StreamId other = scheduler.Open({}, {}, events);
  auto frame = std::make_shared<Frame>();
  frame->width = frame->height = 30;
  frame->rgb.resize(30 * 30 * 3, 100);
  scheduler.Push(other, 0, frame);
  EXPECT_EQ(events->come.get_future().wait_for(std::chrono::seconds(20)), std::future_status::ready)
      << "no round ran beside the saves";
  done = true;
  for (std::thread& saver : savers) saver.join();
}

}  // namespace
}  // namespace sluice
