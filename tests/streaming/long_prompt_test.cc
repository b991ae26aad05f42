// Prompts that are too long for a round, and frames that cannot be ingested: nobody else is held
// up.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "streaming/pipeline.h"
#include "streaming/scheduler.h"
#include "tests/streaming/fakes.h"
#include "tests/support/tiny_stream.h"

namespace sluice {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Le;
using testing::SizeIs;
using testing::ThrowsMessage;

class FakeClock : public Clock {
 public:
  WallTime Now() const override { return WallTime(std::chrono::nanoseconds(now_ns_)); }
  void Advance(double seconds) { now_ns_ += static_cast<int64_t>(seconds * 1e9); }

 private:
  std::atomic<int64_t> now_ns_ = 0;
};

struct Heard : StreamEvents {
  void OnFrame(FrameNumber frame, MediaTime) override { frames.push_back(frame); }
  void OnDropped(FrameNumber frame, MediaTime, DropReason reason) override {
    dropped.emplace_back(frame, Name(reason));
  }
  void OnText(QuestionId, std::string_view piece) override { text += piece; }
  void OnAnswer(const StreamAnswer& answer) override { answers.push_back(answer); }
  void OnWarning(std::string_view line) override { warnings.emplace_back(line); }
  void OnFailed(std::string_view error) override { failures.emplace_back(error); }

  std::vector<FrameNumber> frames;
  std::vector<std::pair<FrameNumber, std::string>> dropped;
  std::string text;
  std::vector<StreamAnswer> answers;
  std::vector<std::string> warnings, failures;
};
using Dropped = std::pair<FrameNumber, std::string>;

constexpr int64_t kRows = 64;  // of prompts in a round

class LongPromptTest : public testing::Test {
 protected:
  LongPromptTest() {
    vlm_->decoder().before_step = [this](std::span<const SequenceStep> sequences) {
      int64_t rows = 0;
      for (const SequenceStep& step : sequences) rows += step.embeddings.dim(0);
      rows_of_steps_.push_back(rows);
    };
  }
  struct Client {
    StreamId id;
    std::shared_ptr<Heard> heard;
  };
  Client Open(const SessionOptions& options = {}, const StreamBudget& budget = {}) {
    auto heard = std::make_shared<Heard>();
    return {scheduler_.Open(options, budget, heard), heard};
  }
  void Push(const Client& client, int from, int to, int brightness = 0) {
    for (int i = from; i < to; ++i) {
      scheduler_.Push(client.id, i, FakeFrame(i, (brightness + i) % 256));
    }
  }
  void Ask(const Client& client, QuestionId id, const std::string& text) {
    scheduler_.Ask(client.id, {id, text, {}});
  }
  void RunAll() {
    while (scheduler_.RunRound()) {
    }
  }
  std::string Alone(int frames, const std::string& text, int brightness = 0) {
    const auto session = engine_->NewSession({});
    const auto ctx = engine_->NewContext();
    for (int i = 0; i < frames; ++i) {
      const FramePtr frame = FakeFrame(i, (brightness + i) % 256);
      Ingest(*ctx, *session, {&frame, 1});
    }
    return sluice::Ask(*ctx, *session, text, nullptr).text;
  }

