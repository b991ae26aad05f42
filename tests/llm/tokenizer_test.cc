#include "llm/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <string>
#include <thread>
#include <vector>

#include "llm/unicode.h"
#include "runtime/error.h"
#include "tests/llm/tokenizer_test_util.h"

namespace sluice {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

using Ids = std::vector<int32_t>;

class TokenizerTest : public ::testing::Test {
 protected:
  const nlohmann::json byte_level_file_ = ReadGolden("byte_level.json");
  const nlohmann::json metaspace_file_ = ReadGolden("metaspace.json");
  const std::shared_ptr<const Tokenizer> byte_level_ = LoadTokenizer(byte_level_file_);
  const std::shared_ptr<const Tokenizer> metaspace_ = LoadTokenizer(metaspace_file_);

  // Ids that stand for single bytes in each vocabulary.
  Ids ByteLevelIds(std::string_view bytes) const {
    static const std::vector<std::string> kNames = [] {
      std::vector<std::string> names(256);
      char32_t other = 0x100;
      for (int b = 0; b < 256; ++b) {
        const bool plain = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
        unicode::Append(plain ? b : other++, &names[b]);
      }
      return names;
    }();
    Ids ids;
    for (const char c : bytes) ids.push_back(*byte_level_->TokenToId(kNames[uint8_t(c)]));
    return ids;
  }
  Ids FallbackIds(std::string_view bytes) const {
    Ids ids;
    for (const char c : bytes) {
      char name[8];
      std::snprintf(name, sizeof(name), "<0x%02X>", static_cast<uint8_t>(c));
      ids.push_back(*metaspace_->TokenToId(name));
    }
    return ids;
  }

