#include "demos/cli/questions.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "runtime/error.h"

namespace sluice::cli {
namespace {

using ::testing::HasSubstr;

TEST(QuestionArgumentTest, NumberBehindTheLastAtSignIsTheTime) {
  const TimedQuestion question = ParseTimedQuestion("What is visible?@3.5");
  EXPECT_EQ(question.text, "What is visible?");
  EXPECT_EQ(question.at, MediaTime::FromSeconds(3.5));
}

TEST(QuestionArgumentTest, TimesMayHaveMinutesAndHours) {
  for (const auto& [text, seconds] :
       std::vector<std::pair<std::string, double>>{{"75", 75},
                                                   {"1:45", 105},
                                                   {"00:00:01.75", 1.75},
                                                   {"1:02:03.5", 3723.5},
                                                   {"0:00", 0},
                                                   {"90:00", 5400}}) {
    EXPECT_EQ(ParseTimedQuestion("What?@" + text).at, MediaTime::FromSeconds(seconds)) << text;
  }
  for (const char* text :
       {"1:75", "1:", ":5", "1.5:00", "1:2:3:4", "12s", "1:4x", "-3", "9999:0:0"}) {
    EXPECT_THROW(ParseTimedQuestion(std::string("What?@") + text), InputError) << text;
  }
}

TEST(QuestionArgumentTest, WithoutATimeTheQuestionIsAskedAtTheEnd) {
  for (const char* text : {"What is visible?", "Who wrote to me@home?", "who@", "3 @ 4 o'clock"}) {
    const TimedQuestion question = ParseTimedQuestion(text);
    EXPECT_EQ(question.text, text);
    EXPECT_FALSE(question.at.has_value()) << text;
  }
}

TEST(QuestionArgumentTest, EarlierAtSignsBelongToTheText) {
  const TimedQuestion question = ParseTimedQuestion("me@home, where?@2");
  EXPECT_EQ(question.text, "me@home, where?");
  EXPECT_EQ(question.at, MediaTime::FromSeconds(2));
}

TEST(QuestionArgumentTest, EmptyTextAndImpossibleTimesAreRefused) {
  for (const char* text : {"", "@3", "What?@-1", "What?@nan", "What?@inf", "What?@1e30"}) {
    EXPECT_THROW(ParseTimedQuestion(text), InputError) << text;
  }
}

class QuestionFileTest : public ::testing::Test {
 protected:
  QuestionFileTest()
      : path_(std::filesystem::path(::testing::TempDir()) /
              (std::string(::testing::UnitTest::GetInstance()->current_test_info()->name()) +
               ".jsonl")) {}
  ~QuestionFileTest() override { std::filesystem::remove(path_); }

  std::vector<ExpectedQuestion> Read(const std::string& text) {
    std::ofstream(path_) << text;
    return ReadQuestions(path_, "somewhere/parade.mp4");
  }
  std::string Problem(const std::string& text) {
    try {
      Read(text);
    } catch (const InputError& error) {
      return error.what();
    }
    return "no error";
  }

  std::filesystem::path path_;
};

TEST_F(QuestionFileTest, LinesCarryQuestionTimeAndAnswer) {
  const auto questions = Read(R"({"question": "Where is the cat?", "at": 1.75, "answer": "left"})"
                              "\n\n"
                              R"({"question": "What left last?"})"
                              "\n");
  ASSERT_EQ(questions.size(), 2u);
  EXPECT_EQ(questions[0].question.text, "Where is the cat?");
  EXPECT_EQ(questions[0].question.at, MediaTime::FromSeconds(1.75));
  EXPECT_EQ(questions[0].answer, "left");
  EXPECT_FALSE(questions[1].question.at.has_value());
  EXPECT_FALSE(questions[1].answer.has_value());
}

TEST_F(QuestionFileTest, LinesAboutOtherClipsArePassedOver) {
  const auto questions = Read(R"({"clip": "other.mp4", "question": "one"})"
                              "\n"
                              R"({"clip": "parade.mp4", "question": "two"})");
  ASSERT_EQ(questions.size(), 1u);
  EXPECT_EQ(questions[0].question.text, "two");
}

TEST_F(QuestionFileTest, ProblemsNameFileAndLine) {
  const std::string good = R"({"question": "one"})"
                           "\n";
  for (const char* line : {"not json", "[1]", R"({"at": 3})", R"({"question": 7})",
                           R"({"question": ""})", R"({"question": "x", "at": "3"})",
                           R"({"question": "x", "at": -3})", R"({"question": "x", "answer": 1})"}) {
    EXPECT_THAT(Problem(good + line), HasSubstr(path_.string() + ":2:")) << line;
  }
}

TEST_F(QuestionFileTest, MissingFileAndFileWithoutQuestionsAreRefused) {
  EXPECT_THAT(Problem(""), HasSubstr("no question about parade.mp4"));
  std::filesystem::remove(path_);
  EXPECT_THROW(ReadQuestions(path_, "parade.mp4"), InputError);
}

}  // namespace
}  // namespace sluice::cli
