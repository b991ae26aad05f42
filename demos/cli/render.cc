// sluice render: clips of the demo world as mp4, with their questions and answers.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>

#include "demos/cli/atlas.h"
#include "demos/cli/clips.h"
#include "demos/cli/commands.h"
#include "demos/cli/common.h"
#include "demos/world/questions.h"
#include "runtime/error.h"

namespace sluice::cli {
namespace {

struct RenderFlags {
  std::string out;
  std::string name = "clip";
  int clips = 1;
  int frames = 0;
  int questions = 8;
  int times = 1;
  uint64_t seed = 0;
  bool json = false;
};

// Questions at `times` moments spread evenly over the clip, the last at its end. Each is asked
// between two sampled frames, when it is about the earlier one and everything before.
void WriteQuestions(std::ostream& out, const std::string& file, const Clip& clip,
                    const RenderFlags& flags) {
  for (int i = 1; i <= flags.times; ++i) {
    const int last_frame = std::max(clip.scene.frames * i / flags.times - 1, 0);
    const int share = flags.questions * i / flags.times - flags.questions * (i - 1) / flags.times;
    for (const auto& question : world::AskAll(
             clip.scene, last_frame, clip.question_seed + static_cast<uint64_t>(i) - 1, share)) {
      const Json line = {{"clip", file},
                         {"at", (last_frame + 0.5) * world::kSampleSeconds},
                         {"kind", world::KindName(question.kind)},
                         {"question", question.text},
                         {"answer", question.answer}};
      out << line.dump() << '\n';
    }
  }
}

void Render(const RenderFlags& flags) {
  const world::Atlas atlas = LoadAtlas();
  const std::filesystem::path directory = flags.out;
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) throw InputError("[render] cannot make " + flags.out + ": " + error.message());

  const auto jsonl = directory / (flags.name + ".jsonl");
  std::ofstream questions(jsonl);
  Json files = Json::array();
  Progress progress;
  for (int i = 0; i < flags.clips; ++i) {
    progress.Show(static_cast<double>(i) / flags.clips,
                  std::to_string(i) + " of " + std::to_string(flags.clips) + " clips");
    char number[16] = "";
    if (flags.clips > 1) std::snprintf(number, sizeof number, "-%04d", i);
    const std::string file = flags.name + number + ".mp4";
    const Clip clip = MakeClip(flags.seed, i, flags.frames);
    WriteClip(clip.scene, atlas, directory / file);
    WriteQuestions(questions, file, clip, flags);
    files.push_back((directory / file).string());
  }
  questions.close();
  if (!questions) throw Error("[render] cannot write " + jsonl.string());

  progress.Clear();
  if (flags.json) {
    PrintJson({{"clips", files}, {"questions", jsonl.string()}});
  } else {
    std::printf("%d clips and %s\n", flags.clips, jsonl.c_str());
  }
}

}  // namespace

void AddRender(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "render", "Write clips of the demo world as mp4 (H.264, 640x360, 25 fps) with questions");
  auto flags = std::make_shared<RenderFlags>();
  command->add_option("--out", flags->out, "Directory to write to")->required();
  command->add_option("--name", flags->name, "Files are NAME-0000.mp4 ... and NAME.jsonl")
      ->capture_default_str();
  AddClipOptions(*command, {flags->clips, flags->frames, flags->questions});
  command->add_option("--seed", flags->seed, "Same seed, same clips")->capture_default_str();
  command
      ->add_option("--times", flags->times, "Ask at so many moments of the clip, the last its end")
      ->capture_default_str()
      ->check(CLI::Range(1, 1000));
  command->add_flag("--json", flags->json, "Print what was written as one JSON object");
  command->callback([flags] { Render(*flags); });
}

}  // namespace sluice::cli
