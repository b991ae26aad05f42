// How a checkpoint's chat template lays out a conversation about one video, in parts, so that a
// stream can be fed piece by piece and still equal the reference's one-shot prompt:
//
//   Prefix() | visual tokens ... newline row | question 1 | answer | question 2, follow-up | answer
//
// Immutable; safe for many threads.
#ifndef SLUICE_LLM_PROMPT_H_
#define SLUICE_LLM_PROMPT_H_

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "llm/tokenizer.h"

namespace sluice {

// A question, a system prompt and an instruction have at most so many bytes, as text of any
// language that fills a context of 32,768 tokens has: tokenized in a tenth of a second, whatever
// they hold.
inline constexpr size_t kMostPromptBytes = size_t{128} << 10;

class PromptFormat {
 public:
  // Reads the template as transformers finds it: processor_config.json "chat_template",
  // chat_template.json, chat_template.jinja, tokenizer_config.json "chat_template"; in JSON a
  // string, a list of {"name", "template"} or an object by name, of which "default" counts. The
  // ones published for the LLaVA families are known (a list in prompt.cc), compared as Jinja reads
  // them: comments, spacing inside tags and whitespace that rendering drops do not matter, nor do
  // order and presence of the loops that list images and videos, if one is there. Throws InputError
  // that names the file and shows the beginning of a template it does not know.
  static PromptFormat Load(const std::filesystem::path& directory);

  enum class Revision {
    kSpaced,  // "<|im_start|>user <video>\nQ<|im_end|><|im_start|>assistant\n" (on the hub today)
    kChatMl,  // "<|im_start|>user\n<video>\nQ<|im_end|>\n<|im_start|>assistant\n" (older files)
    kVicuna,  // "USER: <video>\nQ ASSISTANT:"
    kConvertedVicuna,   // as kVicuna, but a system prompt is rendered twice
    kMistral,           // "[INST] <video>\nQ [/INST]", answers end with "</s> "
    kMistralBackslash,  // as kMistral, but answers end with "<\s> " (older files)
    kConvertedMistral,  // as kMistralBackslash, without system prompts
    // "<|start_header_id|>user<|end_header_id|>\n\n<video>\nQ<|eot_id|>"; every turn's text begins
    // behind a line end of its own, also where there is no video
    kLlama3,
  };
  // What stands for the video: templates of models that know only images have no <video>.
  enum class Media { kVideo, kImage };
  explicit PromptFormat(Revision revision, Media media = Media::kVideo)
      : revision_(revision), media_(media) {}
  Revision revision() const { return revision_; }
  const char* name() const;  // of the revision: "spaced", "chatml", "vicuna", ...
  std::string_view placeholder() const { return media_ == Media::kVideo ? "<video>" : "<image>"; }

  // Up to right before the first visual token, to be encoded with SpecialTokens::kMatch. An empty
  // `system` means no system turn; no template inserts one of its own. Throws InputError
  // where the template has no place for one.
  std::string Prefix(std::string_view system = {}) const;
  // Its ids, behind what the tokenizer's post-processor puts at the beginning of a text (<s>).
  // `system` is encoded with SpecialTokens::kAsText, what surrounds it with kMatch: equal to what
  // encoding Prefix(system) gives whenever `system` holds no control strings. Throws InputError as
  // Prefix does, and on more than kMostPromptBytes.
  std::vector<int32_t> EncodePrefix(const Tokenizer& tokenizer, std::string_view system = {}) const;

  // What surrounds a question, to be encoded with SpecialTokens::kMatch, while the question is a
  // user's text. EncodeQuestion does both and knows that text encodes differently when it is cut.
  std::string BeforeQuestion(bool follow_up) const;  // follow_up: closes the assistant's turn first
  std::string AfterQuestion() const;                 // up to where the answer begins

  // Ids of BeforeQuestion, the question with SpecialTokens::kAsText, and AfterQuestion. Equal to
  // what encoding the whole prompt gives for them whenever the question holds no control strings;
  // a follow-up's, to what it gives behind an answer that ends without a space. Throws InputError
  // on more than kMostPromptBytes.
  std::vector<int32_t> EncodeQuestion(const Tokenizer& tokenizer, std::string_view question,
                                      bool follow_up) const;

  // A turn of the conversation: an empty answer is one that is still to come.
  struct Turn {
    std::string question;
    std::string answer;
  };
  // The whole conversation's text with one placeholder in the first question, up to where
  // the next answer begins if `generate`. Equals the reference's apply_chat_template. kSpaced
  // renders an answer of the past behind "assistant \n" but asks for one with "assistant\n", so a
  // stream, which keeps what it asked with, differs there by that one space. Behind "ASSISTANT:"
  // the space is the answer's own.
  std::string Render(std::string_view system, std::span<const Turn> turns,
                     bool generate = true) const;
  std::string Render(std::string_view system, std::string_view question) const;

 private:
  struct Layout;
  const Layout& layout() const;

  Revision revision_;
  Media media_;
};

}  // namespace sluice

#endif  // SLUICE_LLM_PROMPT_H_
