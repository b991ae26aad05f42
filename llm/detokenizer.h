// The decoder stage of tokenizer.json: token contents back to text, as they come.
#ifndef SLUICE_LLM_DETOKENIZER_H_
#define SLUICE_LLM_DETOKENIZER_H_

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "llm/pre_tokenizer.h"
#include "llm/unicode.h"

namespace sluice {

// One step of the chain. Behind ByteLevel and Fuse all text is one token that arrives in fragments.
struct DecoderStep {
  enum class Kind {
    kJoin,          // no decoder: a space between tokens
    kByteLevel,     // GPT-2's printable characters back to bytes, lossy UTF-8
    kByteFallback,  // runs of <0xHH> to characters, U+FFFD for each byte of a malformed run
    kReplace,       // `pattern` by `content` in each token
    kMetaspace,     // `pattern` by a space, by nothing in the first token if `strip_first`
    kFuse,          // all tokens become one
    kStrip,         // up to `max_strip` of `content` from the front of each token
    kStripFused,    // the same from the front of the whole text
  };
  Kind kind;
  std::string pattern;
  std::string content;
  int64_t max_strip = 0;
  bool strip_first = false;
};

// Reads ByteLevel, Replace, ByteFallback, Fuse, Strip, Metaspace, Sequence and null. Throws
// InputError that names the field on anything else.
std::vector<DecoderStep> ReadDecoder(const nlohmann::json& spec);

// Runs the chain over one sequence of tokens. Used by one thread at a time.
class Detokenizer {
 public:
  // When a run of <0xHH> tokens leaves. kAtOnce: whenever it is valid UTF-8, for streams; if the
  // run turns out malformed later, the characters that left stay. kWhole: when it ends, as the
  // reference.
  enum class ByteRuns { kAtOnce, kWhole };

  // `steps` must outlive the detokenizer.
  Detokenizer(const std::vector<DecoderStep>& steps, ByteRuns byte_runs);
  // Appends to *out the text that `token` completes; never half a character.
  void Push(std::string_view token, std::string* out) { Feed(0, token, out); }
  // Appends what still waits: U+FFFD for bytes that became no character.
  void Finish(std::string* out);

 private:
  struct State {
    unicode::Utf8Decoder utf8;
    std::string run;       // bytes of <0xHH> tokens that wait
    bool started = false;  // a token has come by
    int64_t stripped = 0;  // characters removed so far; -1: the front is passed
  };

  void Feed(size_t step, std::string_view text, std::string* out);
  void FlushRun(size_t step, std::string* out);

  const std::vector<DecoderStep>& steps_;
  ByteRuns byte_runs_;
  std::vector<State> states_;
};

}  // namespace sluice

#endif  // SLUICE_LLM_DETOKENIZER_H_
