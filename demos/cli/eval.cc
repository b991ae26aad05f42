// sluice eval: accuracy and speed over clips of the demo world.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <span>
#include <string>

#include "demos/cli/commands.h"
#include "demos/cli/common.h"
#include "demos/cli/evaluation.h"
#include "demos/cli/footage.h"
#include "demos/cli/help.h"
#include "demos/cli/methods.h"
#include "demos/cli/recall.h"
#include "demos/cli/sweep.h"
#include "runtime/error.h"

namespace sluice::cli {
namespace {

struct EvalFlags {
  ModelFlags model;
  MethodFlags methods;
  ClipSet clips;
  SweepFlags sweep;
  FootageFlags footage;
  std::vector<int> recall_distances;
  bool list_failures = false;
  std::string dump;
  bool json = false;
};

// What another implementation needs to answer the same questions: DIR/clip-N.rgb holds a clip's
// frames ([frames, height, width, 3] u8), DIR/answers.jsonl a line for every question.
class Dump {
 public:
  explicit Dump(const std::string& directory) : directory_(directory) {
    if (directory.empty()) return;
    std::error_code error;
    std::filesystem::create_directories(directory_, error);
    answers_.open(directory_ / "answers.jsonl");
    if (!answers_) throw InputError("[eval] cannot write to " + directory);
  }

  void Frames(int clip, std::span<const FramePtr> frames) {
    if (directory_.empty()) return;
    file_ = "clip-" + std::to_string(clip) + ".rgb";
    std::ofstream out(directory_ / file_, std::ios::binary);
    for (const FramePtr& frame : frames) {
      out.write(reinterpret_cast<const char*>(frame->rgb.data()),
                static_cast<std::streamsize>(frame->rgb.size()));
    }
    out.close();
    if (!out) throw Error("[eval] cannot write " + (directory_ / file_).string());
    shape_ = {frames.size(), frames.front()->height, frames.front()->width, 3};
  }

  void Answer(const world::Question& question, const Generated& generated) {
    if (directory_.empty()) return;
    const Json line = {{"frames", file_},           {"shape", shape_},
                       {"question", question.text}, {"expected", question.answer},
                       {"answer", generated.text},  {"ids", generated.ids}};
    answers_ << line.dump() << '\n' << std::flush;
    if (!answers_) throw Error("[eval] cannot write to " + directory_.string());
  }

