// Real decoding into a real model: a tiny random checkpoint whose answers transformers computed.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "runtime/safetensors.h"
#include "streaming/engine.h"
#include "streaming/pipeline.h"

namespace sluice {
namespace {

const std::filesystem::path kGolden = std::filesystem::path(SLUICE_SOURCE_DIR) / "tests/golden";

class StreamTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
#ifdef __SANITIZE_THREAD__
    GTEST_SKIP() << "GStreamer is not instrumented, each of its handovers would look like a race";
#endif
  }
  static Engine Open(const std::string& name) {
    EngineOptions options;
    options.model = kGolden / name;
    options.vlm.compute_type = DType::kF32;
    options.num_threads = 1;  // the decoder has threads of its own
    return Engine(options);
  }

  Engine engine_ = Open(GetParam());
  std::unique_ptr<ExecContext> ctx_ = engine_.NewContext();
};

// The reference's clip, question and first 64 greedy tokens.
struct Golden {
  explicit Golden(const std::string& name)
      : file(SafetensorsFile::Open(kGolden / (name + ".golden.safetensors"))),
        question(file->metadata().at("question")) {
    const ConstTensorView pixels = file->tensors().at("frames");
    const int64_t frame_bytes = pixels.dim(1) * pixels.dim(2) * 3;
    for (int64_t i = 0; i < pixels.dim(0); ++i) {
      auto frame = std::make_shared<Frame>();
      frame->height = static_cast<int>(pixels.dim(1));
      frame->width = static_cast<int>(pixels.dim(2));
      const uint8_t* bytes = pixels.data<uint8_t>() + i * frame_bytes;
      frame->rgb.assign(bytes, bytes + frame_bytes);
      frame->index = i;
      frame->time = MediaTime::FromSeconds(0.5 * static_cast<double>(i));
      frames.push_back(frame);
    }
    const ConstTensorView ids = file->tensors().at("greedy_ids");
    greedy_ids.assign(ids.data<int32_t>(), ids.data<int32_t>() + ids.dim(0));
  }
  std::shared_ptr<const SafetensorsFile> file;
  std::string question;
  std::vector<FramePtr> frames;
  std::vector<int32_t> greedy_ids;
};

std::vector<int32_t> WithoutStop(std::vector<int32_t> ids, const Vlm& vlm) {
  const auto& stops = vlm.generation_defaults().stop_ids;
  const auto stop = std::find_first_of(ids.begin(), ids.end(), stops.begin(), stops.end());
  ids.erase(stop, ids.end());
  return ids;
}

TEST_P(StreamTest, AStreamedSessionAnswersAsTheReferenceDoesInOneShot) {
  const Golden golden(GetParam());
  SessionOptions options;
  options.keep_dialogue = false;
  options.generate.max_new_tokens = static_cast<int>(golden.greedy_ids.size());
  const std::vector<int32_t> expected = WithoutStop(golden.greedy_ids, *engine_.vlm());
  for (size_t batch : {size_t{1}, size_t{3}, golden.frames.size()}) {
    SCOPED_TRACE("batches of " + std::to_string(batch));
    const auto session = engine_.NewSession(options);
    const std::span<const FramePtr> frames(golden.frames);
    for (size_t i = 0; i < frames.size(); i += batch) {
      Ingest(*ctx_, *session, frames.subspan(i, std::min(batch, frames.size() - i)));
      // Questions on the way leave no trace.
      if (i + batch < frames.size()) Ask(*ctx_, *session, "Anything yet?", nullptr);
    }
    EXPECT_EQ(Ask(*ctx_, *session, golden.question, nullptr).ids, expected);
    EXPECT_EQ(Ask(*ctx_, *session, golden.question, nullptr).ids, expected) << "asked again";
  }
}

TEST_P(StreamTest, ARunOverAFileEqualsASessionFedFrameByFrame) {
  SourceOptions sampling;
  sampling.rate.fps = 4;
  SessionOptions options;
  options.generate.max_new_tokens = 12;
  const auto source = Source::Open("test:ball:2", sampling);
  const auto session = engine_.NewSession(options);
  const RunResult run = sluice::Run(
      *ctx_, *session, *source, {{"What moves?", MediaTime::FromSeconds(1)}, {"And now?", {}}}, {});
  ASSERT_EQ(run.answers.size(), 2u);
  EXPECT_EQ(run.frames, 8);
  EXPECT_EQ(run.answers[0].frames_seen, 5);
  EXPECT_EQ(run.answers[0].asked_at, MediaTime::FromSeconds(1));

  const auto again = Source::Open("test:ball:2", sampling);
  const auto by_hand = engine_.NewSession(options);
  while (const FramePtr frame = again->Next()) {
    Ingest(*ctx_, *by_hand, {&frame, 1});
    if (frame->index == 4) {
      EXPECT_EQ(Ask(*ctx_, *by_hand, "What moves?", nullptr).ids, run.answers[0].generated.ids);
    }
  }
  EXPECT_EQ(Ask(*ctx_, *by_hand, "And now?", nullptr).ids, run.answers[1].generated.ids);
}

TEST_P(StreamTest, AStillSceneCostsOneFrameWithTheDuplicateFilter) {
  SourceOptions sampling;
  sampling.rate.fps = 5;
  SessionOptions options;
  options.duplicate_threshold = 4;
  const auto source = Source::Open("test:white:2", sampling);
  const auto session = engine_.NewSession(options);
  const RunResult run = sluice::Run(*ctx_, *session, *source, {{"What is it?", {}}}, {});
  EXPECT_EQ(run.frames, 10);
  EXPECT_EQ(run.duplicates, 9);
  EXPECT_EQ(session->visual_tokens, engine_.vlm()->encoder().tokens_per_frame());
}

TEST_P(StreamTest, ALongStreamEndsInAClearErrorWhenTheContextIsFull) {
  SessionOptions options;
  options.max_context_tokens = 400;
  const auto source = Source::Open("test:ball:60", {});
  const auto session = engine_.NewSession(options);
  try {
    sluice::Run(*ctx_, *session, *source, {}, {});
    ADD_FAILURE() << "120 frames do not fit into 400 tokens";
  } catch (const InputError& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("the context is full"));
    EXPECT_THAT(error.what(), testing::HasSubstr("400"));
  }
  EXPECT_GT(session->frames_seen, 0);
  EXPECT_NO_THROW(Ask(*ctx_, *session, "What was it?", nullptr));
}

INSTANTIATE_TEST_SUITE_P(Models, StreamTest,
                         testing::Values("tiny_tied", "tiny_untied", "tiny_next_video",
                                         "tiny_next_mistral", "tiny_llava15"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace sluice
