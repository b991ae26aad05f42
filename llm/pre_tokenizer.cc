#include "llm/pre_tokenizer.h"

#include <algorithm>
#include <functional>
#include <string_view>
#include <utility>

#include "llm/byte_map.h"
#include "llm/json_file.h"
#include "llm/normalizer.h"
#include "llm/unicode.h"
#include "runtime/error.h"

namespace sluice {
namespace {

using unicode::IsLetter;
using unicode::IsNumber;
using unicode::IsWhitespace;

bool IsNewline(char32_t c) { return c == '\r' || c == '\n'; }
bool IsOther(char32_t c) { return !IsWhitespace(c) && !IsLetter(c) && !IsNumber(c); }

// The first index at or behind `i` whose code point is not `in`.
template <class Predicate>
size_t EndOfRun(std::string_view text, size_t i, Predicate in) {
  while (i < text.size()) {
    size_t next = i;
    if (!in(unicode::Next(text, &next))) break;
    i = next;
  }
  return i;
}

enum class Case { kExact, kFolded };

// The end of an English contraction ('s 't 're 've 'm 'll 'd) at `i`, or `i` if there is none.
size_t EndOfContraction(std::string_view text, size_t i, Case match) {
  if (text[i] != '\'') return i;
  const auto letter = [&](size_t* at) -> char32_t {
    if (*at >= text.size()) return 0;
    const char32_t c = unicode::Next(text, at);
    if (match == Case::kExact) return c;
    // U+017F, the long s, is the only character beyond ASCII that folds to one of these letters.
    if (c == 0x17F) return 's';
    return c >= 'A' && c <= 'Z' ? c + ('a' - 'A') : c;
  };
  size_t end = i + 1;
  const char32_t first = letter(&end);
  if (first == 's' || first == 't' || first == 'm' || first == 'd') return end;
  const char32_t second = letter(&end);
  if ((first == 'r' && second == 'e') || (first == 'v' && second == 'e') ||
      (first == 'l' && second == 'l')) {
    return end;
  }
  return i;
}

// \s+(?!\S)|\s+ at `i`, where `end` is the end of the run of whitespace that begins there: the run
// without its last code point, which belongs to what follows, unless nothing does.
size_t EndOfSpaces(std::string_view text, size_t i, size_t end) {
  if (end == text.size()) return end;
  size_t last = end;
  unicode::Previous(text, &last);
  return last > i ? last : end;
}

// The pattern of Qwen2 (max_digits 1) and Llama-3 (max_digits 3), first alternative that matches:
//   (?i:'s|'t|'re|'ve|'m|'ll|'d) | [^\r\n\p{L}\p{N}]?\p{L}+ | \p{N}{1,max_digits}
//   | ?[^\s\p{L}\p{N}]+[\r\n]* | \s*[\r\n]+ | \s+(?!\S) | \s+
// Returns the end of the piece at `i`; pieces cover every text without gaps.
size_t EndOfQwenPiece(std::string_view text, size_t i, int max_digits) {
  if (const size_t end = EndOfContraction(text, i, Case::kFolded); end > i) return end;
  size_t next = i;
  const char32_t c = unicode::Next(text, &next);
  if (IsLetter(c)) return EndOfRun(text, next, IsLetter);
  if (IsNumber(c)) {
    int digits = 1;
    return EndOfRun(text, next, [&](char32_t d) { return IsNumber(d) && digits++ < max_digits; });
  }
  if (!IsNewline(c)) {
    if (const size_t end = EndOfRun(text, next, IsLetter); end > next) return end;
  }
  const size_t symbols = c == ' ' ? next : i;
  if (const size_t end = EndOfRun(text, symbols, IsOther); end > symbols) {
    return EndOfRun(text, end, IsNewline);
  }
  // Only whitespace is left.
  const size_t end = EndOfRun(text, i, IsWhitespace);
  const size_t newline = text.substr(i, end - i).find_last_of("\r\n");
  if (newline != std::string_view::npos) return i + newline + 1;
  return EndOfSpaces(text, i, end);
}

// The pattern of GPT-2, also that of a ByteLevel stage with use_regex:
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
size_t EndOfGpt2Piece(std::string_view text, size_t i) {
  if (const size_t end = EndOfContraction(text, i, Case::kExact); end > i) return end;
  const size_t word = text[i] == ' ' ? i + 1 : i;
  for (bool (*in)(char32_t) : {&IsLetter, &IsNumber, &IsOther}) {
    if (const size_t end = EndOfRun(text, word, in); end > word) return end;
  }
  return EndOfSpaces(text, i, EndOfRun(text, i, IsWhitespace));
}

// A part of a text, and whether the pattern matched it.
struct Part {
  size_t begin, end;
  bool match;
};
// Cuts a text into parts without gaps.
using Pattern = std::function<std::vector<Part>(std::string_view)>;

// A pattern whose matches follow each other without gaps.
Pattern Covering(std::function<size_t(std::string_view, size_t)> end_of_piece) {
  return [end_of_piece](std::string_view text) {
    std::vector<Part> parts;
    for (size_t i = 0; i < text.size();) {
      const size_t end = end_of_piece(text, i);
      parts.push_back({i, end, true});
      i = end;
    }
    return parts;
  };
}

Pattern Literal(std::string literal) {
  return [literal](std::string_view text) {
    std::vector<Part> parts;
    size_t from = 0;
    for (size_t at; (at = text.find(literal, from)) != std::string_view::npos;) {
      if (at > from) parts.push_back({from, at, false});
      parts.push_back({at, at + literal.size(), true});
      from = at + literal.size();
    }
    if (from < text.size()) parts.push_back({from, text.size(), false});
    return parts;
  };
}

Pattern EachNumber() {
  return [](std::string_view text) {
    std::vector<Part> parts;
    for (size_t i = 0; i < text.size();) {
      const size_t begin = i;
      const bool number = IsNumber(unicode::Next(text, &i));
      if (!number && !parts.empty() && !parts.back().match) {
        parts.back().end = i;
      } else {
        parts.push_back({begin, i, number});
      }
    }
    return parts;
  };
}

Pattern KnownRegex(const std::string& regex, const std::string& where) {
  struct Known {
    const char* regex;
    size_t (*end_of_piece)(std::string_view, size_t);
  };
  static constexpr Known kKnown[] = {
      {R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|)"
       R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)",
       [](std::string_view text, size_t i) { return EndOfQwenPiece(text, i, 1); }},
      {R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|)"
       R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)",
       [](std::string_view text, size_t i) { return EndOfQwenPiece(text, i, 3); }},
      {R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)",
       EndOfGpt2Piece},
  };
  for (const Known& known : kKnown) {
    if (regex == known.regex) return Covering(known.end_of_piece);
  }
  throw InputError(where + ".pattern.Regex is none of the known ones (Qwen2, Llama-3, GPT-2): \"" +
                   regex + "\"");
}

