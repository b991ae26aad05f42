// The added_tokens of tokenizer.json: contents that become one id wherever they stand in a text,
// before anything else looks at it. Immutable once filled; safe for many threads.
#ifndef SLUICE_LLM_ADDED_TOKENS_H_
#define SLUICE_LLM_ADDED_TOKENS_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace sluice {

struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool single_word = false;  // matches only between characters that are not part of a word
  bool lstrip = false;       // swallows the whitespace before it
  bool rstrip = false;       // swallows the whitespace behind it
  bool normalized = false;   // is looked for after the normalizer instead of before
  bool special = false;      // Decode may skip it; control strings of users must not become it
};

// Finds a set of added tokens in a text, leftmost first and of these the longest.
class AddedTokenMatcher {
 public:
  // A part of a text: an added token, or nullptr for what lies between them.
  struct Segment {
    const AddedToken* token;
    size_t begin, end;
  };

  AddedTokenMatcher() { first_.fill(-1); }
  // Looks for `content` and reports `token`, which must outlive the matcher. Of two tokens with the
  // same content the first added is reported. REQUIRES: `content` is not empty.
  void Add(std::string_view content, const AddedToken* token);

  // The segments of `text` in order, none of the plain ones empty. With `skip_special`, special
  // tokens are part of the plain text. O(length of the text x length of the longest content).
  std::vector<Segment> Split(std::string_view text, bool skip_special) const;

 private:
  int32_t Child(int32_t node, uint8_t byte) const;

  // A trie over bytes. Most positions of a text fail at the first byte: a table of its own.
  std::array<int32_t, 256> first_;
  std::unordered_map<uint64_t, int32_t> children_;  // (node, byte) to node
  std::vector<const AddedToken*> tokens_;           // by node; nullptr: no content ends here
};

}  // namespace sluice

#endif  // SLUICE_LLM_ADDED_TOKENS_H_
