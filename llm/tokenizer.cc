#include "llm/tokenizer.h"

#include <deque>
#include <unordered_map>
#include <utility>

#include "llm/added_tokens.h"
#include "llm/bpe.h"
#include "llm/detokenizer.h"
#include "llm/json_file.h"
#include "llm/normalizer.h"
#include "llm/pre_tokenizer.h"
#include "llm/unicode.h"
#include "runtime/error.h"

namespace sluice {
namespace {

// Published vocabularies have up to 262 thousand entries and 40 MB; beyond these bounds a file is
// taken to be broken before its numbers size any memory.
constexpr uint64_t kMaxFileBytes = 64u << 20;
constexpr int64_t kMaxId = (1 << 22) - 1;
constexpr size_t kMaxTextBytes = 1u << 30;

// Pieces whose ids one call remembers: words repeat, long pieces hardly do.
constexpr size_t kMaxCachedPieces = 1 << 14;
constexpr size_t kMaxCachedPieceBytes = 64;

// What a post-processor puts around the ids of a text.
struct Surround {
  std::vector<int32_t> before;
  std::vector<int32_t> after;
};

// {"id": ..., "ids": [...]} of the special token that a template calls `name`.
std::vector<int32_t> TemplateIds(const nlohmann::json& spec, const std::string& where,
                                 const std::string& name) {
  const nlohmann::json& specials = AnyField(spec, where, "special_tokens");
  const std::string special = where + ".special_tokens";
  const nlohmann::json& list =
      ArrayField(AnyField(specials, special, name.c_str()), special + "." + name, "ids");
  std::vector<int32_t> ids;
  for (const nlohmann::json& id : list) {
    const nlohmann::json field = {{"ids", id}};
    ids.push_back(static_cast<int32_t>(IntField(field, special + "." + name, "ids", 0, kMaxId)));
  }
  return ids;
}

void ReadPostProcessor(const nlohmann::json& spec, const std::string& where, Surround* around) {
  if (spec.is_null()) return;
  const std::string type = StringField(spec, where, "type");
  if (type == "ByteLevel") return;  // moves offsets only
  if (type == "Sequence") {
    const nlohmann::json& list = ArrayField(spec, where, "processors");
    for (size_t i = 0; i < list.size(); ++i) {
      ReadPostProcessor(list[i], where + ".processors[" + std::to_string(i) + "]", around);
    }
    return;
  }
  if (type != "TemplateProcessing") {
    throw InputError(where + ".type must be ByteLevel, TemplateProcessing or Sequence, is " +
                     Quoted(type));
  }
  if (!around->before.empty() || !around->after.empty()) {
    throw InputError(where + ": one TemplateProcessing can be evaluated, this is a second");
  }
  int num_texts = 0;
  const nlohmann::json& single = ArrayField(spec, where, "single");
  for (size_t i = 0; i < single.size(); ++i) {
    const std::string at = where + ".single[" + std::to_string(i) + "]";
    if (single[i].is_object() && single[i].contains("Sequence")) {
      const std::string id = StringField(single[i]["Sequence"], at + ".Sequence", "id");
      if (id != "A") throw InputError(at + ".Sequence.id must be A, is " + Quoted(id));
      ++num_texts;
      continue;
    }
    const std::string name =
        StringField(AnyField(single[i], at, "SpecialToken"), at + ".SpecialToken", "id");
    std::vector<int32_t>& side = num_texts == 0 ? around->before : around->after;
    for (const int32_t id : TemplateIds(spec, where, name)) side.push_back(id);
  }
  if (num_texts != 1) {
    throw InputError(where + ".single must hold the text once, holds it " +
                     std::to_string(num_texts) + " times");
  }
}

std::vector<AddedToken> ReadAddedTokens(const nlohmann::json& file) {
  std::vector<AddedToken> tokens;
  const auto found = file.find("added_tokens");
  if (found == file.end() || found->is_null()) return tokens;
  const nlohmann::json& list = ArrayField(file, "tokenizer", "added_tokens");
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string where = "added_tokens[" + std::to_string(i) + "]";
    AddedToken token;
    token.id = static_cast<int32_t>(IntField(list[i], where, "id", 0, kMaxId));
    token.content = StringField(list[i], where, "content");
    if (token.content.empty()) throw InputError(where + ".content must not be empty");
    token.single_word = BoolField(list[i], where, "single_word");
    token.lstrip = BoolField(list[i], where, "lstrip");
    token.rstrip = BoolField(list[i], where, "rstrip");
    token.normalized = BoolField(list[i], where, "normalized");
    token.special = BoolField(list[i], where, "special");
    tokens.push_back(std::move(token));
  }
  return tokens;
}

// Content by id. Throws on ids out of bounds and on two tokens with one id.
std::vector<std::string> ReadVocabulary(const nlohmann::json& model) {
  const nlohmann::json& vocabulary = AnyField(model, "model", "vocab");
  if (!vocabulary.is_object()) {
    throw InputError(std::string("model.vocab must be an object, is ") + vocabulary.type_name());
  }
  std::vector<std::string> tokens;
  for (const auto& [token, id_value] : vocabulary.items()) {
    if (!id_value.is_number_unsigned() || id_value.get<uint64_t>() > kMaxId) {
      throw InputError("model.vocab[" + Quoted(token) + "] must be an id from 0 to " +
                       std::to_string(kMaxId) + ", is " + Quoted(id_value.dump()));
    }
    const size_t id = id_value.get<size_t>();
    if (id >= tokens.size()) tokens.resize(id + 1);
    if (!tokens[id].empty()) {
      throw InputError("model.vocab gives id " + std::to_string(id) + " to both " +
                       Quoted(tokens[id]) + " and " + Quoted(token));
    }
    tokens[id] = token;
  }
  return tokens;
}

// Both spellings: "left right", and ["left", "right"] which allows spaces inside.
std::vector<std::pair<std::string, std::string>> ReadMerges(const nlohmann::json& model) {
  const nlohmann::json& list = ArrayField(model, "model", "merges");
  std::vector<std::pair<std::string, std::string>> merges;
  merges.reserve(list.size());
  for (const nlohmann::json& merge : list) {
    if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      merges.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
      continue;
    }
    const std::string text = merge.is_string() ? merge.get<std::string>() : std::string();
    const size_t space = text.find(' ');
    if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) {
      throw InputError("model.merges[" + std::to_string(merges.size()) +
                       "] must be \"left right\" or [\"left\", \"right\"], is " +
                       Quoted(merge.dump()));
    }
    merges.emplace_back(text.substr(0, space), text.substr(space + 1));
  }
  return merges;
}