// What becomes of the matches. Names as in tokenizer.json.
enum class Behavior { kIsolated, kRemoved, kMergedWithPrevious, kMergedWithNext, kContiguous };

// Joins the parts as `behavior` says; a part with match set is then to be dropped.
std::vector<Part> Arrange(std::vector<Part> parts, Behavior behavior) {
  if (behavior == Behavior::kRemoved) return parts;
  if (behavior == Behavior::kMergedWithNext) std::reverse(parts.begin(), parts.end());
  std::vector<Part> out;
  bool previous_match = false;
  for (const Part& part : parts) {
    bool join = false;
    switch (behavior) {
      case Behavior::kContiguous:
        join = part.match == previous_match;
        break;
      case Behavior::kMergedWithPrevious:
      case Behavior::kMergedWithNext:
        join = part.match && !previous_match;
        break;
      case Behavior::kIsolated:
      case Behavior::kRemoved:
        break;
    }
    previous_match = part.match;
    if (join && !out.empty()) {
      out.back().begin = std::min(out.back().begin, part.begin);
      out.back().end = std::max(out.back().end, part.end);
    } else {
      out.push_back({part.begin, part.end, false});
    }
  }
  if (behavior == Behavior::kMergedWithNext) std::reverse(out.begin(), out.end());
  return out;
}

