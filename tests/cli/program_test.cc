// The program as a script sees it: exit codes, one line on stderr, one object on stdout.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>

#include "tests/support/sanitizers.h"

namespace sluice {
namespace {

using nlohmann::json;
using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::Not;

struct Outcome {
  int exit_code = -1;
  std::string out, err;
};

std::string ReadFile(const std::filesystem::path& path) {
  std::stringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

class ProgramTest : public ::testing::Test {
 protected:
  ProgramTest()
      : directory_(std::filesystem::path(::testing::TempDir()) /
                   ("program_test_" + std::to_string(getpid()) + "_" +
                    std::string(::testing::UnitTest::GetInstance()->current_test_info()->name()))) {
    std::filesystem::create_directories(directory_);
  }
  ~ProgramTest() override { std::filesystem::remove_all(directory_); }

  Outcome Sluice(const std::string& arguments) const {
    const auto out = directory_ / "stdout", err = directory_ / "stderr";
    const std::string command = std::string(SLUICE_PROGRAM) + " " + arguments + " >" +
                                out.string() + " 2>" + err.string() + " </dev/null";
    const int status = std::system(command.c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, ReadFile(out), ReadFile(err)};
  }

  // Expects exit code 2, nothing on stdout and one line on stderr that holds `part`.
  void ExpectRefused(const std::string& arguments, const std::string& part) const {
    const Outcome outcome = Sluice(arguments);
    EXPECT_EQ(outcome.exit_code, 2) << arguments;
    EXPECT_EQ(outcome.out, "") << arguments;
    EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
    EXPECT_THAT(outcome.err, HasSubstr(part)) << arguments;
  }

  const std::string model_ = " --model " SLUICE_SOURCE_DIR "/tests/golden/tiny_tied ";
  const std::filesystem::path directory_;
};

TEST_F(ProgramTest, HelpNamesEverySubcommand) {
  const Outcome outcome = Sluice("--help");
  EXPECT_EQ(outcome.exit_code, 0);
  for (const char* command : {"ask", "bench", "calibrate", "eval", "info", "load", "render"}) {
    EXPECT_THAT(outcome.out, HasSubstr(command));
    const Outcome help = Sluice(std::string(command) + " --help");
    EXPECT_EQ(help.exit_code, 0);
    EXPECT_THAT(help.out, HasSubstr("--json"));
  }
}

TEST_F(ProgramTest, HelpShowsWhatEverybodyNeedsFirstAndAllOfItWhenAsked) {
  for (const char* command : {"ask", "bench", "eval", "load", "serve"}) {
    SCOPED_TRACE(command);
    const Outcome first = Sluice(std::string(command) + " --help");
    const Outcome all = Sluice(std::string(command) + " --help-all");
    EXPECT_EQ(first.exit_code, 0);
    EXPECT_EQ(all.exit_code, 0);
    EXPECT_LE(std::count(first.out.begin(), first.out.end(), '\n'), 40) << first.out;
    EXPECT_THAT(first.out,
                HasSubstr("more options: sluice " + std::string(command) + " --help-all"));
    EXPECT_GT(all.out.size(), 2 * first.out.size());
  }
  EXPECT_THAT(Sluice("ask --help").out, Not(HasSubstr("--pyramid-quota")));
  EXPECT_THAT(Sluice("ask --help-all").out, HasSubstr("--pyramid-quota"));
  EXPECT_THAT(Sluice("ask --help").out, HasSubstr("--question"));
  EXPECT_THAT(Sluice("token --help").out, Not(HasSubstr("more options")));
}

TEST_F(ProgramTest, WrongUsageIsOneLineAndExitCodeTwo) {
  ExpectRefused("", "subcommand");
  ExpectRefused("frobnicate", "frobnicate");
  ExpectRefused("ask", "--source");
  ExpectRefused("ask --source test --colour red", "--colour");
  ExpectRefused("ask --source test", "--question");
  ExpectRefused("ask --source test --question ''", "question");
  ExpectRefused("ask --source test --question x --dtype f8", "f8");
  ExpectRefused("ask --source test --question x --fps 2 --every-nth 3", "--every-nth");
  ExpectRefused("eval --clips 0", "--clips");
  ExpectRefused("eval --pyramid-stages 3", "--pyramid-drop");
  ExpectRefused("eval --clips 1 --pyramid-drop quest" + model_, "query-free");
  ExpectRefused("eval --clips 1 --pyramid-drop question" + model_, "3 layers, got 4 stages");
  ExpectRefused(
      "ask --source test:smpte:1 --question x --pyramid-drop probe --pyramid-stages 3" + model_,
      "standing instruction");
}

TEST_F(ProgramTest, WrongInputIsOneLineThatNamesIt) {
  ExpectRefused("ask --source /no/such/file.mp4 --question x" + model_, "/no/such/file.mp4");
  ExpectRefused("ask --source " + directory_.string() + " --question x" + model_,
                directory_.string());
  const auto empty = directory_ / "empty.mp4";
  std::ofstream(empty).flush();
  ExpectRefused("ask --source " + empty.string() + " --question x" + model_, empty.string());
  ExpectRefused("ask --source test:smpte:1 --question x --model /no/such/model", "/no/such/model");
  ExpectRefused("ask --source test:smpte:1 --question x --questions /no/such.jsonl" + model_,
                "/no/such.jsonl");
  ExpectRefused("info --model /no/such/model", "/no/such/model");
}

TEST_F(ProgramTest, InfoDescribesCheckpointAndMachine) {
  const Outcome outcome = Sluice("info --json" + model_);
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const json info = json::parse(outcome.out);
  EXPECT_EQ(info["checkpoint"]["architecture"], "LlavaOnevisionForConditionalGeneration");
  EXPECT_EQ(info["checkpoint"]["vision"]["tokens_per_frame"], 9);
  EXPECT_GT(info["checkpoint"]["parameters"], 0);
  EXPECT_GE(info["machine"]["physical_cores"], 1);
  EXPECT_TRUE(info["fast_paths"].contains("decode_linear"));
  EXPECT_THAT(info["fast_paths"]["many_bf16_rows"].get<std::string>(),
              ::testing::AnyOf("amx", "avx512_bf16", HasSubstr("f32")));
  EXPECT_EQ(info["families"]["llava_onevision"], "LlavaOnevisionForConditionalGeneration");
  EXPECT_EQ(info["families"]["llava_next_video"], "LlavaNextVideoForConditionalGeneration");
  const Outcome text = Sluice("info" + model_);
  EXPECT_EQ(text.exit_code, 0);
  EXPECT_THAT(text.out, HasSubstr("LlavaOnevisionForConditionalGeneration"));
}

TEST_F(ProgramTest, AskReportsEveryAnswerAsOneObject) {
  const Outcome outcome = Sluice(
      "ask --json --source test:smpte:3 --max-new-tokens 4 --question 'What?@1' --question "
      "'And now?'" +
      model_);
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const json report = json::parse(outcome.out);
  ASSERT_EQ(report["answers"].size(), 2u);
  EXPECT_EQ(report["answers"][0]["question"], "What?");
  EXPECT_EQ(report["answers"][0]["at_media_seconds"], 1.0);
  EXPECT_LT(report["answers"][0]["frames_seen"], report["answers"][1]["frames_seen"]);
  EXPECT_LE(report["answers"][0]["token_ids"].size(), 4u);
  EXPECT_EQ(report["frames"]["sampled"], report["answers"][1]["frames_seen"]);
  for (const char* stage : {"encode", "prefill", "decode"}) {
    EXPECT_GT(report["stages"][stage]["seconds"], 0) << stage;
  }
}

TEST_F(ProgramTest, AskCountsFramesThatShowNothingNew) {
  const Outcome outcome = Sluice(
      "ask --json --source test:smpte75:3 --max-new-tokens 1 --question x --duplicate-threshold 0" +
      model_);
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const json report = json::parse(outcome.out);
  EXPECT_EQ(report["frames"]["sampled"], 6);
  EXPECT_EQ(
      report["frames"]["duplicates"].get<int>() + report["stages"]["encode"]["items"].get<int>(),
      6);
}

TEST_F(ProgramTest, AskTellsTheMomentsThatAnswersRestOn) {
  const json report = json::parse(
      Sluice("ask --json --source test:ball:20 --fps 2 --max-new-tokens 4 --question x --memory "
             "--memory-window 64 --memory-recall 4" +
             model_)
          .out);
  const json& evidence = report["answers"][0]["evidence"];
  ASSERT_FALSE(evidence.empty());
  double weight = 0;
  for (const json& moment : evidence) weight += moment["weight"].get<double>();
  EXPECT_NEAR(weight, 1, 1e-6);
}

TEST_F(ProgramTest, AskPrintsQuestionsAnswersAndStages) {
  const Outcome outcome = Sluice(
      "ask --stats --source test:smpte:2 --max-new-tokens 4 --question 'What is it?'" + model_);
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, HasSubstr("What is it?"));
  EXPECT_THAT(outcome.out, HasSubstr("ms/item"));
  EXPECT_EQ(outcome.err, "");  // no progress bar where there is no terminal
}

TEST_F(ProgramTest, SameSeedGivesTheSameAnswer) {
  const std::string ask =
      "ask --json --source test:smpte:1 --max-new-tokens 8 --question x --temperature 2 --seed ";
  const auto text = [&](const char* seed) {
    return json::parse(Sluice(ask + seed + model_).out)["answers"][0]["token_ids"];
  };
  EXPECT_EQ(text("5"), text("5"));
  EXPECT_NE(text("5"), text("6"));
}

TEST_F(ProgramTest, TooFewRightAnswersFail) {
  ASSERT_EQ(
      Sluice("render --frames 8 --times 2 --name film --out " + directory_.string()).exit_code, 0);
  const auto film = directory_ / "film.mp4", questions = directory_ / "film.jsonl";
  EXPECT_TRUE(std::filesystem::exists(film));
  const Outcome outcome = Sluice("ask --max-new-tokens 2 --require-right 1000 --source " +
                                 film.string() + " --questions " + questions.string() + model_);
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_THAT(outcome.out, HasSubstr("answers are right"));
  EXPECT_THAT(outcome.err, HasSubstr("expected at least 1000 right answers"));
}

TEST_F(ProgramTest, EvalScoresRenderedAndVideoClips) {
  for (const char* source : {"rendered", "mp4"}) {
    const Outcome outcome =
        Sluice("eval --json --clips 2 --frames 8 --questions-per-clip 4 --source " +
               std::string(source) + model_);
    ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
    const json report = json::parse(outcome.out);
    EXPECT_EQ(report["frames"], 16);
    EXPECT_EQ(report["tokens_per_frame"], 9.0);
    EXPECT_GE(report["accuracy"]["mean"], 0.0);
    EXPECT_FALSE(report["accuracy"]["by_kind"].empty());
    EXPECT_EQ(report["majority_baseline"].size(), report["accuracy"]["by_kind"].size());
    for (const char* figure :
         {"encode_ms_per_frame", "prefill_ms_per_frame", "decode_tokens_per_s"}) {
      EXPECT_GT(report[figure], 0.0) << figure;
    }
  }
}

TEST_F(ProgramTest, EvalTellsWhatPyramidDropSpares) {
  const std::string few = "eval --json --clips 2 --frames 8 --questions-per-clip 4 ";
  const std::string drop = "--pyramid-stages 3 --pyramid-replay-frames 8 --pyramid-drop ";
  for (const char* mode :
       {"question", "replay=0.4", "query-free", "probe --pyramid-instruction Watch"}) {
    const Outcome outcome = Sluice(few + drop + mode + model_);
    ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
    const json report = json::parse(outcome.out);
    const json &method = report["methods"]["pyramid_drop"], &work = report["visual_tokens"];
    EXPECT_EQ(method["boundaries"], json({1, 2}));
    const bool arriving = *mode == 'p' || std::string(mode) == "query-free";
    EXPECT_EQ(work["kv_bytes_per_clip"] < work["dense_kv_bytes_per_clip"],
              arriving || *mode == 'r');
    EXPECT_EQ(work["prefill_gmac_per_clip"] < work["dense_prefill_gmac_per_clip"],
              arriving || *mode == 'r');
    EXPECT_LT(work["kv_bytes_read_per_answer_token"], work["dense_kv_bytes_per_clip"]);
    EXPECT_EQ(work["replay_gmac_per_question"] > 0.0, *mode == 'r');
  }
  const json plain = json::parse(Sluice(few + model_).out);
  EXPECT_TRUE(plain["methods"].empty());
  EXPECT_EQ(plain["visual_tokens"]["kv_bytes_per_clip"],
            plain["visual_tokens"]["dense_kv_bytes_per_clip"]);
}

TEST_F(ProgramTest, EvalSweepsConfigurationsOverTheSameClips) {
  const auto file = directory_ / "sweep.json";
  const std::string sweep =
      "eval --clips 2 --frames 8 --questions-per-clip 2 --seeds 3,4 --sweep " + file.string() +
      model_ +
      "--sweep-config 'half: --compress tome-merge=4' "
      "--sweep-config 'reuse: --cacher --cacher-ratio 0.1' ";
  const Outcome outcome = Sluice(sweep);
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, HasSubstr("reuse"));
  const json report = json::parse(ReadFile(file));
  EXPECT_EQ(report["seeds"], json({3, 4}));
  const json& all = report["configurations"];
  ASSERT_EQ(all.size(), 3u);
  EXPECT_EQ(all[0]["name"], "dense");
  EXPECT_EQ(all[0]["of_dense"]["ms"], 1.0);
  for (const json& one : all) {
    EXPECT_EQ(one["frames"], 32);
    EXPECT_EQ(one["questions"], all[0]["questions"]);
    EXPECT_EQ(one["accuracy"]["mean_by_seed"].size(), 2u);
    EXPECT_GT(one["of_dense"]["ms_per_frame"], 0.0);
  }
  EXPECT_EQ(all[1]["tokens_per_frame"], 4.0);
  EXPECT_LT(all[1]["of_dense"]["gflop"], 1.0);
  EXPECT_LT(all[2]["encode_gflop_per_frame"], all[0]["encode_gflop_per_frame"]);
  EXPECT_THAT(ReadFile(directory_ / "sweep.svg"), HasSubstr(">half</text>"));

