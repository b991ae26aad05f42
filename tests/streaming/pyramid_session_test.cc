// PyramidDrop in sessions, on a tiny random checkpoint.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "compression/registry.h"
#include "runtime/error.h"
#include "streaming/engine.h"
#include "streaming/pipeline.h"
#include "tests/support/tiny_stream.h"
#include "vision/preprocess.h"

namespace sluice {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr int kTokensPerFrame = 9, kLayers = 3;

SessionOptions Options(PyramidMode mode, double lambda = 0.5) {
  SessionOptions options;
  options.keep_dialogue = false;
  options.pyramid.mode = mode;
  options.pyramid.lambda = lambda;
  options.pyramid.stages = 3;  // before layers 1 and 2
  options.pyramid.replay_frames = 16;
  if (mode == PyramidMode::kProbe) options.pyramid.instruction = "Watch the door.";
  options.generate.max_new_tokens = 12;
  return options;
}

std::vector<FramePtr> NoiseFrames(int count, int first = 0) {
  std::vector<FramePtr> frames;
  for (int i = first; i < first + count; ++i) frames.push_back(NoiseFrame(i, /*film=*/i));
  return frames;
}

class PyramidSessionTest : public testing::Test {
 protected:
  std::unique_ptr<Session> Shown(const SessionOptions& options, int frames, int batch = 4) {
    auto session = engine_.NewSession(options);
    Show(*session, NoiseFrames(frames), batch);
    return session;
  }
  void Show(Session& session, const std::vector<FramePtr>& frames, int batch = 4) {
    for (size_t i = 0; i < frames.size(); i += batch) {
      Ingest(*ctx_, session,
             std::span(frames).subspan(i, std::min<size_t>(batch, frames.size() - i)));
    }
  }
  std::vector<int32_t> Answer(Session& session, const std::string& question) {
    return Ask(*ctx_, session, question, nullptr).ids;
  }
  // Every block that the session's cache holds, whole.
  std::vector<float> Blocks(const Session& session, int64_t rows) {
    std::vector<float> all;
    const KvGeometry kv = engine_.vlm()->decoder().kv_geometry();
    for (int layer = 0; layer < kLayers; ++layer) {
      const KvLayerView view = session.cache.layer(layer);
      for (size_t b = 0; b < view.blocks.size(); ++b) {
        const auto* block = static_cast<const float*>(view.blocks[b]);
        for (int64_t t = 0; t < std::min<int64_t>(rows - b * kKvBlockTokens, kKvBlockTokens); ++t) {
          for (int head = 0; head < kv.kv_heads; ++head) {
            const float* k = block + int64_t{head} * kKvBlockTokens * kv.head_dim;
            const float* v = block + int64_t{kv.kv_heads + head} * kKvBlockTokens * kv.head_dim;
            for (int d = 0; d < kv.head_dim; ++d) {
              all.push_back(k[t * kv.head_dim + d]);
              all.push_back(v[d * kKvBlockTokens + t]);
            }
          }
        }
      }
    }
    return all;
  }

