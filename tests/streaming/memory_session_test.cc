// Sessions with a streaming memory, on a tiny random checkpoint.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "runtime/ops/attention.h"
#include "runtime/transfer.h"
#include "streaming/engine.h"
#include "streaming/pipeline.h"
#include "tests/support/gpu_testing.h"
#include "tests/support/tiny_stream.h"

namespace sluice {
namespace {

using ::sluice::testing::SkippedWithout;

class MemorySessionTest : public ::testing::TestWithParam<Device> {
 protected:
  void SetUp() override { SkippedWithout(GetParam()); }
  static Engine Open(int64_t kv_budget_bytes = 0) {
    EngineOptions options = TinyOptions();
    options.vlm.device = GetParam();
    options.kv_budget_bytes = kv_budget_bytes;
    return Engine(options);
  }
};
INSTANTIATE_TEST_SUITE_P(Devices, MemorySessionTest, ::testing::Values(Device::kCpu, Device::kCuda),
                         [](const auto& info) { return Name(info.param); });

SessionOptions WithMemory(int64_t window, int recall) {
  SessionOptions options;
  options.keep_dialogue = false;
  options.memory = MemoryOptions{.window_tokens = window, .recall_blocks = recall};
  options.generate.max_new_tokens = 12;
  return options;
}

void Show(ExecContext& ctx, Session& session, int first, int count) {
  std::vector<FramePtr> frames;
  for (int i = first; i < first + count; ++i) frames.push_back(NoiseFrame(i, /*film=*/i));
  Ingest(ctx, session, frames);
}

// Every key and value, as bytes.
std::vector<std::vector<float>> Contents(ExecContext& ctx, const KvCache& cache) {
  std::vector<std::vector<float>> layers;
  const KvGeometry& kv = cache.pool()->geometry();
  for (int layer = 0; layer < kv.num_layers; ++layer) {
    const Tensor there(DType::kF32, {2 * cache.rows(layer), kv.kv_heads * kv.head_dim}, kv.device);
    LoadKv(ctx, cache.layer(layer), 0, there.view().Slice(0, cache.rows(layer)),
           there.view().Slice(cache.rows(layer), there.dim(0)));
    const Tensor both = TransferTo(ctx, there, Device::kCpu);
    layers.emplace_back(both.data<float>(), both.data<float>() + both.shape().NumElements());
  }
  return layers;
}

std::string Refusal(const std::function<void()>& act) {
  try {
    act();
  } catch (const InputError& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    return error.what();
  }
  return "";
}

TEST_P(MemorySessionTest, WhileTheStreamFitsTheWindowNothingDiffersFromNoMemory) {
  const Engine engine = Open();
  const auto ctx = engine.NewContext();
  SessionOptions plain = WithMemory(1, 1);
  plain.memory.reset();
  const auto a = engine.NewSession(plain), b = engine.NewSession(WithMemory(600, 4));
  const int frames = 600 / engine.vlm()->encoder().tokens_per_frame();
  for (int first = 0; first < frames; first += 4) {
    const int count = std::min(4, frames - first);
    Show(*ctx, *a, first, count);
    Show(*ctx, *b, first, count);
    const Generated x = Ask(*ctx, *a, "What is there?", nullptr);
    const Generated y = Ask(*ctx, *b, "What is there?", nullptr);
    EXPECT_EQ(x.ids, y.ids);
    EXPECT_TRUE(y.evidence.empty());
  }
  EXPECT_EQ(b->cache.gone(), 0);
  EXPECT_EQ(Contents(*ctx, a->cache), Contents(*ctx, b->cache));
}

TEST_P(MemorySessionTest, ALongStreamStaysWithinItsWindowAndAnswersWithEvidence) {
  const Engine engine = Open();
  const auto ctx = engine.NewContext();
  for (const int recall : {0, 5}) {
    SessionOptions options = WithMemory(300, recall);
    options.memory->store.host_bytes = 1 << 20;
    const auto session = engine.NewSession(options);
    const int64_t frame = engine.vlm()->encoder().tokens_per_frame();
    int64_t early = 0, late = 0;
    for (int first = 0; first < 1600; first += 8) {
      Show(*ctx, *session, first, 8);
      ASSERT_LT(session->cache.Reach(),
                static_cast<int64_t>(session->prefix_ids.size()) + 300 + kKvBlockTokens);
      // Blocks come and go; what matters is the most there ever is, once budgets are spent.
      int64_t& most = first < 800 ? early : late;
      most = std::max(most, session->SizeBytes());
    }
    EXPECT_LE(late, early + early / 50);
    EXPECT_EQ(session->cache.length(),
              static_cast<int64_t>(session->prefix_ids.size()) + 1600 * frame);
    const auto before = Contents(*ctx, session->cache);
    const Generated answer = Ask(*ctx, *session, "What is there?", nullptr);
    EXPECT_FALSE(answer.ids.empty());
    EXPECT_EQ(answer.evidence.empty(), recall == 0);
    EXPECT_EQ(Ask(*ctx, *session, "What is there?", nullptr).ids, answer.ids);
    EXPECT_EQ(Contents(*ctx, session->cache), before);
    if (recall > 0) {
      EXPECT_GT(session->memory->counts().dropped, 0);
      EXPECT_LE(session->memory->counts().host_bytes, 1 << 20);
    }
  }
}

// The pool is too small for the batch, or for the slide behind it: both leave no trace.
TEST_P(MemorySessionTest, AnIngestThatFailsLeavesNoTrace) {
  const Engine roomy = Open();
  const auto ctx = roomy.NewContext();
  const SessionOptions options = WithMemory(200, 4);
  const int64_t block = KvBlockPool(roomy.vlm()->decoder().kv_geometry(), 0).block_bytes();
  bool failed = false;
  for (int64_t blocks = 12; blocks < 24; ++blocks) {
    const Engine tight = Open(blocks * block);
    const auto session = tight.NewSession(options);
    auto before = Contents(*ctx, session->cache);
    int64_t known = 0;  // frames that can be recalled
    try {
      for (int first = 0; first < 48; first += 4) {
        before = Contents(*ctx, session->cache);
        known = session->memory->counts().blocks;
        Show(*ctx, *session, first, 4);
      }
    } catch (const ResourceExhausted&) {
      failed = true;
      EXPECT_EQ(Contents(*ctx, session->cache), before);
      EXPECT_EQ(session->memory->counts().blocks, known);
    }
  }
  EXPECT_TRUE(failed);
}

TEST_P(MemorySessionTest, TheDialogueIsToldWithinItsBudgetTheNewestTurnsFirst) {
  const Engine engine = Open();
  const auto ctx = engine.NewContext();
  SessionOptions options = WithMemory(300, 4);
  options.keep_dialogue = true;
  options.memory->dialogue_tokens = 120;
  const auto session = engine.NewSession(options);
  Show(*ctx, *session, 0, 40);
  for (int i = 0; i < 20; ++i) {
    Ask(*ctx, *session, "Question number " + std::to_string(i) + "?", nullptr);
    size_t tokens = 0;
    for (const Turn& turn : session->transcript) {
      tokens += turn.question_ids.size() + turn.answer_ids.size();
    }
    ASSERT_LE(tokens, 120u);
  }
  ASSERT_GT(session->transcript.size(), 0u);
  ASSERT_LT(session->transcript.size(), 20u);
  EXPECT_EQ(session->transcript.back().question, "Question number 19?");
  const Turn& first = session->transcript.front();
  EXPECT_EQ(first.question_ids,
            engine.vlm()->prompt_format().EncodeQuestion(engine.vlm()->tokenizer(), first.question,
                                                         /*follow_up=*/false));
}

TEST_P(MemorySessionTest, WhatCannotFitOrGoTogetherIsRefusedInOneLine) {
  const Engine engine = Open();
  const auto refusal = [&](const std::function<void(SessionOptions&)>& change) {
    SessionOptions options = WithMemory(300, 4);
    change(options);
    return Refusal([&] { engine.NewSession(options); });
  };
  using ::testing::HasSubstr;
  EXPECT_THAT(refusal([](auto& o) { o.memory->window_tokens = 4000; }),
              HasSubstr("--memory-window smaller by"));
  EXPECT_THAT(refusal([](auto& o) { o.memory->recall_blocks = 4000; }),
              HasSubstr("--memory-recall smaller"));
  EXPECT_THAT(refusal([](auto& o) { o.memory->window_tokens = -1; }), HasSubstr("must be 0 to"));
  EXPECT_THAT(refusal([](auto& o) { o.memory->window_tokens = INT64_MAX; }),
              HasSubstr("must be 0 to"));
  EXPECT_THAT(refusal([](auto& o) { o.memory->dialogue_tokens = INT64_MAX; }),
              HasSubstr("must be 0 to"));
  EXPECT_THAT(refusal([](auto& o) { o.memory->recall_blocks = INT32_MAX; }),
              HasSubstr("must be 0 to"));
  EXPECT_THAT(refusal([](auto& o) { o.memory->recall_chunk = 0; }), HasSubstr("must be 1 to"));
  EXPECT_THAT(refusal([](auto& o) { o.memory->store.host_bytes = 0; }), HasSubstr("host memory"));
  EXPECT_THAT(refusal([](auto& o) {
                o.pyramid = ParsePyramid("query-free");
                o.pyramid.stages = 3;
              }),
              HasSubstr("--pyramid-drop"));
  EXPECT_EQ(refusal([](auto&) {}), "");
}

}  // namespace
}  // namespace sluice
