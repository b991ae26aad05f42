#include "demos/cli/sweep.h"

#include <cstdio>
#include <filesystem>
#include <fstream>

#include "demos/cli/chart.h"
#include "demos/cli/methods.h"
#include "runtime/error.h"

namespace sluice::cli {
namespace {

const SweepConfiguration kConfigurations[] = {
    {"cacher N=2", "--cacher"},
    {"cacher N=2 shared", "--cacher --cacher-shared"},
    {"cacher N=4", "--cacher --cacher-interval 4"},
    {"cacher N=4 shared", "--cacher --cacher-interval 4 --cacher-shared"},
    {"turbo 16", "--turbo 16"},
    {"turbo 0.2", "--turbo 0.2"},
    {"duplicates 4", "--duplicate-threshold 4"},
    {"uniform 1/3", "--compress uniform-frames=3"},
    {"pruner 1/3", "--compress stc-pruner=0.34"},
    {"pruner-paper 1/3", "--compress stc-pruner-paper=0.34"},
    {"pruner-compat 1/3", "--compress stc-pruner-compat=0.34"},
    {"pruner-join 1/3", "--compress stc-pruner-join=0.34"},
    {"turbo-merge 1/3", "--compress turbo-merge=0.34"},
    {"tome-merge 1/3", "--compress tome-merge=0.34"},
    {"uniform 1/2", "--compress uniform-frames=2"},
    {"pruner 1/2", "--compress stc-pruner=0.5"},
    {"pruner-paper 1/2", "--compress stc-pruner-paper=0.5"},
    {"pruner-compat 1/2", "--compress stc-pruner-compat=0.5"},
    {"pruner-join 1/2", "--compress stc-pruner-join=0.5"},
    {"turbo-merge 1/2", "--compress turbo-merge=0.5"},
    {"tome-merge 1/2", "--compress tome-merge=0.5"},
    {"preset stc", "--preset stc"},
    {"preset fast", "--preset fast"},
    {"cacher N=2, pruner 1/3", "--cacher --compress stc-pruner=0.34"},
    {"cacher N=2, tome-merge 1/3", "--cacher --compress tome-merge=0.34"},
    {"cacher N=4, tome-merge 1/3", "--cacher --cacher-interval 4 --compress tome-merge=0.34"},
    {"cacher N=4, tome-merge 1/2", "--cacher --cacher-interval 4 --compress tome-merge=0.5"},
    {"pyramid question 0.5", "--pyramid-drop question=0.5"},
    {"pyramid question 0.7", "--pyramid-drop question=0.7"},
    {"pyramid replay 0.5", "--pyramid-drop replay=0.5"},
    {"pyramid replay 0.7", "--pyramid-drop replay=0.7"},
    {"pyramid query-free 0.5", "--pyramid-drop query-free=0.5"},
    {"pyramid query-free 0.7", "--pyramid-drop query-free=0.7"},
    {"pyramid probe 0.5", "--pyramid-drop probe=0.5 --pyramid-instruction 'What do you see?'"},
    {"pyramid probe 0.7", "--pyramid-drop probe=0.7 --pyramid-instruction 'What do you see?'"},
    {"tome-merge 1/2, query-free 0.7", "--compress tome-merge=0.5 --pyramid-drop query-free=0.7"},
};

std::vector<SweepConfiguration> Configurations(const SweepFlags& flags) {
  std::vector<SweepConfiguration> list = {{"dense", ""}};
  for (const std::string& text : flags.configurations) {
    const size_t colon = text.find(':');
    if (colon == 0 || colon == std::string::npos) {
      throw InputError(
          "[sweep] a configuration is 'NAME: FLAGS', as 'half: --compress "
          "tome-merge=0.5', got '" +
          text + "'");
    }
    list.push_back({text.substr(0, colon), text.substr(colon + 1)});
  }
  if (flags.configurations.empty()) {
    list.insert(list.end(), std::begin(kConfigurations), std::end(kConfigurations));
  }
  return list;
}

void Write(const std::filesystem::path& file, const std::string& text) {
  std::ofstream out(file);
  out << text;
  out.close();
  if (!out) throw InputError("[sweep] cannot write " + file.string());
}

// What one frame costs from the encoder to the cache, with its part of one question a clip: modes
// that put off work until somebody asks would look free otherwise.
struct Cost {
  double encode = 0, compress = 0, prefill = 0, question = 0;
  double Total() const { return encode + compress + prefill + question; }
};

Cost Milliseconds(const Json& report, double clips) {
  const double frames = report["frames"].get<double>() / clips;
  return {
      report["duplicates_ms_per_frame"].get<double>() + report["encode_ms_per_frame"].get<double>(),
      report["compress_ms_per_frame"], report["prefill_ms_per_frame"],
      report["question_ms"].get<double>() / frames};
}

Cost Gflop(const Json& report, double clips) {
  const double frames = report["frames"].get<double>() / clips;
  return {report["encode_gflop_per_frame"], 0, report["prefill_gflop_per_frame"],
          report["question_gflop"].get<double>() / frames};
}

// Which share of the work that was spared shows in the time; null where hardly any was.
Json TimePerWork(double ms, double dense_ms, double gflop, double dense_gflop) {
  const double work_saved = 1 - gflop / dense_gflop;
  if (!(work_saved > 0.01)) return nullptr;
  return (1 - ms / dense_ms) / work_saved;
}

Json Compared(const Json& report, const Json& dense, double clips) {
  const Cost ms = Milliseconds(report, clips), dense_ms = Milliseconds(dense, clips);
  const Cost gflop = Gflop(report, clips), dense_gflop = Gflop(dense, clips);
  return {
      {"accuracy",
       report["accuracy"]["mean"].get<double>() / dense["accuracy"]["mean"].get<double>()},
      {"ms_per_frame", ms.Total()},
      {"gflop_per_frame", gflop.Total()},
      {"ms", ms.Total() / dense_ms.Total()},
      {"gflop", gflop.Total() / dense_gflop.Total()},
      {"ms_saved_per_gflop_saved",
       {{"encode", TimePerWork(ms.encode, dense_ms.encode, gflop.encode, dense_gflop.encode)},
        {"prefill", TimePerWork(ms.compress + ms.prefill, dense_ms.compress + dense_ms.prefill,
                                gflop.prefill, dense_gflop.prefill)},
        {"all", TimePerWork(ms.Total(), dense_ms.Total(), gflop.Total(), dense_gflop.Total())}}}};
}

std::string Draw(const Json& report) {
  Chart chart;
  chart.title = "Accuracy kept against time per frame (" + report["model"].get<std::string>() + ")";
  chart.x_title = "time of a frame and its part of one question, of dense";
  chart.y_title = "right answers, of dense";
  chart.groups = {"dense", "encoder", "tokens", "decoder", "several"};
  for (const Json& one : report["configurations"]) {
    const Json& methods = one["methods"];
    const bool encoder = methods.contains("stc_cacher") || methods.contains("turbo") ||
                         methods.contains("duplicate_frames");
    const bool tokens = methods.contains("compressors");
    const bool decoder = methods.contains("pyramid_drop");
    const int group = encoder + tokens + decoder > 1 ? 4
                      : encoder                      ? 1
                      : tokens                       ? 2
                      : decoder                      ? 3
                                                     : 0;
    chart.points.push_back(
        {one["name"], one["of_dense"]["ms"], one["of_dense"]["accuracy"], group});
  }
  return ToSvg(chart);
}

}  // namespace

std::span<const SweepConfiguration> SweepConfigurations() { return kConfigurations; }

Json Sweep(const Engine& engine, const ClipSet& clips, const SweepFlags& flags, Json head) {
  const std::filesystem::path file = flags.file;
  if (file.extension() != ".json") {
    throw InputError("[sweep] expected a file name that ends in .json, got " + flags.file);
  }
  const std::vector<SweepConfiguration> configurations = Configurations(flags);
  std::vector<Evaluation> evaluations;
  for (const SweepConfiguration& configuration : configurations) {
    SessionOptions options;
    options.keep_dialogue = false;
    try {
      ApplyMethods(ParseMethodFlags(configuration.flags), options);
      evaluations.emplace_back(engine, options);
    } catch (const InputError& error) {
      throw InputError("[sweep] configuration '" + configuration.name + "': " + error.what());
    }
  }
  Write(file, "");  // that it can be written should not turn out at the end

  const auto context = engine.NewContext();
  PlayClips(clips, [&](const PlayedClip& clip) {
    // In turn first: the first one finds the caches full of the clip that was just drawn.
    for (size_t i = 0; i < evaluations.size(); ++i) {
      evaluations[(clip.number + i) % evaluations.size()].Play(*context, clip, clips.questions);
    }
    return std::to_string(evaluations.size()) + " configurations";
  });

  Json report = std::move(head), list = Json::array();
  const auto played = static_cast<double>(clips.clips) * static_cast<double>(clips.seeds.size());
  const Json dense = evaluations[0].Report();
  for (size_t i = 0; i < evaluations.size(); ++i) {
    const Json own = i == 0 ? dense : evaluations[i].Report();
    Json one = {{"name", configurations[i].name},
                {"flags", configurations[i].flags},
                {"of_dense", Compared(own, dense, played)}};
    one.update(own);
    list.push_back(std::move(one));
  }
  report["configurations"] = std::move(list);
  Write(file, report.dump(2) + "\n");
  Write(std::filesystem::path(file).replace_extension(".svg"), Draw(report));
  return report;
}

void PrintSweep(const Json& report) {
  Table table({"configuration", "right %", "of dense %", "tokens/frame", "encode ms", "compress ms",
               "prefill ms", "question ms", "ms of dense %", "GFLOP of dense %",
               "ms saved/GFLOP saved"});
  for (const Json& one : report["configurations"]) {
    const Json& of_dense = one["of_dense"];
    const Json& saved = of_dense["ms_saved_per_gflop_saved"]["all"];
    table.Add({one["name"], Percent(one["accuracy"]["mean"]), Percent(of_dense["accuracy"]),
               Number(one["tokens_per_frame"], 1), Number(one["encode_ms_per_frame"], 3),
               Number(one["compress_ms_per_frame"], 3), Number(one["prefill_ms_per_frame"], 3),
               Number(one["question_ms"], 2), Percent(of_dense["ms"]), Percent(of_dense["gflop"]),
               saved.is_null() ? "-" : Number(saved, 2)});
  }
  std::printf("%s", table.ToString().c_str());
}

}  // namespace sluice::cli
