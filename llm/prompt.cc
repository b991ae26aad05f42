#include "llm/prompt.h"

#include <algorithm>
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

// The default of transformers' converter for LLaVA-NeXT with the Yi decoder.
constexpr std::string_view kYiTemplate =
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{{'<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

// llava-hf/llava-1.5-*-hf and llava-v1.6-vicuna-*-hf, chat_template.json.
constexpr std::string_view kVicunaTemplate =
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}";

// The default of transformers' converter for LLaVA-NeXT-Video. It renders a system prompt twice.
constexpr std::string_view kConvertedVicunaTemplate =
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ message['content'][0]['text'] }}{% else %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}";

// llava-hf/llava-v1.6-mistral-7b-hf, chat_template.json. answer_end: "</s> "; in earlier revisions
// "<\\s> ", as Jinja escapes it.
std::string MistralTemplate(std::string_view answer_end) {
  return "{% for message in messages %}{% if message['role'] == 'system' %}"
         "{{ '<<SYS>>\\n' + message['content'][0]['text'] + '\\n<</SYS>>\\n\\n' }}"
         "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
         "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
         "{{ '<image>\\n' }}{% endfor %}"
         "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
         "{{ content['text'] }}{% endfor %}{{' [/INST]' }}{% elif message['role'] == 'assistant' %}"
         "{{ ' ' + message['content'][0]['text'] + '" +
         std::string(answer_end) +
         "'}}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
         "{% endif %}{% endfor %}";
}

// The default of transformers' converter for LLaVA-NeXT with the Mistral decoder.
constexpr std::string_view kConvertedMistralTemplate =
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{{' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'][0]['text'] + '<\\\\s> '}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}";

// llava-hf/llama3-llava-next-8b-hf, chat_template.json.
constexpr std::string_view kLlama3Template =
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\\n' + content['text'] + '<|eot_id|>' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}";

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
        case 's':  // no escape: both characters stay
          value += "\\s";
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

// A template's lexemes with every run of loops over images and videos made one lexeme: which kinds
// a template lists, and in which order, depends on its processor, not on the conversation.
struct Skeleton {
  std::vector<std::string> lexemes;
  bool images = false, videos = false;
};

// One such loop at `at`: *kind and what it renders, *text. Returns its number of lexemes, or 0.
size_t MatchMediaLoop(std::span<const std::string> lexemes, std::string* kind, std::string* text) {
  static const std::vector<std::string> kLoop = *JinjaLexer::Lex(
      "{% for content in message['content'] | selectattr('type', 'equalto', '') %}{{ '' }}"
      "{% endfor %}");
  if (lexemes.size() < kLoop.size()) return 0;
  int blank = 0;
  for (size_t i = 0; i < kLoop.size(); ++i) {
    if (kLoop[i] == "s" && lexemes[i].starts_with('s')) {
      *(blank++ == 0 ? kind : text) = lexemes[i].substr(1);
    } else if (kLoop[i] != lexemes[i]) {
      return 0;
    }
  }
  return kLoop.size();
}

std::optional<Skeleton> ReadSkeleton(std::string_view source) {
  const auto lexemes = JinjaLexer::Lex(source);
  if (!lexemes) return std::nullopt;
  Skeleton skeleton;
  for (size_t i = 0; i < lexemes->size();) {
    std::string kind, text;
    const size_t count = MatchMediaLoop(std::span(*lexemes).subspan(i), &kind, &text);
    bool* const seen = kind == "image" ? &skeleton.images : &skeleton.videos;
    const std::string placeholder = "<" + kind + ">";
    if (count == 0 || (kind != "image" && kind != "video") || *seen ||
        !text.starts_with(placeholder)) {
      skeleton.lexemes.push_back((*lexemes)[i++]);
      continue;
    }
    *seen = true;
    // 'm' is media; what follows a placeholder is part of the conversation's text.
    const std::string media = "m" + text.substr(placeholder.size());
    if (skeleton.lexemes.empty() || skeleton.lexemes.back() != media) {
      skeleton.lexemes.push_back(media);
    }
    i += count;
  }
  return skeleton;
}

