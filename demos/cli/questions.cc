#include "demos/cli/questions.h"

#include <charconv>
#include <fstream>
#include <nlohmann/json.hpp>

#include "runtime/error.h"

namespace sluice::cli {
namespace {

constexpr double kMostSeconds = 366.0 * 24 * 3600;

bool IsTime(double seconds) { return seconds >= 0 && seconds <= kMostSeconds; }

}  // namespace

TimedQuestion ParseTimedQuestion(const std::string& argument) {
  TimedQuestion question{argument, std::nullopt};
  const size_t sign = argument.rfind('@');
  if (sign != std::string::npos && sign + 1 < argument.size()) {
    double seconds = 0;
    const char* end = argument.data() + argument.size();
    const auto [stopped, error] = std::from_chars(argument.data() + sign + 1, end, seconds);
    if (error == std::errc() && stopped == end) {
      if (!IsTime(seconds)) {
        throw InputError("[question] a time must be seconds from 0 to one year, got '" +
                         argument.substr(sign + 1) + "'");
      }
      question.text = argument.substr(0, sign);
      question.at = MediaTime::FromSeconds(seconds);
    }
  }
  if (question.text.empty()) throw InputError("[question] expected text, got '" + argument + "'");
  return question;
}

std::vector<ExpectedQuestion> ReadQuestions(const std::filesystem::path& jsonl,
                                            const std::string& source) {
  std::ifstream file(jsonl);
  if (!file) throw InputError("[questions] cannot read " + jsonl.string());
  const std::string clip = std::filesystem::path(source).filename().string();

  std::vector<ExpectedQuestion> questions;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const auto fail = [&](const std::string& what) {
      throw InputError("[questions] " + jsonl.string() + ":" + std::to_string(number) + ": " +
                       what);
    };
    const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!json.is_object()) fail("expected a JSON object");
    if (json.contains("clip") && json["clip"] != clip) continue;
    if (!json.contains("question") || !json["question"].is_string() ||
        json["question"].get_ref<const std::string&>().empty()) {
      fail("expected \"question\" with text");
    }
    ExpectedQuestion question;
    question.question.text = json["question"];
    if (json.contains("at")) {
      if (!json["at"].is_number() || !IsTime(json["at"])) fail("expected \"at\" in seconds");
      question.question.at = MediaTime::FromSeconds(json["at"]);
    }
    if (json.contains("answer")) {
      if (!json["answer"].is_string()) fail("expected \"answer\" with text");
      question.answer = json["answer"];
    }
    questions.push_back(std::move(question));
  }
  if (file.bad()) throw InputError("[questions] cannot read " + jsonl.string());
  if (questions.empty()) {
    throw InputError("[questions] " + jsonl.string() + " holds no question about " + clip);
  }
  return questions;
}

}  // namespace sluice::cli