  ExpectRefused("eval --cacher --sweep " + file.string(), "--sweep");
  ExpectRefused("eval --sweep-config 'a: --cacher'", "--sweep");
  ExpectRefused("eval --sweep " + (directory_ / "sweep.txt").string() + model_, ".json");
  ExpectRefused(sweep + "--sweep-config nameless", "'NAME: FLAGS'");
  ExpectRefused(sweep + "--sweep-config 'x: --colour red'", "configuration 'x'");
  ExpectRefused(sweep + "--sweep-config 'x: --compress nonsense'", "configuration 'x'");
}

TEST_F(ProgramTest, EvalComparesReusedFeaturesOnAnySource) {
  const Outcome outcome =
      Sluice("eval --json --footage test:ball:4 --fps 4 --cacher --cacher-interval 4" + model_);
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const json report = json::parse(outcome.out);
  EXPECT_EQ(report["frames"].size(), 16u);
  EXPECT_EQ(report["methods"]["stc_cacher"]["frames"], 16);
  EXPECT_EQ(report["other_reused"]["frames"], 12);
  for (const json& frame : report["frames"]) {
    EXPECT_GT(frame["cosine"], frame["how"] == "reused" ? 0.5 : 0.999) << frame;
    EXPECT_EQ(frame["fresh_patches"] == 1.0, frame["how"] != "reused");
  }
  EXPECT_THAT(Sluice("eval --footage test:ball:2 --cacher" + model_).out, HasSubstr("least alike"));
  ExpectRefused("eval --footage test:ball:2" + model_, "expected --cacher");
  ExpectRefused("eval --fps 3", "--footage");
  ExpectRefused("eval --footage /no/such/film --cacher" + model_, "/no/such/film");
}

// The default model, as shipped. 120 questions tell a model that answers from one that guesses: at
// a true share of 0.99 fewer than 0.92 right is a matter of one in 10^8 runs, and the clips are
// fixed. Under sanitizers 36 questions, of which it may miss two.
TEST_F(ProgramTest, BundledModelAnswersQuestionsAboutTheWorld) {
  const std::string clips = testing::kSanitized ? "3" : "10";
  for (const char* how : {"--source rendered --dtype f32", "--source mp4"}) {
    const Outcome outcome =
        Sluice("eval --json --frames 8 --seed 901 --clips " + clips + " " + how);
    ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
    const json report = json::parse(outcome.out);
    EXPECT_EQ(report["model"], "sluice-mini");
    EXPECT_EQ(report["tokens_per_frame"], 49.0);
    EXPECT_GE(report["accuracy"]["mean"], 0.92) << how;
  }
}

TEST_F(ProgramTest, BundledModelAnswersTheBundledClip) {
  const std::string clip = SLUICE_SOURCE_DIR "/demos/clips/parade";
  const Outcome outcome = Sluice("ask --no-dialogue --require-right 12 --source " + clip +
                                 ".mp4 --questions " + clip + ".jsonl");
  EXPECT_EQ(outcome.exit_code, 0) << outcome.out << outcome.err;
  EXPECT_THAT(outcome.err, HasSubstr("knows the painted world of the demo only"));
}

TEST_F(ProgramTest, AskSaysInJsonWhatTheBundledModelKnows) {
  const Outcome outcome =
      Sluice("ask --json --source test:smpte:1 --max-new-tokens 1 --question x");
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_THAT(json::parse(outcome.out)["warnings"].dump(), HasSubstr("--model DIR"));
}

TEST_F(ProgramTest, InfoIsReadable) {
  const Outcome outcome = Sluice("info");
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, ContainsRegex("file_bytes +[0-9.]+ MiB"));
  EXPECT_THAT(outcome.out, Not(ContainsRegex("[0-9]\\.[0-9]{6}")));
}

