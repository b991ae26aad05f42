// Questions on the command line and in the JSONL files that `sluice render` writes.
#ifndef SLUICE_DEMOS_CLI_QUESTIONS_H_
#define SLUICE_DEMOS_CLI_QUESTIONS_H_

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "streaming/engine.h"

namespace sluice::cli {

struct ExpectedQuestion {
  TimedQuestion question;
  std::optional<std::string> answer;  // what is right, if known
};

// "text" or "text@seconds": what follows the last @ is a time if all of it is a number.
// Throws InputError on empty text or a time that is negative or beyond a year.
TimedQuestion ParseTimedQuestion(const std::string& argument);

// One JSON object a line: "question" (text), optional "at" (seconds), "answer" (text) and "clip"
// (file name). Lines whose clip is another file than `source` are passed over. Throws InputError
// naming file and line.
std::vector<ExpectedQuestion> ReadQuestions(const std::filesystem::path& jsonl,
                                            const std::string& source);

}  // namespace sluice::cli

#endif  // SLUICE_DEMOS_CLI_QUESTIONS_H_