  Engine engine_{TinyOptions()};
  std::unique_ptr<ExecContext> ctx_ = engine_.NewContext();
};

TEST_F(PyramidSessionTest, QuestionsThroughAViewDoNotDisturbEachOther) {
  const SessionOptions options = Options(PyramidMode::kQuestion);
  const auto session = Shown(options, 12);
  const int64_t length = session->cache.length(), bytes = session->cache.SizeBytes();
  const std::vector<float> before = Blocks(*session, length);
  for (const char* question : {"What is there?", "Who came in after the dog?"}) {
    const auto fresh = Shown(options, 12);
    EXPECT_EQ(Answer(*session, question), Answer(*fresh, question)) << question;
    EXPECT_THAT(session->pyramid.QuestionStageSizes(), ElementsAre(108, 54, 27));
    EXPECT_EQ(session->cache.length(), length);
    EXPECT_EQ(session->cache.SizeBytes(), bytes);
    EXPECT_EQ(Blocks(*session, length), before);
  }
}

// Of every family.
TEST(PyramidFamiliesTest, SharesOfOneRememberAndAnswerAsWithoutTheMethodBitForBit) {
  for (const char* name :
       {"tiny_tied", "tiny_untied", "tiny_llava15", "tiny_next_mistral", "tiny_next_video"}) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      EngineOptions engine_options;
      engine_options.model = std::filesystem::path(SLUICE_SOURCE_DIR) / "tests/golden" / name;
      engine_options.vlm.compute_type = dtype;
      engine_options.num_threads = 1;
      const Engine engine(engine_options);
      const auto ctx = engine.NewContext();
      const Decoder& decoder = engine.vlm()->decoder();
      const std::vector<FramePtr> frames = NoiseFrames(6);
      // Logits of a row behind what the session remembers, and its answer.
      const auto run = [&](PyramidMode mode) {
        SessionOptions options = Options(mode, 1);
        options.pyramid.stages = 2;
        const auto session = engine.NewSession(options);
        Ingest(*ctx, *session, std::span(frames).first(4));
        Ingest(*ctx, *session, std::span(frames).subspan(4));
        const std::vector<int32_t> answer = Ask(*ctx, *session, "What is there?", nullptr).ids;
        std::vector<float> result(answer.begin(), answer.end());
        if (session->pyramid.replays()) return result;
        const Tensor row(DType::kF32, {1, decoder.hidden_size()});
        decoder.Embed(*ctx, std::vector<int32_t>{5}, row);
        const Tensor logits(DType::kF32, {1, decoder.vocab_size()});
        SequenceStep step{&session->cache, row, logits, session->pyramid.ForQuestion(0, 1)};
        decoder.Step(*ctx, {&step, 1});
        result.insert(result.end(), logits.data<float>(),
                      logits.data<float>() + decoder.vocab_size());
        return result;
      };
      const std::vector<float> want = run(PyramidMode::kOff);
      for (const PyramidMode mode :
           {PyramidMode::kQuestion, PyramidMode::kQueryFree, PyramidMode::kProbe}) {
        EXPECT_EQ(run(mode), want) << name << " " << Name(dtype) << " " << Name(mode);
      }
      const std::vector<float> replayed = run(PyramidMode::kReplay);
      EXPECT_EQ(replayed, std::vector<float>(want.begin(), want.begin() + replayed.size()))
          << name << " " << Name(dtype);
    }
  }
}

TEST_F(PyramidSessionTest, ReplayEqualsThePapersPrefillOfTheWholePrompt) {
  SessionOptions options = Options(PyramidMode::kReplay);
  options.pyramid.quota = PyramidQuota::kGlobal;
  options.pyramid.rank = PyramidRank::kLast;
  const auto session = Shown(options, 9);
  EXPECT_EQ(session->cache.length(), 0);
  const Vlm& vlm = *engine_.vlm();

  // The same in one piece, by hand.
  const std::vector<FramePtr> frames = NoiseFrames(9);
  const PreprocessConfig& config = vlm.encoder().preprocess_config();
  const Tensor pixels(DType::kF32, {9, 3, config.height, config.width});
  Preprocess(*ctx_, frames, config, pixels);
  const VisualTokens tokens = vlm.encoder().Encode(*ctx_, pixels, frames);
  const std::vector<int32_t> question =
      vlm.prompt_format().EncodeQuestion(vlm.tokenizer(), "What is there?", false);
  const auto prefix = static_cast<int64_t>(session->prefix_ids.size());
  const auto count = static_cast<int64_t>(question.size());
  const int64_t visual = tokens.size(), width = vlm.decoder().hidden_size();
  Tensor prompt(DType::kF32, {prefix + visual + 1 + count, width});
  vlm.decoder().Embed(*ctx_, session->prefix_ids, prompt.view().Slice(0, prefix));
  std::copy_n(tokens.features.data<float>(), visual * width, prompt.data<float>() + prefix * width);
  std::copy_n(vlm.newline_row().data<float>(), width,
              prompt.data<float>() + (prefix + visual) * width);
  vlm.decoder().Embed(*ctx_, question,
                      prompt.view().Slice(prefix + visual + 1, prefix + visual + 1 + count));
  std::vector<int32_t> labels(prefix, PyramidDrop::kText);
  for (const TokenOrigin& origin : tokens.origins) labels.push_back(origin.frame);
  const PyramidPlan plan = PyramidPlan::Make(options.pyramid, kLayers);
  PyramidDrop drop(plan, labels, 0);
  KvCache cache(session->cache.pool(), KvPositions::kRows);
  const Generated want =
      Generate(*ctx_, vlm, cache, std::move(prompt), {}, options.generate, nullptr, &drop);

  EXPECT_EQ(Answer(*session, "What is there?"), want.ids);
  EXPECT_THAT(drop.stage_sizes(), ElementsAre(81, 40, 20));
  EXPECT_EQ(session->pyramid.QuestionStageSizes(), drop.stage_sizes());
}