TEST_F(ProgramTest, MethodsSaveWorkAndSayHowMuch) {
  const std::string eval = "eval --json --clips 2 --frames 8 --questions-per-clip 2 --seed 902";
  const json dense = json::parse(Sluice(eval).out);
  EXPECT_TRUE(dense["methods"].empty());
  const json stc = json::parse(Sluice(eval + " --preset stc").out);
  EXPECT_EQ(stc["methods"]["stc_cacher"]["frames"], 16);
  EXPECT_GE(stc["methods"]["stc_cacher"]["whole_frames"], 8);
  EXPECT_EQ(stc["methods"]["compressors"], json::array({"stc-pruner"}));
  EXPECT_EQ(stc["tokens_per_frame"], 16.0);  // floor(49 / 3)
  EXPECT_LT(stc["encode_gflop_per_frame"], 0.75 * dense["encode_gflop_per_frame"].get<double>());
  EXPECT_LT(stc["prefill_gflop_per_frame"], 0.4 * dense["prefill_gflop_per_frame"].get<double>());
  const json all = json::parse(Sluice(eval + " --cacher --cacher-ratio 1 --cacher-interval 4").out);
  EXPECT_EQ(all["encode_gflop_per_frame"], dense["encode_gflop_per_frame"]);
  EXPECT_EQ(all["accuracy"], dense["accuracy"]);
  const json merged = json::parse(Sluice(eval + " --turbo 16").out);
  EXPECT_EQ(merged["methods"]["turbo"]["remove"], 16.0);
  EXPECT_EQ(merged["tokens_per_frame"], dense["tokens_per_frame"]);
  EXPECT_LT(merged["encode_gflop_per_frame"], 0.8 * dense["encode_gflop_per_frame"].get<double>());
}

