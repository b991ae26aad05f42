// The normalizer stage of tokenizer.json: what happens to text before it is cut into pieces.
#ifndef SLUICE_LLM_NORMALIZER_H_
#define SLUICE_LLM_NORMALIZER_H_

#include <memory>
#include <nlohmann/json.hpp>
#include <string>

namespace sluice {

// Immutable; safe for many threads.
class Normalizer {
 public:
  virtual ~Normalizer() = default;
  // REQUIRES: `text` is valid UTF-8; so is the result.
  virtual std::string Normalize(std::string text) const = 0;
};

// Reads NFC, Prepend, Replace (of a string) and Sequence; null changes nothing. Throws InputError
// that names `where` on anything else.
std::unique_ptr<const Normalizer> MakeNormalizer(const nlohmann::json& spec,
                                                 const std::string& where = "normalizer");

// `text` with every non-overlapping `pattern`, from the left, replaced by `content`.
// REQUIRES: `pattern` is not empty.
std::string ReplaceAll(std::string_view text, std::string_view pattern, std::string_view content);

// The {"String": "..."} of a Replace or Split stage. Throws InputError when it is empty or missing.
std::string StringPattern(const nlohmann::json& spec, const std::string& where);

}  // namespace sluice

#endif  // SLUICE_LLM_NORMALIZER_H_
