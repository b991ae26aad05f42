#include "streaming/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <future>
#include <thread>

#include "runtime/error.h"
#include "streaming/pipeline.h"
#include "tests/streaming/fakes.h"

namespace sluice {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::SizeIs;
using testing::ThrowsMessage;

TimedQuestion At(double seconds, std::string text) {
  return {std::move(text), MediaTime::FromSeconds(seconds)};
}

class RunTest : public testing::Test {
 protected:
  RunTest() : engine_(vlm_, {.model = {}, .vlm = {}, .num_threads = 1}) {
    options_.keep_dialogue = false;
  }
  RunResult Play(FakeSource& source, std::vector<TimedQuestion> questions,
                 const RunObserver& observer = {}) {
    session_ = engine_.NewSession(options_);
    return sluice::Run(*ctx_, *session_, source, std::move(questions), observer);
  }
  const std::vector<int>& batches() const { return vlm_->encoder().batches; }

  std::shared_ptr<FakeVlm> vlm_ = std::make_shared<FakeVlm>();
  Engine engine_;
  std::unique_ptr<ExecContext> ctx_ = engine_.NewContext();
  SessionOptions options_;
  std::unique_ptr<Session> session_;
};

std::vector<std::pair<std::string, int64_t>> SeenBy(const RunResult& result) {
  std::vector<std::pair<std::string, int64_t>> seen;
  for (const TimedAnswer& answer : result.answers) {
    seen.emplace_back(answer.question.text, answer.frames_seen);
  }
  return seen;
}

// ---- When questions are asked ------------------------------------------------------------------

TEST_F(RunTest, AsksEachQuestionAboutWhatHadBeenSeenByThen) {
  FakeSource source(10);  // at 0, 0.5, ... 4.5 s
  const RunResult result =
      Play(source, {At(1.0, "on a frame"), At(1.2, "between"), At(4.4, "late"), At(0, "first")});
  EXPECT_THAT(SeenBy(result), ElementsAre(std::pair("first", 1), std::pair("on a frame", 3),
                                          std::pair("between", 3), std::pair("late", 9)));
  EXPECT_EQ(result.answers[1].asked_at, MediaTime::FromSeconds(1));
  EXPECT_EQ(result.frames, 10);
  EXPECT_EQ(session_->frames_seen, 10);
}

TEST_F(RunTest, AsksAtTheEndWhatHasNoTimeOrAnImpossibleOne) {
  FakeSource source(3);
  const RunResult result =
      Play(source, {{"whenever", std::nullopt}, At(1000, "after the end"), At(1, "at the end")});
  EXPECT_THAT(SeenBy(result), ElementsAre(std::pair("at the end", 3), std::pair("after the end", 3),
                                          std::pair("whenever", 3)));
}

TEST_F(RunTest, KeepsTheGivenOrderOfQuestionsForTheSameTime) {
  FakeSource source(6);
  const RunResult result = Play(source, {At(1, "b"), {"z", {}}, At(1, "a"), {"y", {}}, At(1, "c")});
  EXPECT_THAT(SeenBy(result), ElementsAre(std::pair("b", 3), std::pair("a", 3), std::pair("c", 3),
                                          std::pair("z", 6), std::pair("y", 6)));
}

TEST_F(RunTest, AnswersEqualThoseOfASessionFedByHand) {
  FakeSource source(9);
  const RunResult result = Play(source, {At(2, "What?"), {"What?", {}}});
  const auto by_hand = engine_.NewSession(options_);
  for (int i = 0; i < 9; ++i) {
    const FramePtr frame = FakeFrame(i, i);
    Ingest(*ctx_, *by_hand, {&frame, 1});
    if (i == 4) {
      EXPECT_EQ(result.answers[0].generated.ids, Ask(*ctx_, *by_hand, "What?", nullptr).ids);
    }
  }
  EXPECT_EQ(result.answers[1].generated.ids, Ask(*ctx_, *by_hand, "What?", nullptr).ids);
}

TEST_F(RunTest, RefusesAQuestionThatIsDueBeforeTheFirstFrame) {
  FakeSource source(3);
  EXPECT_THAT([&] { Play(source, {At(-1, "What?")}); },
              ThrowsMessage<InputError>(HasSubstr("no frame has been seen")));
}

TEST_F(RunTest, ASourceWithoutFramesIsAnErrorOnlyForWhoAsks) {
  FakeSource empty(0);
  EXPECT_EQ(Play(empty, {}).frames, 0);
  EXPECT_THROW(Play(empty, {{"What?", {}}}), InputError);
}

// ---- Batches ----------------------------------------------------------------------------------

TEST_F(RunTest, IngestsRecordingsInFullBatchesThatNeverCrossAQuestion) {
  options_.frames_per_batch = 4;
  FakeSource source(14);
  Play(source, {At(2.6, "after frame 5"), At(2.7, "again"), At(3.1, "after frame 6")});
  EXPECT_THAT(batches(), ElementsAre(4, 2, 1, 4, 3));
}

TEST_F(RunTest, IngestsWhatIsWaitingOfALiveSource) {
  // The source gives its first frame; the rest only while the model is busy with it.
  std::promise<void> busy, rest;
  FakeSource source(4, /*live=*/true);
  source.before_frame = [&](int index) {
    if (index == 1) busy.get_future().wait();
  };
  RunObserver observer;
  observer.on_frame = [&](const Frame& frame, int64_t) {
    if (frame.index != 0) return;
    busy.set_value();
    rest.get_future().wait();
  };
  std::thread watcher([&] {
    while (!source.finished()) std::this_thread::yield();
    rest.set_value();
  });
  const RunResult result = Play(source, {}, observer);
  watcher.join();
  EXPECT_THAT(batches(), ElementsAre(1, 3));
  EXPECT_EQ(result.queue.dropped, 0);
}

TEST_F(RunTest, DropsTheOldestFramesOfALiveSourceThatIsFasterThanTheModel) {
  options_.frames_per_batch = 4;
  std::promise<void> busy, rest;
  FakeSource source(20, /*live=*/true);
  source.before_frame = [&](int index) {
    if (index == 1) busy.get_future().wait();
  };
  std::vector<int64_t> seen;
  RunObserver observer;
  observer.on_frame = [&](const Frame& frame, int64_t) {
    seen.push_back(frame.index);
    if (frame.index != 0) return;
    busy.set_value();
    rest.get_future().wait();
  };
  std::thread watcher([&] {
    while (!source.finished()) std::this_thread::yield();
    rest.set_value();
  });
  const RunResult result = Play(source, {{"What?", {}}}, observer);
  watcher.join();
  EXPECT_THAT(seen, ElementsAre(0, 16, 17, 18, 19));
  EXPECT_EQ(result.queue.pushed, 20);
  EXPECT_EQ(result.queue.dropped, 15);
  EXPECT_EQ(result.frames, 5);
}

// ---- Reporting --------------------------------------------------------------------------------

TEST_F(RunTest, TellsTheObserverInOrder) {
  FakeSource source(3);
  source.warning_line = "cut off";
  std::string story;
  RunObserver observer;
  observer.on_open = [&](const SourceInfo&) { story += "open "; };
  observer.on_frame = [&](const Frame& frame, int64_t seen) {
    EXPECT_EQ(seen, frame.index + 1);
    story += "frame ";
  };
  observer.on_question = [&](const TimedQuestion& q, MediaTime now) {
    story += q.text + "@" + std::to_string(now.seconds()).substr(0, 3) + " ";
  };
  std::string text;
  observer.on_text = [&](std::string_view piece) {
    text += piece;
    return true;
  };
  observer.on_answer = [&](const TimedAnswer& answer) {
    EXPECT_EQ(answer.generated.text, text);
    EXPECT_LE(answer.first_token_seconds, answer.total_seconds);
    story += "answer ";
    text.clear();
  };
  const RunResult result = Play(source, {At(0.6, "q1"), {"q2", {}}}, observer);
  EXPECT_EQ(story, "open frame frame q1@0.5 answer frame q2@1.0 answer ");
  EXPECT_EQ(result.warning, "cut off");
  EXPECT_THAT(result.answers, SizeIs(2));
}

TEST_F(RunTest, AnObserverMayCancelOneAnswer) {
  FakeSource source(2);
  RunObserver observer;
  int answers = 0;
  observer.on_text = [&](std::string_view) { return answers > 0; };
  observer.on_answer = [&](const TimedAnswer&) { ++answers; };
  const RunResult result = Play(source, {{"q1", {}}, {"q2", {}}}, observer);
  EXPECT_EQ(result.answers[0].generated.reason, FinishReason::kCancelled);
  EXPECT_EQ(result.answers[1].generated.reason, FinishReason::kStop);
}

// ---- Ends -------------------------------------------------------------------------------------

TEST_F(RunTest, PassesOnWhatGoesWrongInTheSourceAfterTheFramesBeforeIt) {
  FakeSource source(10);
  source.before_frame = [](int index) {
    if (index == 6) throw InputError("[source] the cable is out");
  };
  EXPECT_THAT(
      [&] {
        Play(source, {{"never asked", {}}});
      },
      ThrowsMessage<InputError>(HasSubstr("the cable is out")));
  EXPECT_EQ(session_->frames_seen, 6);
  EXPECT_TRUE(session_->transcript.empty());
}

TEST_F(RunTest, KeepsTheAnswersThatWereGivenBeforeTheSourceFailed) {
  FakeSource source(10);
  source.before_frame = [](int index) {
    if (index == 6) throw InputError("[source] the cable is out");
  };
  const RunResult result = Play(source, {At(0.6, "q1"), At(20, "q2"), {"q3", {}}});
  ASSERT_THAT(result.answers, SizeIs(1));
  EXPECT_EQ(result.answers[0].question.text, "q1");
  EXPECT_EQ(result.error, "[source] the cable is out");
  EXPECT_EQ(result.not_asked, 2);
  EXPECT_EQ(result.frames, 6);
}

TEST_F(RunTest, StopsTheSourceWhenTheModelFails) {
  FakeSource source(1'000'000);
  int seen = 0;
  RunObserver observer;
  observer.on_frame = [&](const Frame&, int64_t) {
    if (++seen == 8) vlm_->decoder().fail_next_step = true;
  };
  EXPECT_THAT([&] { Play(source, {}, observer); },
              ThrowsMessage<Error>(HasSubstr("[fake] the step failed")));
  EXPECT_TRUE(source.cancelled());
  EXPECT_EQ(session_->frames_seen, 8);
}

TEST_F(RunTest, StopsTheSourceWhenTheObserverThrows) {
  FakeSource source(1'000'000, /*live=*/true);
  RunObserver observer;
  observer.on_frame = [](const Frame&, int64_t) { throw std::runtime_error("the client left"); };
  EXPECT_THROW(Play(source, {}, observer), std::runtime_error);
  EXPECT_TRUE(source.cancelled());
}

TEST_F(RunTest, CancellingTheSourceEndsTheRunAndAsksWhatIsLeft) {
  FakeSource source(1'000'000);
  RunObserver observer;
  observer.on_frame = [&](const Frame& frame, int64_t) {
    if (frame.index == 5) source.Cancel();
  };
  const RunResult result = Play(source, {At(100'000, "later"), {"What?", {}}}, observer);
  EXPECT_THAT(result.answers, SizeIs(2));
  EXPECT_GE(result.frames, 8);
  EXPECT_LT(result.frames, 1000);
}

TEST_F(RunTest, ASecondRunContinuesTheSession) {
  FakeSource first(3), second(2);
  Play(first, {});
  const RunResult result = sluice::Run(*ctx_, *session_, second, {{"What?", {}}}, {});
  EXPECT_EQ(result.frames, 2);
  EXPECT_EQ(result.answers[0].frames_seen, 5);
}

TEST(EngineTest, RefusesNegativeLimitsAndMissingModels) {
  EXPECT_THROW(Engine(std::make_shared<FakeVlm>(), {.model = {}, .vlm = {}, .num_threads = -1}),
               InputError);
  EXPECT_THROW(Engine({.model = "/no/such/model", .vlm = {}}), InputError);
}

TEST(EngineTest, CountsAllItsSessionsUnderOneBudget) {
  auto vlm = std::make_shared<FakeVlm>();
  const int64_t block = KvBlockBytes(1, 4, DType::kF32);
  const Engine engine(vlm,
                      {.model = {}, .vlm = {}, .num_threads = 1, .kv_budget_bytes = 2 * block});
  const auto ctx = engine.NewContext();
  EXPECT_EQ(ctx->num_threads(), 1);
  const FramePtr frame = FakeFrame(0, 1);
  auto a = engine.NewSession({}), b = engine.NewSession({}), c = engine.NewSession({});
  Ingest(*ctx, *a, {&frame, 1});
  Ingest(*ctx, *b, {&frame, 1});
  EXPECT_THROW(Ingest(*ctx, *c, {&frame, 1}), ResourceExhausted);
  a.reset();
  Ingest(*ctx, *c, {&frame, 1});
  EXPECT_EQ(c->frames_seen, 1);
}

}  // namespace
}  // namespace sluice