TEST_F(PyramidSessionTest, ReplaySeesTheNewestFramesOnlyAndHowTheyCameDoesNotMatter) {
  SessionOptions options = Options(PyramidMode::kReplay);
  options.pyramid.replay_frames = 3;
  const auto lived = Shown(options, 20, 4), single = Shown(options, 20, 1);
  const auto late = engine_.NewSession(options);
  Show(*late, NoiseFrames(3, 17));
  EXPECT_EQ(lived->pyramid.ReplayRows().size(),
            static_cast<size_t>(3 * kTokensPerFrame * engine_.vlm()->decoder().hidden_size()));
  const std::vector<int32_t> want = Answer(*late, "What is there?");
  EXPECT_EQ(Answer(*lived, "What is there?"), want);
  EXPECT_EQ(Answer(*single, "What is there?"), want);
  EXPECT_EQ(Answer(*lived, "What is there?"), want);
}

TEST_F(PyramidSessionTest, FramesThinnedOnArrivalLeaveDeepLayersFewRows) {
  for (const PyramidMode mode : {PyramidMode::kQueryFree, PyramidMode::kProbe}) {
    for (const KvPositions positions : {KvPositions::kRows, KvPositions::kTokens}) {
      SessionOptions options = Options(mode);
      options.pyramid.positions = positions;
      const auto session = Shown(options, 12, 5), single = Shown(options, 12, 1);
      const auto prefix = static_cast<int64_t>(session->prefix_ids.size());
      EXPECT_EQ(session->cache.length(), prefix + 12 * 9) << Name(mode);
      EXPECT_EQ(session->cache.rows(0), prefix + 12 * 9);
      EXPECT_EQ(session->cache.rows(1), prefix + 12 * 4);
      EXPECT_EQ(session->cache.rows(2), prefix + 12 * 2);
      const int64_t bytes = session->cache.SizeBytes();
      const std::vector<int32_t> answer = Answer(*session, "What is there?");
      EXPECT_EQ(Answer(*session, "What is there?"), answer);
      EXPECT_EQ(session->cache.SizeBytes(), bytes);
      if (mode == PyramidMode::kProbe) continue;  // how a frame is ranked depends on its batch
      EXPECT_EQ(Answer(*single, "What is there?"), answer);
    }
  }
}

TEST_F(PyramidSessionTest, AFailedBatchLeavesNoTrace) {
  SessionOptions options = Options(PyramidMode::kQueryFree);
  options.max_context_tokens = 6 * kTokensPerFrame + 100;
  const auto session = Shown(options, 4), spared = Shown(options, 4);
  EXPECT_THROW(Show(*session, NoiseFrames(12, 4), 12), InputError);
  Show(*session, NoiseFrames(1, 4));
  Show(*spared, NoiseFrames(1, 4));
  EXPECT_EQ(Answer(*session, "What is there?"), Answer(*spared, "What is there?"));
}

