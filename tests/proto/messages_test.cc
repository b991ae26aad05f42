#include "proto/messages.h"

#include <gtest/gtest.h>

#include "runtime/error.h"

namespace sluice {
namespace {

TEST(MessagesTest, OptionsComeBackAsTheyWere) {
  SessionOptions options;
  options.system_prompt = "Be brief.";
  options.keep_dialogue = false;
  options.duplicate_threshold = 3.5;
  options.max_context_tokens = 999;
  options.cacher =
      StcCacherOptions{.interval = 5, .ratio = 0.3, .shared_selection = true, .refresh_below = 0.1};
  options.compressors = {"stc-pruner=0.5"};
  options.pyramid.mode = PyramidMode::kQuestion;
  options.pyramid.lambda = 0.62;
  options.pyramid.boundaries = {1, 3};
  options.pyramid.stages = 3;
  options.pyramid.quota = PyramidQuota::kFrame;
  options.pyramid.rank = PyramidRank::kMean;
  options.pyramid.positions = KvPositions::kTokens;
  options.generate.max_new_tokens = 17;
  options.generate.sampling.temperature = 0.7f;
  options.generate.sampling.seed = 12345678901234;
  options.generate.stop_strings = {"END"};

  const SessionOptions back = FromProto(ToProto(options), GenerationDefaults(), {});
  EXPECT_EQ(back.system_prompt, options.system_prompt);
  EXPECT_FALSE(back.keep_dialogue);
  EXPECT_EQ(back.duplicate_threshold, options.duplicate_threshold);
  EXPECT_EQ(back.max_context_tokens, 999);
  ASSERT_TRUE(back.cacher);
  EXPECT_EQ(back.cacher->interval, 5);
  EXPECT_EQ(back.cacher->ratio, 0.3);
  EXPECT_EQ(back.cacher->refresh_below, 0.1);
  EXPECT_TRUE(back.cacher->shared_selection);
  EXPECT_FALSE(back.turbo);
  EXPECT_EQ(back.compressors, options.compressors);
  EXPECT_EQ(back.pyramid.mode, PyramidMode::kQuestion);
  EXPECT_EQ(back.pyramid.lambda, 0.62);
  EXPECT_EQ(back.pyramid.boundaries, options.pyramid.boundaries);
  EXPECT_EQ(back.pyramid.stages, 3);
  EXPECT_EQ(back.pyramid.quota, PyramidQuota::kFrame);
  EXPECT_EQ(back.pyramid.rank, PyramidRank::kMean);
  EXPECT_EQ(back.pyramid.positions, KvPositions::kTokens);
  EXPECT_EQ(back.generate.max_new_tokens, 17);
  EXPECT_EQ(back.generate.sampling.temperature, 0.7f);
  EXPECT_EQ(back.generate.sampling.seed, 12345678901234u);
  EXPECT_EQ(back.generate.stop_strings, options.generate.stop_strings);
}

TEST(MessagesTest, WhatIsNotToldIsAsTheCheckpointAndThePresetSay) {
  GenerationDefaults defaults;
  defaults.do_sample = true;
  defaults.temperature = 0.3f;
  v1::ModelOptions message;
  message.set_preset(v1::PRESET_FAST);
  const SessionOptions options = FromProto(message, defaults, {});
  EXPECT_EQ(options.generate.sampling.temperature, 0.3f);
  ASSERT_TRUE(options.cacher);
  EXPECT_EQ(options.cacher->interval, 4);
  message.set_cacher(false);
  EXPECT_FALSE(FromProto(message, defaults, {}).cacher);
}

TEST(MessagesTest, DetailsWithoutTheirMethodAreRefused) {
  v1::ModelOptions message;
  message.set_cacher_ratio(0.5);
  EXPECT_THROW(FromProto(message, {}, {}), InputError);
  message.Clear();
  message.set_turbo_lambda(1);
  EXPECT_THROW(FromProto(message, {}, {}), InputError);
  message.Clear();
  message.set_pyramid_drop("question");
  message.set_pyramid_rank(static_cast<v1::PyramidRank>(9));
  EXPECT_THROW(FromProto(message, {}, {}), InputError);
}

TEST(MessagesTest, AMemoryGetsWhatTheServerAllowsAndKeepsItWhereTheServerSays) {
  const BlockStoreOptions most{.host_bytes = 1000, .disk_bytes = 500, .disk_directory = "/srv"};
  v1::ModelOptions message;
  EXPECT_FALSE(FromProto(message, {}, most).memory);
  message.mutable_memory();
  EXPECT_EQ(FromProto(message, {}, most).memory, MemoryOptions{.store = most});
  message.mutable_memory()->set_host_bytes(1 << 30);
  message.mutable_memory()->set_disk_bytes(20);
  const BlockStoreOptions granted = FromProto(message, {}, most).memory->store;
  EXPECT_EQ(granted.host_bytes, 1000);
  EXPECT_EQ(granted.disk_bytes, 20);
  EXPECT_EQ(granted.disk_directory, "/srv");
  message.mutable_memory()->set_when_full(static_cast<v1::MemoryWhenFull>(7));
  EXPECT_THROW(FromProto(message, {}, most), InputError);

  SessionOptions options;
  options.memory = MemoryOptions{.window_tokens = 77,
                                 .recall_blocks = 5,
                                 .recall_chunk = 2,
                                 .store = {.host_bytes = 900,
                                           .disk_bytes = 400,
                                           .disk_directory = "/srv",
                                           .when_full = WhenFull::kThin},
                                 .int8 = true,
                                 .dialogue_tokens = 9};
  EXPECT_EQ(FromProto(ToProto(options), {}, most).memory, options.memory);
}

TEST(MessagesTest, ABudgetIsGrantedUpToTheServersOwn) {
  StreamBudget most;
  most.kv_bytes = 100;
  most.queued_frames = 8;
  v1::Budgets asked;
  EXPECT_EQ(Granted(asked, most).kv_bytes, 100);
  asked.set_kv_bytes(0);  // no limit of its own
  asked.set_queued_frames(99);
  asked.set_frames_per_second(3);  // the server has none
  const StreamBudget granted = Granted(asked, most);
  EXPECT_EQ(granted.kv_bytes, 100);
  EXPECT_EQ(granted.queued_frames, 8);
  EXPECT_EQ(granted.frames_per_second, 3);
  asked.set_kv_bytes(50);
  EXPECT_EQ(Granted(asked, most).kv_bytes, 50);
  asked.set_answer_tokens(0);
  EXPECT_THROW(Granted(asked, most), InputError);
}

TEST(MessagesTest, AStopStringIsNoLongerThanAnyAnswerNeeds) {
  v1::Generation generation;
  generation.add_stop_strings(std::string(256, 'x'));
  EXPECT_NO_THROW(FromProto(generation, GenerateOptions()));
  generation.add_stop_strings(std::string(257, 'x'));
  EXPECT_THROW(FromProto(generation, GenerateOptions()), InputError);
}

}  // namespace
}  // namespace sluice
