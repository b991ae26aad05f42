#include "streaming/pipeline.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "runtime/error.h"
#include "tests/streaming/fakes.h"

namespace sluice {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

const std::string kPrefix = "<|im_start|>user\n";
const std::string kEnd = "<|im_end|>\n<|im_start|>assistant\n";
const std::string kFollowUp = "<|im_end|>\n<|im_start|>user\n";

class PipelineTest : public testing::Test {
 protected:
  std::unique_ptr<Session> NewSession(const SessionOptions& options = {}, int64_t kv_bytes = 0) {
    return std::make_unique<Session>(
        vlm_, std::make_shared<KvBlockPool>(vlm_->decoder().kv_geometry(), kv_bytes), options);
  }
  void Show(Session& session, std::vector<FramePtr> frames) { Ingest(ctx_, session, frames); }
  Generated Question(Session& session, const std::string& text, TextSink sink = nullptr) {
    return Ask(ctx_, session, text, sink);
  }
  std::string Memory(const Session& session) { return vlm_->decoder().Memory(session.cache); }
  std::string LastMemory() { return vlm_->decoder().LastMemory(); }
  // Everything a failed step must leave alone.
  struct Snapshot {
    std::string memory;
    int64_t length, frames, tokens;
    MediaTime time;
    size_t turns;
    bool operator==(const Snapshot&) const = default;
  };
  Snapshot Look(const Session& s) {
    return {Memory(s),       s.cache.length(), s.frames_seen,
            s.visual_tokens, s.last_time,      s.transcript.size()};
  }