 private:
  std::filesystem::path directory_;
  std::ofstream answers_;
  std::string file_;
  Json shape_;
};

Json DescribeModel(const Vlm& vlm) {
  return {{"model", vlm.info().name},
          {"dtype", Name(vlm.info().compute_type)},
          {"weights", WeightsName(vlm.info())}};
}

// What a run over clips was told, for its report.
Json Describe(const EvalFlags& flags, const Vlm& vlm) {
  Json report = DescribeModel(vlm);
  report["source"] = flags.clips.source;
  report["seeds"] = flags.clips.seeds;
  report["clips"] = flags.clips.clips;
  return report;
}

void PrintReport(const EvalFlags& flags, const Evaluation& evaluation) {
  const KindScores scores = evaluation.Scores();
  Table table({"kind", "asked", "right %", "majority %"});
  for (const auto& [kind, score] : scores) {
    table.Add(
        {kind, std::to_string(score.asked), Percent(score.Accuracy()), Percent(score.Majority())});
  }
  table.Add({"mean over kinds", std::to_string(evaluation.questions()),
             Percent(MeanAccuracy(scores)), ""});
  std::string seeds;
  for (const uint64_t seed : flags.clips.seeds) {
    seeds += (seeds.empty() ? "" : ", ") + std::to_string(seed);
  }
  std::printf("%d clips (%s) of each seed (%s), %lld frames\n\n%s\n%s", flags.clips.clips,
              flags.clips.source.c_str(), seeds.c_str(),
              static_cast<long long>(evaluation.frames()), table.ToString().c_str(),
              StageTable(evaluation.tracer()).c_str());
}

void EvalOnce(const EvalFlags& flags, const Engine& engine, const SessionOptions& options) {
  Evaluation evaluation(engine, options);
  Dump dump(flags.dump);
  const auto context = engine.NewContext();
  PlayClips(flags.clips, [&](const PlayedClip& clip) {
    dump.Frames(clip.number, clip.frames);
    evaluation.Play(
        *context, clip, flags.clips.questions,
        [&](const auto& question, const auto& answer) { dump.Answer(question, answer); });
    return Percent(evaluation.ShareRight()) + " % right";
  });

  Json report = Describe(flags, *engine.vlm());
  report.update(evaluation.Report());
  if (flags.json) {
    if (flags.list_failures) report["failures"] = evaluation.failures();
    PrintJson(report);
    return;
  }
  PrintReport(flags, evaluation);
  if (!flags.list_failures) return;
  for (const Json& failure : evaluation.failures()) std::printf("%s\n", failure.dump().c_str());
}

void Eval(const EvalFlags& flags) {
  const Engine engine = OpenEngine(flags.model);
  const auto print = [&](const Json& report, void (*as_tables)(const Json&)) {
    flags.json ? PrintJson(report) : as_tables(report);
  };
  SessionOptions options;
  options.keep_dialogue = false;
  ApplyMethods(flags.methods, options);
  if (!flags.footage.source.empty()) {
    print(CompareFootage(engine, options, flags.footage, DescribeModel(*engine.vlm())),
          PrintFootage);
  } else if (!flags.recall_distances.empty()) {
    print(MeasureRecall(engine, options, flags.clips, flags.recall_distances,
                        Describe(flags, *engine.vlm())),
          PrintRecall);
  } else if (!flags.sweep.file.empty()) {
    print(Sweep(engine, flags.clips, flags.sweep, Describe(flags, *engine.vlm())), PrintSweep);
  } else {
    EvalOnce(flags, engine, options);
  }
}

}  // namespace

void AddEval(CLI::App& app) {
  CLI::App* command = app.add_subcommand("eval", "Accuracy and speed over clips of the demo world");
  auto flags = std::make_shared<EvalFlags>();
  AddModelFlags(*command, flags->model);
  AddMethodFlags(*command, flags->methods);
  const auto methods = command->get_options(
      [](const CLI::Option* option) { return option->get_group() == kMethodGroup; });
  AddClipOptions(*command, {flags->clips.clips, flags->clips.frames, flags->clips.questions});
  command
      ->add_option("--seed,--seeds", flags->clips.seeds,
                   "Same seed, same clips; of several, as 1,2,3, each gives --clips clips")
      ->delimiter(',')
      ->capture_default_str();
  command
      ->add_option("--source", flags->clips.source,
                   "rendered: pictures as they are; mp4: written as H.264 and read back")
      ->capture_default_str()
      ->check(CLI::IsMember({"rendered", "mp4"}));
  auto* sweep = command->add_option(
      "--sweep", flags->sweep.file,
      "Compare ways of saving work on the same clips; writes this .json and an .svg beside it");
  command
      ->add_option("--sweep-config", flags->sweep.configurations,
                   "Compare with 'NAME: FLAGS' instead of the built-in list, as 'half: --compress "
                   "tome-merge=0.5'; may be given several times")
      ->allow_extra_args(false)
      ->needs(sweep);
  for (CLI::Option* method : methods) method->excludes(sweep);
  command->add_option("--dump", flags->dump, "Write frames and answers to this directory")
      ->excludes(sweep);
  command->add_flag("--failures", flags->list_failures, "List every wrong answer")->excludes(sweep);
  auto* footage = command
                      ->add_option("--footage", flags->footage.source,
                                   "Instead: compare features that --cacher reuses with those "
                                   "computed whole, on this source (as of sluice ask)")
                      ->excludes(sweep);
  command->add_option("--fps", flags->footage.fps, "Frames of it to look at per second")
      ->capture_default_str()
      ->check(CLI::Range(0.001, 1000.0))
      ->needs(footage);
  command
      ->add_option("--recall-distances", flags->recall_distances,
                   "Instead: ask about films that ended so many quiet frames ago, as 10,100,1000, "
                   "with --memory, with its window alone and with everything in the context")
      ->delimiter(',')
      ->excludes(sweep)
      ->excludes(footage);
  command->add_flag("--json", flags->json, "Print one JSON object");
  ShowFirst(*command, {"--model", "--device", "--clips", "--frames", "--seed", "--preset",
                       "--source", "--json"});
  command->callback([flags] { Eval(*flags); });
}

}  // namespace sluice::cli