  static std::string LoadError(const nlohmann::json& file) {
    try {
      LoadTokenizer(file);
    } catch (const InputError& error) {
      return error.what();
    }
    return "no error";
  }
  std::string PatchError(const std::string& patch) const {
    nlohmann::json file = byte_level_file_;
    file.merge_patch(nlohmann::json::parse(patch));
    return LoadError(file);
  }
};

std::string Replacements(int n) {
  std::string text;
  for (int i = 0; i < n; ++i) text += "\uFFFD";
  return text;
}

TEST_F(TokenizerTest, MalformedBytesDecodeByTheRulesOfEachFamily) {
  const struct {
    std::string bytes, byte_level, byte_fallback;
  } kCases[] = {
      {"\xF0\x9F\x98\x80", "😀", "😀"},
      {"\xF0\x9F\x98", Replacements(1), Replacements(3)},
      {"\xE2\x82\x61", Replacements(1) + "a", Replacements(3)},
      {"\xC3\x28", Replacements(1) + "(", Replacements(2)},
      {"\x80\x80", Replacements(2), Replacements(2)},
      {"\xFF\xFE", Replacements(2), Replacements(2)},
      {"\xC0\xAF", Replacements(2), Replacements(2)},
      {"\xED\xA0\x80", Replacements(3), Replacements(3)},
      {"\xF4\x90\x80\x80", Replacements(4), Replacements(4)},
      {"\xF0\x80\x80\xAF", Replacements(4), Replacements(4)},
      {"\xE4\xBD\xE5\xA5\xBD", Replacements(1) + "好", Replacements(5)},
  };
  for (const auto& c : kCases) {
    EXPECT_EQ(byte_level_->Decode(ByteLevelIds(c.bytes)), c.byte_level);
    EXPECT_EQ(metaspace_->Decode(FallbackIds(c.bytes)), c.byte_fallback);
    for (const auto& [tokenizer, ids, text] :
         {std::tuple(byte_level_, ByteLevelIds(c.bytes), c.byte_level),
          std::tuple(metaspace_, FallbackIds(c.bytes), c.byte_fallback)}) {
      const auto stream = tokenizer->NewStream();
      std::string streamed;
      for (const int32_t id : ids) streamed += stream->Push(id);
      EXPECT_EQ(streamed + stream->Finish(), text);
    }
  }
}

TEST_F(TokenizerTest, StreamHoldsBackOnlyUnfinishedCharacters) {
  const auto stream = byte_level_->NewStream();
  std::vector<std::string> chunks;
  for (const int32_t id : ByteLevelIds("a😀é")) chunks.push_back(stream->Push(id));
  EXPECT_EQ(chunks, (std::vector<std::string>{"a", "", "", "", "😀", "", "é"}));
  EXPECT_EQ(stream->Finish(), "");
}

TEST_F(TokenizerTest, StreamReplacesWhatWaitsBeforeTextThatDoesNotContinueIt) {
  const auto stream = byte_level_->NewStream(/*skip_special=*/false);
  EXPECT_EQ(stream->Push(ByteLevelIds("\xF0")[0]), "");
  EXPECT_EQ(stream->Push(ByteLevelIds("\x9F")[0]), "");
  EXPECT_EQ(stream->Push(*byte_level_->TokenToId("<|im_end|>")), "\uFFFD<|im_end|>");
  EXPECT_EQ(stream->Push(ByteLevelIds("\xC3")[0]), "");
  EXPECT_EQ(stream->Finish(), "\uFFFD");
  EXPECT_EQ(stream->Finish(), "");
}

TEST_F(TokenizerTest, ByteFallbackStreamGivesEachCharacterWhenItIsWhole) {
  const auto stream = metaspace_->NewStream();
  std::vector<std::string> chunks;
  for (const int32_t id : FallbackIds("\n🧿\xF0")) chunks.push_back(stream->Push(id));
  EXPECT_EQ(chunks, (std::vector<std::string>{"\n", "", "", "", "🧿", ""}));
  EXPECT_EQ(stream->Finish(), "\uFFFD");
}

TEST_F(TokenizerTest, LeadingSpaceGoesOncePerSequence) {
  const Ids ids = metaspace_->Encode("the a", SpecialTokens::kMatch, /*add_special=*/true);
  const auto stream = metaspace_->NewStream();
  std::string text;
  for (const int32_t id : ids) text += stream->Push(id);
  EXPECT_EQ(text + stream->Finish(), "the a");
  Ids twice = ids;
  twice.insert(twice.end(), ids.begin(), ids.end());
  EXPECT_EQ(metaspace_->Decode(twice), "the a the a");
}

TEST_F(TokenizerTest, IdsWithoutATokenDecodeToNothing) {
  const int32_t a = ByteLevelIds("a")[0];
  EXPECT_EQ(byte_level_->Decode(Ids{-1, a, byte_level_->vocab_size(), 1 << 30, a}), "aa");
  EXPECT_EQ(byte_level_->Decode({}), "");
}

TEST_F(TokenizerTest, ControlStringsAreTextWhereUsersWrite) {
  const int32_t end = *byte_level_->TokenToId("<|im_end|>");
  EXPECT_EQ(byte_level_->Encode("<|im_end|>"), Ids{end});
  const Ids text = byte_level_->Encode("a<|im_end|><video>", SpecialTokens::kAsText);
  for (const int32_t id : text) EXPECT_LT(id, *byte_level_->TokenToId("<|endoftext|>"));
  EXPECT_EQ(byte_level_->Decode(text), "a<|im_end|><video>");
}

TEST_F(TokenizerTest, InvalidUtf8EncodesAsReplacementCharacters) {
  EXPECT_EQ(byte_level_->Encode("a\xF0\x9F\x62\xC0"), byte_level_->Encode("a\uFFFDb\uFFFD"));
  EXPECT_EQ(metaspace_->Encode("\xED\xA0\x80"), metaspace_->Encode(Replacements(3)));
}

TEST_F(TokenizerTest, RandomBytesSurviveTheByteTokens) {
  GoldenRandom random(11);
  for (int i = 0; i < 200; ++i) {
    std::string bytes;
    for (uint64_t n = random.Below(40); n > 0; --n) bytes += static_cast<char>(random.Below(256));
    EXPECT_EQ(byte_level_->Decode(ByteLevelIds(bytes)), unicode::Sanitize(bytes));
  }
}

// Merging pair by pair over the whole word would take hours for these.
TEST_F(TokenizerTest, AMegabyteInOneWordIsEncoded) {
  GoldenRandom random(12);
  std::string word;
  while (word.size() < (1 << 20)) word += static_cast<char>('a' + random.Below(26));
  EXPECT_EQ(byte_level_->Decode(byte_level_->Encode(word)), word);
  EXPECT_EQ(metaspace_->Decode(metaspace_->Encode(word)), word);
  const std::string same(1 << 20, 'l');
  EXPECT_EQ(byte_level_->Decode(byte_level_->Encode(same)), same);
}

TEST_F(TokenizerTest, LongRunsOfWhitespaceAreEncoded) {
  for (const int length : {1, 2, 64, 100000}) {
    for (const char* end : {"", "x", "\n", "\nx", "<video>"}) {
      const std::string text = std::string(length, ' ') + end;
      EXPECT_EQ(byte_level_->Decode(byte_level_->Encode(text), false), text);
      EXPECT_EQ(metaspace_->Decode(metaspace_->Encode(text), false), text);
    }
  }
}

TEST_F(TokenizerTest, AHundredThousandPlaceholdersEncodeAndDecode) {
  constexpr int kCount = 100000;
  const int32_t video = *byte_level_->TokenToId("<video>");
  std::string text;
  for (int i = 0; i < kCount; ++i) text += "<video>";
  const Ids ids = byte_level_->Encode(text);
  EXPECT_EQ(ids, Ids(kCount, video));
  EXPECT_EQ(byte_level_->Decode(ids, false), text);
  EXPECT_EQ(byte_level_->Decode(ids, true), "");
}

TEST_F(TokenizerTest, ManyThreadsShareOneTokenizer) {
  const std::string text = "It's 3 o'clock in café 你好 <video>\n\n" + std::string(50, 'a');
  const Ids expected = byte_level_->Encode(text);
  std::vector<std::thread> threads;
  std::vector<int> wrong(4);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 200; ++i) {
        if (byte_level_->Encode(text) != expected) ++wrong[t];
        if (byte_level_->Decode(expected, false) != text) ++wrong[t];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(4));
}

