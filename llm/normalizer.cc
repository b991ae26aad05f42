#include "llm/normalizer.h"

#include <utility>
#include <vector>

#include "llm/json_file.h"
#include "llm/unicode.h"
#include "runtime/error.h"

namespace sluice {
namespace {

class Nfc : public Normalizer {
 public:
  std::string Normalize(std::string text) const override { return unicode::Nfc(text); }
};

class Prepend : public Normalizer {
 public:
  explicit Prepend(std::string prefix) : prefix_(std::move(prefix)) {}
  std::string Normalize(std::string text) const override {
    return text.empty() ? text : prefix_ + text;
  }

 private:
  std::string prefix_;
};

class Replace : public Normalizer {
 public:
  Replace(std::string pattern, std::string content)
      : pattern_(std::move(pattern)), content_(std::move(content)) {}
  std::string Normalize(std::string text) const override {
    return ReplaceAll(text, pattern_, content_);
  }

 private:
  std::string pattern_, content_;
};

class Sequence : public Normalizer {
 public:
  explicit Sequence(std::vector<std::unique_ptr<const Normalizer>> steps)
      : steps_(std::move(steps)) {}
  std::string Normalize(std::string text) const override {
    for (const auto& step : steps_) text = step->Normalize(std::move(text));
    return text;
  }

 private:
  std::vector<std::unique_ptr<const Normalizer>> steps_;
};

}  // namespace

std::unique_ptr<const Normalizer> MakeNormalizer(const nlohmann::json& spec,
                                                 const std::string& where) {
  std::vector<std::unique_ptr<const Normalizer>> steps;
  if (spec.is_null()) return std::make_unique<Sequence>(std::move(steps));
  const std::string type = StringField(spec, where, "type");
  if (type == "NFC") return std::make_unique<Nfc>();
  if (type == "Prepend") return std::make_unique<Prepend>(StringField(spec, where, "prepend"));
  if (type == "Replace") {
    return std::make_unique<Replace>(StringPattern(spec, where),
                                     StringField(spec, where, "content"));
  }
  if (type == "Sequence") {
    const nlohmann::json& list = ArrayField(spec, where, "normalizers");
    for (size_t i = 0; i < list.size(); ++i) {
      steps.push_back(MakeNormalizer(list[i], where + ".normalizers[" + std::to_string(i) + "]"));
    }
    return std::make_unique<Sequence>(std::move(steps));
  }
  throw InputError(where + ".type must be NFC, Prepend, Replace or Sequence, is " + Quoted(type));
}

std::string ReplaceAll(std::string_view text, std::string_view pattern, std::string_view content) {
  std::string out;
  out.reserve(text.size());
  size_t from = 0;
  for (size_t at; (at = text.find(pattern, from)) != std::string_view::npos;) {
    out += text.substr(from, at - from);
    out += content;
    from = at + pattern.size();
  }
  out += text.substr(from);
  return out;
}

std::string StringPattern(const nlohmann::json& spec, const std::string& where) {
  const nlohmann::json& pattern = AnyField(spec, where, "pattern");
  if (pattern.is_object() && pattern.contains("Regex")) {
    throw InputError(where + ".pattern must be a String, is the unknown Regex " +
                     Quoted(StringField(pattern, where + ".pattern", "Regex")));
  }
  std::string text = StringField(pattern, where + ".pattern", "String");
  if (text.empty()) throw InputError(where + ".pattern.String must not be empty");
  return text;
}

}  // namespace sluice