using Revision = PromptFormat::Revision;

std::vector<std::pair<std::string, Revision>> KnownTemplates() {
  return {{std::string(kSpacedTemplate), Revision::kSpaced},
          {std::string(kChatMlTemplate), Revision::kChatMl},
          {std::string(kYiTemplate), Revision::kChatMl},
          {std::string(kVicunaTemplate), Revision::kVicuna},
          {std::string(kConvertedVicunaTemplate), Revision::kConvertedVicuna},
          {MistralTemplate("</s> "), Revision::kMistral},
          {MistralTemplate("<\\\\s> "), Revision::kMistralBackslash},
          {std::string(kConvertedMistralTemplate), Revision::kConvertedMistral},
          {std::string(kLlama3Template), Revision::kLlama3}};
}

}  // namespace

// What a revision puts around the parts of a conversation.
struct PromptFormat::Layout {
  Revision revision;
  const char* name;
  int system_times;  // how often a system prompt is rendered; 0: it has no place
  std::string_view system_begin, system_end;
  std::string_view user_begin;        // before the video
  std::string_view later_user_begin;  // of a turn without one
  std::string_view video_end;
  std::string_view user_end;
  std::string_view ask;           // what an answer is generated behind
  std::string_view answer_begin;  // what an answer of the past stands behind
  std::string_view answer_end;
};

const PromptFormat::Layout& PromptFormat::layout() const {
  static constexpr Layout kLayouts[] = {
      {Revision::kSpaced, "spaced", 1, "<|im_start|>system \n", "<|im_end|>", "<|im_start|>user ",
       "<|im_start|>user \n", "\n", "<|im_end|>", "<|im_start|>assistant\n",
       "<|im_start|>assistant \n", "<|im_end|>"},
      {Revision::kChatMl, "chatml", 1, "<|im_start|>system\n", "<|im_end|>\n", "<|im_start|>user\n",
       "<|im_start|>user\n", "\n", "<|im_end|>\n", "<|im_start|>assistant\n",
       "<|im_start|>assistant\n", "<|im_end|>\n"},
      {Revision::kVicuna, "vicuna", 1, "", " ", "USER: ", "USER: ", "\n", " ",
       "ASSISTANT:", "ASSISTANT: ", " "},
      {Revision::kConvertedVicuna, "converted_vicuna", 2, "", " ", "USER: ", "USER: ", "\n", " ",
       "ASSISTANT:", "ASSISTANT: ", " "},
      {Revision::kMistral, "mistral", 1, "<<SYS>>\n", "\n<</SYS>>\n\n", "[INST] ", "[INST] ", "\n",
       " [/INST]", "", " ", "</s> "},
      {Revision::kMistralBackslash, "mistral_backslash", 1, "<<SYS>>\n", "\n<</SYS>>\n\n",
       "[INST] ", "[INST] ", "\n", " [/INST]", "", " ", "<\\s> "},
      {Revision::kConvertedMistral, "converted_mistral", 0, "", "", "[INST] ", "[INST] ", "\n",
       " [/INST]", "", " ", "<\\s> "},
      {Revision::kLlama3, "llama3", 1, "<|start_header_id|>system<|end_header_id|>\n\n\n",
       "<|eot_id|>", "<|start_header_id|>user<|end_header_id|>\n\n",
       "<|start_header_id|>user<|end_header_id|>\n\n\n", "\n", "<|eot_id|>",
       "<|start_header_id|>assistant<|end_header_id|>\n\n",
       "<|start_header_id|>assistant<|end_header_id|>\n\n\n", "<|eot_id|>"},
  };
  for (const Layout& layout : kLayouts) {
    if (layout.revision == revision_) return layout;
  }
  throw Error("[prompt] revision " + std::to_string(static_cast<int>(revision_)) +
              " has no layout");
}