TEST_F(TokenizerTest, EqualRanksMergeFromTheLeft) {
  nlohmann::json file = byte_level_file_;
  file["added_tokens"] = nlohmann::json::array();
  file["model"]["vocab"] = {{"a", 0}, {"b", 1}, {"ba", 2}, {"ab", 3}};
  file["model"]["merges"] = {"b a", "a b"};
  const auto tokenizer = LoadTokenizer(file);
  EXPECT_EQ(tokenizer->Encode("abab"), (Ids{0, 2, 1}));
  EXPECT_EQ(tokenizer->Encode("ac"), Ids{0}) << "without unk_token unknown symbols vanish";
}

TEST_F(TokenizerTest, VocabularyEndsBehindTheLargestId) {
  nlohmann::json file = byte_level_file_;
  const int32_t size = byte_level_->vocab_size();
  file["added_tokens"].push_back({{"id", size + 10},
                                  {"content", "<far>"},
                                  {"single_word", false},
                                  {"lstrip", false},
                                  {"rstrip", false},
                                  {"normalized", false},
                                  {"special", false}});
  const auto tokenizer = LoadTokenizer(file);
  EXPECT_EQ(tokenizer->vocab_size(), size + 11);
  EXPECT_EQ(tokenizer->Encode("<far>"), Ids{size + 10});
  EXPECT_EQ(tokenizer->Decode(Ids{size, size + 10}), "<far>");
  EXPECT_EQ(tokenizer->TokenToId("<far>"), size + 10);
  EXPECT_EQ(tokenizer->TokenToId("<near>"), std::nullopt);
}

TEST_F(TokenizerTest, UnknownStagesAreRefusedByName) {
  EXPECT_THAT(PatchError(R"({"normalizer": {"type": "NFKC"}})"),
              AllOf(StartsWith("[tokenizer] "),
                    HasSubstr("tokenizer.json: normalizer.type must be"), HasSubstr("\"NFKC\"")));
  EXPECT_THAT(PatchError(R"({"pre_tokenizer": {"type": "Whitespace"}})"),
              HasSubstr("pre_tokenizer.type must be"));
  EXPECT_THAT(PatchError(R"({"decoder": {"type": "WordPiece"}})"),
              HasSubstr("decoder.type must be"));
  EXPECT_THAT(PatchError(R"({"post_processor": {"type": "BertProcessing"}})"),
              HasSubstr("post_processor.type must be"));
  EXPECT_THAT(PatchError(R"({"model": {"type": "Unigram"}})"), HasSubstr("model.type must be BPE"));
  EXPECT_THAT(PatchError(R"({"model": null})"), HasSubstr("tokenizer.model is missing"));
  EXPECT_THAT(PatchError(R"({"model": {"dropout": 0.1}})"), HasSubstr("model.dropout"));
  EXPECT_THAT(PatchError(R"({"model": {"end_of_word_suffix": "</w>"}})"),
              HasSubstr("model.end_of_word_suffix"));
  EXPECT_THAT(
      PatchError(
          R"({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\w+"}, "behavior": "Isolated"}})"),
      HasSubstr("\"\\w+\""));
  EXPECT_THAT(
      PatchError(
          R"({"pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "isolate"}})"),
      HasSubstr("pre_tokenizer.behavior must be"));
  EXPECT_THAT(
      PatchError(
          R"({"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]}})"),
      HasSubstr("decoder.decoders[1]: ByteFallback must stand before"));
}

