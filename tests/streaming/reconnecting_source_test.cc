// Streams that break and are opened again, without a network and without waiting.
#include "streaming/reconnecting_source.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <deque>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "streaming/metrics.h"
#include "tests/streaming/fakes.h"

namespace sluice {
namespace {

using std::chrono::milliseconds;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;
using testing::ThrowsMessage;

class HeldClock : public Clock {
 public:
  WallTime Now() const override { return now; }
  WallTime now{};
};

// One opening of the stream: so many frames half a second apart, then it breaks or ends.
struct Opening {
  int frames = 0;
  bool breaks = true;
  std::string refused = {};  // not empty: it cannot be opened
};

class ReconnectingSourceTest : public testing::Test {
 protected:
  std::unique_ptr<Source> OpenNext() {
    ++opened_;
    const Opening opening = openings_.empty() ? Opening{.refused = "no more"} : openings_.front();
    if (!openings_.empty()) openings_.pop_front();
    if (!opening.refused.empty()) throw InputError("[source] 'cam': " + opening.refused);
    const int total = opening.frames + (opening.breaks ? 1 : 0);
    auto source = std::make_unique<FakeSource>(total, /*live=*/true);
    source->before_frame = [this, opening](int index) {
      if (index == opening.frames) throw InputError("[source] 'cam': the cable is out");
      if (index > 0) clock_.now += milliseconds(500);
    };
    return source;
  }

  std::unique_ptr<ReconnectingSource> Open(std::deque<Opening> openings) {
    openings_ = std::move(openings);
    options_.on_warning = [this](const std::string& line) { warnings_.push_back(line); };
    return std::make_unique<ReconnectingSource>(
        "cam", OpenNext(),
        [this](const std::function<void(Source*)>& announce) {
          auto source = OpenNext();
          announce(source.get());
          return source;
        },
        options_, clock_,
        [this](milliseconds time) {
          pauses_.push_back(time.count());
          clock_.now += time;
          if (on_pause_) on_pause_();
        });
  }

  static std::vector<double> Times(Source& source) {
    std::vector<double> times;
    while (const FramePtr frame = source.Next()) {
      EXPECT_EQ(frame->index, static_cast<int64_t>(times.size()));
      times.push_back(frame->time.seconds());
    }
    return times;
  }