void AppendParts(const Piece& piece, const std::vector<Part>& parts, std::vector<Piece>* out) {
  for (const Part& part : parts) {
    if (part.match) continue;
    out->push_back(
        {piece.text.substr(part.begin, part.end - part.begin), piece.at_start && part.begin == 0});
  }
}

class Split : public PreTokenizer {
 public:
  Split(Pattern pattern, Behavior behavior, bool invert)
      : pattern_(std::move(pattern)), behavior_(behavior), invert_(invert) {}

  std::vector<Piece> Apply(std::vector<Piece> pieces) const override {
    std::vector<Piece> out;
    for (const Piece& piece : pieces) {
      std::vector<Part> parts = pattern_(piece.text);
      if (invert_) {
        for (Part& part : parts) part.match = !part.match;
      }
      AppendParts(piece, Arrange(std::move(parts), behavior_), &out);
    }
    return out;
  }

 private:
  Pattern pattern_;
  Behavior behavior_;
  bool invert_;
};

class ByteLevel : public PreTokenizer {
 public:
  ByteLevel(bool add_prefix_space, bool use_regex)
      : add_prefix_space_(add_prefix_space), use_regex_(use_regex) {}

  std::vector<Piece> Apply(std::vector<Piece> pieces) const override {
    if (add_prefix_space_) {
      for (Piece& piece : pieces) {
        if (piece.text[0] != ' ') piece.text.insert(0, " ");
      }
    }
    if (use_regex_) {
      static const Split gpt2(Covering(EndOfGpt2Piece), Behavior::kIsolated, false);
      pieces = gpt2.Apply(std::move(pieces));
    }
    for (Piece& piece : pieces) {
      std::string mapped;
      mapped.reserve(piece.text.size() * 2);
      for (const char byte : piece.text) {
        unicode::Append(kByteMap.ToChar(static_cast<uint8_t>(byte)), &mapped);
      }
      piece.text = std::move(mapped);
    }
    return pieces;
  }

 private:
  bool add_prefix_space_, use_regex_;
};

class Metaspace : public PreTokenizer {
 public:
  explicit Metaspace(MetaspaceOptions options)
      : options_(std::move(options)), pattern_(Literal(options_.replacement)) {}

  std::vector<Piece> Apply(std::vector<Piece> pieces) const override {
    std::vector<Piece> out;
    for (Piece& piece : pieces) {
      piece.text = ReplaceAll(piece.text, " ", options_.replacement);
      const bool prepend =
          options_.prepend == MetaspaceOptions::Prepend::kAlways ||
          (options_.prepend == MetaspaceOptions::Prepend::kFirst && piece.at_start);
      if (prepend && !piece.text.starts_with(options_.replacement)) {
        piece.text.insert(0, options_.replacement);
      }
      if (options_.split) {
        AppendParts(piece, Arrange(pattern_(piece.text), Behavior::kMergedWithNext), &out);
      } else {
        out.push_back(std::move(piece));
      }
    }
    return out;
  }

 private:
  MetaspaceOptions options_;
  Pattern pattern_;
};

class Sequence : public PreTokenizer {
 public:
  explicit Sequence(std::vector<std::unique_ptr<const PreTokenizer>> steps)
      : steps_(std::move(steps)) {}
  std::vector<Piece> Apply(std::vector<Piece> pieces) const override {
    for (const auto& step : steps_) pieces = step->Apply(std::move(pieces));
    return pieces;
  }

 private:
  std::vector<std::unique_ptr<const PreTokenizer>> steps_;
};

