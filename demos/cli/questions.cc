#include "demos/cli/questions.h"

#include <charconv>
#include <fstream>
#include <nlohmann/json.hpp>

#include "runtime/error.h"
#include "streaming/logging.h"

namespace sluice::cli {
namespace {

constexpr double kMostSeconds = 366.0 * 24 * 3600;

bool LooksLikeANumber(std::string_view text) {
  if (text.empty()) return false;
  if (std::string_view("0123456789.:+-").find(text[0]) != text.npos) return true;
  double value = 0;  // "nan", "inf"
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size();
}

bool IsTime(double seconds) { return seconds >= 0 && seconds <= kMostSeconds; }

}  // namespace

std::optional<double> ParseTime(std::string_view text) {
  double seconds = 0;
  int parts = 0;
  for (bool more = true; more; ++parts) {
    const size_t colon = text.find(':');
    more = colon != text.npos;
    const std::string_view part = text.substr(0, colon);
    if (parts == 3 || part.empty() || part.find_first_not_of("0123456789.") != part.npos) return {};
    double value = 0;
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), value);
    if (error != std::errc() || end != part.data() + part.size()) return {};
    const bool whole = part.find('.') == part.npos;
    if ((more && !whole) || (parts > 0 && value >= 60)) return {};
    seconds = seconds * 60 + value;
    if (more) text.remove_prefix(colon + 1);
  }
  if (!IsTime(seconds)) return {};
  return seconds;
}

TimedQuestion ParseTimedQuestion(const std::string& argument) {
  TimedQuestion question{argument, std::nullopt};
  const size_t sign = argument.rfind('@');
  if (sign != std::string::npos) {
    const std::string after = argument.substr(sign + 1);
    const std::optional<double> seconds = ParseTime(after);
    if (seconds) {
      question.text = argument.substr(0, sign);
      question.at = MediaTime::FromSeconds(*seconds);
    } else if (LooksLikeANumber(after)) {
      throw InputError("[question] expected a time after @, as 75, 75.5, 1:15 or 0:01:15.5 up to " +
                       std::string("a year, got '") + after + "'");
    } else {
      Logger()->warn("[question] '{}' after @ is no time; the whole text is asked at the end",
                     after);
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