  HeldClock clock_;
  SourceOptions options_;
  std::deque<Opening> openings_;
  int opened_ = 0;
  std::vector<int64_t> pauses_;
  std::vector<std::string> warnings_;
  std::function<void()> on_pause_;
};

TEST_F(ReconnectingSourceTest, GoesOnInTimeByWhatPassedWhileItWasAway) {
  Counter reconnections;
  options_.reconnect.reconnections = &reconnections;
  const auto source =
      Open({{.frames = 3}, {.refused = "refused"}, {.refused = "refused"}, {3, false}});
  // Away for pauses of 1, 2 and 4 s after the frame at 1 s.
  EXPECT_THAT(Times(*source), ElementsAre(0, 0.5, 1, 8, 8.5, 9));
  EXPECT_THAT(pauses_, ElementsAre(1000, 2000, 4000));
  EXPECT_EQ(reconnections.value(), 1);
  ASSERT_THAT(warnings_, SizeIs(2));
  EXPECT_THAT(warnings_[0], AllOf(HasSubstr("[source] 'cam'"), HasSubstr("the cable is out")));
  EXPECT_THAT(warnings_[1], AllOf(HasSubstr("away for 7.0 s"), HasSubstr("from 00:00:01.000"),
                                  HasSubstr("to 00:00:08.000"), HasSubstr("try 3")));
}

TEST_F(ReconnectingSourceTest, GivesUpAfterSoManyTriesInARowAndSaysWhy) {
  options_.reconnect.most_tries = 3;
  const auto source = Open({{.frames = 2},
                            {.refused = "x"},
                            {.frames = 2},  // tries are counted anew from here
                            {.refused = "x"},
                            {.refused = "x"},
                            {.refused = "connection refused"}});
  for (int i = 0; i < 4; ++i) EXPECT_NE(source->Next(), nullptr);
  EXPECT_THAT([&] { source->Next(); },
              ThrowsMessage<InputError>(AllOf(HasSubstr("after 4 frames"), HasSubstr("3 times"),
                                              HasSubstr("connection refused"))));
  EXPECT_EQ(source->Next(), nullptr) << "it stays ended";
  EXPECT_EQ(opened_, 6);
}

TEST_F(ReconnectingSourceTest, AStreamThatOpensAndBreaksWithoutAFrameCountsAsOneGap) {
  options_.reconnect.most_tries = 3;
  const auto source = Open({{.frames = 1}, {.frames = 0}, {.frames = 0}, {.frames = 0}});
  EXPECT_NE(source->Next(), nullptr);
  EXPECT_THAT([&] { source->Next(); }, ThrowsMessage<InputError>(HasSubstr("3 times")));
  EXPECT_THAT(pauses_, ElementsAre(1000, 2000, 4000));
  EXPECT_THAT(warnings_, SizeIs(1));
}

TEST_F(ReconnectingSourceTest, PausesGrowToALimitAndTriesMayGoOnForEver) {
  options_.reconnect.most_tries = ReconnectOptions::kForever;
  std::deque<Opening> openings = {{.frames = 1}};
  for (int i = 0; i < 60; ++i) openings.push_back({.refused = "refused"});
  openings.push_back({1, false});
  const auto source = Open(std::move(openings));
  EXPECT_THAT(Times(*source), SizeIs(2));
  ASSERT_THAT(pauses_, SizeIs(61));
  EXPECT_EQ(pauses_[4], 16000);
  for (size_t i = 5; i < pauses_.size(); ++i) EXPECT_EQ(pauses_[i], 30000) << i;
}

TEST_F(ReconnectingSourceTest, CountsFramesAcrossGapsToTheNumberWanted) {
  options_.max_frames = 5;
  const auto source = Open({{.frames = 3}, {.frames = 3}, {.frames = 3}});
  EXPECT_THAT(Times(*source), SizeIs(5));
  EXPECT_EQ(opened_, 2);
}

TEST_F(ReconnectingSourceTest, IsCancelledWhileItPauses) {
  const auto source = Open({{.frames = 1}, {.frames = 1}});
  on_pause_ = [&] { source->Cancel(); };
  EXPECT_NE(source->Next(), nullptr);
  EXPECT_EQ(source->Next(), nullptr);
  EXPECT_EQ(source->Next(), nullptr);
  EXPECT_EQ(opened_, 1);
}

TEST_F(ReconnectingSourceTest, CancelReachesASourceThatIsBeingOpened) {
  options_.on_warning = {};
  FakeSource opening(1, true);
  ReconnectingSource* reconnecting = nullptr;
  openings_ = {{.frames = 0}};
  ReconnectingSource source(
      "cam", OpenNext(),
      [&](const std::function<void(Source*)>& announce) -> std::unique_ptr<Source> {
        announce(&opening);
        reconnecting->Cancel();  // as from another thread
        EXPECT_TRUE(opening.cancelled());
        announce(nullptr);
        throw InputError("[source] 'cam': was cancelled");
      },
      options_, clock_, [](milliseconds) {});
  reconnecting = &source;
  EXPECT_EQ(source.Next(), nullptr);
}

TEST_F(ReconnectingSourceTest, WithoutTriesABreakIsAFailure) {
  options_.reconnect.most_tries = 0;
  const auto source = Open({{.frames = 1}, {.frames = 1}});
  EXPECT_NE(source->Next(), nullptr);
  EXPECT_THAT([&] { source->Next(); }, ThrowsMessage<InputError>(HasSubstr("the cable is out")));
  EXPECT_THAT(warnings_, IsEmpty());
}

TEST_F(ReconnectingSourceTest, OnlyStreamsWithoutAnEndAreKeptOpen) {
  class Endless final : public Source {
   public:
    explicit Endless(bool endless) { info_.endless = endless; }
    const SourceInfo& info() const override { return info_; }
    FramePtr Next() override { return nullptr; }
    void Cancel() override {}
    std::optional<std::string> warning() const override { return std::nullopt; }

   private:
    SourceInfo info_;
  };
  const auto kept = [&](bool endless) {
    const auto source =
        KeepOpen("x", options_, [&](const auto&) { return std::make_unique<Endless>(endless); });
    return dynamic_cast<ReconnectingSource*>(source.get()) != nullptr;
  };
  EXPECT_TRUE(kept(true));
  EXPECT_FALSE(kept(false));
  options_.reconnect.most_tries = 0;
  EXPECT_FALSE(kept(true));
}

}  // namespace
}  // namespace sluice