Behavior ReadBehavior(const nlohmann::json& spec, const std::string& where) {
  const std::string name = StringField(spec, where, "behavior");
  if (name == "Isolated") return Behavior::kIsolated;
  if (name == "Removed") return Behavior::kRemoved;
  if (name == "MergedWithPrevious") return Behavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return Behavior::kMergedWithNext;
  if (name == "Contiguous") return Behavior::kContiguous;
  throw InputError(where +
                   ".behavior must be Isolated, Removed, MergedWithPrevious, MergedWithNext or "
                   "Contiguous, is " +
                   Quoted(name));
}

}  // namespace

std::unique_ptr<const PreTokenizer> MakePreTokenizer(const nlohmann::json& spec,
                                                     const std::string& where) {
  std::vector<std::unique_ptr<const PreTokenizer>> steps;
  if (spec.is_null()) return std::make_unique<Sequence>(std::move(steps));
  const std::string type = StringField(spec, where, "type");
  if (type == "Split") {
    const nlohmann::json& pattern = AnyField(spec, where, "pattern");
    const bool is_regex = pattern.is_object() && pattern.contains("Regex");
    return std::make_unique<Split>(
        is_regex ? KnownRegex(StringField(pattern, where + ".pattern", "Regex"), where)
                 : Literal(StringPattern(spec, where)),
        ReadBehavior(spec, where), BoolField(spec, where, "invert", false));
  }
  if (type == "ByteLevel") {
    return std::make_unique<ByteLevel>(BoolField(spec, where, "add_prefix_space"),
                                       BoolField(spec, where, "use_regex", true));
  }
  if (type == "Metaspace") return std::make_unique<Metaspace>(ReadMetaspace(spec, where));
  if (type == "Digits") {
    const bool individual = BoolField(spec, where, "individual_digits");
    return std::make_unique<Split>(EachNumber(),
                                   individual ? Behavior::kIsolated : Behavior::kContiguous, false);
  }
  if (type == "Sequence") {
    const nlohmann::json& list = ArrayField(spec, where, "pretokenizers");
    for (size_t i = 0; i < list.size(); ++i) {
      steps.push_back(
          MakePreTokenizer(list[i], where + ".pretokenizers[" + std::to_string(i) + "]"));
    }
    return std::make_unique<Sequence>(std::move(steps));
  }
  throw InputError(where + ".type must be Split, ByteLevel, Metaspace, Digits or Sequence, is " +
                   Quoted(type));
}

MetaspaceOptions ReadMetaspace(const nlohmann::json& spec, const std::string& where) {
  MetaspaceOptions options;
  options.replacement = StringField(spec, where, "replacement");
  size_t end = 0;
  if (!options.replacement.empty()) unicode::Next(options.replacement, &end);
  if (end == 0 || end != options.replacement.size()) {
    throw InputError(where + ".replacement must be one character, is " +
                     Quoted(options.replacement));
  }
  options.split = BoolField(spec, where, "split", true);
  const std::optional<std::string> scheme = OptionalStringField(spec, where, "prepend_scheme");
  // Files from before the schemes say add_prefix_space instead; newer ones may say both.
  const bool add_prefix_space = BoolField(spec, where, "add_prefix_space", true);
  if (!scheme) {
    options.prepend =
        add_prefix_space ? MetaspaceOptions::Prepend::kAlways : MetaspaceOptions::Prepend::kNever;
  } else if (*scheme == "always" && add_prefix_space) {
    options.prepend = MetaspaceOptions::Prepend::kAlways;
  } else if (*scheme == "first" && add_prefix_space) {
    options.prepend = MetaspaceOptions::Prepend::kFirst;
  } else if (*scheme == "never") {
    options.prepend = MetaspaceOptions::Prepend::kNever;
  } else {
    throw InputError(where + ".prepend_scheme must be always, first or never and agree with " +
                     "add_prefix_space, is " + Quoted(*scheme));
  }
  return options;
}

}  // namespace sluice
