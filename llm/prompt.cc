#include "llm/prompt.h"

#include <optional>
#include <system_error>
#include <utility>

#include "llm/json_file.h"
#include "llm/unicode.h"
#include "runtime/error.h"

namespace sluice {
namespace {

constexpr uint64_t kMaxConfigBytes = 16u << 20;
constexpr uint64_t kMaxTemplateBytes = 1u << 20;

// llava-hf/llava-onevision-qwen2-*-ov-hf, chat_template.json.
constexpr std::string_view kSpacedTemplate =
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\\n' + content['text'] }}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\\n' + content['text'] }}{% endgeneration %}{% endfor %}"
    "{% endif %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

// The default of transformers' converter for these checkpoints.
constexpr std::string_view kChatMlTemplate =
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>\\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] }}{% endgeneration %}{% endfor %}"
    "{% endif %}{{'<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

bool IsSpace(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

// A template as Jinja reads it under the reference's settings (trim_blocks, lstrip_blocks): a list
// of texts and of lexemes inside tags. Two templates with equal lists render equally.
class JinjaLexer {
 public:
  // Each element is one letter for its kind and its text: 'd' data, '{' a tag's opening, 'w' a word
  // or number, 's' a string literal's value, 'p' a punctuation character. Text that is no
  // well-formed template gives nullopt.
  static std::optional<std::vector<std::string>> Lex(std::string_view source) {
    JinjaLexer lexer(source);
    if (!lexer.Run()) return std::nullopt;
    return std::move(lexer.out_);
  }

 private:
  explicit JinjaLexer(std::string_view source) {
    // Jinja reads every kind of line end as \n and drops one at the end of the file.
    for (size_t i = 0; i < source.size(); ++i) {
      if (source[i] == '\r' && i + 1 < source.size() && source[i + 1] == '\n') continue;
      text_ += source[i] == '\r' ? '\n' : source[i];
    }
    if (text_.ends_with('\n')) text_.pop_back();
  }

  bool Run() {
    std::string data;
    size_t floor = 0;  // where in `data` the text behind the last comment begins
    while (true) {
      const size_t open = FindOpening();
      data += text_.substr(at_, open - at_);
      if (open == std::string::npos) {
        EmitData(&data);
        return true;
      }
      at_ = open + 2;
      const char kind = text_[open + 1];
      const char sign = at_ < text_.size() ? text_[at_] : '\0';
      if (sign == '-' || sign == '+') ++at_;
      if (sign == '-') {
        while (data.size() > floor && IsSpace(data.back())) data.pop_back();
      } else if (sign != '+' && kind != '{') {
        StripIndent(&data, open);
      }
      std::vector<std::string> tag;
      if (kind == '#' ? !SkipComment() : !ReadTag(kind, &tag)) return false;
      // Comments, and the marks for the training loss, render as nothing: what stands on both sides
      // of them is one text.
      const bool is_mark =
          kind == '%' && tag.size() == 1 && (tag[0] == "wgeneration" || tag[0] == "wendgeneration");
      if (kind != '#' && !is_mark) {
        EmitData(&data);
        out_.push_back(std::string("{") + kind);
        for (std::string& lexeme : tag) out_.push_back(std::move(lexeme));
      }
      floor = data.size();
    }
  }

  void EmitData(std::string* data) {
    if (!data->empty()) out_.push_back("d" + *data);
    data->clear();
  }

  size_t FindOpening() const {
    for (size_t i = at_; i + 1 < text_.size(); ++i) {
      if (text_[i] == '{' && (text_[i + 1] == '%' || text_[i + 1] == '{' || text_[i + 1] == '#')) {
        return i;
      }
    }
    return std::string::npos;
  }

  // lstrip_blocks: spaces before a block go if nothing else stands before it on its line.
  void StripIndent(std::string* data, size_t open) const {
    size_t begin = open;
    while (begin > tag_end_ && IsSpace(text_[begin - 1]) && text_[begin - 1] != '\n') --begin;
    const bool at_line_start = begin == 0 || text_[begin - 1] == '\n';
    if (at_line_start) data->resize(data->size() - (open - begin));
  }

  // Behind a closing sign: '-' drops all whitespace; a block or comment drops one line end.
  void AfterTag(bool minus, bool plus, char kind) {
    if (minus) {
      while (at_ < text_.size() && IsSpace(text_[at_])) ++at_;
    } else if (!plus && kind != '{' && at_ < text_.size() && text_[at_] == '\n') {
      ++at_;
    }
    tag_end_ = at_;
  }

  bool SkipComment() {
    const size_t end = text_.find("#}", at_);
    if (end == std::string::npos) return false;
    const char sign = end > at_ ? text_[end - 1] : '\0';
    at_ = end + 2;
    AfterTag(sign == '-', sign == '+', '#');
    return true;
  }

  bool ReadTag(char kind, std::vector<std::string>* tag) {
    const std::string closing = kind == '%' ? "%}" : "}}";
    int open_brackets = 0;
    while (at_ < text_.size()) {
      const char c = text_[at_];
      if (IsSpace(c)) {
        ++at_;
        continue;
      }
      if (open_brackets == 0) {
        const bool sign = c == '-' || (c == '+' && kind == '%');
        if (text_.compare(at_ + (sign ? 1 : 0), 2, closing) == 0) {
          at_ += sign ? 3 : 2;
          AfterTag(sign && c == '-', sign && c == '+', kind);
          return true;
        }
      }
      if (c == '\'' || c == '"') {
        if (!ReadString(tag)) return false;
        continue;
      }
      const auto is_word = [](char w) {
        return w == '_' || (w >= '0' && w <= '9') || (w >= 'a' && w <= 'z') ||
               (w >= 'A' && w <= 'Z') || static_cast<unsigned char>(w) >= 0x80;
      };
      if (is_word(c)) {
        std::string word = "w";
        while (at_ < text_.size() && is_word(text_[at_])) word += text_[at_++];
        tag->push_back(std::move(word));
        continue;
      }
      if (c == '(' || c == '[' || c == '{') ++open_brackets;
      if (c == ')' || c == ']' || c == '}') --open_brackets;
      tag->push_back(std::string("p") + c);
      ++at_;
    }
    return false;
  }

  // The value of a literal. Only the escapes below occur in templates; one with others stays
  // unknown, which is what a template with other strings is anyway.
  bool ReadString(std::vector<std::string>* tag) {
    const char quote = text_[at_++];
    std::string value = "s";
    for (; at_ < text_.size(); ++at_) {
      const char c = text_[at_];
      if (c == quote) {
        ++at_;
        tag->push_back(std::move(value));
        return true;
      }
      if (c != '\\') {
        value += c;
        continue;
      }
      if (++at_ >= text_.size()) return false;
      switch (text_[at_]) {
        case 'n':
          value += '\n';
          break;
        case 't':
          value += '\t';
          break;
        case '\\':
        case '\'':
        case '"':
          value += text_[at_];
          break;
        default:
          return false;
      }
    }
    return false;
  }

  std::string text_;
  size_t at_ = 0;
  size_t tag_end_ = 0;  // where the last tag ended: no indent reaches before it
  std::vector<std::string> out_;
};

// The template in a "chat_template" field: a string, or several by name of which "default" counts.
std::string TemplateOf(const nlohmann::json& value, const std::string& where) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_object() && value.contains("default")) return StringField(value, where, "default");
  if (value.is_array()) {
    for (size_t i = 0; i < value.size(); ++i) {
      const std::string at = where + "[" + std::to_string(i) + "]";
      if (StringField(value[i], at, "name") == "default") {
        return StringField(value[i], at, "template");
      }
    }
  }
  throw InputError(where + " must be a string or hold a template named default, is " +
                   Quoted(value.dump()));
}

