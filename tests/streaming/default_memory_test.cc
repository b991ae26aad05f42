// The memory that a stream has unless it is told otherwise, on a tiny random checkpoint.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "streaming/defaults.h"
#include "streaming/engine.h"
#include "streaming/pipeline.h"
#include "tests/streaming/fakes.h"
#include "tests/support/tiny_stream.h"

namespace sluice {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

class DefaultMemoryTest : public testing::Test {
 protected:
  SessionOptions Options(int64_t context) const {
    SessionOptions options;
    options.max_context_tokens = context;
    options.frames_per_batch = 4;
    options.generate.max_new_tokens = 8;
    return options;
  }
  SessionOptions WithMemory(SessionOptions options) const {
    EXPECT_EQ(AddDefaultMemory(*engine_.vlm(), BlockStoreOptions(), 0, options), std::nullopt);
    EXPECT_TRUE(options.memory);
    return options;
  }
  // Frames until the context is full, at most so many. Batches of 4.
  int Show(Session& session, int first, int most) const {
    for (int i = first; i < first + most; i += 4) {
      std::vector<FramePtr> frames;
      for (int f = i; f < i + 4; ++f) frames.push_back(NoiseFrame(f, /*film=*/f));
      if (!HasRoom(session, 4 * engine_.vlm()->encoder().tokens_per_frame())) return i;
      Ingest(*ctx_, session, frames);
    }
    return first + most;
  }