TEST_F(ProgramTest, MethodsRefuseSettingsThatMeanNothing) {
  ExpectRefused("eval --cacher --cacher-ratio 0", "[stc-cacher] the ratio of fresh patches");
  ExpectRefused("eval --cacher --cacher-interval 0", "[stc-cacher] the interval");
  ExpectRefused("ask --source test --question x --compress stc-pruner=1.5", "[stc-pruner]");
  ExpectRefused("ask --source test --question x --compress nonsense", "there are stc-pruner");
  ExpectRefused("eval --preset faster", "--preset");
  ExpectRefused("eval --cacher-interval 4", "--cacher");
  ExpectRefused("eval --turbo 8 --cacher", "choose one of --turbo and --cacher");
  ExpectRefused("eval --turbo 0.6", "a share in (0, 0.5]");
  ExpectRefused("eval --clips 1 --turbo 100000" + model_, "patches at most, got turbo 100000");
  ExpectRefused("eval --clips 1 --compress stc-pruner=100000" + model_,
                "[stc-pruner] cannot keep 100000 of the");
  ExpectRefused("eval --clips 1 --compress turbo-merge=1 --compress tome-merge=2" + model_,
                "[tome-merge] cannot keep 2 of the 1 tokens");
  ExpectRefused("eval --turbo -3", "[turbo]");
  ExpectRefused("eval --turbo 8 --turbo-lambda -1", "[turbo] lambda");
  ExpectRefused("eval --turbo-lambda 1", "--turbo");
  ExpectRefused("eval --duplicate-threshold 255", "[0, 255)");
  ExpectRefused("bench --duplicate-threshold 4" + model_, "[bench]");
}

