#include "llm/generator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <string>
#include <vector>

#include "runtime/error.h"

namespace sluice {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr int32_t kStop = 255;

// Every id below 256 is that byte; the id 256 has no text.
class ByteTokenizer : public Tokenizer {
 public:
  std::vector<int32_t> Encode(std::string_view text, SpecialTokens, bool) const override {
    return std::vector<int32_t>(text.begin(), text.end());
  }
  std::string Decode(std::span<const int32_t> ids, bool) const override {
    std::string text;
    for (int32_t id : ids) {
      if (id < 256) text += static_cast<char>(id);
    }
    return text;
  }
  std::optional<int32_t> TokenToId(std::string_view) const override { return std::nullopt; }
  int32_t vocab_size() const override { return 257; }
  std::unique_ptr<Stream> NewStream(bool) const override { return std::make_unique<Bytes>(); }

 private:
  // Holds back what may be half of a two-byte character.
  class Bytes : public Stream {
   public:
    std::string Push(int32_t id) override {
      if (id == 256) return "";
      pending_ += static_cast<char>(id);
      if ((pending_.back() & 0xe0) == 0xc0) return "";
      return std::exchange(pending_, {});
    }
    std::string Finish() override { return std::exchange(pending_, {}).empty() ? "" : "?"; }

   private:
    std::string pending_;
  };
};

// Says a script, whatever it is asked: after n new positions the next id is script[n].
class ScriptedDecoder : public Decoder {
 public:
  ScriptedDecoder(std::vector<int32_t> script, int64_t max_positions)
      : script_(std::move(script)), max_positions_(max_positions) {}
  void Step(ExecContext& ctx, std::span<SequenceStep> sequences,
            const DecoderProbe&) const override {
    for (SequenceStep& step : sequences) {
      if (step.cache->length() + step.embeddings.dim(0) > max_positions_) {
        throw InputError("[scripted] context");
      }
      step.cache->Reserve(ctx, step.embeddings.dim(0));
      seen_.push_back(step.embeddings.data<float>()[0]);
      float* logits = step.logits.data<float>();
      std::fill(logits, logits + 300, 0.0f);
      logits[280] = 9.0f;  // a row without a token is never chosen
      logits[script_.at(next_++)] = 5.0f;
    }
  }
  void Embed(ExecContext&, std::span<const int32_t> ids, TensorView out) const override {
    for (size_t i = 0; i < ids.size(); ++i) {
      std::fill_n(out.data<float>() + 4 * i, 4, static_cast<float>(ids[i]));
    }
  }
  KvGeometry kv_geometry() const override {
    return {.num_layers = 1, .kv_heads = 1, .head_dim = 4, .dtype = DType::kF32};
  }
  int num_heads() const override { return 1; }
  int64_t hidden_size() const override { return 4; }
  int64_t vocab_size() const override { return 300; }
  int64_t max_positions() const override { return max_positions_; }
  ConstTensorView rotary_frequencies() const override { return {}; }
  double FlopsPerToken(int64_t) const override { return 100; }
  double LmHeadFlops() const override { return 10; }
  int64_t WeightBytesPerToken() const override { return 1000; }

  const std::vector<float>& seen() const { return seen_; }

 private:
  std::vector<int32_t> script_;
  int64_t max_positions_;
  mutable size_t next_ = 0;
  mutable std::vector<float> seen_;
};

class ScriptedVlm : public Vlm {
 public:
  explicit ScriptedVlm(const std::string& script, int64_t max_positions = 1000)
      : ScriptedVlm(Ids(script), max_positions) {}
  ScriptedVlm(std::vector<int32_t> script, int64_t max_positions)
      : decoder_(std::move(script), max_positions) {
    defaults_.stop_ids = {kStop};
  }
  const VlmInfo& info() const override { return info_; }
  const Tokenizer& tokenizer() const override { return tokenizer_; }
  const PromptFormat& prompt_format() const override { return format_; }
  const VisionEncoder& encoder() const override { throw Error("no encoder"); }
  const ScriptedDecoder& decoder() const override { return decoder_; }
  const GenerationDefaults& generation_defaults() const override { return defaults_; }
  ConstTensorView newline_row() const override { return {}; }