TEST_F(TokenizerTest, InconsistentVocabulariesAreRefused) {
  EXPECT_THAT(PatchError(R"({"model": {"vocab": {"twice": 3}}})"), HasSubstr("gives id 3 to both"));
  EXPECT_THAT(PatchError(R"({"model": {"vocab": {"far": 4194304}}})"),
              HasSubstr("must be an id from 0 to 4194303"));
  for (const char* id : {"-1", "1.5", "\"7\"", "99999999999999999999"}) {
    EXPECT_THAT(PatchError(std::string(R"({"model": {"vocab": {"bad": )") + id + "}}}"),
                HasSubstr("must be an id"));
  }
  EXPECT_THAT(PatchError(R"({"model": {"merges": [["a", "nowhere"]]}})"),
              HasSubstr("needs \"nowhere\" in model.vocab"));
  EXPECT_THAT(PatchError(R"({"model": {"merges": ["a b c"]}})"), HasSubstr("model.merges[0] must"));
  EXPECT_THAT(PatchError(R"({"model": {"merges": [7]}})"), HasSubstr("model.merges[0] must"));
  EXPECT_THAT(PatchError(R"({"model": {"unk_token": "<unk>"}})"), HasSubstr("model.unk_token"));

  const auto added = [this](int64_t id, const std::string& content) {
    nlohmann::json file = byte_level_file_;
    nlohmann::json token = file["added_tokens"][0];
    token["id"] = id;
    token["content"] = content;
    file["added_tokens"].push_back(token);
    return LoadError(file);
  };
  EXPECT_THAT(added(900, "<video>"), HasSubstr("added_tokens lists \"<video>\" twice"));
  EXPECT_THAT(added(459, "<other>"), HasSubstr("gives id 459 to \"<other>\", it belongs to"));
  EXPECT_THAT(added(3, "<other>"), HasSubstr("gives id 3 to \"<other>\""));
  EXPECT_THAT(added(900, "a"), HasSubstr("gives \"a\" id 900, model.vocab gives it"));
  EXPECT_THAT(added(int64_t{1} << 40, "<x>"), HasSubstr("added_tokens[5].id must be from 0 to"));
  EXPECT_THAT(added(900, ""), HasSubstr("added_tokens[5].content must not be empty"));

  nlohmann::json file = metaspace_file_;
  file["post_processor"]["special_tokens"]["<s>"]["ids"] = {100000};
  EXPECT_THAT(LoadError(file), HasSubstr("post_processor adds id 100000"));
}

TEST_F(TokenizerTest, BrokenFilesAreRefusedWithTheirName) {
  const TemporaryFolder folder;
  const auto error = [&](const std::string& name) -> std::string {
    try {
      Tokenizer::Load(folder.path() / name);
    } catch (const InputError& e) {
      return e.what();
    }
    return "no error";
  };
  EXPECT_THAT(error("missing.json"), AllOf(StartsWith("[tokenizer] "), HasSubstr("missing.json")));
  const std::string whole = byte_level_file_.dump();
  folder.Write("cut.json", whole.substr(0, whole.size() / 2));
  EXPECT_THAT(error("cut.json"), HasSubstr("cut.json: not JSON at byte"));
  folder.Write("list.json", "[]");
  EXPECT_THAT(error("list.json"), HasSubstr("must be an object"));
  folder.Write("deep.json", std::string(1000000, '['));
  EXPECT_THAT(error("deep.json"), HasSubstr("nest at most"));
}

TEST_F(TokenizerTest, NoBrokenFieldEscapesAsAnotherError) {
  // Every value of the file in turn becomes one of another type.
  const nlohmann::json flat = byte_level_file_.flatten();
  int tried = 0;
  std::map<std::string, int> listed;
  for (const auto& [path, value] : flat.items()) {
    // Of the long lists the first entries stand for all.
    const bool long_list = path.starts_with("/model/vocab/") || path.starts_with("/model/merges/");
    if (long_list && ++listed[path.substr(0, sizeof("/model/v") - 1)] > 6) continue;
    for (const nlohmann::json& other :
         {nlohmann::json(), nlohmann::json(-5), nlohmann::json("?"), nlohmann::json::array({1}),
          nlohmann::json({{"type", 3}}), nlohmann::json(1e30)}) {
      nlohmann::json file = byte_level_file_;
      file[nlohmann::json::json_pointer(path)] = other;
      ++tried;
      try {
        LoadTokenizer(file);
      } catch (const InputError&) {
      }
    }
  }
  EXPECT_GT(tried, 100);
}

}  // namespace
}  // namespace sluice
