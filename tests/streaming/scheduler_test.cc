#include "streaming/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <atomic>
#include <csignal>
#include <deque>
#include <filesystem>
#include <new>
#include <thread>

#include "runtime/error.h"
#include "streaming/pipeline.h"
#include "tests/streaming/fakes.h"
#include "tests/support/tiny_stream.h"

namespace sluice {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;
using testing::SizeIs;
using testing::ThrowsMessage;

class FakeClock : public Clock {
 public:
  WallTime Now() const override { return WallTime(std::chrono::nanoseconds(now_ns_)); }
  void Advance(double seconds) { now_ns_ += static_cast<int64_t>(seconds * 1e9); }

 private:
  std::atomic<int64_t> now_ns_ = 0;
};

// Everything one stream was told. `story` may be shared: who was told what, in order.
struct Listener : StreamEvents {
  explicit Listener(std::string listener_name = "",
                    std::vector<std::string>* story_of_all = nullptr)
      : name(std::move(listener_name)), story(story_of_all) {}
  void OnFrame(FrameNumber frame, MediaTime) override {
    frames.push_back(frame);
    Tell("frame");
  }
  void OnDropped(FrameNumber frame, MediaTime, DropReason reason) override {
    dropped.emplace_back(frame, Name(reason));
  }
  void OnText(QuestionId, std::string_view piece) override {
    text += piece;
    Tell("text");
  }
  void OnAnswer(const StreamAnswer& answer) override {
    answers.push_back(answer);
    Tell("answer");
  }
  void OnWarning(std::string_view line) override { warnings.emplace_back(line); }
  void OnFailed(std::string_view error) override { failures.emplace_back(error); }
  void Tell(const std::string& what) {
    if (story) story->push_back(name + what);
  }

  const std::string name;
  std::vector<std::string>* const story;
  std::vector<FrameNumber> frames;
  std::vector<std::pair<FrameNumber, std::string>> dropped;
  std::string text;
  std::vector<StreamAnswer> answers;
  std::vector<std::string> warnings, failures;
};

using Dropped = std::pair<FrameNumber, std::string>;

class SchedulerTest : public testing::Test {
 protected:
  void Start(SchedulerOptions options = {}, int64_t kv_bytes = 0) {
    engine_ = std::make_shared<Engine>(
        vlm_, EngineOptions{.model = {}, .vlm = {}, .num_threads = 1, .kv_budget_bytes = kv_bytes});
    scheduler_ = std::make_unique<Scheduler>(engine_, options, clock_, metrics_, /*manual=*/true);
  }
  struct Client {
    StreamId id;
    std::shared_ptr<Listener> heard;
  };
  Client Open(const StreamBudget& budget = {}, const SessionOptions& options = {},
              const std::string& name = "") {
    if (!scheduler_) Start();
    auto heard = std::make_shared<Listener>(name, &story_);
    return {scheduler_->Open(options, budget, heard), heard};
  }
  // Frames number `from` to `to`, without the latter.
  void Push(const Client& client, int from, int to, int brightness = 0) {
    for (int i = from; i < to; ++i) {
      scheduler_->Push(client.id, i, FakeFrame(i, (brightness + i) % 256));
    }
  }
  void Ask(const Client& client, QuestionId id, const std::string& text = "What?") {
    scheduler_->Ask(client.id, {id, text, {}});
  }
  int RunAll() {
    int rounds = 0;
    while (scheduler_->RunRound()) ++rounds;
    return rounds;
  }
  // What a session by itself says about frames [0, frames).
  std::string Alone(int frames, int brightness = 0, const std::string& text = "What?") {
    const Engine engine(vlm_, {.model = {}, .vlm = {}, .num_threads = 1});
    const auto session = engine.NewSession({});
    const auto ctx = engine.NewContext();
    for (int i = 0; i < frames; ++i) {
      const FramePtr frame = FakeFrame(i, (brightness + i) % 256);
      Ingest(*ctx, *session, {&frame, 1});
    }
    return sluice::Ask(*ctx, *session, text, nullptr).text;
  }
  void ExpectBalance(const Client& client) {
    const StreamCounts counts = scheduler_->Report(client.id).frames;
    EXPECT_EQ(counts.pushed, counts.encoded + counts.dropped + counts.waiting);
    EXPECT_EQ(counts.encoded, static_cast<int64_t>(client.heard->frames.size()));
    EXPECT_EQ(counts.dropped, static_cast<int64_t>(client.heard->dropped.size()));
  }