struct Source {
  std::filesystem::path file;
  std::string text;
};

Source FindTemplate(const std::filesystem::path& directory) {
  for (const char* name : {"processor_config.json", "chat_template.json", "chat_template.jinja",
                           "tokenizer_config.json"}) {
    const std::filesystem::path file = directory / name;
    std::error_code error;
    if (!std::filesystem::exists(file, error)) continue;
    if (file.extension() == ".jinja")
      return {file, ReadSmallFile("prompt", file, kMaxTemplateBytes)};
    const nlohmann::json config = ReadJsonFile("prompt", file, kMaxConfigBytes);
    try {
      if (!config.is_object()) {
        throw InputError(std::string("must hold an object, holds ") + config.type_name());
      }
      const auto found = config.find("chat_template");
      if (found == config.end() || found->is_null()) continue;
      return {file, TemplateOf(*found, "chat_template")};
    } catch (const InputError& error) {
      throw InputError("[prompt] " + file.string() + ": " + error.what());
    }
  }
  throw InputError("[prompt] " + directory.string() +
                   ": no chat template in processor_config.json, chat_template.json, "
                   "chat_template.jinja or tokenizer_config.json");
}

}  // namespace

PromptFormat PromptFormat::Load(const std::filesystem::path& directory) {
  const Source source = FindTemplate(directory);
  if (const auto lexed = JinjaLexer::Lex(source.text)) {
    if (lexed == JinjaLexer::Lex(kSpacedTemplate)) return PromptFormat(Revision::kSpaced);
    if (lexed == JinjaLexer::Lex(kChatMlTemplate)) return PromptFormat(Revision::kChatMl);
  }
  throw InputError("[prompt] " + source.file.string() +
                   ": the chat template must be one published for LLaVA-OneVision, is " +
                   Quoted(source.text));
}