Bpe::Options ReadBpeOptions(const nlohmann::json& model) {
  const std::string type = StringField(model, "model", "type");
  if (type != "BPE") throw InputError("model.type must be BPE, is " + Quoted(type));
  for (const char* name : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const std::string affix = OptionalStringField(model, "model", name).value_or("");
    if (!affix.empty()) {
      throw InputError(std::string("model.") + name + " must be empty, is " + Quoted(affix));
    }
  }
  const auto dropout = model.find("dropout");
  if (dropout != model.end() && !dropout->is_null() && *dropout != 0) {
    throw InputError("model.dropout must be null, is " + Quoted(dropout->dump()));
  }
  return {.unk_token = OptionalStringField(model, "model", "unk_token"),
          .fuse_unk = BoolField(model, "model", "fuse_unk", false),
          .byte_fallback = BoolField(model, "model", "byte_fallback", false),
          .ignore_merges = BoolField(model, "model", "ignore_merges", false)};
}

const nlohmann::json& Model(const nlohmann::json& file) {
  return AnyField(file, "tokenizer", "model");
}

const nlohmann::json& Stage(const nlohmann::json& file, const char* name) {
  static const nlohmann::json kNone;
  const auto found = file.find(name);
  return found == file.end() ? kNone : *found;
}

class BpeTokenizer : public Tokenizer {
 public:
  // Throws InputError without place and file.
  explicit BpeTokenizer(const nlohmann::json& file)
      : bpe_(ReadVocabulary(Model(file)), ReadMerges(Model(file)), ReadBpeOptions(Model(file))),
        added_(ReadAddedTokens(file)),
        normalizer_(MakeNormalizer(Stage(file, "normalizer"))),
        pre_tokenizer_(MakePreTokenizer(Stage(file, "pre_tokenizer"))),
        decoder_(ReadDecoder(Stage(file, "decoder"))),
        contents_(bpe_.tokens().begin(), bpe_.tokens().end()) {
    for (const AddedToken& token : added_) AddToken(token);
    // Special tokens first: with equal contents after normalizing they win, as in the reference.
    for (const bool special : {true, false}) {
      for (const AddedToken& token : added_) {
        if (token.special != special) continue;
        if (!token.normalized) {
          raw_matcher_.Add(token.content, &token);
          continue;
        }
        const std::string content = normalizer_->Normalize(token.content);
        if (content.empty()) {
          throw InputError("the normalizer leaves nothing of the added token " +
                           Quoted(token.content));
        }
        normalized_matcher_.Add(content, &token);
        // Decodes to what was found in the text, as since version 0.23 of the reference.
        contents_[token.id] = normalized_contents_.emplace_back(content);
      }
    }
    special_.resize(contents_.size());
    for (const AddedToken& token : added_) special_[token.id] = token.special;

    ReadPostProcessor(Stage(file, "post_processor"), "post_processor", &around_);
    for (const std::vector<int32_t>* side : {&around_.before, &around_.after}) {
      for (const int32_t id : *side) {
        if (!HasToken(id)) {
          throw InputError("post_processor adds id " + std::to_string(id) +
                           ", which has no token in this file");
        }
      }
    }
  }

