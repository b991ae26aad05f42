// Streams with and without methods, served together on a tiny random checkpoint: what they share
// may change rounding, and nothing else.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "streaming/engine.h"
#include "streaming/pipeline.h"
#include "streaming/scheduler.h"
#include "tests/support/tiny_stream.h"

namespace sluice {
namespace {

constexpr int kFrames = 24;
constexpr int kRenewed = 74 * 74 * 3 / 2;  // values of a frame

// One of each kind.
std::vector<SessionOptions> AllKinds() {
  SessionOptions plain;
  plain.generate.max_new_tokens = 6;
  plain.pyramid.stages = 3;
  plain.pyramid.replay_frames = 16;
  std::vector<SessionOptions> all(9, plain);
  all[1].cacher = StcCacherOptions{.interval = 4};
  all[2].turbo = TurboOptions{};
  all[2].turbo->remove = 2;
  all[3].compressors = {"stc-pruner=2"};
  all[4].duplicate_threshold = 1;
  all[5].pyramid.mode = PyramidMode::kQuestion;
  all[6].pyramid.mode = PyramidMode::kReplay;
  all[7].pyramid.mode = PyramidMode::kQueryFree;
  all[8].pyramid.mode = PyramidMode::kProbe;
  all[8].pyramid.instruction = "Watch the door.";
  return all;
}

struct Listener : StreamEvents {
  void OnFrame(FrameNumber, MediaTime) override {}
  void OnDropped(FrameNumber, MediaTime, DropReason reason) override {
    if (reason != DropReason::kDuplicate) ADD_FAILURE() << Name(reason);
  }
  void OnText(QuestionId, std::string_view) override {}
  void OnAnswer(const StreamAnswer& answer) override { answers.push_back(answer); }
  void OnWarning(std::string_view line) override { ADD_FAILURE() << line; }
  void OnFailed(std::string_view error) override { ADD_FAILURE() << error; }
  std::vector<StreamAnswer> answers;
};

class BatchingTest : public testing::Test {
 protected:
  // Of the row of token 5 behind all that a session has read.
  std::vector<float> NextLogits(Session& session) {
    const Decoder& decoder = session.vlm->decoder();
    const Tensor row(DType::kF32, {1, decoder.hidden_size()});
    const Tensor logits(DType::kF32, {1, decoder.vocab_size()});
    const int32_t id = 5;
    decoder.Embed(*ctx_, {&id, 1}, row);
    SequenceStep step{&session.cache, row, logits};
    const KvCache::Mark mark = session.cache.MarkHere();
    decoder.Step(*ctx_, {&step, 1});
    session.cache.RewindTo(mark);
    return {logits.data<float>(), logits.data<float>() + decoder.vocab_size()};
  }

  const std::shared_ptr<const Engine> engine_ = std::make_shared<Engine>(TinyOptions());
  const std::unique_ptr<ExecContext> ctx_ = engine_->NewContext();
};

TEST_F(BatchingTest, SessionsIngestedTogetherRememberWhatTheyDoAlone) {
  std::vector<std::unique_ptr<Session>> together, alone;
  for (const SessionOptions& options : AllKinds()) {
    together.push_back(engine_->NewSession(options));
    alone.push_back(engine_->NewSession(options));
  }
  for (int first = 0; first < 12; first += 2) {
    std::vector<std::vector<FramePtr>> frames;
    for (uint32_t s = 0; s < together.size(); ++s) {
      frames.push_back({NoiseFrame(first, s, kRenewed), NoiseFrame(first + 1, s, kRenewed)});
    }
    std::vector<Arrivals> arrivals;
    for (size_t s = 0; s < together.size(); ++s) {
      arrivals.push_back({together[s].get(), frames[s]});
    }
    Ingest(*ctx_, arrivals);
    for (size_t s = 0; s < alone.size(); ++s) Ingest(*ctx_, *alone[s], frames[s]);
  }
  for (size_t s = 0; s < alone.size(); ++s) {
    ASSERT_EQ(together[s]->cache.length(), alone[s]->cache.length()) << s;
    EXPECT_EQ(together[s]->frames_seen, 12) << s;
    EXPECT_EQ(together[s]->visual_tokens, alone[s]->visual_tokens) << s;
    if (alone[s]->pyramid.replays()) continue;  // nothing is read before a question
    const std::vector<float> got = NextLogits(*together[s]), want = NextLogits(*alone[s]);
    double difference = 0, size = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      difference += std::pow(double{got[i]} - want[i], 2);
      size += std::pow(double{want[i]}, 2);
    }
    // Sums of products in another order: a few units of the last place of f32, 6e-8, a layer.
    EXPECT_LE(std::sqrt(difference / size), 1e-5) << s;
  }
}

TEST_F(BatchingTest, StreamsServedTogetherGiveTheAnswersTheyGiveAlone) {
  const std::vector<SessionOptions> kinds = AllKinds();
  const SystemClock clock;
  Metrics metrics;
  Scheduler scheduler(engine_, {.frames_per_round = 16}, clock, metrics, /*manual=*/true);
  std::vector<StreamId> ids;
  std::vector<std::shared_ptr<Listener>> heard;
  for (const SessionOptions& options : kinds) {
    heard.push_back(std::make_shared<Listener>());
    ids.push_back(scheduler.Open(options, {}, heard.back()));
  }
  // Frames go on while answers are made, which begin at different times.
  const auto asks = [](size_t stream, int frame) {
    return frame == 3 + static_cast<int>(stream) % 4 || frame == kFrames - 1;
  };
  for (int i = 0; i < kFrames; ++i) {
    for (uint32_t s = 0; s < ids.size(); ++s) {
      scheduler.Push(ids[s], i, NoiseFrame(i, s, kRenewed));
      if (asks(s, i)) scheduler.Ask(ids[s], {QuestionId(i), "What is there?", {}});
    }
    scheduler.RunRound();
  }
  while (scheduler.RunRound()) {
  }
  for (uint32_t s = 0; s < ids.size(); ++s) {
    const auto session = engine_->NewSession(kinds[s]);
    std::vector<std::string> want;
    for (int i = 0; i < kFrames; ++i) {
      const FramePtr frame = NoiseFrame(i, s, kRenewed);
      Ingest(*ctx_, *session, {&frame, 1});
      if (asks(s, i)) want.push_back(Ask(*ctx_, *session, "What is there?", nullptr).text);
    }
    ASSERT_EQ(heard[s]->answers.size(), want.size()) << s;
    for (size_t i = 0; i < want.size(); ++i) {
      EXPECT_EQ(heard[s]->answers[i].text, want[i]) << s << " " << i;
      EXPECT_EQ(heard[s]->answers[i].end, AnswerEnd::kLength) << s;
    }
    EXPECT_EQ(heard[s]->answers[0].frames_seen, 4 + s % 4) << s;
    scheduler.Close(ids[s]);
  }
  EXPECT_EQ(engine_->pool().bytes_in_use(), 0);
  EXPECT_THAT(metrics.Text(), testing::HasSubstr("sluice_cacher_patches_total"));
  EXPECT_GT(metrics.counter("sluice_cacher_fresh_patches_total", "").value(), 0);
  EXPECT_LT(metrics.counter("sluice_cacher_fresh_patches_total", "").value(),
            metrics.counter("sluice_cacher_patches_total", "").value());
}

}  // namespace
}  // namespace sluice