namespace {

// Ids of `text` as they come behind more text: a vocabulary may put a space before what begins a
// text, which this one does not. A control character, which merges with nothing, stands in for what
// comes before and is dropped.
std::vector<int32_t> EncodeBehindText(const Tokenizer& tokenizer, const std::string& text) {
  const std::string mark = "\x01";
  const std::vector<int32_t> begin = tokenizer.Encode(mark, SpecialTokens::kAsText);
  std::vector<int32_t> ids = tokenizer.Encode(mark + text, SpecialTokens::kAsText);
  if (ids.size() < begin.size() || !std::equal(begin.begin(), begin.end(), ids.begin())) {
    throw InputError(
        "[prompt] the vocabulary must not merge U+0001 with what follows, it does in " +
        Quoted(mark + text));
  }
  ids.erase(ids.begin(), ids.begin() + static_cast<int64_t>(begin.size()));
  return ids;
}

// Ids of `text` as they come behind the control string `control`. Where a vocabulary begins only
// the very first text with a space, this is not the first.
std::vector<int32_t> EncodeBehindControl(const Tokenizer& tokenizer, std::string_view control,
                                         const std::string& text) {
  const std::optional<int32_t> id = tokenizer.TokenToId(control);
  std::vector<int32_t> first = tokenizer.Encode("x");
  if (id) first.insert(first.begin(), *id);
  const bool like_first = !id || tokenizer.Encode(std::string(control) + "x") == first;
  return like_first ? tokenizer.Encode(text, SpecialTokens::kAsText)
                    : EncodeBehindText(tokenizer, text);
}

void CheckLength(const char* what, std::string_view text) {
  if (text.size() <= kMostPromptBytes) return;
  throw InputError(std::string("[prompt] ") + what + " has " + std::to_string(text.size()) +
                   " bytes, expected at most " + std::to_string(kMostPromptBytes) +
                   "; make it shorter");
}

// Where the last control string of `text` ends, and where the first begins: all of them stand in
// angle brackets.
size_t ControlEnd(const Tokenizer& tokenizer, std::string_view text) {
  for (size_t end = text.rfind('>'); end != std::string_view::npos && end > 0;
       end = text.rfind('>', end - 1)) {
    const size_t begin = text.rfind('<', end);
    if (begin == std::string_view::npos) break;
    if (tokenizer.TokenToId(text.substr(begin, end + 1 - begin))) return end + 1;
  }
  return 0;
}
size_t ControlBegin(const Tokenizer& tokenizer, std::string_view text) {
  for (size_t begin = text.find('<'); begin != std::string_view::npos;
       begin = text.find('<', begin + 1)) {
    const size_t end = text.find('>', begin);
    if (end == std::string_view::npos) break;
    if (tokenizer.TokenToId(text.substr(begin, end + 1 - begin))) return begin;
  }
  return text.size();
}

}  // namespace

PromptFormat PromptFormat::Load(const std::filesystem::path& directory) {
  const Source source = FindTemplate(directory);
  const auto skeleton = ReadSkeleton(source.text);
  if (skeleton && (skeleton->images || skeleton->videos)) {
    for (const auto& [jinja, revision] : KnownTemplates()) {
      if (skeleton->lexemes == ReadSkeleton(jinja)->lexemes) {
        return PromptFormat(revision, skeleton->videos ? Media::kVideo : Media::kImage);
      }
    }
  }
  throw InputError("[prompt] " + source.file.string() +
                   ": the chat template must be one published for LLaVA-OneVision, LLaVA-1.5, "
                   "LLaVA-NeXT or LLaVA-NeXT-Video, is " +
                   Quoted(source.text));
}

const char* PromptFormat::name() const { return layout().name; }

std::string PromptFormat::Prefix(std::string_view system) const {
  std::string text;
  if (!system.empty()) {
    if (layout().system_times == 0) {
      throw InputError(
          "[prompt] the checkpoint's chat template has no place for a system prompt, got " +
          Quoted(std::string(system)));
    }
    text += layout().system_begin;
    for (int i = 0; i < layout().system_times; ++i) text += system;
    text += layout().system_end;
  }
  return text += layout().user_begin;
}