  std::shared_ptr<FakeVlm> vlm_ = std::make_shared<FakeVlm>();
  FakeClock clock_;
  Metrics metrics_;
  std::vector<int64_t> rows_of_steps_;
  std::shared_ptr<const Engine> engine_ =
      std::make_shared<Engine>(vlm_, EngineOptions{.model = {}, .vlm = {}, .num_threads = 1});
  Scheduler scheduler_{engine_,
                       {.prompt_rows_per_round = kRows},
                       clock_,
                       metrics_,
                       /*manual=*/true};
};

TEST_F(LongPromptTest, IsReadInPartsBetweenTheTokensAndFramesOfOthers) {
  vlm_->decoder().answer_tokens = 40;
  const Client asks = Open(), answers = Open();
  Push(asks, 0, 2);
  Push(answers, 0, 2, 50);
  RunAll();
  Ask(answers, 1, "What?");
  scheduler_.RunRound();
  const std::string text(600, 'w');
  Ask(asks, 1, text);
  rows_of_steps_.clear();
  int rounds = 0;
  for (; asks.heard->text.empty() && rounds < 30; ++rounds) {
    const size_t said = answers.heard->text.size();
    Push(answers, 2 + rounds, 3 + rounds, 50);
    Push(asks, 2 + rounds, 3 + rounds);
    scheduler_.RunRound();
    EXPECT_EQ(answers.heard->text.size(), said + 1);
    EXPECT_THAT(answers.heard->frames, SizeIs(3 + rounds));
    EXPECT_THAT(asks.heard->frames, SizeIs(3 + rounds));  // its own go on as well
  }
  EXPECT_EQ(rounds, 10);  // of 64 rows
  EXPECT_THAT(rows_of_steps_, testing::Each(Le(kRows + 1)));
  RunAll();
  vlm_->decoder().before_step = nullptr;
  EXPECT_EQ(asks.heard->answers.at(0).text, Alone(2, text));
  EXPECT_EQ(answers.heard->answers.at(0).text, Alone(2, "What?", 50));
}

TEST_F(LongPromptTest, ShortQuestionsPassItAndLongOnesTakeTurns) {
  const Client a = Open(), b = Open(), quick = Open();
  for (const Client& client : {a, b, quick}) Push(client, 0, 1);
  RunAll();
  Ask(a, 1, std::string(400, 'a'));
  Ask(b, 1, std::string(400, 'b'));
  scheduler_.RunRound();
  Ask(quick, 1, "Q?");
  scheduler_.RunRound();
  EXPECT_THAT(quick.heard->text, SizeIs(1));
  std::vector<size_t> rounds(2, 0);
  for (size_t round = 1; a.heard->text.empty() || b.heard->text.empty(); ++round) {
    ASSERT_LT(round, 50u);
    scheduler_.RunRound();
    if (a.heard->text.empty()) rounds[0] = round;
    if (b.heard->text.empty()) rounds[1] = round;
  }
  EXPECT_LE(std::max(rounds[0], rounds[1]) - std::min(rounds[0], rounds[1]), 2u);
}

TEST_F(LongPromptTest, EndsBetweenItsPartsWhenItIsCancelledOrItsTimeIsOver) {
  const Client cancelled = Open(), late = Open({}, {.answer_seconds = 5});
  for (const Client& client : {cancelled, late}) {
    Push(client, 0, 1);
    Ask(client, 1, std::string(600, 'w'));
  }
  scheduler_.RunRound();
  scheduler_.RunRound();
  scheduler_.RunRound();
  scheduler_.Cancel(cancelled.id, 1);
  clock_.Advance(6);
  scheduler_.RunRound();
  EXPECT_EQ(cancelled.heard->answers.at(0).end, AnswerEnd::kCancelled);
  EXPECT_EQ(late.heard->answers.at(0).end, AnswerEnd::kTime);
  EXPECT_THAT(late.heard->text, IsEmpty());
  EXPECT_FALSE(scheduler_.RunRound());
  // Both streams are well.
  Ask(late, 2, "What?");
  RunAll();
  vlm_->decoder().before_step = nullptr;
  EXPECT_EQ(late.heard->answers.at(1).text, Alone(1, "What?"));
}

TEST_F(LongPromptTest, OneThatNoContextHoldsIsRefusedByItsCaller) {
  const Client client = Open();
  Push(client, 0, 1);
  RunAll();
  rows_of_steps_.clear();
  EXPECT_THAT([&] { Ask(client, 1, std::string(1500, 'w')); },
              ThrowsMessage<InputError>(AllOf(HasSubstr("tokens"), HasSubstr("has room for 9"))));
  EXPECT_THAT([&] { Ask(client, 1, std::string(8 << 20, 'w')); },
              ThrowsMessage<InputError>(HasSubstr("8388608 bytes")));
  EXPECT_THAT(
      [&] {
        scheduler_.AskAlways(client.id, {{1, std::string(1500, 'w'), {}}, 5, false});
      },
      ThrowsMessage<InputError>(HasSubstr("tokens")));
  EXPECT_FALSE(scheduler_.RunRound());
  EXPECT_THAT(rows_of_steps_, IsEmpty());
  // One that only frames leave no room for is refused before anything of it is read.
  Ask(client, 1, std::string(940, 'w'));
  Push(client, 1, 20);
  RunAll();
  Ask(client, 2, std::string(940, 'w'));
  rows_of_steps_.clear();
  RunAll();
  EXPECT_THAT(rows_of_steps_, IsEmpty());
  EXPECT_THAT(client.heard->answers.at(1).error, HasSubstr("the context is full"));
}

TEST_F(LongPromptTest, ALongSystemPromptIsReadInPartsAndOneThatFillsTheContextRefused) {
  SessionOptions options;
  options.system_prompt = std::string(400, 's');
  const Client talks = Open(options), quick = Open();
  Push(talks, 0, 2);
  Push(quick, 0, 1);
  RunAll();
  EXPECT_THAT(rows_of_steps_, testing::Each(Le(kRows)));
  EXPECT_THAT(talks.heard->frames, ElementsAre(0u, 1u));
  Ask(talks, 1, "What?");
  RunAll();
  vlm_->decoder().before_step = nullptr;
  const auto session = engine_->NewSession(options);
  const auto ctx = engine_->NewContext();
  const std::vector<FramePtr> frames = {FakeFrame(0, 0), FakeFrame(1, 1)};
  Ingest(*ctx, *session, frames);
  EXPECT_EQ(talks.heard->answers.at(0).text, sluice::Ask(*ctx, *session, "What?", nullptr).text);
  options.system_prompt = std::string(1000, 's');
  EXPECT_THAT([&] { Open(options); },
              ThrowsMessage<InputError>(HasSubstr("the system prompt has 10")));
}

// ---- Blame -----------------------------------------------------------------------------------

TEST_F(LongPromptTest, AFrameThatCannotBeIngestedIsDroppedAloneAndItsNeighboursGoOn) {
  const auto bad_alloc = [](std::span<const FramePtr> frames) {
    for (const FramePtr& frame : frames) {
      if (frame->rgb[0] == 66) throw std::bad_alloc();
    }
  };
  const auto refuse = [](std::span<const FramePtr> frames) {
    for (const FramePtr& frame : frames) {
      if (frame->rgb[0] == 66) throw InputError("[fake] too large a picture");
    }
  };
  for (const auto& [hook, reason] :
       std::vector<std::pair<std::function<void(std::span<const FramePtr>)>, std::string>>{
           {bad_alloc, "memory"}, {refuse, "bad_frame"}}) {
    const Client mixed = Open(), other = Open();
    vlm_->encoder().before_encode = hook;
    for (int i = 0; i < 3; ++i) {
      scheduler_.Push(mixed.id, i, FakeFrame(i, i == 1 ? 66 : i));
      scheduler_.Push(other.id, i, FakeFrame(i, 10 + i));
    }
    RunAll();
    EXPECT_THAT(mixed.heard->frames, ElementsAre(0u, 2u));
    EXPECT_THAT(mixed.heard->dropped, ElementsAre(Dropped(1, reason)));
    EXPECT_THAT(mixed.heard->warnings, SizeIs(1));
    EXPECT_THAT(other.heard->frames, ElementsAre(0u, 1u, 2u));
    EXPECT_THAT(other.heard->dropped, IsEmpty());
    vlm_->encoder().before_encode = nullptr;
    scheduler_.Push(mixed.id, 3, FakeFrame(3, 3));
    RunAll();
    EXPECT_THAT(mixed.heard->frames, ElementsAre(0u, 2u, 3u));
  }
}

TEST_F(LongPromptTest, AStreamOfCompressorsWithoutEndIsRefused) {
  SessionOptions options;
  options.compressors.assign(9, "uniform-frames=2");
  EXPECT_THAT([&] { Open(options); },
              ThrowsMessage<InputError>(HasSubstr("at most 8 token compressors")));
}

// ---- Prompts that are read by layers ---------------------------------------------------------

TEST(PromptByLayersTest, InPiecesSaysWhatItSaysAtOnce) {
  const auto engine = std::make_shared<Engine>(TinyOptions());
  SessionOptions replay, question, recall;
  replay.pyramid = ParsePyramid("replay=0.5");
  replay.pyramid.replay_frames = 8;
  question.pyramid = ParsePyramid("question=0.5");
  replay.pyramid.stages = question.pyramid.stages = 3;  // a model of three layers
  recall.memory = MemoryOptions{.window_tokens = 200, .recall_blocks = 4};
  const std::string text = "What did you see there before, and was it as large as this one?";
  for (SessionOptions* options : {&replay, &question, &recall}) {
    options->generate.max_new_tokens = 8;
    options->keep_dialogue = false;
    const auto session = engine->NewSession(*options);
    const auto ctx = engine->NewContext();
    for (int i = 0; i < 40; ++i) {
      const FramePtr frame = NoiseFrame(i, i);
      Ingest(*ctx, *session, {&frame, 1});
    }
    const Generated alone = Ask(*ctx, *session, text, nullptr);
    for (const int64_t rows : {1, 8}) {
      FakeClock clock;
      Metrics metrics;
      Scheduler scheduler(engine, {.frames_per_round = 1, .prompt_rows_per_round = rows}, clock,
                          metrics, /*manual=*/true);
      const auto heard = std::make_shared<Heard>();
      const StreamId id = scheduler.Open(*options, {.queued_frames = 64}, heard);
      for (int i = 0; i < 40; ++i) scheduler.Push(id, i, NoiseFrame(i, i));
      while (scheduler.RunRound()) {
      }
      ASSERT_THAT(heard->frames, SizeIs(40));
      scheduler.Ask(id, {1, text, {}});
      scheduler.Push(id, 40, NoiseFrame(40, 40));
      int rounds = 0;
      while (heard->text.empty() && heard->answers.empty() && rounds < 1000) {
        scheduler.RunRound();
        ++rounds;
      }
      EXPECT_GT(rounds, 1);
      while (scheduler.RunRound()) {
      }
      ASSERT_THAT(heard->answers, SizeIs(1));
      EXPECT_EQ(heard->answers[0].text, alone.text);
      EXPECT_EQ(heard->answers[0].evidence.size(), alone.evidence.size());
      EXPECT_EQ(heard->answers[0].error, "");
      EXPECT_THAT(heard->frames, SizeIs(41));
    }
  }
}

}  // namespace
}  // namespace sluice