TEST_F(ProgramTest, RecallAnswersWhatTheWindowHasForgotten) {
  // Sanitizers look at one short film: they take a minute for what is asked of the others.
  const int farthest = testing::kSanitized ? 12 : 40;
  const Outcome outcome =
      Sluice("eval --json --memory --memory-window 392 --memory-recall 16 " +
             std::string(testing::kSanitized ? "--clips 1 --recall-distances 12"
                                             : "--clips 2 --recall-distances 12,40"));
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  double recall = 0, window = 0;
  const json report = json::parse(outcome.out);
  for (const json& row : report["recall"]) {
    EXPECT_GT(row["asked"], 0);
    if (row["distance"] != farthest) continue;
    if (row["memory"] == "recall") recall = row["right"]["all"];
    if (row["memory"] == "window only") window = row["right"]["all"];
    if (row["memory"] == "recall") {
      EXPECT_GT(row["film_attention"], 0.0);
    }
  }
  // Two films, some eight questions: all but one right against next to none.
  if (testing::kSanitized) return;
  EXPECT_GT(recall, 0.6);
  EXPECT_LT(window, 0.5);
}

TEST_F(ProgramTest, AStreamLongerThanItsWindowIsAnsweredWithItsMoments) {
  const Outcome outcome = Sluice(
      "ask --source test:ball:60 --fps 2 --question 'What is there?' --max-new-tokens 4 --memory"
      " --memory-window 200 --memory-recall 8 --memory-int8 --memory-disk-mb 1 --memory-disk-dir " +
      directory_.string() + model_);
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, HasSubstr("of the attention to recalled frames"));
}

