#include "proto/convert.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace sluice {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using ::testing::Not;

RunResult SampleResult() {
  RunResult result;
  result.source.width = 640;
  result.source.height = 360;
  result.source.codec = "H.264";
  result.source.duration = MediaTime::FromSeconds(12.5);
  result.frames = 25;
  TimedAnswer answer;
  answer.question = {"What is visible?", MediaTime::FromSeconds(3.25)};
  answer.asked_at = MediaTime::FromSeconds(3.0);
  answer.frames_seen = 7;
  answer.generated.text = "a cat";
  answer.generated.ids = {64, 8251};
  answer.generated.evidence = {{.begin = MediaTime::FromSeconds(1),
                                .end = MediaTime::FromSeconds(1.5),
                                .weight = 0.75,
                                .layers = 2}};
  answer.first_token_seconds = 0.03125;
  answer.total_seconds = 0.0625;
  result.answers.push_back(answer);
  return result;
}

TEST(ConvertTest, ReportIsOneJsonObjectOnOneLine) {
  const std::string text = RunReportJson(SampleResult(), Tracer());
  EXPECT_THAT(text, Not(HasSubstr("\n")));
  EXPECT_TRUE(json::parse(text).is_object());
}

TEST(ConvertTest, AnswersCarryTextIdsAndTimes) {
  const json report = json::parse(RunReportJson(SampleResult(), Tracer()));
  ASSERT_EQ(report["answers"].size(), 1u);
  const json& answer = report["answers"][0];
  EXPECT_EQ(answer["question"], "What is visible?");
  EXPECT_EQ(answer["text"], "a cat");
  EXPECT_EQ(answer["token_ids"], json({64, 8251}));
  EXPECT_EQ(answer["finish_reason"], Name(FinishReason::kStop));
  EXPECT_EQ(answer["at_media_seconds"], 3.25);
  EXPECT_EQ(answer["asked_at_media_seconds"], 3.0);
  EXPECT_EQ(answer["frames_seen"], 7);
  EXPECT_EQ(answer["first_token_seconds"], 0.03125);
  EXPECT_EQ(answer["total_seconds"], 0.0625);
  ASSERT_EQ(answer["evidence"].size(), 1u);
  EXPECT_EQ(answer["evidence"][0]["begin_media_seconds"], 1);
  EXPECT_EQ(answer["evidence"][0]["end_media_seconds"], 1.5);
  EXPECT_EQ(answer["evidence"][0]["weight"], 0.75);
  EXPECT_EQ(answer["evidence"][0]["layers"], 2);
}

TEST(ConvertTest, QuestionsAtTheEndHaveNoTimeOfTheirOwn) {
  RunResult result = SampleResult();
  result.answers[0].question.at.reset();
  const json report = json::parse(RunReportJson(result, Tracer()));
  EXPECT_FALSE(report["answers"][0].contains("at_media_seconds"));
}

TEST(ConvertTest, UnknownDurationAndMissingWarningAreAbsent) {
  RunResult result = SampleResult();
  result.source.duration.reset();
  const json report = json::parse(RunReportJson(result, Tracer()));
  EXPECT_FALSE(report["source"].contains("media_seconds"));
  EXPECT_FALSE(report.contains("warning"));
}

TEST(ConvertTest, CountsAreNumbersAndZeroIsPrinted) {
  const json report = json::parse(RunReportJson(SampleResult(), Tracer()));
  EXPECT_EQ(report["frames"]["sampled"], 25);
  EXPECT_EQ(report["frames"]["dropped"], 0);
  EXPECT_EQ(report["source"]["live"], false);
}

TEST(ConvertTest, CountsBeyond32BitsSaturate) {
  RunResult result = SampleResult();
  result.queue.dropped = int64_t{1} << 40;
  const json report = json::parse(RunReportJson(result, Tracer()));
  EXPECT_EQ(report["frames"]["dropped"], 2147483647);
}

TEST(ConvertTest, StagesKeepTheirNames) {
  Tracer tracer;
  tracer.Add("encode", {.calls = 2, .items = 8, .seconds = 0.5, .flops = 1e9, .bytes = 2e6});
  tracer.Add("encode/attention", {.calls = 12, .seconds = 0.25});
  const json report = json::parse(RunReportJson(SampleResult(), tracer));
  EXPECT_EQ(report["stages"]["encode"]["calls"], 2);
  EXPECT_EQ(report["stages"]["encode"]["items"], 8);
  EXPECT_EQ(report["stages"]["encode"]["flops"], 1e9);
  EXPECT_EQ(report["stages"]["encode/attention"]["seconds"], 0.25);
}

TEST(ConvertTest, TextThatIsNotUtf8IsRepaired) {
  RunResult result = SampleResult();
  result.source.codec = "a\xFF\xC3";            // a stray byte and a sequence cut short
  result.warning = "\xED\xA0\x80 caf\xC3\xA9";  // a surrogate, then good text
  result.warnings = {"was away for 7 s", "\xFF"};
  result.error = "the cable is out";
  result.not_asked = 2;
  const json report = json::parse(RunReportJson(result, Tracer()));
  EXPECT_EQ(report["source"]["codec"], "a\uFFFD\uFFFD");
  EXPECT_EQ(report["warning"], "\uFFFD\uFFFD\uFFFD caf\u00E9");
  EXPECT_EQ(report["warnings"], (nlohmann::json{"was away for 7 s", "\uFFFD"}));
  EXPECT_EQ(report["error"], "the cable is out");
  EXPECT_EQ(report["not_asked"], 2);
}

TEST(ErrorLineTest, IsOneShortLineWhateverAClientSent) {
  EXPECT_EQ(ErrorLine("[options] got 'a\n\x1b[31mb'"), "[options] got 'a  [31mb'");
  const std::string line = ErrorLine(std::string(3000000, 'x'));
  EXPECT_LE(line.size(), 512u);
  EXPECT_TRUE(line.ends_with("..."));
}

}  // namespace
}  // namespace sluice