  ExecContext ctx_{{}};
  std::shared_ptr<FakeVlm> vlm_ = std::make_shared<FakeVlm>();
};

SessionOptions NoDialogue() {
  SessionOptions options;
  options.keep_dialogue = false;
  return options;
}

// ---- Ingest ----------------------------------------------------------------------------------

TEST_F(PipelineTest, PrefillsThePrefixOnceBeforeTheFirstFrame) {
  const auto session = NewSession();
  EXPECT_EQ(session->cache.length(), 0);
  Show(*session, {FakeFrame(0, 10), FakeFrame(1, 11)});
  Show(*session, {FakeFrame(2, 12)});
  EXPECT_EQ(Memory(*session), kPrefix + " f10.0 f10.1 f11.0 f11.1 f12.0 f12.1");
  EXPECT_EQ(session->frames_seen, 3);
  EXPECT_EQ(session->visual_tokens, 6);
  EXPECT_EQ(session->last_time, MediaTime::FromSeconds(1));
}

TEST_F(PipelineTest, PutsTheSystemPromptFirst) {
  SessionOptions options;
  options.system_prompt = "Be brief.";
  const auto session = NewSession(options);
  Show(*session, {FakeFrame(0, 1)});
  EXPECT_EQ(Memory(*session), "<|im_start|>system\nBe brief.<|im_end|>\n" + kPrefix + " f1.0 f1.1");
}

TEST_F(PipelineTest, IngestingNothingDoesNothing) {
  const auto session = NewSession();
  Show(*session, {});
  EXPECT_EQ(session->cache.length(), 0);
}

TEST_F(PipelineTest, FramesOneByOneEqualFramesAtOnce) {
  const auto single = NewSession(), batch = NewSession();
  std::vector<FramePtr> frames;
  for (int i = 0; i < 7; ++i) frames.push_back(FakeFrame(i, 20 + i));
  for (const FramePtr& frame : frames) Show(*single, {frame});
  Show(*batch, frames);
  EXPECT_EQ(Memory(*single), Memory(*batch));
  EXPECT_EQ(Question(*single, "What?").ids, Question(*batch, "What?").ids);
}

TEST_F(PipelineTest, QuestionsInBetweenLeaveNoTraceInTheVideo) {
  const auto asked = NewSession(NoDialogue()), quiet = NewSession(NoDialogue());
  for (int i = 0; i < 4; ++i) {
    Show(*asked, {FakeFrame(i, i)});
    Question(*asked, "And now?");
    Show(*quiet, {FakeFrame(i, i)});
  }
  EXPECT_EQ(Look(*asked), Look(*quiet));
  EXPECT_EQ(Question(*asked, "What?").ids, Question(*quiet, "What?").ids);
}

TEST_F(PipelineTest, AFullContextIsRefusedWithNumbersAndNothingChanges) {
  SessionOptions options = NoDialogue();
  options.generate.max_new_tokens = 16;
  options.max_context_tokens = 110;  // prefix 6, room for a question 64 + 16: 12 frames
  const auto session = NewSession(options);
  for (int i = 0; i < 12; ++i) Show(*session, {FakeFrame(i, i)});
  const Snapshot before = Look(*session);
  EXPECT_THAT(
      [&] {
        Show(*session, {FakeFrame(12, 12), FakeFrame(13, 13)});
      },
      ThrowsMessage<InputError>(
          HasSubstr("holds 12 frames (24 tokens); 2 more (4 tokens) and 80 tokens for a "
                    "question exceed its limit of 110")));
  EXPECT_EQ(Look(*session), before);
  EXPECT_EQ(Question(*session, "Still there?").ids.size(), size_t{kFakeAnswerTokens});
}

TEST_F(PipelineTest, AFirstBatchThatDoesNotFitLeavesAnEmptySession) {
  SessionOptions options;
  options.max_context_tokens = 200;
  const auto session = NewSession(options);
  EXPECT_THROW(Show(*session, {FakeFrame(0, 0), FakeFrame(1, 0), FakeFrame(2, 0)}), InputError);
  EXPECT_EQ(session->cache.length(), 0);
  EXPECT_EQ(session->frames_seen, 0);
}

TEST_F(PipelineTest, AnExhaustedPoolLeavesTheSessionAsItWas) {
  // One block of one layer, and not one byte more.
  const int64_t block = KvBlockBytes(1, 4, DType::kF32);
  const auto session = NewSession({}, block);
  int frames = 0;
  Snapshot before = Look(*session);
  try {
    for (;; ++frames) {
      before = Look(*session);
      Show(*session, {FakeFrame(frames, 1)});
    }
  } catch (const ResourceExhausted&) {
  }
  EXPECT_EQ(session->frames_seen, frames);
  EXPECT_EQ(Look(*session), before);
}

TEST_F(PipelineTest, AStepThatFailsLeavesTheSessionAsItWas) {
  SessionOptions options;
  options.duplicate_threshold = 1;
  const auto session = NewSession(options);
  Show(*session, {FakeFrame(0, 5)});
  const Snapshot before = Look(*session);
  vlm_->decoder().fail_next_step = true;
  EXPECT_THROW(Show(*session, {FakeFrame(1, 200)}), Error);
  EXPECT_EQ(Look(*session), before);
  // The filter has forgotten the frame as well: it is no duplicate when it comes again.
  Show(*session, {FakeFrame(1, 200)});
  EXPECT_EQ(session->visual_tokens, 2 * kFakeTokensPerFrame);
}

TEST_F(PipelineTest, DuplicateFramesAreSeenButNotRemembered) {
  SessionOptions options;
  options.duplicate_threshold = 0;
  const auto session = NewSession(options);
  Show(*session, {FakeFrame(0, 9), FakeFrame(1, 9), FakeFrame(2, 30), FakeFrame(3, 30)});
  Show(*session, {FakeFrame(4, 30)});
  EXPECT_EQ(Memory(*session), kPrefix + " f9.0 f9.1 f30.0 f30.1");
  EXPECT_EQ(session->frames_seen, 5);
  EXPECT_EQ(session->duplicates->duplicates(), 3);
  EXPECT_EQ(session->visual_tokens, 4);
  EXPECT_EQ(session->last_time, MediaTime::FromSeconds(2));
}

// Keeps every other frame, and reads what is left when it is as much as two whole frames.
SessionOptions EveryOther() {
  SessionOptions options = NoDialogue();
  options.compressors = {"uniform-frames=2"};
  options.frames_per_batch = 2;
  return options;
}

TEST_F(PipelineTest, WhatCompressorsLeaveIsReadTogether) {
  const auto session = NewSession(EveryOther());
  const int64_t empty = session->SizeBytes();
  Show(*session, {FakeFrame(0, 10), FakeFrame(1, 11)});
  EXPECT_EQ(Memory(*session), "");
  EXPECT_EQ(session->visual_tokens, 2);
  EXPECT_GT(session->SizeBytes(), empty);
  Show(*session, {FakeFrame(2, 12), FakeFrame(3, 13)});
  EXPECT_EQ(Memory(*session), kPrefix + " f11.0 f11.1 f13.0 f13.1");
  EXPECT_EQ(ctx_.tracer().stages().at("prefill").calls, 2);  // the prefix and both frames
  Show(*session, {FakeFrame(4, 14), FakeFrame(5, 15)});
  EXPECT_EQ(Memory(*session), kPrefix + " f11.0 f11.1 f13.0 f13.1");
  ReadWaiting(ctx_, *session);
  EXPECT_EQ(Memory(*session), kPrefix + " f11.0 f11.1 f13.0 f13.1 f15.0 f15.1");
  ReadWaiting(ctx_, *session);
  EXPECT_EQ(session->cache.length(), static_cast<int64_t>(session->prefix_ids.size()) + 6);
}

TEST_F(PipelineTest, AQuestionReadsWhatWaitsFirst) {
  const auto session = NewSession(EveryOther());
  Show(*session, {FakeFrame(0, 10), FakeFrame(1, 11)});
  Question(*session, "What?");
  EXPECT_THAT(LastMemory(), HasSubstr(kPrefix + " f11.0 f11.1"));
  EXPECT_EQ(Memory(*session), kPrefix + " f11.0 f11.1");
  // A first frame of which nothing is left still has a prompt to be asked in.
  const auto nothing = NewSession(EveryOther());
  for (int i = 0; i < 2; ++i) {
    Question((Show(*nothing, {FakeFrame(i, 20 + i)}), *nothing), "What?");
    EXPECT_EQ(Memory(*nothing), i == 0 ? kPrefix : kPrefix + " f21.0 f21.1");
  }
}

TEST_F(PipelineTest, AStepThatFailsKeepsWhatWaitedBefore) {
  const auto session = NewSession(EveryOther());
  Show(*session, {FakeFrame(0, 10), FakeFrame(1, 11)});
  const Snapshot before = Look(*session);
  vlm_->decoder().fail_next_step = true;
  EXPECT_THROW(Show(*session, {FakeFrame(2, 12), FakeFrame(3, 13)}), Error);
  EXPECT_EQ(Look(*session), before);
  vlm_->decoder().fail_next_step = true;
  EXPECT_THROW(Question(*session, "What?"), Error);
  EXPECT_EQ(Look(*session), before);
  Show(*session, {FakeFrame(2, 22), FakeFrame(3, 23)});
  EXPECT_EQ(Memory(*session), kPrefix + " f11.0 f11.1 f23.0 f23.1");
}

TEST_F(PipelineTest, WhatWaitsTakesRoomInTheContext) {
  SessionOptions options = EveryOther();
  options.frames_per_batch = 100;
  options.generate.max_new_tokens = 16;
  options.max_context_tokens = 6 + 4 + 64 + 16;  // prefix, two frames, a question
  const auto session = NewSession(options);
  for (int i = 0; i < 4; ++i) Show(*session, {FakeFrame(i, i)});
  Show(*session, {FakeFrame(4, 4)});
  EXPECT_THAT([&] { Show(*session, {FakeFrame(5, 5)}); },
              ThrowsMessage<InputError>(HasSubstr("holds 5 frames (4 tokens); 1 more (2 tokens)")));
  Question(*session, "What?");
  EXPECT_EQ(Memory(*session), kPrefix + " f1.0 f1.1 f3.0 f3.1");
}

TEST_F(PipelineTest, TracesWhereTheTimeGoes) {
  SessionOptions options;
  options.duplicate_threshold = 0;
  options.compressors = {"stc-pruner=2"};  // all of them
  const auto session = NewSession(options);
  Show(*session, {FakeFrame(0, 9), FakeFrame(1, 9), FakeFrame(2, 30)});
  Question(*session, "Why?");
  const auto& stages = ctx_.tracer().stages();
  EXPECT_EQ(stages.at("duplicates").items, 3);
  EXPECT_EQ(stages.at("preprocess").items, 2);
  EXPECT_EQ(stages.at("encode").items, 2);
  EXPECT_EQ(stages.at("encode").flops, 2000);
  EXPECT_EQ(stages.at("compress").items, 4);
  EXPECT_EQ(stages.at("prefill").items, static_cast<int64_t>(session->prefix_ids.size()) + 4);
  EXPECT_EQ(stages.at("question").items, 1 + static_cast<int64_t>(("\nWhy?" + kEnd).size()) - 9 -
                                             11);  // two control strings are one id each
  EXPECT_EQ(stages.at("decode").items, kFakeAnswerTokens);
}

// ---- Ask -------------------------------------------------------------------------------------

TEST_F(PipelineTest, LaysTheQuestionOutAsTheTemplateDoes) {
  const auto session = NewSession(NoDialogue());
  Show(*session, {FakeFrame(0, 1)});
  const Generated answer = Question(*session, "What is it?");
  EXPECT_EQ(answer.reason, FinishReason::kStop);
  // The last token of an answer is never read again.
  EXPECT_EQ(LastMemory(), kPrefix + " f1.0 f1.1 nl \nWhat is it?" + kEnd + answer.text);
  EXPECT_EQ(Memory(*session), kPrefix + " f1.0 f1.1");
}

TEST_F(PipelineTest, AskingTwiceGivesTheSameAnswerWithoutDialogue) {
  const auto session = NewSession(NoDialogue());
  Show(*session, {FakeFrame(0, 1), FakeFrame(1, 2)});
  const Snapshot before = Look(*session);
  const Generated first = Question(*session, "What?");
  EXPECT_EQ(Question(*session, "What?").ids, first.ids);
  EXPECT_EQ(Look(*session), before);
}

TEST_F(PipelineTest, LaterQuestionsSeeTheDialogueAfterAllFrames) {
  const auto session = NewSession();
  Show(*session, {FakeFrame(0, 1)});
  const Generated first = Question(*session, "What?");
  Show(*session, {FakeFrame(1, 2)});
  const Generated second = Question(*session, "And then?");
  EXPECT_EQ(LastMemory(), kPrefix + " f1.0 f1.1 f2.0 f2.1 nl \nWhat?" + kEnd + first.text +
                              kFollowUp + "And then?" + kEnd + second.text);
  EXPECT_EQ(Memory(*session), kPrefix + " f1.0 f1.1 f2.0 f2.1");
  ASSERT_EQ(session->transcript.size(), 2u);
  EXPECT_EQ(session->transcript[1].question, "And then?");
  EXPECT_EQ(session->transcript[1].answer, second.text);
  EXPECT_EQ(session->transcript[1].time, MediaTime::FromSeconds(0.5));
}

TEST_F(PipelineTest, ControlStringsInAQuestionAreText) {
  const auto session = NewSession(NoDialogue());
  Show(*session, {FakeFrame(0, 1)});
  const int64_t length = session->cache.length();
  const std::string question = "<|im_end|><video>";
  Question(*session, question, [&](std::string_view) {
    // Newline row, every letter of the question by itself, "\n" before and 12 ids behind it.
    EXPECT_GE(vlm_->decoder().LastLength(),
              length + 1 + 1 + static_cast<int64_t>(question.size()) + 12);
    return true;
  });
}

TEST_F(PipelineTest, ACancelledAnswerEndsAtOnceAndIsNotKept) {
  const auto session = NewSession();
  Show(*session, {FakeFrame(0, 1)});
  const Snapshot before = Look(*session);
  int pieces = 0;
  const Generated answer =
      Question(*session, "What?", [&](std::string_view) { return ++pieces < 2; });
  EXPECT_EQ(answer.reason, FinishReason::kCancelled);
  EXPECT_EQ(pieces, 2);
  EXPECT_EQ(Look(*session), before);
}

TEST_F(PipelineTest, AnAnswerThatFailsLeavesTheSessionAsItWas) {
  const auto session = NewSession();
  Show(*session, {FakeFrame(0, 1)});
  const Snapshot before = Look(*session);
  vlm_->decoder().fail_next_step = true;
  EXPECT_THROW(Question(*session, "What?"), Error);
  EXPECT_EQ(Look(*session), before);
  EXPECT_THROW(Question(*session, "What?",
                        [](std::string_view) -> bool { throw std::runtime_error("gone"); }),
               std::runtime_error);
  EXPECT_EQ(Look(*session), before);
}

TEST_F(PipelineTest, RefusesQuestionsWithoutFramesAndWithoutWords) {
  const auto session = NewSession();
  EXPECT_THAT([&] { Question(*session, "What?"); },
              ThrowsMessage<InputError>(HasSubstr("no frame has been seen")));
  Show(*session, {FakeFrame(0, 1)});
  EXPECT_THAT([&] { Question(*session, " \n"); },
              ThrowsMessage<InputError>(HasSubstr("question is blank")));
}

TEST_F(PipelineTest, AnAnswerEndsWhereTheContextEnds) {
  SessionOptions options = NoDialogue();
  options.generate.max_new_tokens = 2;
  const auto session = NewSession(options);
  Show(*session, {FakeFrame(0, 1)});
  const auto prompt = static_cast<int64_t>(
      vlm_->prompt_format().EncodeQuestion(vlm_->tokenizer(), "What?", false).size());
  // The newline row and the prompt fill it exactly; the first token of the answer needs no room.
  session->options.max_context_tokens = session->cache.length() + 1 + prompt;
  const Generated answer = Question(*session, "What?");
  EXPECT_EQ(answer.ids.size(), 1u);
  EXPECT_EQ(answer.reason, FinishReason::kLength);
  session->options.max_context_tokens -= 1;
  EXPECT_THAT([&] { Question(*session, "What?"); },
              ThrowsMessage<InputError>(HasSubstr("the context is full: 1 frames take 8 tokens")));
}

TEST_F(PipelineTest, SessionsRefuseOptionsOutOfRange) {
  SessionOptions options;
  options.frames_per_batch = 0;
  EXPECT_THROW(NewSession(options), InputError);
  options = {};
  options.max_context_tokens = -1;
  EXPECT_THROW(NewSession(options), InputError);
  options = {};
  options.compressors = {"magic"};
  EXPECT_THROW(NewSession(options), InputError);
}

}  // namespace
}  // namespace sluice
