// Text to ids and back, as `tokenizer.json` says: byte-level BPE (GPT-2, Qwen2, Llama-3) and
// metaspace BPE with byte fallback (Llama, Mistral). The file alone decides; what it asks for and
// is not implemented is refused when loading. Immutable after loading; safe for many threads.
#ifndef SLUICE_LLM_TOKENIZER_H_
#define SLUICE_LLM_TOKENIZER_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace sluice {

enum class SpecialTokens {
  kMatch,   // control strings such as <|im_end|> become their ids: for templates
  kAsText,  // control strings are ordinary text: for what users type
};

class Tokenizer {
 public:
  // Throws InputError naming the file and the field: missing, not JSON, unknown stage, inconsistent
  // vocabulary.
  static std::shared_ptr<const Tokenizer> Load(const std::filesystem::path& tokenizer_json);
  virtual ~Tokenizer() = default;

  // Ids of `text`. Invalid UTF-8 is replaced by U+FFFD first. No BOS/EOS is added unless the file's
  // post-processor does and `add_special` is set. O(n log n) in the bytes of `text`; throws
  // InputError above 1 GiB.
  virtual std::vector<int32_t> Encode(std::string_view text,
                                      SpecialTokens special = SpecialTokens::kMatch,
                                      bool add_special = false) const = 0;
  // Text of `ids`. Ids without a token decode to nothing.
  virtual std::string Decode(std::span<const int32_t> ids, bool skip_special = true) const = 0;

  virtual std::optional<int32_t> TokenToId(std::string_view token) const = 0;
  // Largest id + 1 over vocabulary and added tokens.
  virtual int32_t vocab_size() const = 0;

  // Turns a growing sequence of ids into text that never holds half a character. The concatenation
  // of all results equals Decode of all ids, but for one case: a run of byte-fallback tokens that
  // begins well and ends malformed keeps the characters already given, where Decode replaces the
  // whole run. Used by one thread at a time; must not outlive its tokenizer.
  class Stream {
   public:
    virtual ~Stream() = default;
    virtual std::string Push(int32_t id) = 0;
    virtual std::string Finish() = 0;
  };
  virtual std::unique_ptr<Stream> NewStream(bool skip_special = true) const = 0;
};

}  // namespace sluice

#endif  // SLUICE_LLM_TOKENIZER_H_