std::string PromptFormat::Prefix(std::string_view system) const {
  const bool spaced = revision_ == Revision::kSpaced;
  std::string text;
  if (!system.empty()) {
    text += spaced ? "<|im_start|>system \n" : "<|im_start|>system\n";
    text += system;
    text += spaced ? "<|im_end|>" : "<|im_end|>\n";
  }
  return text + (spaced ? "<|im_start|>user " : "<|im_start|>user\n");
}

std::string PromptFormat::BeforeQuestion(bool follow_up) const {
  if (!follow_up) return "\n";
  return revision_ == Revision::kSpaced ? "<|im_end|><|im_start|>user \n"
                                        : "<|im_end|>\n<|im_start|>user\n";
}

std::string PromptFormat::AfterQuestion() const {
  return revision_ == Revision::kSpaced ? "<|im_end|><|im_start|>assistant\n"
                                        : "<|im_end|>\n<|im_start|>assistant\n";
}

std::vector<int32_t> PromptFormat::EncodeQuestion(const Tokenizer& tokenizer,
                                                  std::string_view question, bool follow_up) const {
  // The text between the last control string and the question must not be cut from the question:
  // "\n" and a question that begins with "\n" are one token together. No control string is in it,
  // so that encoding it as text changes nothing.
  const std::string before = BeforeQuestion(follow_up);
  const size_t control_end = before.rfind('>') == std::string::npos ? 0 : before.rfind('>') + 1;
  std::vector<int32_t> ids = tokenizer.Encode(before.substr(0, control_end));
  const auto append = [&ids](const std::vector<int32_t>& more) {
    ids.insert(ids.end(), more.begin(), more.end());
  };
  append(
      tokenizer.Encode(before.substr(control_end) + std::string(question), SpecialTokens::kAsText));
  append(tokenizer.Encode(AfterQuestion()));
  return ids;
}

std::string PromptFormat::Render(std::string_view system, std::span<const Turn> turns,
                                 bool generate) const {
  const bool spaced = revision_ == Revision::kSpaced;
  const std::string end = spaced ? "<|im_end|>" : "<|im_end|>\n";
  std::string text = Prefix(system);
  for (size_t i = 0; i < turns.size(); ++i) {
    if (i == 0) {
      text += "<video>\n";
    } else {
      text += spaced ? "<|im_start|>user \n" : "<|im_start|>user\n";
    }
    text += turns[i].question + end;
    if (turns[i].answer.empty()) continue;
    text += spaced ? "<|im_start|>assistant \n" : "<|im_start|>assistant\n";
    text += turns[i].answer + end;
  }
  if (generate) text += "<|im_start|>assistant\n";
  return text;
}

std::string PromptFormat::Render(std::string_view system, std::string_view question) const {
  const Turn turn{std::string(question), {}};
  return Render(system, std::span(&turn, 1));
}

}  // namespace sluice