std::vector<int32_t> PromptFormat::EncodePrefix(const Tokenizer& tokenizer,
                                                std::string_view system) const {
  CheckLength("the system prompt", system);
  if (system.empty()) {
    return tokenizer.Encode(Prefix(), SpecialTokens::kMatch, /*add_special=*/true);
  }
  Prefix(system);  // whether it has a place
  // As for a question, only the template's control strings are encoded by themselves.
  const std::string before(layout().system_begin);
  const std::string after = std::string(layout().system_end) + std::string(layout().user_begin);
  const size_t lead_end = ControlEnd(tokenizer, before),
               tail_begin = ControlBegin(tokenizer, after);
  std::string text = before.substr(lead_end);
  for (int i = 0; i < layout().system_times; ++i) text += system;
  text += after.substr(0, tail_begin);
  // What the post-processor adds comes from encoding nothing.
  std::vector<int32_t> ids = tokenizer.Encode("", SpecialTokens::kMatch, /*add_special=*/true);
  const auto append = [&ids](const std::vector<int32_t>& more) {
    ids.insert(ids.end(), more.begin(), more.end());
  };
  if (lead_end > 0) {
    append(tokenizer.Encode(before.substr(0, lead_end)));
    append(EncodeBehindControl(tokenizer, before.substr(ControlBegin(tokenizer, before), lead_end),
                               text));
  } else {
    append(tokenizer.Encode(text, SpecialTokens::kAsText));
  }
  if (tail_begin < after.size()) append(tokenizer.Encode(after.substr(tail_begin)));
  return ids;
}

std::string PromptFormat::BeforeQuestion(bool follow_up) const {
  if (!follow_up) return std::string(layout().video_end);
  return std::string(layout().answer_end) + std::string(layout().later_user_begin);
}

std::string PromptFormat::AfterQuestion() const {
  return std::string(layout().user_end) + std::string(layout().ask);
}

std::vector<int32_t> PromptFormat::EncodeQuestion(const Tokenizer& tokenizer,
                                                  std::string_view question, bool follow_up) const {
  CheckLength("the question", question);
  // The template's text around the question must not be cut from it: "\n" and a question that
  // begins with "\n" are one token together, and a Llama vocabulary begins every text with a space
  // of its own. Only the control strings are encoded by themselves.
  const std::string before = BeforeQuestion(follow_up), after = AfterQuestion();
  const size_t lead_end = ControlEnd(tokenizer, before),
               tail_begin = ControlBegin(tokenizer, after);
  std::vector<int32_t> ids;
  const auto append = [&ids](const std::vector<int32_t>& more) {
    ids.insert(ids.end(), more.begin(), more.end());
  };
  if (lead_end > 0) append(tokenizer.Encode(before.substr(0, lead_end)));
  const std::string text =
      before.substr(lead_end) + std::string(question) + after.substr(0, tail_begin);
  const bool behind_text = lead_end == 0 && follow_up;
  append(behind_text ? EncodeBehindText(tokenizer, text)
                     : EncodeBehindControl(tokenizer, placeholder(), text));
  if (tail_begin < after.size()) append(tokenizer.Encode(after.substr(tail_begin)));
  return ids;
}

std::string PromptFormat::Render(std::string_view system, std::span<const Turn> turns,
                                 bool generate) const {
  const Layout& layout = this->layout();
  std::string text = Prefix(system);
  for (size_t i = 0; i < turns.size(); ++i) {
    if (i == 0) {
      text += placeholder();
      text += layout.video_end;
    } else {
      text += layout.later_user_begin;
    }
    text += turns[i].question;
    text += layout.user_end;
    if (turns[i].answer.empty()) continue;
    text += layout.answer_begin;
    text += turns[i].answer;
    text += layout.answer_end;
  }
  if (generate) text += layout.ask;
  return text;
}

std::string PromptFormat::Render(std::string_view system, std::string_view question) const {
  const Turn turn{std::string(question), {}};
  return Render(system, std::span(&turn, 1));
}

}  // namespace sluice
