// Sessions with several methods on at once, on a tiny random checkpoint.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "compression/registry.h"
#include "streaming/engine.h"
#include "streaming/pipeline.h"
#include "tests/support/tiny_stream.h"

namespace sluice {
namespace {

constexpr int kRenewed = 74 * 74 / 2;  // values of a frame

class MethodsSessionTest : public testing::Test {
 protected:
  // Everything but what a caller adds.
  static SessionOptions Options() {
    SessionOptions options;
    options.keep_dialogue = false;
    options.duplicate_threshold = 1;
    options.cacher = StcCacherOptions{.interval = 4};
    options.pyramid.stages = 3;
    options.pyramid.replay_frames = 16;
    options.generate.max_new_tokens = 8;
    return options;
  }
  void Show(Session& session, uint32_t film, int first, int count) {
    std::vector<FramePtr> frames;
    for (int i = first; i < first + count; ++i) frames.push_back(NoiseFrame(i, film, kRenewed));
    Ingest(*ctx_, session, frames);
  }
  std::vector<int32_t> Answer(Session& session) {
    return Ask(*ctx_, session, "What is there?", nullptr).ids;
  }

  Engine engine_{TinyOptions()};
  std::unique_ptr<ExecContext> ctx_ = engine_.NewContext();
};

TEST_F(MethodsSessionTest, InterleavedSessionsAnswerAsTheyDoAlone) {
  for (const PyramidMode mode : {PyramidMode::kOff, PyramidMode::kQuestion, PyramidMode::kReplay,
                                 PyramidMode::kQueryFree, PyramidMode::kProbe}) {
    for (const CompressorEntry& entry : TokenCompressors()) {
      SCOPED_TRACE(std::string(Name(mode)) + " " + std::string(entry.name));
      SessionOptions options = Options();
      options.pyramid.mode = mode;
      if (mode == PyramidMode::kProbe) options.pyramid.instruction = "Watch the door.";
      options.compressors = {std::string(entry.name) + (entry.default_value < 1 ? "=0.5" : "=2")};
      const auto a = engine_.NewSession(options), b = engine_.NewSession(options);
      const auto alone_a = engine_.NewSession(options), alone_b = engine_.NewSession(options);
      for (int first = 0; first < 12; first += 3) {
        Show(*alone_a, 1, first, 3);
        Answer(*alone_a);
      }
      for (int first = 0; first < 12; first += 3) Show(*alone_b, 2, first, 3);
      for (int first = 0; first < 12; first += 3) {
        Show(*a, 1, first, 3);
        Show(*b, 2, first, 3);
        Answer(*a);
      }
      EXPECT_EQ(Answer(*a), Answer(*alone_a));
      EXPECT_EQ(Answer(*b), Answer(*alone_b));
      EXPECT_GT(a->duplicates->duplicates(), 0);
      EXPECT_GT(a->reuse->counts().frames, a->reuse->counts().whole);
      EXPECT_EQ(a->SizeBytes(), alone_a->SizeBytes());
    }
  }
}

// Frames that are replayed leave nothing in the KV cache, so that the whole session stays as it is.
TEST_F(MethodsSessionTest, MemoryIsFlatOverTenThousandFrames) {
  SessionOptions options = Options();
  options.pyramid.mode = PyramidMode::kReplay;
  options.compressors = {"stc-pruner-join=0.5", "tome-merge=3", "uniform-frames=2"};
  std::vector<FramePtr> film;
  for (int i = 0; i < 48; ++i) film.push_back(NoiseFrame(i, 3, kRenewed));
  const auto session = engine_.NewSession(options);
  int64_t bytes = 0;
  for (int i = 0; i < 10000; i += 8) {
    Ingest(*ctx_, *session, std::span(film).subspan(i % 48, 8));
    if (i == 96) bytes = session->SizeBytes();
    if (i > 96) {
      ASSERT_EQ(session->SizeBytes(), bytes) << i;
    }
  }
  EXPECT_EQ(session->frames_seen, 10000);
  EXPECT_GT(bytes, session->reuse->SizeBytes());
  EXPECT_GT(session->duplicates->duplicates(), 3000);
  EXPECT_FALSE(Answer(*session).empty());
}

}  // namespace
}  // namespace sluice