TEST_F(ProgramTest, MemoriesThatCannotWorkAreRefused) {
  ExpectRefused("eval --memory-window 100", "--memory");
  ExpectRefused("eval --memory --memory-disk-mb 5", "--memory-disk-dir");
  ExpectRefused("eval --memory --memory-disk-mb 5 --memory-disk-dir /no/where", "/no/where");
  ExpectRefused("eval --memory --memory-when-full all", "oldest");
  ExpectRefused("eval --memory --pyramid-drop question", "--pyramid-drop");
  ExpectRefused("eval --memory --memory-window 40000", "--memory-window smaller by");
  ExpectRefused("eval --recall-distances 10", "add --memory");
  ExpectRefused("eval --memory --recall-distances 0", "distances");
}

TEST_F(ProgramTest, BenchMeasuresAStreamWhoseWindowSlides) {
  const Outcome outcome = Sluice(
      "bench --json --seconds 0 --batch 4 --threads 1 --memory --memory-window 130"
      " --memory-recall 4" +
      model_);
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const json memory = json::parse(outcome.out)["memory"];
  EXPECT_GT(memory["sliding_frames_per_s"], 0.0);
  EXPECT_GT(memory["whole_frames_per_s"], 0.0);
  EXPECT_GT(memory["bytes_per_frame"], 0.0);
  EXPECT_GT(memory["question_ms"], 0.0);
  EXPECT_EQ(memory["staged_bytes"], 0);  // on the CPU nothing is on its way
  EXPECT_FALSE(memory.contains("gpu_bytes_in_use"));
}