  const Engine engine_{TinyOptions()};
  const std::unique_ptr<ExecContext> ctx_ = engine_.NewContext();
};

TEST_F(DefaultMemoryTest, ChangesNothingWhileTheStreamAndItsDialogueFitTheContext) {
  const SessionOptions plain = Options(1600);
  const auto a = engine_.NewSession(plain), b = engine_.NewSession(WithMemory(plain));
  int shown = 0;
  for (int next = 8; next < 400; next += 8) {
    const int now = Show(*a, shown, 8);
    if (now == shown) break;
    for (int i = shown; i < now; i += 4) Show(*b, i, 4);
    shown = now;
    Generated x, y;
    try {
      x = Ask(*ctx_, *a, "What is there " + std::string(40, 'a') + "?", nullptr);
    } catch (const InputError&) {
      break;  // the dialogue has filled the context
    }
    if (x.reason == FinishReason::kLength && x.ids.size() < 8) break;  // cut by the context
    y = Ask(*ctx_, *b, "What is there " + std::string(40, 'a') + "?", nullptr);
    ASSERT_EQ(x.ids, y.ids) << shown;
    EXPECT_THAT(y.evidence, IsEmpty());
    EXPECT_THAT(y.no_evidence, HasSubstr("frames were in view"));
    EXPECT_EQ(a->transcript.size(), b->transcript.size());
  }
  EXPECT_GT(shown, 24);
  EXPECT_EQ(b->cache.gone(), 0);
  EXPECT_EQ(a->cache.length(), b->cache.length());
}

TEST_F(DefaultMemoryTest, AStreamLongerThanTheContextIsAnsweredAboutWithEvidence) {
  for (const bool compresses : {false, true}) {
    SessionOptions plain = Options(1600);
    if (compresses) plain.compressors = {"stc-pruner=0.5"};
    const auto none = engine_.NewSession(plain);
    EXPECT_LT(Show(*none, 0, 400), 400);
    const auto session = engine_.NewSession(WithMemory(plain));
    for (int i = 0; i < 400; i += 100) {
      ASSERT_EQ(Show(*session, i, 100), i + 100);
      ASSERT_LE(session->cache.Reach(), 1600);
      const Generated answer = Ask(*ctx_, *session, "What is there?", nullptr);
      EXPECT_THAT(answer.ids, Not(IsEmpty()));
      EXPECT_EQ(answer.evidence.empty(), session->cache.gone() == 0);
      EXPECT_EQ(answer.no_evidence.empty(), session->cache.gone() > 0);
    }
    EXPECT_GT(session->cache.gone(), 0);
    EXPECT_EQ(session->frames_seen, 400);
    // The present and, thinned, all of the past can be recalled.
    EXPECT_LT(session->memory->blocks().front().time.seconds(), 60);
  }
}

TEST_F(DefaultMemoryTest, AQuestionThatTheFullContextHasNoRoomForMakesRoom) {
  const SessionOptions plain = Options(1600);
  const auto none = engine_.NewSession(plain), session = engine_.NewSession(WithMemory(plain));
  const int full = Show(*none, 0, 400);
  Show(*session, 0, full);
  ASSERT_EQ(session->cache.gone(), 0);
  const std::string text = "What is there, " + std::string(300, 'x') + "?";
  EXPECT_THROW(Ask(*ctx_, *none, text, nullptr), InputError);
  const Generated answer = Ask(*ctx_, *session, text, nullptr);
  EXPECT_THAT(answer.ids, Not(IsEmpty()));
  EXPECT_THAT(answer.evidence, Not(IsEmpty()));
}

TEST_F(DefaultMemoryTest, GivesWayInOneLineWhereThereCanBeNone) {
  const auto why = [&](SessionOptions options, BlockStoreOptions store = {}, int64_t kv_bytes = 0) {
    const auto line = AddDefaultMemory(*engine_.vlm(), store, kv_bytes, options);
    EXPECT_FALSE(options.memory);
    return line.value_or("");
  };
  SessionOptions pyramid = Options(0);
  pyramid.pyramid = ParsePyramid("question");
  EXPECT_THAT(why(pyramid), HasSubstr("PyramidDrop"));
  EXPECT_THAT(why(Options(100)), HasSubstr("too short"));
  EXPECT_THAT(why(Options(0), {.host_bytes = 0}), HasSubstr("no host memory"));
  EXPECT_THAT(why(Options(0), {}, 1), HasSubstr("budget"));
}

TEST_F(DefaultMemoryTest, KeepsWithinABudgetOfKeysAndValues) {
  const KvBlockPool pool(engine_.vlm()->decoder().kv_geometry(), 0);
  const int64_t budget = 12 * pool.block_bytes() * pool.geometry().num_layers;  // 768 rows
  SessionOptions options = Options(0);
  ASSERT_EQ(AddDefaultMemory(*engine_.vlm(), BlockStoreOptions(), budget, options), std::nullopt);
  options.memory->recall_blocks = 4;
  const auto session = engine_.NewSession(options);
  Show(*session, 0, 400);
  EXPECT_GT(session->cache.gone(), 0);
  EXPECT_LE(session->cache.SizeBytes(), budget);
}

TEST(RunNotesTest, AQuestionPastTheEndIsToldAndOneThatFitsIsNot) {
  const auto vlm = std::make_shared<FakeVlm>();
  const Engine engine(vlm, {.model = {}, .vlm = {}, .num_threads = 1});
  const auto session = engine.NewSession({});
  const auto ctx = engine.NewContext();
  FakeSource source(8);  // the last frame is at 3.5 s
  const RunResult result = sluice::Run(*ctx, *session, source,
                                       {{"In time?", MediaTime::FromSeconds(2)},
                                        {"At its end?", MediaTime::FromSeconds(4)},
                                        {"Late?", MediaTime::FromSeconds(50)},
                                        {"Any time?", {}}},
                                       {});
  ASSERT_EQ(result.answers.size(), 4u);
  EXPECT_EQ(result.answers[0].note, "");
  EXPECT_EQ(result.answers[1].note, "");
  EXPECT_THAT(result.answers[2].note, HasSubstr("after the end of the video"));
  EXPECT_EQ(result.answers[3].note, "");
}

TEST(RunNotesTest, AQuestionThatTheContextCannotHoldIsRefusedBeforeTheFirstFrame) {
  const auto vlm = std::make_shared<FakeVlm>();
  const Engine engine(vlm, {.model = {}, .vlm = {}, .num_threads = 1});
  const auto session = engine.NewSession({});
  const auto ctx = engine.NewContext();
  FakeSource source(8);
  EXPECT_THROW(sluice::Run(*ctx, *session, source, {{std::string(2000, 'w'), {}}}, {}), InputError);
  EXPECT_EQ(session->frames_seen, 0);
}

}  // namespace
}  // namespace sluice
