// The pre_tokenizer stage of tokenizer.json: cuts text into the pieces BPE works on.
#ifndef SLUICE_LLM_PRE_TOKENIZER_H_
#define SLUICE_LLM_PRE_TOKENIZER_H_

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace sluice {

struct Piece {
  std::string text;       // valid UTF-8, not empty
  bool at_start = false;  // begins where the whole input begins
};

// Immutable; safe for many threads.
class PreTokenizer {
 public:
  virtual ~PreTokenizer() = default;
  virtual std::vector<Piece> Apply(std::vector<Piece> pieces) const = 0;
};

// Reads Split, ByteLevel, Metaspace, Digits and Sequence; null keeps text whole. Regular
// expressions are not evaluated: the ones that published byte-level vocabularies use (GPT-2, Qwen2,
// Llama-3) are written out by hand, any other throws InputError that shows it.
std::unique_ptr<const PreTokenizer> MakePreTokenizer(const nlohmann::json& spec,
                                                     const std::string& where = "pre_tokenizer");

// The Metaspace settings that its pre-tokenizer and its decoder share.
struct MetaspaceOptions {
  enum class Prepend { kAlways, kFirst, kNever };
  std::string replacement;  // one code point
  Prepend prepend = Prepend::kAlways;
  bool split = true;
};
MetaspaceOptions ReadMetaspace(const nlohmann::json& spec, const std::string& where);

}  // namespace sluice

#endif  // SLUICE_LLM_PRE_TOKENIZER_H_
