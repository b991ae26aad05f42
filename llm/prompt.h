// How a checkpoint's chat template lays out a conversation about one video, in parts, so that a
// stream can be fed piece by piece and still equal the reference's one-shot prompt:
//
//   Prefix() | visual tokens ... newline row | Question(q1, first) | answer | Question(q2,
//   follow-up) | answer ...
//
// Immutable; safe for many threads.
#ifndef SLUICE_LLM_PROMPT_H_
#define SLUICE_LLM_PROMPT_H_

#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

namespace sluice {

class PromptFormat {
 public:
  // Reads the template as transformers finds it: processor_config.json "chat_template",
  // chat_template.json, chat_template.jinja, tokenizer_config.json "chat_template". Both revisions
  // published for LLaVA-OneVision are known. Throws InputError that names the file and shows the
  // beginning of a template it does not know.
  static PromptFormat Load(const std::filesystem::path& directory);

  enum class Revision {
    kSpaced,  // "<|im_start|>user <video>\nQ<|im_end|><|im_start|>assistant\n" (on the hub today)
    kChatMl,  // "<|im_start|>user\n<video>\nQ<|im_end|>\n<|im_start|>assistant\n" (older files)
  };
  explicit PromptFormat(Revision revision) : revision_(revision) {}
  Revision revision() const { return revision_; }

  // All text below is to be encoded with SpecialTokens::kMatch, except the question itself, which
  // is a user's text and is encoded with SpecialTokens::kAsText between BeforeQuestion and
  // AfterQuestion (token-wise equal to encoding the whole when the question holds no control
  // strings; tests assert it).
  std::string Prefix(
      std::string_view system = {}) const;           // ends right before the first visual token
  std::string BeforeQuestion(bool follow_up) const;  // follow_up: closes the assistant's turn first
  std::string AfterQuestion() const;                 // up to where the answer begins
  // The whole conversation's text with one <video> placeholder, for tests and tools.
  std::string Render(std::string_view system, std::string_view question) const;

 private:
  Revision revision_;
};

}  // namespace sluice

#endif  // SLUICE_LLM_PROMPT_H_
