#include "llm/unicode.h"

#include <algorithm>
#include <iterator>
#include <utility>
#include <vector>

namespace sluice::unicode {
namespace {

struct CodePointRange {
  char32_t first, last;
};
struct CombiningRange {
  char32_t first, last;
  uint8_t combining_class;
};
struct Decomposition {
  char32_t composed, first, second;
};
struct Composition {
  char32_t first, second, composed;
};

#include "llm/unicode_tables.inc"

// The range of a sorted table that holds `c`, or nullptr.
template <class Range, size_t N>
const Range* Find(const Range (&table)[N], char32_t c) {
  const Range* range =
      std::upper_bound(std::begin(table), std::end(table), c,
                       [](char32_t value, const Range& r) { return value < r.first; });
  if (range == std::begin(table)) return nullptr;
  --range;
  return c <= range->last ? range : nullptr;
}

uint8_t CombiningClass(char32_t c) {
  if (c < 0x300) return 0;
  const CombiningRange* range = Find(kCombiningClasses, c);
  return range == nullptr ? 0 : range->combining_class;
}

// Hangul syllables are computed instead of listed (Unicode 16.0, section 3.12).
constexpr char32_t kSBase = 0xAC00, kLBase = 0x1100, kVBase = 0x1161, kTBase = 0x11A7;
constexpr char32_t kLCount = 19, kVCount = 21, kTCount = 28;
constexpr char32_t kNCount = kVCount * kTCount, kSCount = kLCount * kNCount;

// Appends the full canonical decomposition of `c`.
void Decompose(char32_t c, std::vector<char32_t>* out) {
  if (c < 0xC0) {
    out->push_back(c);
    return;
  }
  if (c >= kSBase && c < kSBase + kSCount) {
    const char32_t s = c - kSBase;
    out->push_back(kLBase + s / kNCount);
    out->push_back(kVBase + s % kNCount / kTCount);
    if (s % kTCount != 0) out->push_back(kTBase + s % kTCount);
    return;
  }
  const Decomposition* entry =
      std::lower_bound(std::begin(kDecompositions), std::end(kDecompositions), c,
                       [](const Decomposition& d, char32_t value) { return d.composed < value; });
  if (entry == std::end(kDecompositions) || entry->composed != c) {
    out->push_back(c);
    return;
  }
  Decompose(entry->first, out);
  if (entry->second != 0) Decompose(entry->second, out);
}

// The primary composite of two code points, or 0.
char32_t Compose(char32_t first, char32_t second) {
  if (first >= kLBase && first < kLBase + kLCount && second >= kVBase &&
      second < kVBase + kVCount) {
    return kSBase + ((first - kLBase) * kVCount + (second - kVBase)) * kTCount;
  }
  if (first >= kSBase && first < kSBase + kSCount && (first - kSBase) % kTCount == 0 &&
      second > kTBase && second < kTBase + kTCount) {
    return first + (second - kTBase);
  }
  const Composition* entry =
      std::lower_bound(std::begin(kCompositions), std::end(kCompositions), std::pair(first, second),
                       [](const Composition& c, const std::pair<char32_t, char32_t>& value) {
                         return std::pair(c.first, c.second) < value;
                       });
  if (entry == std::end(kCompositions) || entry->first != first || entry->second != second) {
    return 0;
  }
  return entry->composed;
}

}  // namespace

bool IsLetter(char32_t c) {
  if (c < 0x80) return (c | 0x20) >= 'a' && (c | 0x20) <= 'z';
  return Find(kLetters, c) != nullptr;
}

bool IsNumber(char32_t c) {
  if (c < 0x80) return c >= '0' && c <= '9';
  return Find(kNumbers, c) != nullptr;
}

bool IsWhitespace(char32_t c) {
  if (c < 0x80) return c == ' ' || (c >= 0x09 && c <= 0x0D);
  return Find(kWhiteSpace, c) != nullptr;
}

bool IsWord(char32_t c) { return Find(kWordCharacters, c) != nullptr; }

char32_t Next(std::string_view text, size_t* at) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[*at + i]); };
  const char32_t lead = byte(0);
  if (lead < 0x80) {
    *at += 1;
    return lead;
  }
  char32_t c;
  if (lead < 0xE0) {
    c = (lead & 0x1F) << 6 | (byte(1) & 0x3F);
    *at += 2;
  } else if (lead < 0xF0) {
    c = (lead & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F);
    *at += 3;
  } else {
    c = (lead & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 | (byte(3) & 0x3F);
    *at += 4;
  }
  return c;
}

char32_t Previous(std::string_view text, size_t* at) {
  do {
    --*at;
  } while ((static_cast<uint8_t>(text[*at]) & 0xC0) == 0x80);
  size_t begin = *at;
  return Next(text, &begin);
}