TEST_F(ProgramTest, BenchMeasuresEveryStageAgainstThePeak) {
  const Outcome outcome =
      Sluice("bench --json --seconds 0 --batch 2 --context-frames 4 --threads 1" + model_);
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const json report = json::parse(outcome.out);
  EXPECT_GT(report["peak"]["gflops"], 0.0);
  EXPECT_GT(report["peak"]["read_gbps"], 0.0);
  EXPECT_GT(report["encode"]["percent_of_peak"], 0.0);
  EXPECT_GT(report["prefill"]["percent_of_peak"], 0.0);
  EXPECT_GT(report["decode"]["percent_of_read_bandwidth"], 0.0);
  for (const char* stage : {"encode", "prefill", "question"}) {
    EXPECT_LE(report[stage]["percent_of_peak"], 100.0) << stage;
  }
  EXPECT_LE(report["decode"]["percent_of_read_bandwidth"], 100.0);
  EXPECT_EQ(report["compress"]["ms_per_frame"], 0.0);
  EXPECT_EQ(report["compress"]["tokens_per_frame"], 9.0);
  const std::string few = "bench --json --seconds 0 --batch 3 --context-frames 4 --threads 1 ";
  const json halved = json::parse(Sluice(few + "--compress uniform-frames=2" + model_).out);
  EXPECT_EQ(halved["compress"]["tokens_per_frame"], 4.5);
  EXPECT_EQ(halved["prefill"]["tokens"], 18);
  EXPECT_LT(halved["prefill"]["gflop_per_frame"], report["prefill"]["gflop_per_frame"]);
  const json reused = json::parse(Sluice(few + "--cacher --cacher-ratio 0.2" + model_).out);
  EXPECT_EQ(reused["methods"]["stc_cacher"]["refreshes"], 0);
  EXPECT_LT(reused["encode"]["gflop_per_frame"], report["encode"]["gflop_per_frame"]);
  ExpectRefused(few + "--compress uniform-frames=9" + model_, "leave none of the tokens");
  for (const char* mode : {"question", "replay", "query-free", "probe --pyramid-instruction x"}) {
    const Outcome dropped = Sluice(
        "bench --json --seconds 0 --batch 3 --context-frames 4"
        " --threads 1 --pyramid-stages 3 --pyramid-drop " +
        std::string(mode) + model_);
    ASSERT_EQ(dropped.exit_code, 0) << dropped.err;
    const json decode = json::parse(dropped.out)["decode"];
    EXPECT_LT(decode["context_rows_per_layer"], decode["context_tokens"]) << mode;
  }
}

