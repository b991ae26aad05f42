#include "llm/detokenizer.h"

#include <limits>
#include <optional>

#include "llm/byte_map.h"
#include "llm/json_file.h"
#include "llm/normalizer.h"
#include "runtime/error.h"

namespace sluice {
namespace {

using Kind = DecoderStep::Kind;

// The bytes a token of a byte-level vocabulary stands for. An added token with characters outside
// of the map, a space for one, stands for its own UTF-8.
std::string MappedBytes(std::string_view token) {
  std::string bytes;
  for (size_t i = 0; i < token.size();) {
    const std::optional<uint8_t> byte = kByteMap.ToByte(unicode::Next(token, &i));
    if (!byte) return std::string(token);
    bytes.push_back(static_cast<char>(*byte));
  }
  return bytes;
}

std::optional<int> HexDigit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  const char lower = static_cast<char>(c | 0x20);
  if (lower >= 'a' && lower <= 'f') return lower - 'a' + 10;
  return std::nullopt;
}

// The byte of a token <0xHH>.
std::optional<char> FallbackByte(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return std::nullopt;
  const std::optional<int> high = HexDigit(token[3]), low = HexDigit(token[4]);
  if (!high || !low) return std::nullopt;
  return static_cast<char>(*high * 16 + *low);
}

// How many bytes of `text` up to `max` copies of `content` take at its front. *count: how many.
size_t FrontOf(std::string_view text, std::string_view content, int64_t max, int64_t* count) {
  size_t bytes = 0;
  for (*count = 0; *count < max && text.substr(bytes).starts_with(content); ++*count) {
    bytes += content.size();
  }
  return bytes;
}

void ReadSteps(const nlohmann::json& spec, const std::string& where, bool* fused,
               std::vector<DecoderStep>* steps) {
  const std::string type = StringField(spec, where, "type");
  if (type == "Sequence") {
    const nlohmann::json& list = ArrayField(spec, where, "decoders");
    for (size_t i = 0; i < list.size(); ++i) {
      ReadSteps(list[i], where + ".decoders[" + std::to_string(i) + "]", fused, steps);
    }
    return;
  }
  if (type == "Fuse") {
    steps->push_back({.kind = Kind::kFuse, .pattern = {}, .content = {}});
    *fused = true;
    return;
  }
  if (type == "Strip") {
    DecoderStep step{
        .kind = *fused ? Kind::kStripFused : Kind::kStrip, .pattern = {}, .content = {}};
    step.content = StringField(spec, where, "content");
    size_t end = 0;
    if (!step.content.empty()) unicode::Next(step.content, &end);
    if (end == 0 || end != step.content.size()) {
      throw InputError(where + ".content must be one character, is " + Quoted(step.content));
    }
    step.max_strip = IntField(spec, where, "start", 0, std::numeric_limits<int32_t>::max());
    // Stripping from the back would hold text back in a stream; no published file asks for it.
    IntField(spec, where, "stop", 0, 0);
    steps->push_back(std::move(step));
    return;
  }
  if (type != "ByteLevel" && type != "ByteFallback" && type != "Replace" && type != "Metaspace") {
    throw InputError(where +
                     ".type must be ByteLevel, Replace, ByteFallback, Fuse, Strip, Metaspace or "
                     "Sequence, is " +
                     Quoted(type));
  }
  if (*fused) {
    throw InputError(where + ": " + type +
                     " must stand before ByteLevel and Fuse, where tokens are still apart");
  }
  if (type == "ByteLevel") {
    steps->push_back({.kind = Kind::kByteLevel, .pattern = {}, .content = {}});
    *fused = true;
  } else if (type == "ByteFallback") {
    steps->push_back({.kind = Kind::kByteFallback, .pattern = {}, .content = {}});
  } else if (type == "Replace") {
    steps->push_back({.kind = Kind::kReplace,
                      .pattern = StringPattern(spec, where),
                      .content = StringField(spec, where, "content")});
  } else {
    const MetaspaceOptions options = ReadMetaspace(spec, where);
    steps->push_back({.kind = Kind::kMetaspace,
                      .pattern = options.replacement,
                      .content = " ",
                      .strip_first = options.prepend != MetaspaceOptions::Prepend::kNever});
  }
}

}  // namespace

std::vector<DecoderStep> ReadDecoder(const nlohmann::json& spec) {
  std::vector<DecoderStep> steps;
  if (spec.is_null()) {
    steps.push_back({.kind = Kind::kJoin, .pattern = {}, .content = {}});
  } else {
    bool fused = false;
    ReadSteps(spec, "decoder", &fused, &steps);
  }
  return steps;
}

Detokenizer::Detokenizer(const std::vector<DecoderStep>& steps, ByteRuns byte_runs)
    : steps_(steps), byte_runs_(byte_runs), states_(steps.size()) {}

void Detokenizer::Feed(size_t step, std::string_view text, std::string* out) {
  if (step == steps_.size()) {
    out->append(text);
    return;
  }
  const DecoderStep& spec = steps_[step];
  State& state = states_[step];
  switch (spec.kind) {
    case Kind::kJoin:
      if (state.started) Feed(step + 1, " ", out);
      state.started = true;
      Feed(step + 1, text, out);
      return;
    case Kind::kByteLevel: {
      std::string complete;
      state.utf8.Push(MappedBytes(text), &complete);
      Feed(step + 1, complete, out);
      return;
    }
    case Kind::kByteFallback: {
      const std::optional<char> byte = FallbackByte(text);
      if (!byte) {
        FlushRun(step, out);
        Feed(step + 1, text, out);
        return;
      }
      state.run.push_back(*byte);
      // What is longer than a character and has not left is malformed for good.
      const bool may_be_whole = byte_runs_ == ByteRuns::kAtOnce && state.run.size() <= 4;
      if (may_be_whole && unicode::Sanitize(state.run) == state.run) FlushRun(step, out);
      return;
    }
    case Kind::kReplace:
      Feed(step + 1, ReplaceAll(text, spec.pattern, spec.content), out);
      return;
    case Kind::kMetaspace: {
      const bool strip = spec.strip_first && !state.started;
      state.started = true;
      Feed(step + 1, ReplaceAll(text, spec.pattern, strip ? "" : " "), out);
      return;
    }
    case Kind::kFuse:
      Feed(step + 1, text, out);
      return;
    case Kind::kStrip: {
      int64_t count = 0;
      text.remove_prefix(FrontOf(text, spec.content, spec.max_strip, &count));
      Feed(step + 1, text, out);
      return;
    }
    case Kind::kStripFused: {
      if (state.stripped >= 0) {
        int64_t count = 0;
        text.remove_prefix(FrontOf(text, spec.content, spec.max_strip - state.stripped, &count));
        state.stripped = text.empty() ? state.stripped + count : -1;
      }
      Feed(step + 1, text, out);
      return;
    }
  }
}

void Detokenizer::FlushRun(size_t step, std::string* out) {
  std::string run;
  run.swap(states_[step].run);
  if (run.empty()) return;
  if (unicode::Sanitize(run) == run) {
    Feed(step + 1, run, out);
    return;
  }
  std::string replacement;
  unicode::Append(unicode::kReplacement, &replacement);
  for (size_t i = 0; i < run.size(); ++i) Feed(step + 1, replacement, out);
}

void Detokenizer::Finish(std::string* out) {
  for (size_t step = 0; step < steps_.size(); ++step) {
    FlushRun(step, out);
    std::string rest;
    states_[step].utf8.Finish(&rest);
    if (!rest.empty()) Feed(step + 1, rest, out);
  }
}

}  // namespace sluice
