#include "llm/added_tokens.h"

#include <algorithm>

#include "llm/unicode.h"

namespace sluice {
namespace {

bool IsInsideWord(std::string_view text, size_t begin, size_t end) {
  size_t at = begin;
  if (begin > 0 && unicode::IsWord(unicode::Previous(text, &at))) return true;
  at = end;
  return end < text.size() && unicode::IsWord(unicode::Next(text, &at));
}

size_t BeginOfSpacesBefore(std::string_view text, size_t i) {
  while (i > 0) {
    size_t previous = i;
    if (!unicode::IsWhitespace(unicode::Previous(text, &previous))) break;
    i = previous;
  }
  return i;
}

size_t EndOfSpacesBehind(std::string_view text, size_t i) {
  while (i < text.size()) {
    size_t next = i;
    if (!unicode::IsWhitespace(unicode::Next(text, &next))) break;
    i = next;
  }
  return i;
}

}  // namespace

void AddedTokenMatcher::Add(std::string_view content, const AddedToken* token) {
  int32_t node = -1;
  for (size_t i = 0; i < content.size(); ++i) {
    const uint8_t byte = static_cast<uint8_t>(content[i]);
    int32_t next = Child(node, byte);
    if (next < 0) {
      next = static_cast<int32_t>(tokens_.size());
      tokens_.push_back(nullptr);
      if (node < 0) {
        first_[byte] = next;
      } else {
        children_.emplace(static_cast<uint64_t>(node) << 8 | byte, next);
      }
    }
    node = next;
  }
  if (tokens_[node] == nullptr) tokens_[node] = token;
}

int32_t AddedTokenMatcher::Child(int32_t node, uint8_t byte) const {
  if (node < 0) return first_[byte];
  const auto found = children_.find(static_cast<uint64_t>(node) << 8 | byte);
  return found == children_.end() ? -1 : found->second;
}

std::vector<AddedTokenMatcher::Segment> AddedTokenMatcher::Split(std::string_view text,
                                                                 bool skip_special) const {
  std::vector<Segment> segments;
  size_t plain = 0;  // where the text that is not yet in a segment begins
  for (size_t i = 0; i < text.size();) {
    const AddedToken* token = nullptr;
    size_t match_end = i;
    int32_t node = Child(-1, static_cast<uint8_t>(text[i]));
    for (size_t end = i + 1; node >= 0; ++end) {
      if (tokens_[node] != nullptr) {
        token = tokens_[node];
        match_end = end;
      }
      node = end < text.size() ? Child(node, static_cast<uint8_t>(text[end])) : -1;
    }
    if (token == nullptr) {
      ++i;
      continue;
    }
    size_t begin = i;
    // Also a match that does not count hides what begins inside it, as in the reference.
    i = match_end;
    if (skip_special && token->special) continue;
    if (token->single_word && IsInsideWord(text, begin, match_end)) continue;
    if (token->lstrip) begin = std::max(BeginOfSpacesBefore(text, begin), plain);
    const size_t end = token->rstrip ? EndOfSpacesBehind(text, match_end) : match_end;
    if (plain < begin) segments.push_back({nullptr, plain, begin});
    segments.push_back({token, begin, end});
    plain = end;
  }
  if (plain < text.size()) segments.push_back({nullptr, plain, text.size()});
  return segments;
}

}  // namespace sluice
