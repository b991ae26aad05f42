// Questions on the command line and in the JSONL files that `sluice render` writes.
#ifndef SLUICE_DEMOS_CLI_QUESTIONS_H_
#define SLUICE_DEMOS_CLI_QUESTIONS_H_

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "streaming/engine.h"

namespace sluice::cli {

struct ExpectedQuestion {
  TimedQuestion question;
  std::optional<std::string> answer;  // what is right, if known
};

// Seconds from 0 to a year: "75", "75.5", "1:15", "1:02:03.5". None: `text` is no time.
std::optional<double> ParseTime(std::string_view text);

// "text" or "text@TIME": what follows the last @ is a time if ParseTime takes it. What begins like
// a number and is no time is refused; other text belongs to the question, which stderr is told.
// Throws InputError on these and on empty text.
TimedQuestion ParseTimedQuestion(const std::string& argument);

// One JSON object a line: "question" (text), optional "at" (seconds), "answer" (text) and "clip"
// (file name). Lines whose clip is another file than `source` are passed over. Throws InputError
// naming file and line.
std::vector<ExpectedQuestion> ReadQuestions(const std::filesystem::path& jsonl,
                                            const std::string& source);

}  // namespace sluice::cli

#endif  // SLUICE_DEMOS_CLI_QUESTIONS_H_