void Append(char32_t c, std::string* out) {
  if (c < 0x80) {
    out->push_back(static_cast<char>(c));
  } else if (c < 0x800) {
    out->push_back(static_cast<char>(0xC0 | c >> 6));
    out->push_back(static_cast<char>(0x80 | (c & 0x3F)));
  } else if (c < 0x10000) {
    out->push_back(static_cast<char>(0xE0 | c >> 12));
    out->push_back(static_cast<char>(0x80 | (c >> 6 & 0x3F)));
    out->push_back(static_cast<char>(0x80 | (c & 0x3F)));
  } else {
    out->push_back(static_cast<char>(0xF0 | c >> 18));
    out->push_back(static_cast<char>(0x80 | (c >> 12 & 0x3F)));
    out->push_back(static_cast<char>(0x80 | (c >> 6 & 0x3F)));
    out->push_back(static_cast<char>(0x80 | (c & 0x3F)));
  }
}

std::string Sanitize(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  Utf8Decoder decoder;
  decoder.Push(text, &out);
  decoder.Finish(&out);
  return out;
}

std::string Nfc(std::string_view text) {
  // Text below U+0300 is its own NFC: lead bytes up to 0xCB begin U+0000 to U+02FF.
  if (std::all_of(text.begin(), text.end(),
                  [](char c) { return static_cast<uint8_t>(c) < 0xCC; })) {
    return std::string(text);
  }
  std::vector<char32_t> chars;
  chars.reserve(text.size());
  for (size_t i = 0; i < text.size();) Decompose(Next(text, &i), &chars);

  // Canonical order: sort each run of combining marks by class, keeping the order of equals.
  std::vector<uint8_t> classes(chars.size());
  std::vector<std::pair<uint8_t, char32_t>> run;
  for (size_t i = 0; i < chars.size();) {
    classes[i] = CombiningClass(chars[i]);
    if (classes[i] == 0) {
      ++i;
      continue;
    }
    run.clear();
    size_t end = i;
    for (; end < chars.size(); ++end) {
      const uint8_t combining_class = CombiningClass(chars[end]);
      if (combining_class == 0) break;
      run.emplace_back(combining_class, chars[end]);
    }
    std::stable_sort(run.begin(), run.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    for (const auto& [combining_class, c] : run) {
      classes[i] = combining_class;
      chars[i++] = c;
    }
  }

  // Composition: a character joins the last starter unless something of its class or higher, or
  // another starter, stands between them.
  size_t written = 0;
  size_t starter = chars.size();  // none yet
  int last_class = -1;            // class of the last character kept after the starter; -1: none
  for (size_t i = 0; i < chars.size(); ++i) {
    const int combining_class = classes[i];
    if (starter < chars.size() && last_class < combining_class) {
      if (const char32_t composed = Compose(chars[starter], chars[i]); composed != 0) {
        chars[starter] = composed;
        continue;
      }
    }
    chars[written] = chars[i];
    if (combining_class == 0) {
      starter = written;
      last_class = -1;
    } else {
      last_class = combining_class;
    }
    ++written;
  }

  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < written; ++i) Append(chars[i], &out);
  return out;
}

void Utf8Decoder::Push(std::string_view bytes, std::string* out) {
  for (size_t i = 0; i < bytes.size();) {
    const uint8_t byte = static_cast<uint8_t>(bytes[i]);
    if (num_pending_ > 0) {
      if (byte < low_ || byte > high_) {
        // The character ends here unfinished; this byte is looked at again as a first one.
        Finish(out);
        continue;
      }
      pending_[num_pending_++] = bytes[i++];
      low_ = 0x80;
      high_ = 0xBF;
      if (num_pending_ == length_) {
        out->append(pending_, length_);
        num_pending_ = 0;
      }
      continue;
    }
    ++i;
    if (byte < 0x80) {
      out->push_back(static_cast<char>(byte));
      continue;
    }
    if (byte < 0xC2 || byte > 0xF4) {
      Append(kReplacement, out);
      continue;
    }
    pending_[0] = static_cast<char>(byte);
    num_pending_ = 1;
    length_ = byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
    // No overlong forms, surrogates or values above U+10FFFF (table 3-7 of the standard).
    low_ = byte == 0xE0 ? 0xA0 : byte == 0xF0 ? 0x90 : 0x80;
    high_ = byte == 0xED ? 0x9F : byte == 0xF4 ? 0x8F : 0xBF;
  }
}

void Utf8Decoder::Finish(std::string* out) {
  if (num_pending_ == 0) return;
  num_pending_ = 0;
  Append(kReplacement, out);
}

}  // namespace sluice::unicode