  std::vector<int32_t> Encode(std::string_view raw, SpecialTokens special,
                              bool add_special) const override {
    if (raw.size() > kMaxTextBytes) {
      throw InputError("[tokenizer] text must have at most " + std::to_string(kMaxTextBytes) +
                       " bytes, has " + std::to_string(raw.size()));
    }
    const bool skip_special = special == SpecialTokens::kAsText;
    const std::string text = unicode::Sanitize(raw);
    std::vector<int32_t> ids;
    if (add_special) ids = around_.before;
    Cache cache;
    for (const auto& segment : raw_matcher_.Split(text, skip_special)) {
      if (segment.token != nullptr) {
        ids.push_back(segment.token->id);
        continue;
      }
      const std::string normal =
          normalizer_->Normalize(text.substr(segment.begin, segment.end - segment.begin));
      for (const auto& part : normalized_matcher_.Split(normal, skip_special)) {
        if (part.token != nullptr) {
          ids.push_back(part.token->id);
          continue;
        }
        std::vector<Piece> pieces;
        pieces.push_back({normal.substr(part.begin, part.end - part.begin),
                          segment.begin == 0 && part.begin == 0});
        for (const Piece& piece : pre_tokenizer_->Apply(std::move(pieces))) {
          EncodePiece(piece.text, &cache, &ids);
        }
      }
    }
    if (add_special) ids.insert(ids.end(), around_.after.begin(), around_.after.end());
    return ids;
  }

  std::string Decode(std::span<const int32_t> ids, bool skip_special) const override {
    Detokenizer detokenizer(decoder_, Detokenizer::ByteRuns::kWhole);
    std::string text;
    for (const int32_t id : ids) {
      if (IsShown(id, skip_special)) detokenizer.Push(contents_[id], &text);
    }
    detokenizer.Finish(&text);
    return text;
  }

  std::optional<int32_t> TokenToId(std::string_view token) const override {
    const auto added = added_ids_.find(token);
    return added == added_ids_.end() ? bpe_.TokenToId(token) : added->second;
  }

  int32_t vocab_size() const override { return static_cast<int32_t>(contents_.size()); }