TEST_F(PyramidSessionTest, WhatAModeCannotFollowIsRefusedBeforeTheFirstFrame) {
  struct Case {
    PyramidMode mode;
    void (*change)(SessionOptions&);
    const char* refusal;  // null: it is fine
  };
  constexpr PyramidMode kView = PyramidMode::kQuestion, kReplay = PyramidMode::kReplay,
                        kFree = PyramidMode::kQueryFree, kProbe = PyramidMode::kProbe;
  const auto compact = [](SessionOptions& o) { o.pyramid.positions = KvPositions::kRows; };
  const auto preserve = [](SessionOptions& o) { o.pyramid.positions = KvPositions::kTokens; };
  const auto global = [](SessionOptions& o) { o.pyramid.quota = PyramidQuota::kGlobal; };
  const auto hybrid = [](SessionOptions& o) { o.pyramid.quota = PyramidQuota::kHybrid; };
  const auto frame = [](SessionOptions& o) { o.pyramid.quota = PyramidQuota::kFrame; };
  const auto last = [](SessionOptions& o) { o.pyramid.rank = PyramidRank::kLast; };
  const auto instruct = [](SessionOptions& o) { o.pyramid.instruction = "Watch the door."; };
  const auto silent = [](SessionOptions& o) { o.pyramid.instruction = " \n"; };
  const auto deep = [](SessionOptions& o) { o.pyramid.stages = 4; };
  const auto narrow = [](SessionOptions& o) { o.max_context_tokens = 100; };
  const auto none = [](SessionOptions& o) { o.pyramid.replay_frames = 0; };
  const Case cases[] = {
      {kView, compact, "leave them out, or use mode replay, query-free or probe"},
      {kReplay, compact, nullptr},
      {kFree, compact, nullptr},
      {kProbe, compact, nullptr},
      {kView, preserve, nullptr},
      {kReplay, preserve, nullptr},
      {kFree, preserve, nullptr},
      {kView, global, nullptr},
      {kReplay, frame, nullptr},
      {kFree, frame, nullptr},
      {kFree, global, "got quota global: leave the quota out, or use mode question or replay"},
      {kProbe, hybrid, "got quota hybrid: leave the quota out, or use mode question or replay"},
      {kView, last, nullptr},
      {kReplay, last, nullptr},
      {kFree, last, "got rank last: leave the rank out, or use mode question or replay"},
      {kProbe, last, "got rank last: leave the rank out, or use mode question or replay"},
      {kView, instruct, "leave it out, or use mode probe"},
      {kReplay, instruct, "leave it out, or use mode probe"},
      {kFree, instruct, "leave it out, or use mode probe"},
      {kProbe, silent, "give one, or use mode query-free"},
      {kView, deep, "3 layers, got 4 stages: use 1 to as many"},
      {kView, narrow, nullptr},
      {kReplay, narrow, "replay fewer than"},
      {kReplay, none, "at least 1 frame, got 0"},
  };
  for (const Case& c : cases) {
    SessionOptions options = Options(c.mode);
    c.change(options);
    try {
      engine_.NewSession(options);
      EXPECT_EQ(c.refusal, nullptr) << Name(c.mode);
    } catch (const InputError& error) {
      ASSERT_NE(c.refusal, nullptr) << error.what();
      EXPECT_THAT(error.what(), HasSubstr(c.refusal));
      EXPECT_THAT(error.what(), testing::Not(HasSubstr("\n")));
    }
  }
}

TEST_F(PyramidSessionTest, EveryModeWorksBehindTheCacherAndEveryCompressor) {
  std::vector<std::vector<std::string>> lists = {{}, {"stc-pruner=0.5", "turbo-merge=3"}};
  for (const CompressorEntry& entry : TokenCompressors())
    lists.push_back({std::string(entry.name)});
  for (const PyramidMode mode : {PyramidMode::kQuestion, PyramidMode::kReplay,
                                 PyramidMode::kQueryFree, PyramidMode::kProbe}) {
    for (const auto& compressors : lists) {
      SessionOptions options = Options(mode), whole = Options(PyramidMode::kOff);
      options.compressors = whole.compressors = compressors;
      options.cacher = whole.cacher = StcCacherOptions{};
      const bool asked = mode == PyramidMode::kQuestion || mode == PyramidMode::kReplay;
      if (asked) options.pyramid.quota = PyramidQuota::kGlobal;  // no row is sure of its place
      const auto session = Shown(options, 8), plain = Shown(whole, 8);
      const std::string name =
          std::string(Name(mode)) + (compressors.empty() ? "" : " " + compressors.front());
      EXPECT_EQ(session->visual_tokens, plain->visual_tokens) << name;
      Answer(*session, "What is there?");
      const int64_t visual = session->visual_tokens;
      const auto prefix = static_cast<int64_t>(session->prefix_ids.size());
      if (asked) {
        EXPECT_THAT(session->pyramid.QuestionStageSizes(),
                    ElementsAre(visual, visual / 2, visual / 4))
            << name;
      } else {
        EXPECT_EQ(session->cache.rows(0), prefix + visual) << name;
        EXPECT_LT(session->cache.rows(1), session->cache.rows(0)) << name;
        EXPECT_LE(session->cache.rows(2), session->cache.rows(1)) << name;
      }
    }
  }
}

}  // namespace
}  // namespace sluice