TEST_F(ProgramTest, CalibrateWritesWhichLayersBearQuantisedAttention) {
  const auto file = (directory_ / "calibration.json").string();
  const std::string cpu = " --device cpu" + model_;
  const Outcome outcome = Sluice("calibrate --json --frames 4 --out " + file + cpu);
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  json report = json::parse(outcome.out);
  EXPECT_EQ(report["file"], file);
  report.erase("file");
  EXPECT_EQ(report, json::parse(ReadFile(file)));
  EXPECT_EQ(report["clips"], 16);
  EXPECT_EQ(report["tower"]["layers"], 3);
  EXPECT_EQ(report["decoder"]["layers"], 3);
  for (const char* part : {"tower", "decoder"}) {
    for (int i = 0; i < 3; ++i) {
      const json& layer = report[part]["layer." + std::to_string(i)];
      EXPECT_EQ(layer["attention"], "sage") << part << " " << i;
      EXPECT_GE(layer["cosine"], 0.998) << part << " " << i;
      EXPECT_GT(layer["relative_l1"], 0.0) << part << " " << i;
    }
  }
  json info = json::parse(Sluice("info --json --attention " + file + cpu).out);
  EXPECT_EQ(info["checkpoint"]["attention_layers"]["decoder"]["sage"], 3);
  // One layer exact, by hand; a decoded token is always.
  report["decoder"]["layer.1"]["attention"] = "exact";
  std::ofstream(file) << report;
  info = json::parse(Sluice("info --json --attention " + file + cpu).out);
  EXPECT_EQ(info["checkpoint"]["attention_layers"]["decoder"]["exact"], 1);
  EXPECT_THAT(info["fast_paths"]["decode_attention"].get<std::string>(), HasSubstr("exact"));
  const Outcome asked =
      Sluice("ask --json --source test:smpte:3 --max-new-tokens 4 --question 'What?' --attention " +
             file + cpu);
  ASSERT_EQ(asked.exit_code, 0) << asked.err;
  EXPECT_TRUE(json::parse(asked.out)["stages"].contains("attention/exact"));

  ExpectRefused(
      "info --attention " + file + " --model " SLUICE_SOURCE_DIR "/tests/golden/tiny_untied",
      "fingerprint must be this model's");
  ExpectRefused("info --attention /no/such.json" + cpu, "/no/such.json");
  ExpectRefused("calibrate --clips 3 --out " + file + cpu, "--clips");
  ExpectRefused("calibrate" + cpu, "--out");
  ExpectRefused("calibrate --attention sage --out " + file + cpu, "--attention");
  ExpectRefused("calibrate --source test:smpte:3 --out " + file + cpu,
                "16 clips of 8 frames, got 0");
}

TEST_F(ProgramTest, ServeRefusesSettingsThatMakeNoSense) {
  const auto file = directory_ / "serve.json";
  std::ofstream(file) << R"({"max_stream": 3})";
  ExpectRefused("serve --config " + file.string(), "nearest is 'max_streams'");
  ExpectRefused("serve --max-streams 0", "max_streams");
  ExpectRefused("serve --config " + (directory_ / "missing.json").string(), "cannot be read");
}

TEST_F(ProgramTest, AskNamesAServerThatIsNotThere) {
  const Outcome outcome = Sluice("ask --server 127.0.0.1:1 --source test:ball:1 --question x");
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_THAT(outcome.err, HasSubstr("127.0.0.1:1"));
  ExpectRefused("ask --server 127.0.0.1:1 --model m --source test:ball:1 --question x", "--model");
}

}  // namespace
}  // namespace sluice