 private:
  static std::vector<int32_t> Ids(const std::string& script) {
    std::vector<int32_t> ids;
    for (char c : script) ids.push_back(static_cast<uint8_t>(c));
    return ids;
  }
  VlmInfo info_;
  ByteTokenizer tokenizer_;
  PromptFormat format_{PromptFormat::Revision::kSpaced};
  ScriptedDecoder decoder_;
  GenerationDefaults defaults_;
};

struct Answer {
  Generated generated;
  std::vector<std::string> pieces;
  int64_t cache_length = 0;
};

// Asks with a prompt of three positions. Cancels when `cancel_at` pieces have come.
Answer Ask(const ScriptedVlm& vlm, const GenerateOptions& options, size_t cancel_at = SIZE_MAX) {
  ExecContext ctx({.num_threads = 1});
  KvCache cache(std::make_shared<KvBlockPool>(vlm.decoder().kv_geometry(), 0));
  Tensor prompt(DType::kF32, {3, 4});
  std::fill_n(prompt.data<float>(), 12, -1.0f);
  Answer answer;
  answer.generated =
      Generate(ctx, vlm, cache, std::move(prompt), {}, options, [&](std::string_view piece) {
        answer.pieces.emplace_back(piece);
        return answer.pieces.size() < cancel_at;
      });
  answer.cache_length = cache.length();
  return answer;
}

TEST(GeneratorTest, EndsAtAStopIdAndFeedsBackWhatItSaid) {
  const ScriptedVlm vlm("abc\xff");
  const Answer answer = Ask(vlm, {});
  EXPECT_EQ(answer.generated.text, "abc");
  EXPECT_THAT(answer.generated.ids, ElementsAre('a', 'b', 'c'));
  EXPECT_EQ(answer.generated.reason, FinishReason::kStop);
  EXPECT_THAT(answer.pieces, ElementsAre("a", "b", "c"));
  EXPECT_THAT(vlm.decoder().seen(), ElementsAre(-1, 'a', 'b', 'c'));
  EXPECT_EQ(answer.cache_length, 3 + 3);
}

TEST(GeneratorTest, AnImmediateStopIdGivesAnEmptyAnswer) {
  const Answer answer = Ask(ScriptedVlm("\xff"), {});
  EXPECT_EQ(answer.generated.text, "");
  EXPECT_TRUE(answer.pieces.empty());
  EXPECT_EQ(answer.generated.reason, FinishReason::kStop);
}

TEST(GeneratorTest, EndsAfterMaxNewTokensWithoutASparePass) {
  const ScriptedVlm vlm("abcdef");
  GenerateOptions options;
  options.max_new_tokens = 4;
  const Answer answer = Ask(vlm, options);
  EXPECT_EQ(answer.generated.text, "abcd");
  EXPECT_EQ(answer.generated.reason, FinishReason::kLength);
  EXPECT_EQ(answer.cache_length, 3 + 3);
}

TEST(GeneratorTest, EndsWhereTheContextDoes) {
  const ScriptedVlm vlm("abcdefgh", 6);
  const Answer answer = Ask(vlm, {});
  EXPECT_EQ(answer.generated.text, "abcd");
  EXPECT_EQ(answer.generated.reason, FinishReason::kLength);
  EXPECT_EQ(answer.cache_length, 6);
  EXPECT_THROW(Ask(ScriptedVlm("ab", 2), {}), InputError);
}

TEST(GeneratorTest, StopStringsAreCutAndNeverShownInPart) {
  GenerateOptions options;
  options.stop_strings = {"</end>", "STOP"};
  {
    const Answer answer = Ask(ScriptedVlm("a<b</en</end>c\xff"), options);
    EXPECT_EQ(answer.generated.text, "a<b</en");
    EXPECT_EQ(answer.generated.reason, FinishReason::kStop);
    EXPECT_EQ(answer.generated.ids.size(), std::string("a<b</en</end>").size());
    EXPECT_THAT(answer.pieces, ElementsAre("a", "<b", "</en"));
  }
  {
    // What looked like a stop string is shown when the answer ends otherwise.
    const Answer answer = Ask(ScriptedVlm("xSTO\xff"), options);
    EXPECT_EQ(answer.generated.text, "xSTO");
    EXPECT_THAT(answer.pieces, ElementsAre("x", "STO"));
  }
  {
    // The earliest of several counts; an inner repetition must not be missed.
    options.stop_strings = {"ababc", "zz"};
    const Answer answer = Ask(ScriptedVlm("abababczz\xff"), options);
    EXPECT_EQ(answer.generated.text, "ab");
  }
}

TEST(GeneratorTest, ASinkThatReturnsFalseCancels) {
  const Answer answer = Ask(ScriptedVlm("abcdef\xff"), {}, 2);
  EXPECT_EQ(answer.generated.text, "ab");
  EXPECT_EQ(answer.generated.reason, FinishReason::kCancelled);
  EXPECT_EQ(answer.cache_length, 3 + 1);
}

TEST(GeneratorTest, IdsWithoutTextMakeNoPieces) {
  const Answer answer = Ask(ScriptedVlm(std::vector<int32_t>{'a', 256, 256, 'b', kStop}, 1000), {});
  EXPECT_EQ(answer.generated.text, "ab");
  EXPECT_THAT(answer.pieces, ElementsAre("a", "b"));
  EXPECT_EQ(answer.generated.ids.size(), 4u);
}

TEST(GeneratorTest, HalfACharacterIsFinishedAtTheEnd) {
  const Answer answer = Ask(ScriptedVlm("a\xc3\xff"), {});
  EXPECT_EQ(answer.generated.text, "a?");
  const Answer whole = Ask(ScriptedVlm("a\xc3\xa9\xff"), {});
  EXPECT_THAT(whole.pieces, ElementsAre("a", "\xc3\xa9"));
}

TEST(GeneratorTest, OptionsOutOfRangeAreRefused) {
  GenerateOptions options;
  options.max_new_tokens = 0;
  EXPECT_THROW(Ask(ScriptedVlm("a\xff"), options), InputError);
  options = {};
  options.stop_strings = {"x", ""};
  EXPECT_THROW(Ask(ScriptedVlm("a\xff"), options), InputError);
}

TEST(GeneratorTest, SeveralAnswersShareEveryStepAndEndByThemselves) {
  // One script for both, in turns: the first says "ac", the second "bdf".
  const ScriptedVlm vlm(
      "abcd\xff"
      "f\xff");
  ExecContext ctx({.num_threads = 1});
  const auto pool = std::make_shared<KvBlockPool>(vlm.decoder().kv_geometry(), 0);
  KvCache first_cache(pool), second_cache(pool);
  const auto prompt = [] {
    Tensor rows(DType::kF32, {3, 4});
    std::fill_n(rows.data<float>(), 12, -1.0f);
    return rows;
  };
  Generation first(vlm, first_cache, prompt(), {}, {}, nullptr);
  Generation second(vlm, second_cache, prompt(), {}, {}, nullptr);
  std::vector<Generation*> answers = {&first, &second};
  EXPECT_EQ(first.prompt_left(), 3);
  while (!answers.empty()) {
    Advance(ctx, vlm, answers);
    std::erase_if(answers, [](const Generation* answer) { return answer->finished(); });
  }
  EXPECT_EQ(first.result().text, "ac");
  EXPECT_EQ(second.result().text, "bdf");
  EXPECT_EQ(second.result().reason, FinishReason::kStop);
  EXPECT_EQ(second_cache.length(), 3 + 3);
  EXPECT_EQ(ctx.tracer().stages().at("prefill_question").items, 6);
  EXPECT_EQ(ctx.tracer().stages().at("decode").calls, 3);
  EXPECT_EQ(ctx.tracer().stages().at("decode").items, 2 + 2 + 1);
}

TEST(GeneratorTest, ASinkThatThrowsEndsItsAnswerAndNoOther) {
  const ScriptedVlm vlm("abcd\xff");
  ExecContext ctx({.num_threads = 1});
  const auto pool = std::make_shared<KvBlockPool>(vlm.decoder().kv_geometry(), 0);
  KvCache first_cache(pool), second_cache(pool);
  const auto prompt = [] {
    Tensor rows(DType::kF32, {2, 4});
    std::fill_n(rows.data<float>(), 8, -1.0f);
    return rows;
  };
  Generation first(vlm, first_cache, prompt(), {}, {},
                   [](std::string_view) -> bool { throw Error("gone"); });
  Generation second(vlm, second_cache, prompt(), {}, {}, nullptr);
  Generation* const both[] = {&first, &second};
  Advance(ctx, vlm, both);
  EXPECT_TRUE(first.finished());
  EXPECT_THROW(std::rethrow_exception(first.failure()), Error);
  EXPECT_FALSE(second.finished());
  EXPECT_EQ(second.result().text, "b");
}

TEST(GeneratorTest, TracesPrefillAndEveryDecodedToken) {
  const ScriptedVlm vlm("abc\xff");
  ExecContext ctx({.num_threads = 1});
  KvCache cache(std::make_shared<KvBlockPool>(vlm.decoder().kv_geometry(), 0));
  Tensor prompt(DType::kF32, {3, 4});
  std::fill_n(prompt.data<float>(), 12, 0.0f);
  Generate(ctx, vlm, cache, std::move(prompt), {}, {}, nullptr);
  const StageCost prefill = ctx.tracer().stages().at("prefill_question");
  EXPECT_EQ(prefill.calls, 1);
  EXPECT_EQ(prefill.items, 3);
  EXPECT_EQ(prefill.flops, 3 * 100 + 10);
  const StageCost decode = ctx.tracer().stages().at("decode");
  EXPECT_EQ(decode.calls, 3);
  EXPECT_EQ(decode.items, 3);
  EXPECT_EQ(decode.flops, 3 * 110);
  EXPECT_EQ(decode.bytes, 3 * 1000 + (4 + 5 + 6) * 2 * 4 * 4);
}

}  // namespace
}  // namespace sluice