  std::unique_ptr<Stream> NewStream(bool skip_special) const override {
    return std::make_unique<BpeStream>(*this, skip_special);
  }

 private:
  using Cache = std::unordered_map<std::string, std::vector<int32_t>>;

  class BpeStream : public Stream {
   public:
    BpeStream(const BpeTokenizer& tokenizer, bool skip_special)
        : tokenizer_(tokenizer),
          skip_special_(skip_special),
          detokenizer_(tokenizer.decoder_, Detokenizer::ByteRuns::kAtOnce) {}
    std::string Push(int32_t id) override {
      std::string text;
      if (tokenizer_.IsShown(id, skip_special_)) {
        detokenizer_.Push(tokenizer_.contents_[id], &text);
      }
      return text;
    }
    std::string Finish() override {
      std::string text;
      detokenizer_.Finish(&text);
      return text;
    }

   private:
    const BpeTokenizer& tokenizer_;
    bool skip_special_;
    Detokenizer detokenizer_;
  };

  bool HasToken(int32_t id) const { return id >= 0 && id < vocab_size() && !contents_[id].empty(); }
  bool IsShown(int32_t id, bool skip_special) const {
    return HasToken(id) && !(skip_special && special_[id]);
  }

  void AddToken(const AddedToken& token) {
    const std::optional<int32_t> id = bpe_.TokenToId(token.content);
    if (id && *id != token.id) {
      throw InputError("added_tokens gives " + Quoted(token.content) + " id " +
                       std::to_string(token.id) + ", model.vocab gives it " + std::to_string(*id));
    }
    if (token.id >= vocab_size()) contents_.resize(token.id + 1);
    std::string_view& content = contents_[token.id];
    // Only model.vocab may have named this very token before.
    if (!content.empty() && !(id && content.data() == bpe_.tokens()[*id].data())) {
      throw InputError("added_tokens gives id " + std::to_string(token.id) + " to " +
                       Quoted(token.content) + ", it belongs to " + Quoted(std::string(content)));
    }
    content = token.content;
    if (!added_ids_.emplace(token.content, token.id).second) {
      throw InputError("added_tokens lists " + Quoted(token.content) + " twice");
    }
  }

  void EncodePiece(const std::string& piece, Cache* cache, std::vector<int32_t>* ids) const {
    if (piece.size() > kMaxCachedPieceBytes) {
      bpe_.Encode(piece, ids);
      return;
    }
    if (const auto found = cache->find(piece); found != cache->end()) {
      ids->insert(ids->end(), found->second.begin(), found->second.end());
      return;
    }
    const size_t begin = ids->size();
    bpe_.Encode(piece, ids);
    if (cache->size() < kMaxCachedPieces) {
      cache->emplace(piece, std::vector<int32_t>(ids->begin() + begin, ids->end()));
    }
  }

  const Bpe bpe_;
  const std::vector<AddedToken> added_;
  const std::unique_ptr<const Normalizer> normalizer_;
  const std::unique_ptr<const PreTokenizer> pre_tokenizer_;
  const std::vector<DecoderStep> decoder_;
  // Content by id over vocabulary and added tokens; looks into
  // bpe_, added_ and normalized_contents_.
  std::vector<std::string_view> contents_;
  std::deque<std::string> normalized_contents_;  // of added tokens looked for after the normalizer
  std::unordered_map<std::string_view, int32_t> added_ids_;
  std::vector<bool> special_;
  AddedTokenMatcher raw_matcher_;         // on the text as it came
  AddedTokenMatcher normalized_matcher_;  // on what the normalizer made of it
  Surround around_;
};

}  // namespace

std::shared_ptr<const Tokenizer> Tokenizer::Load(const std::filesystem::path& tokenizer_json) {
  const nlohmann::json file = ReadJsonFile("tokenizer", tokenizer_json, kMaxFileBytes);
  try {
    return std::make_shared<BpeTokenizer>(file);
  } catch (const InputError& error) {
    throw InputError("[tokenizer] " + tokenizer_json.string() + ": " + error.what());
  }
}

}  // namespace sluice
