// The little of Unicode that tokenizers need: UTF-8, four character classes and NFC, frozen at
// version 16.0 so that pieces are the same on every machine. Pure functions; safe for many threads.
#ifndef SLUICE_LLM_UNICODE_H_
#define SLUICE_LLM_UNICODE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace sluice::unicode {

inline constexpr char32_t kReplacement = 0xFFFD;

bool IsLetter(char32_t c);      // general category L
bool IsNumber(char32_t c);      // general category N
bool IsWhitespace(char32_t c);  // White_Space
bool IsWord(char32_t c);        // letters, marks, decimal digits, connectors such as '_'

// The code point that begins at text[*at]; moves *at behind it.
// REQUIRES: *at < text.size() and `text` is valid UTF-8 (see Sanitize).
char32_t Next(std::string_view text, size_t* at);
// The code point that ends right before text[*at]; moves *at to its beginning.
// REQUIRES: *at > 0 and `text` is valid UTF-8.
char32_t Previous(std::string_view text, size_t* at);
void Append(char32_t c, std::string* out);

// `text` itself when it is valid UTF-8, else a copy in which each maximal subpart of an ill-formed
// sequence has become one U+FFFD (Unicode 16.0, section 3.9).
std::string Sanitize(std::string_view text);

// Normalization form C. Like the reference for all characters it knows; its tables are older (9.0),
// so combining marks and composites added since are left alone there and handled here.
// REQUIRES: `text` is valid UTF-8.
std::string Nfc(std::string_view text);

// Decodes bytes that arrive in pieces. What is complete comes out at once; at most three bytes
// wait. Used by one thread at a time.
class Utf8Decoder {
 public:
  // Appends to *out what `bytes` complete; each maximal ill-formed subpart becomes one U+FFFD.
  void Push(std::string_view bytes, std::string* out);
  // Appends U+FFFD if half a character waits.
  void Finish(std::string* out);

 private:
  char pending_[4] = {};
  int num_pending_ = 0;
  int length_ = 0;      // of the character that waits, in bytes
  uint8_t low_ = 0x80;  // bounds of its next byte
  uint8_t high_ = 0xBF;
};

}  // namespace sluice::unicode

#endif  // SLUICE_LLM_UNICODE_H_