  std::shared_ptr<FakeVlm> vlm_ = std::make_shared<FakeVlm>();
  FakeClock clock_;
  Metrics metrics_;
  std::vector<std::string> story_;
  std::shared_ptr<const Engine> engine_;
  std::unique_ptr<Scheduler> scheduler_;
};

// ---- The rule --------------------------------------------------------------------------------

TEST_F(SchedulerTest, EncodesFramesOfSeveralStreamsTogether) {
  std::vector<Client> clients;
  for (int i = 0; i < 4; ++i) clients.push_back(Open());
  for (int i = 0; i < 4; ++i) Push(clients[i], 0, 1, 10 * i);
  EXPECT_TRUE(scheduler_->RunRound());
  EXPECT_THAT(vlm_->encoder().batches, ElementsAre(4));
  EXPECT_THAT(vlm_->decoder().steps, ElementsAre(4, 4));  // prefixes, frames
  EXPECT_FALSE(scheduler_->RunRound());
  for (const Client& client : clients) EXPECT_THAT(client.heard->frames, ElementsAre(0u));
}

TEST_F(SchedulerTest, AnswersOfStreamsServedTogetherAreThoseOfEachAlone) {
  std::vector<Client> clients;
  for (int i = 0; i < 5; ++i) clients.push_back(Open());
  for (int i = 0; i < 5; ++i) Push(clients[i], 0, 3 + i, 20 * i);
  for (const Client& client : clients) Ask(client, 1);
  RunAll();
  for (int i = 0; i < 5; ++i) {
    ASSERT_THAT(clients[i].heard->answers, SizeIs(1));
    const StreamAnswer& answer = clients[i].heard->answers[0];
    EXPECT_EQ(answer.text, Alone(3 + i, 20 * i)) << i;
    EXPECT_EQ(answer.text, clients[i].heard->text);
    EXPECT_EQ(answer.end, AnswerEnd::kStop);
    EXPECT_EQ(answer.frames_seen, 3 + i);
    EXPECT_EQ(answer.asked_at, FakeFrame(2 + i, 0)->time);
    EXPECT_EQ(answer.usage.visual_tokens, (3 + i) * kFakeTokensPerFrame);
    EXPECT_EQ(answer.usage.answer_tokens, kFakeAnswerTokens);
    EXPECT_GT(answer.usage.prompt_tokens, 5);
  }
}

TEST_F(SchedulerTest, AFloodOfFramesDelaysATokenByOneBatchAtMost) {
  vlm_->decoder().answer_tokens = 20;
  Start({.frames_per_round = 8});
  const Client asking = Open({}, {}, "asking ");
  std::vector<Client> flood;
  for (int i = 0; i < 7; ++i) flood.push_back(Open({.queued_frames = 100}));
  Push(asking, 0, 1);
  Ask(asking, 1);
  for (const Client& client : flood) Push(client, 0, 100);
  RunAll();
  int since = 0, most = 0, tokens = 0;
  bool begun = false;
  for (const std::string& what : story_) {
    if (what == "asking text") {
      if (begun) most = std::max(most, since);
      begun = true;
      since = 0;
      ++tokens;
    } else if (what == "frame") {
      ++since;
    }
  }
  EXPECT_EQ(tokens, 20);
  EXPECT_EQ(most, 8);
  for (const Client& client : flood) EXPECT_THAT(client.heard->frames, SizeIs(100));
}

TEST_F(SchedulerTest, EightAnswersInProgressDoNotStopFrames) {
  vlm_->decoder().answer_tokens = 30;
  std::vector<Client> asking;
  for (int i = 0; i < 8; ++i) asking.push_back(Open());
  const Client watching = Open({.queued_frames = 100});
  for (const Client& client : asking) Push(client, 0, 1);
  RunAll();
  for (const Client& client : asking) Ask(client, 1);
  vlm_->decoder().steps.clear();
  for (int i = 0; i < 10; ++i) {
    Push(watching, i, i + 1);
    scheduler_->RunRound();
    EXPECT_THAT(watching.heard->frames, SizeIs(i + 1));
    for (const Client& client : asking) EXPECT_THAT(client.heard->text, testing::SizeIs(i + 1));
  }
  // One step of all answers and one of the frame a round; the first round reads the prefix as well.
  EXPECT_THAT(vlm_->decoder().steps, SizeIs(21));
  EXPECT_EQ(std::count(vlm_->decoder().steps.begin(), vlm_->decoder().steps.end(), 8), 10);
}

TEST_F(SchedulerTest, StreamsHaveTheirFramesEncodedInTurn) {
  Start({.frames_per_round = 4});
  const Client flood = Open({.queued_frames = 100}), a = Open(), b = Open();
  Push(flood, 0, 50);
  Push(a, 0, 2);
  Push(b, 0, 2);
  scheduler_->RunRound();
  EXPECT_THAT(flood.heard->frames, SizeIs(2));
  EXPECT_THAT(a.heard->frames, SizeIs(1));
  EXPECT_THAT(b.heard->frames, SizeIs(1));
}

TEST_F(SchedulerTest, MoreStreamsThanARoundHoldsAreServedByHowLongTheyWaited) {
  Start({.frames_per_round = 2});
  std::vector<Client> clients;
  for (int i = 0; i < 5; ++i) clients.push_back(Open());
  for (int turn = 0; turn < 4; ++turn) {
    for (const Client& client : clients) Push(client, turn, turn + 1);
  }
  for (int round = 1; round <= 10; ++round) {
    scheduler_->RunRound();
    size_t least = 100, most = 0;
    for (const Client& client : clients) {
      least = std::min(least, client.heard->frames.size());
      most = std::max(most, client.heard->frames.size());
    }
    EXPECT_LE(most - least, 1u) << round;
  }
}

TEST_F(SchedulerTest, AQuestionPutsItsStreamFirstButTakesOnlyHalfOfARound) {
  Start({.frames_per_round = 4});
  const Client flood = Open({.queued_frames = 100}), asking = Open({.queued_frames = 100});
  Push(flood, 0, 50);
  Push(asking, 0, 6);
  Ask(asking, 1);
  scheduler_->RunRound();
  EXPECT_THAT(asking.heard->frames, SizeIs(3));  // two first, then in turn
  EXPECT_THAT(flood.heard->frames, SizeIs(1));
}

TEST_F(SchedulerTest, LongPromptsAreSpreadOverRounds) {
  Start({.prompt_rows_per_round = 60});
  std::vector<Client> clients;
  for (int i = 0; i < 3; ++i) clients.push_back(Open());
  for (const Client& client : clients) Push(client, 0, 1);
  RunAll();
  for (const Client& client : clients) Ask(client, 1, std::string(30, 'w'));
  for (size_t begun = 1; begun <= 3; ++begun) {
    scheduler_->RunRound();
    size_t saying = 0;
    for (const Client& client : clients) saying += client.heard->text.empty() ? 0 : 1;
    EXPECT_EQ(saying, begun);
  }
  RunAll();
  for (const Client& client : clients) {
    EXPECT_EQ(client.heard->answers[0].text, Alone(1, 0, std::string(30, 'w')));
  }
}

// ---- Order inside a stream -------------------------------------------------------------------

TEST_F(SchedulerTest, AQuestionSeesTheFramesBeforeItAndNoneBehindIt) {
  const Client client = Open();
  Push(client, 0, 3);
  Ask(client, 7);
  Push(client, 3, 6);
  RunAll();
  ASSERT_THAT(client.heard->answers, SizeIs(1));
  EXPECT_EQ(client.heard->answers[0].frames_seen, 3);
  EXPECT_EQ(client.heard->answers[0].text, Alone(3));
  EXPECT_THAT(client.heard->frames, SizeIs(6));
}

TEST_F(SchedulerTest, FramesThatArriveDuringAnAnswerDoNotChangeIt) {
  vlm_->decoder().answer_tokens = 70;  // over the end of a block
  const Client client = Open();
  Push(client, 0, 3);
  Ask(client, 1);
  RunAll();
  const std::string quiet = client.heard->text;
  const Client busy = Open();
  Push(busy, 0, 3);
  Ask(busy, 1);
  for (int i = 3; i < 40; ++i) {
    scheduler_->RunRound();
    Push(busy, i, i + 1);
  }
  EXPECT_THAT(busy.heard->frames, SizeIs(39));  // the last one waits for the next round
  EXPECT_THAT(busy.heard->answers, IsEmpty());
  RunAll();
  EXPECT_EQ(busy.heard->text, quiet);
  // The frames are remembered as if nobody had asked.
  vlm_->decoder().answer_tokens = 3;
  const int64_t held = engine_->pool().bytes_in_use();
  EXPECT_EQ(held, scheduler_->Report(client.id).kv_bytes + scheduler_->Report(busy.id).kv_bytes);
  scheduler_->Close(client.id);
  scheduler_->Close(busy.id);
  EXPECT_EQ(engine_->pool().bytes_in_use(), 0);
}

TEST_F(SchedulerTest, ASecondQuestionWaitsForTheFirstAnswerAndSeesItAsDialogue) {
  const Client client = Open();
  Push(client, 0, 2);
  Ask(client, 1);
  Ask(client, 2, "And then?");
  Push(client, 2, 3);
  RunAll();
  ASSERT_THAT(client.heard->answers, SizeIs(2));
  const auto session = engine_->NewSession({});
  const auto ctx = engine_->NewContext();
  for (int i = 0; i < 2; ++i) {
    const FramePtr frame = FakeFrame(i, i);
    Ingest(*ctx, *session, {&frame, 1});
  }
  EXPECT_EQ(client.heard->answers[0].text, sluice::Ask(*ctx, *session, "What?", nullptr).text);
  // The frame behind it did not wait for it.
  const FramePtr frame = FakeFrame(2, 2);
  Ingest(*ctx, *session, {&frame, 1});
  EXPECT_EQ(client.heard->answers[1].frames_seen, 3);
  EXPECT_EQ(client.heard->answers[1].text, sluice::Ask(*ctx, *session, "And then?", nullptr).text);
}

TEST_F(SchedulerTest, WhatCompressorsLeaveIsReadWhenNothingElseIsToDo) {
  SessionOptions options;
  options.compressors = {"uniform-frames=2"};
  const Client client = Open({}, options);
  Push(client, 0, 4);
  EXPECT_TRUE(scheduler_->RunRound());
  EXPECT_THAT(vlm_->decoder().steps, IsEmpty());
  EXPECT_TRUE(scheduler_->RunRound());
  EXPECT_THAT(vlm_->decoder().steps, ElementsAre(1, 1));
  EXPECT_FALSE(scheduler_->RunRound());
}

// ---- Budgets ---------------------------------------------------------------------------------

TEST_F(SchedulerTest, AFullQueueLosesItsOldestFrames) {
  const Client client = Open({.queued_frames = 3});
  Push(client, 0, 5);
  EXPECT_EQ(scheduler_->Report(client.id).frames.waiting, 3);
  ExpectBalance(client);
  RunAll();
  EXPECT_THAT(client.heard->frames, ElementsAre(2u, 3u, 4u));
  EXPECT_THAT(client.heard->dropped,
              ElementsAre(Dropped(0, "queue_full"), Dropped(1, "queue_full")));
  ExpectBalance(client);
}

TEST_F(SchedulerTest, FramesFasterThanTheRateAreDropped) {
  const Client client = Open({.frames_per_second = 2});
  for (int i = 0; i < 20; ++i) {
    Push(client, i, i + 1);
    RunAll();
    clock_.Advance(0.25);  // twice as fast
  }
  // Two at once in the beginning, then two a second for 4.75 s.
  EXPECT_THAT(client.heard->frames, SizeIs(11));
  EXPECT_EQ(client.heard->dropped.back().second, "rate");
  ExpectBalance(client);
}

TEST_F(SchedulerTest, FramesPastTheMemoryBudgetAreDroppedAndQuestionsStillAnswered) {
  const int64_t block = KvBlockBytes(1, 4, DType::kF32);
  const Client client = Open({.kv_bytes = block, .queued_frames = 100}), other = Open();
  Push(client, 0, 60);
  Push(other, 0, 10);
  RunAll();
  EXPECT_LE(scheduler_->Report(client.id).kv_bytes, block);
  const size_t fitted = client.heard->frames.size();
  EXPECT_EQ(fitted, (kKvBlockTokens - 6) / kFakeTokensPerFrame);  // 6: the prefix
  EXPECT_EQ(client.heard->dropped.back(), Dropped(59, "memory"));
  EXPECT_THAT(client.heard->warnings, ElementsAre(HasSubstr("budget of 2048 bytes")));
  EXPECT_THAT(other.heard->frames, SizeIs(10));
  ExpectBalance(client);
  Ask(client, 1);
  RunAll();
  EXPECT_EQ(client.heard->answers.at(0).text, Alone(static_cast<int>(fitted)));
}

TEST_F(SchedulerTest, AnExhaustedPoolDropsFramesAndEndsAnswersWithOneLine) {
  const int64_t block = KvBlockBytes(1, 4, DType::kF32);
  Start({}, 2 * block);
  const Client a = Open(), b = Open(), c = Open();
  Push(a, 0, 1);
  Push(b, 0, 1);
  RunAll();
  Push(c, 0, 1);
  RunAll();
  EXPECT_THAT(c.heard->dropped, ElementsAre(Dropped(0, "memory")));
  EXPECT_THAT(c.heard->warnings, ElementsAre(HasSubstr("the budget is")));
  Ask(a, 1);
  RunAll();
  EXPECT_EQ(a.heard->answers.at(0).end, AnswerEnd::kMemory);
  EXPECT_THAT(a.heard->answers[0].error, HasSubstr("the budget is"));
  scheduler_->Close(b.id);
  Ask(a, 2);
  RunAll();
  EXPECT_EQ(a.heard->answers.at(1).text, Alone(1));
}

TEST_F(SchedulerTest, AnswersAreNoLongerThanTheBudgetAllows) {
  const Client client = Open({.answer_tokens = 2});
  Push(client, 0, 1);
  Ask(client, 1);
  RunAll();
  EXPECT_EQ(client.heard->answers.at(0).end, AnswerEnd::kLength);
  EXPECT_EQ(client.heard->answers[0].text, Alone(1).substr(0, 2));
}

TEST_F(SchedulerTest, AnswersEndWhenTheirTimeIsOver) {
  vlm_->decoder().answer_tokens = 100;
  const Client client = Open({.answer_seconds = 10});
  Push(client, 0, 1);
  Ask(client, 1);
  Ask(client, 2);
  scheduler_->RunRound();
  for (int i = 0; i < 4; ++i) {
    scheduler_->RunRound();
    clock_.Advance(3);
  }
  RunAll();
  ASSERT_THAT(client.heard->answers, SizeIs(2));
  EXPECT_EQ(client.heard->answers[0].end, AnswerEnd::kTime);
  EXPECT_THAT(client.heard->answers[0].text, SizeIs(4));
  EXPECT_EQ(client.heard->answers[0].usage.first_token_seconds, 0);
  EXPECT_EQ(client.heard->answers[0].usage.total_seconds, 12);
  EXPECT_EQ(client.heard->answers[1].end, AnswerEnd::kTime);  // it never began
  EXPECT_EQ(client.heard->answers[1].text, "");
}

TEST_F(SchedulerTest, MoreQuestionsThanTheBudgetAllowsAreRefused) {
  const Client client = Open({.queued_questions = 2});
  Ask(client, 1);
  Ask(client, 2);
  EXPECT_THAT([&] { Ask(client, 3); },
              ThrowsMessage<ResourceExhausted>(HasSubstr("2 questions wait")));
  EXPECT_EQ(scheduler_->Report(client.id).questions, 2);
}

TEST_F(SchedulerTest, RefusesWhatIsOutOfRange) {
  EXPECT_THROW(Start({.frames_per_round = 0}), InputError);
  Start({.max_streams = 1});
  EXPECT_THROW(Open({.queued_frames = 0}), InputError);
  EXPECT_THROW(Open({.answer_seconds = -1}), InputError);
  SessionOptions none;
  none.frames_per_batch = 0;
  EXPECT_THROW(Open({}, none), InputError);
  const Client client = Open();
  EXPECT_THAT([&] { Open(); }, ThrowsMessage<ResourceExhausted>(HasSubstr("max_streams")));
  EXPECT_THAT([&] { Ask(client, 1, " \n"); }, ThrowsMessage<InputError>(HasSubstr("blank")));
  Ask(client, 1);
  EXPECT_THAT([&] { Ask(client, 1); }, ThrowsMessage<InputError>(HasSubstr("in use")));
  EXPECT_THROW(
      scheduler_->AskAlways(client.id, {.question = {2, "What?", {}}, .interval_seconds = 0}),
      InputError);
  EXPECT_THROW(scheduler_->Ask("feedbeef", {1, "What?", {}}), InputError);
  EXPECT_THAT(client.id, testing::MatchesRegex("[0-9a-f]{32}"));
}

// ---- Cancel, options, standing questions -----------------------------------------------------

TEST_F(SchedulerTest, AQuestionCanBeCancelledBeforeAndDuringItsAnswer) {
  const Client client = Open();
  Push(client, 0, 1);
  Ask(client, 1);
  Ask(client, 2);
  scheduler_->RunRound();
  scheduler_->RunRound();
  scheduler_->Cancel(client.id, 2);
  scheduler_->Cancel(client.id, 1);
  scheduler_->Cancel(client.id, 99);
  RunAll();
  ASSERT_THAT(client.heard->answers, SizeIs(2));
  for (const StreamAnswer& answer : client.heard->answers) {
    EXPECT_EQ(answer.end, AnswerEnd::kCancelled);
    EXPECT_THAT(answer.text, SizeIs(answer.id == 1 ? 1 : 0));
  }
  // Cancelled turns are not part of the dialogue.
  Ask(client, 1);
  RunAll();
  EXPECT_EQ(client.heard->answers.at(2).text, Alone(1));
}

TEST_F(SchedulerTest, AStandingQuestionIsAskedAtItsInterval) {
  const Client client = Open({.queued_frames = 100});
  scheduler_->AskAlways(client.id, {.question = {5, "What?", {}}, .interval_seconds = 2});
  Push(client, 0, 11);  // 0 to 5 s
  Ask(client, 6, "Now?");
  RunAll();
  std::vector<int64_t> seen;
  for (const StreamAnswer& answer : client.heard->answers) {
    if (!answer.standing) continue;
    seen.push_back(answer.frames_seen);
    EXPECT_EQ(answer.text, Alone(static_cast<int>(answer.frames_seen)));
  }
  // Frames go on during an answer; after it ended the next one that is due asks again.
  ASSERT_FALSE(seen.empty());
  EXPECT_EQ(seen[0], 1);
  scheduler_->Cancel(client.id, 5);
  const size_t before = client.heard->answers.size();
  Push(client, 11, 30);
  RunAll();
  EXPECT_THAT(client.heard->answers, SizeIs(before));
}

TEST_F(SchedulerTest, AStandingQuestionInAQuietStreamSeesExactlyItsFrames) {
  const Client client = Open();
  scheduler_->AskAlways(client.id, {.question = {5, "What?", {}}, .interval_seconds = 2});
  for (int i = 0; i < 11; ++i) {
    Push(client, i, i + 1);
    RunAll();
  }
  std::vector<int64_t> seen;
  for (const StreamAnswer& answer : client.heard->answers) seen.push_back(answer.frames_seen);
  EXPECT_THAT(seen, ElementsAre(1, 5, 9));
}

TEST_F(SchedulerTest, AnAlertComesOnlyWhenTheAnswerChanges) {
  // Everything that compressors leave of the first frame; nothing new of its copies.
  SessionOptions options;
  options.duplicate_threshold = 0;
  const Client client = Open({}, options);
  scheduler_->AskAlways(
      client.id,
      {.question = {5, "What?", {}}, .interval_seconds = 0.5, .only_when_changed = true});
  for (int i = 0; i < 6; ++i) {
    scheduler_->Push(client.id, i, FakeFrame(i, i < 4 ? 50 : 90));
    RunAll();
  }
  ASSERT_THAT(client.heard->answers, SizeIs(2));
  EXPECT_EQ(client.heard->answers[0].frames_seen, 1);
  EXPECT_EQ(client.heard->answers[1].frames_seen, 5);
  EXPECT_TRUE(client.heard->answers[1].changed);
  EXPECT_EQ(client.heard->text, "");
  EXPECT_THAT(client.heard->dropped, ElementsAre(Dropped(1, "duplicate"), Dropped(2, "duplicate"),
                                                 Dropped(3, "duplicate"), Dropped(5, "duplicate")));
  ExpectBalance(client);
}

TEST_F(SchedulerTest, OptionsChangeForTheNextQuestionAndOthersAreRefusedByName) {
  const Client client = Open();
  Push(client, 0, 1);
  SessionOptions options;
  options.generate.max_new_tokens = 1;
  scheduler_->SetOptions(client.id, options);
  Ask(client, 1);
  RunAll();
  EXPECT_THAT(client.heard->answers.at(0).text, SizeIs(1));
  options.compressors = {"stc-pruner=1"};
  EXPECT_THAT([&] { scheduler_->SetOptions(client.id, options); },
              ThrowsMessage<InputError>(HasSubstr("cannot change its compressors")));
}

// ---- Faults ----------------------------------------------------------------------------------

TEST_F(SchedulerTest, FramesOutOfOrderAndBrokenOnesAreDropped) {
  const Client client = Open();
  scheduler_->Push(client.id, 0, FakeFrame(5, 1));
  scheduler_->Push(client.id, 1, FakeFrame(5, 1));       // the same time
  scheduler_->Push(client.id, 2, FakeFrame(4, 1));       // earlier
  scheduler_->Push(client.id, 3, FakeFrame(6, 1, 1.0));  // a later number, an earlier time
  auto broken = std::make_shared<Frame>(*FakeFrame(7, 1));
  broken->rgb.pop_back();
  scheduler_->Push(client.id, 4, broken);
  broken = std::make_shared<Frame>(*FakeFrame(7, 1));
  broken->width = 1 << 30;
  broken->height = -4;
  scheduler_->Push(client.id, 5, broken);
  RunAll();
  EXPECT_THAT(client.heard->frames, ElementsAre(0u));
  EXPECT_THAT(
      client.heard->dropped,
      ElementsAre(Dropped(1, "out_of_order"), Dropped(2, "out_of_order"),
                  Dropped(3, "out_of_order"), Dropped(4, "bad_frame"), Dropped(5, "bad_frame")));
  ExpectBalance(client);
}

TEST_F(SchedulerTest, FramesThatBreakTheModelOneAfterAnotherEndOnlyTheirStream) {
  const Client bad = Open(), good = Open();
  vlm_->encoder().before_encode = [](std::span<const FramePtr> frames) {
    for (const FramePtr& frame : frames) {
      if (frame->rgb[0] == 66) throw Error("[fake] cannot stand this picture");
    }
  };
  for (int i = 0; i < 3; ++i) scheduler_->Push(bad.id, i, FakeFrame(i, 66));
  Ask(bad, 1);
  Push(good, 0, 3);
  Ask(good, 1);
  RunAll();
  EXPECT_THAT(bad.heard->failures, ElementsAre(HasSubstr("cannot stand this picture")));
  EXPECT_THAT(bad.heard->frames, IsEmpty());
  EXPECT_EQ(bad.heard->answers.at(0).end, AnswerEnd::kFailed);
  ExpectBalance(bad);
  EXPECT_THAT(good.heard->failures, IsEmpty());
  EXPECT_EQ(good.heard->answers.at(0).text, Alone(3));
  ExpectBalance(good);
  // It takes nothing any more and can be closed; its memory is free already.
  EXPECT_EQ(engine_->pool().bytes_in_use(), scheduler_->Report(good.id).kv_bytes);
  Push(bad, 5, 6);
  EXPECT_THAT([&] { Ask(bad, 2); }, ThrowsMessage<Error>(HasSubstr("the stream has ended")));
  const StreamReport report = scheduler_->Close(bad.id);
  EXPECT_EQ(report.frames.pushed, 4);
  EXPECT_EQ(report.frames.dropped, 4);
  EXPECT_THAT(scheduler_->streams(), ElementsAre(good.id));
}

TEST_F(SchedulerTest, AnAnswerWhoseStepThrowsEndsAlone) {
  const Client a = Open(), b = Open();
  Push(a, 0, 2);
  Push(b, 0, 2, 100);
  RunAll();
  const auto fail_a = [this](std::span<const SequenceStep> sequences) {
    for (const SequenceStep& step : sequences) {
      if (step.logits.empty()) continue;
      if (vlm_->decoder().Memory(*step.cache).find(" f0.0") == std::string::npos) continue;
      throw Error("[fake] no such weights");
    }
  };
  Ask(a, 1);
  Ask(b, 1);
  scheduler_->RunRound();
  vlm_->decoder().before_step = fail_a;
  RunAll();
  vlm_->decoder().before_step = nullptr;
  EXPECT_EQ(a.heard->answers.at(0).end, AnswerEnd::kFailed);
  EXPECT_THAT(a.heard->answers[0].error, HasSubstr("no such weights"));
  EXPECT_EQ(b.heard->answers.at(0).text, Alone(2, 100));
  Ask(a, 2);
  RunAll();
  EXPECT_EQ(a.heard->answers.at(1).text, Alone(2));  // the stream itself is well
}

TEST_F(SchedulerTest, AllocationsThatFailCostFramesAndAnswersButNoStream) {
  const Client a = Open(), b = Open();
  Push(a, 0, 2);
  Push(b, 0, 2);
  int calls = 0;
  vlm_->encoder().before_encode = [&](std::span<const FramePtr>) {
    // Both together, then the first one alone, and each of its frames.
    if (++calls <= 4) throw std::bad_alloc();
  };
  RunAll();
  EXPECT_THAT(a.heard->dropped, ElementsAre(Dropped(0, "memory"), Dropped(1, "memory")));
  EXPECT_THAT(a.heard->warnings, ElementsAre(HasSubstr("no memory")));
  EXPECT_THAT(b.heard->frames, SizeIs(2));
  vlm_->encoder().before_encode = nullptr;
  scheduler_->Push(a.id, 2, FakeFrame(2, 2));
  Ask(b, 1);
  vlm_->decoder().before_step = [](std::span<const SequenceStep> sequences) {
    if (!sequences[0].logits.empty()) throw std::bad_alloc();
  };
  RunAll();
  vlm_->decoder().before_step = nullptr;
  EXPECT_THAT(a.heard->frames, ElementsAre(2u));
  EXPECT_EQ(b.heard->answers.at(0).end, AnswerEnd::kMemory);
  ExpectBalance(a);
  ExpectBalance(b);
}

TEST_F(SchedulerTest, AQuestionBeforeAnyFrameFailsWithOneLine) {
  const Client client = Open();
  Ask(client, 1);
  RunAll();
  EXPECT_EQ(client.heard->answers.at(0).end, AnswerEnd::kFailed);
  EXPECT_THAT(client.heard->answers[0].error, HasSubstr("no frame has been seen"));
}

TEST_F(SchedulerTest, AFullContextDropsFramesAndWarnsOnce) {
  SessionOptions options;
  options.generate.max_new_tokens = 16;
  options.max_context_tokens = 110;  // 12 frames
  const Client client = Open({.queued_frames = 100}, options);
  for (int i = 0; i < 20; ++i) {
    Push(client, i, i + 1);
    RunAll();
  }
  EXPECT_THAT(client.heard->frames, SizeIs(12));
  EXPECT_THAT(client.heard->dropped, SizeIs(8));
  EXPECT_THAT(client.heard->warnings, ElementsAre(HasSubstr("the context is full")));
  EXPECT_THAT(client.heard->failures, IsEmpty());
}

// ---- Ends ------------------------------------------------------------------------------------

TEST_F(SchedulerTest, ClosingAStreamDropsWhatWaitsAndCancelsItsQuestions) {
  const Client client = Open();
  Push(client, 0, 1);
  Ask(client, 1);
  scheduler_->RunRound();
  scheduler_->RunRound();
  Push(client, 1, 3);
  Ask(client, 2);
  const StreamReport report = scheduler_->Close(client.id);
  EXPECT_EQ(report.frames.pushed, 3);
  EXPECT_EQ(report.frames.encoded, 1);
  EXPECT_EQ(report.frames.dropped, 2);
  EXPECT_EQ(report.frames.waiting, 0);
  EXPECT_EQ(report.visual_tokens, kFakeTokensPerFrame);
  EXPECT_THAT(client.heard->dropped, ElementsAre(Dropped(1, "closing"), Dropped(2, "closing")));
  ASSERT_THAT(client.heard->answers, SizeIs(2));
  EXPECT_EQ(client.heard->answers[0].end, AnswerEnd::kCancelled);
  EXPECT_THAT(client.heard->failures, IsEmpty());
  EXPECT_EQ(engine_->pool().bytes_in_use(), 0);
  EXPECT_THROW(scheduler_->Report(client.id), InputError);
}

TEST_F(SchedulerTest, DrainingFinishesWhatWaitsAndTakesNothingMore) {
  const Client client = Open();
  Push(client, 0, 3);
  Ask(client, 1);
  scheduler_->Drain(10);
  EXPECT_EQ(client.heard->answers.at(0).text, Alone(3));
  Push(client, 3, 4);
  EXPECT_THAT(client.heard->dropped, ElementsAre(Dropped(3, "closing")));
  EXPECT_THROW(Ask(client, 2), ResourceExhausted);
  EXPECT_THROW(Open(), ResourceExhausted);
  ExpectBalance(client);
}

TEST_F(SchedulerTest, ASchedulerThatEndsTellsStreamsWithWorkInProgress) {
  const Client busy = Open(), idle = Open();
  Push(busy, 0, 1);
  Ask(busy, 1);
  scheduler_->RunRound();
  scheduler_->RunRound();
  Push(busy, 1, 2);
  scheduler_.reset();
  EXPECT_THAT(busy.heard->failures, ElementsAre(HasSubstr("closing")));
  EXPECT_EQ(busy.heard->answers.at(0).end, AnswerEnd::kCancelled);
  EXPECT_THAT(busy.heard->dropped, ElementsAre(Dropped(1, "closing")));
  EXPECT_THAT(idle.heard->failures, IsEmpty());
  EXPECT_EQ(engine_->pool().bytes_in_use(), 0);
}

TEST_F(SchedulerTest, ANewListenerHearsWhatFollows) {
  const Client client = Open();
  Push(client, 0, 1);
  RunAll();
  auto next = std::make_shared<Listener>();
  scheduler_->Attach(client.id, next);
  Push(client, 1, 2);
  RunAll();
  EXPECT_THAT(client.heard->frames, ElementsAre(0u));
  EXPECT_THAT(next->frames, ElementsAre(1u));
  scheduler_->Attach(client.id, nullptr);
  Push(client, 2, 3);
  RunAll();
  EXPECT_EQ(scheduler_->Report(client.id).frames.encoded, 3);
}

TEST_F(SchedulerTest, CountsWhatItDoesInItsMetrics) {
  const Client client = Open({.queued_frames = 2});
  Push(client, 0, 3);
  Ask(client, 1);
  RunAll();
  const std::string text = metrics_.Text();
  for (const char* line :
       {"sluice_frames_pushed_total 3\n", "sluice_frames_encoded_total 2\n",
        "sluice_frames_dropped_total{reason=\"queue_full\"} 1\n", "sluice_visual_tokens_total 4\n",
        "sluice_answers_total{end=\"stop\"} 1\n", "sluice_answer_tokens_total 3\n",
        "sluice_time_to_first_token_seconds_count 1\n", "sluice_streams_open 1\n",
        "sluice_stage_seconds_count{stage=\"encode\"} 1\n",
        "sluice_stage_seconds_count{stage=\"prefill\"} 2\n",
        "sluice_stage_seconds_count{stage=\"prefill_question\"} 1\n",
        "sluice_stage_seconds_count{stage=\"decode\"} 3\n", "sluice_queued_frames 0\n",
        "sluice_kv_bytes{tier=\"device\"} 2048\n"}) {
    EXPECT_THAT(text, HasSubstr(line));
  }
}

// A tiny checkpoint instead of the fake one, whose decoder cannot recall.
class MemoryOfStreamsTest : public SchedulerTest {
 protected:
  MemoryOfStreamsTest() {
    engine_ = std::make_shared<Engine>(TinyOptions());
    scheduler_ = std::make_unique<Scheduler>(engine_, SchedulerOptions(), clock_, metrics_,
                                             /*manual=*/true);
    const KvGeometry kv = engine_->vlm()->decoder().kv_geometry();
    frame_bytes_ = int64_t{2} * kv.num_layers * kv.kv_heads * kv.head_dim * SizeOf(kv.dtype) *
                   engine_->vlm()->encoder().tokens_per_frame();
  }
  // A window of one frame, and room for four more in host memory.
  SessionOptions Remembering(int64_t disk_bytes) const {
    SessionOptions options;
    options.keep_dialogue = false;
    options.generate.max_new_tokens = 4;
    options.memory = MemoryOptions{.window_tokens = engine_->vlm()->encoder().tokens_per_frame(),
                                   .recall_blocks = 4};
    options.memory->store = {.host_bytes = 4 * frame_bytes_,
                             .disk_bytes = disk_bytes,
                             .disk_directory = testing::TempDir()};
    return options;
  }
  int64_t frame_bytes_ = 0;
};

TEST_F(MemoryOfStreamsTest, BytesOfEveryTierAndWhatWasForgottenAreTold) {
  const Client client = Open({}, Remembering(4 * frame_bytes_));
  constexpr int kFrames = 40;
  for (int i = 0; i < kFrames; ++i) {
    Push(client, i, i + 1);
    RunAll();
  }
  Ask(client, 1);
  RunAll();
  EXPECT_THAT(client.heard->answers.at(0).evidence, Not(IsEmpty()));
  const auto bytes = [&](const char* tier) {
    return metrics_.gauge("sluice_kv_bytes", "", {{"tier", tier}}).value();
  };
  EXPECT_GT(bytes("device"), 0);
  EXPECT_EQ(bytes("host"), 4 * frame_bytes_);
  EXPECT_EQ(bytes("disk"), 4 * frame_bytes_);
  // All but those in the tiers and in the window, which moves by whole blocks of the cache.
  const int64_t tokens = engine_->vlm()->encoder().tokens_per_frame();
  const int64_t forgotten = metrics_.counter("sluice_memory_frames_forgotten_total", "").value();
  EXPECT_LE(forgotten, kFrames - 9);
  EXPECT_GE(forgotten, kFrames - 9 - kKvBlockTokens / tokens - 1);
  EXPECT_THAT(metrics_.Text(),
              HasSubstr("sluice_stage_seconds_count{stage=\"decoder/recall\"} " +
                        std::to_string(engine_->pool().geometry().num_layers) + "\n"));
  scheduler_->Close(client.id);
  for (const char* tier : {"device", "host", "disk"}) EXPECT_EQ(bytes(tier), 0) << tier;
}

TEST_F(MemoryOfStreamsTest, AFullDiskWarnsItsStreamAndNobodyElse) {
  const auto play = [&](bool disk_is_full) {
    const Client a = Open({}, Remembering(1000 * frame_bytes_));
    const Client b = Open({}, Remembering(0));
    rlimit before;
    EXPECT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
    const auto handler = std::signal(SIGXFSZ, SIG_IGN);
    rlimit small = before;
    if (disk_is_full) small.rlim_cur = frame_bytes_ * 5 / 2;
    EXPECT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
    for (int i = 0; i < 30; ++i) {
      Push(a, i, i + 1);
      Push(b, i, i + 1);
      RunAll();
    }
    setrlimit(RLIMIT_FSIZE, &before);
    std::signal(SIGXFSZ, handler);
    Ask(a, 1);
    Ask(b, 1);
    RunAll();
    return std::pair(a.heard, b.heard);
  };
  const auto [a, b] = play(/*disk_is_full=*/true);
  const auto [a_else, b_else] = play(/*disk_is_full=*/false);
  EXPECT_THAT(a->warnings, ElementsAre(HasSubstr("[memory] cannot write")));
  EXPECT_THAT(a_else->warnings, IsEmpty());
  EXPECT_THAT(a->frames, SizeIs(30));
  EXPECT_EQ(a->answers.at(0).end, a_else->answers.at(0).end);
  EXPECT_THAT(a->answers.at(0).evidence, Not(IsEmpty()));
  EXPECT_THAT(b->warnings, IsEmpty());
  EXPECT_EQ(b->answers.at(0).text, b_else->answers.at(0).text);
}

// ---- With its own thread ---------------------------------------------------------------------

TEST_F(SchedulerTest, ServesClientsOnManyThreadsAndLosesCountOfNothing) {
  engine_ = std::make_shared<Engine>(
      vlm_, EngineOptions{.model = {}, .vlm = {}, .num_threads = 1, .kv_budget_bytes = 0});
  const SystemClock clock;
  std::vector<std::thread> threads;
  std::vector<std::shared_ptr<Listener>> heard;
  for (int t = 0; t < 4; ++t) heard.push_back(std::make_shared<Listener>());
  std::atomic<int> wrong = 0;
  {
    Scheduler scheduler(engine_, {}, clock, metrics_);
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        const StreamId id = scheduler.Open({}, {.queued_frames = 4}, heard[t]);
        for (int i = 0; i < 100; ++i) {
          scheduler.Push(id, i, FakeFrame(i, i));
          if (i % 20 == 5) scheduler.Ask(id, {QuestionId(i), "What?", {}});
          if (i % 40 == 6) scheduler.Cancel(id, i - 1);
          const StreamCounts counts = scheduler.Report(id).frames;
          wrong += counts.pushed != i + 1 || counts.waiting < 0;
        }
        if (t % 2 == 0) {
          const StreamCounts counts = scheduler.Close(id).frames;
          wrong += counts.waiting != 0 || counts.pushed != 100;
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    scheduler.Drain(60);
    for (const StreamId& id : scheduler.streams()) {
      EXPECT_EQ(scheduler.Report(id).frames.waiting, 0);
    }
  }
  EXPECT_EQ(wrong, 0);
  for (const auto& listener : heard) {
    EXPECT_EQ(listener->frames.size() + listener->dropped.size(), 100u);
    EXPECT_THAT(listener->answers, SizeIs(5));
    EXPECT_THAT(listener->failures, IsEmpty());
  }
  EXPECT_EQ(engine_->pool().bytes_in_use(), 0);
}

}  // namespace
}  // namespace sluice
