// sluice eval: accuracy and speed over clips of the demo world.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <numeric>
#include <span>
#include <vector>

#include "demos/cli/atlas.h"
#include "demos/cli/clips.h"
#include "demos/cli/commands.h"
#include "demos/cli/common.h"
#include "demos/cli/methods.h"
#include "demos/world/questions.h"
#include "runtime/error.h"
#include "streaming/pipeline.h"
#include "streaming/source.h"

namespace sluice::cli {
namespace {

struct EvalFlags {
  ModelFlags model;
  MethodFlags methods;
  int clips = 100;
  uint64_t seed = 0;
  int frames = 0;
  int questions = 12;
  std::string source = "rendered";
  bool list_failures = false;
  std::string dump;
  bool json = false;
};

struct KindScore {
  int64_t asked = 0, right = 0;
  std::map<std::string, int64_t> expected;  // how often each answer was the right one

  double Accuracy() const { return static_cast<double>(right) / static_cast<double>(asked); }
  // What always giving the commonest answer would reach.
  double Majority() const {
    int64_t most = 0;
    for (const auto& [answer, count] : expected) most = std::max(most, count);
    return static_cast<double>(most) / static_cast<double>(asked);
  }
};

// A directory that goes away with its contents.
class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string name = (std::filesystem::temp_directory_path() / "sluice-eval-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw Error("[eval] cannot make " + name);
    path_ = name;
  }
  ~TemporaryDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

// The sampled frames of a scene after a way through H.264 and back.
std::vector<FramePtr> ReadBack(const world::Scene& scene, const world::Atlas& atlas,
                               const std::filesystem::path& mp4) {
  WriteClip(scene, atlas, mp4);
  SourceOptions options;
  options.rate.fps = 1.0 / world::kSampleSeconds;
  const auto source = Source::Open(mp4.string(), options);
  std::vector<FramePtr> frames;
  while (FramePtr frame = source->Next()) frames.push_back(std::move(frame));
  if (static_cast<int>(frames.size()) != scene.frames) {
    throw Error("[eval] wrote " + std::to_string(scene.frames) + " sampled frames to " +
                mp4.string() + ", read back " + std::to_string(frames.size()));
  }
  return frames;
}

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

// What the decoder spent on visual tokens, summed: by the paper's cost model (PyramidCost) and as
// traced.
struct VisualWork {
  double dense_macs = 0;         // of a prefill that keeps all
  double ingest_macs = 0;        // of rows as they arrived
  double question_macs = 0;      // of rows prefilled with questions (replay)
  double ingest_flops = 0;       // traced, the prompt's prefix included
  double question_flops = 0;     // traced, of questions and their answers, text included
  double dense_kv_bytes = 0;     // of visual rows, did every layer hold all
  double kv_bytes = 0;           // that the session holds
  double question_kv_bytes = 0;  // that every decoded token reads
};

struct Evaluation {
  std::map<std::string, KindScore> kinds;
  int64_t frames = 0, visual_tokens = 0, questions = 0;
  VisualWork work;
  Json failures = Json::array();
  MethodCounts methods;
};

// Visual rows of each layer of what the session holds.
std::vector<int64_t> VisualRows(const Session& session) {
  std::vector<int64_t> rows;
  const auto text = static_cast<int64_t>(session.prefix_ids.size());
  for (int i = 0; i < session.vlm->decoder().kv_geometry().num_layers; ++i) {
    rows.push_back(std::max<int64_t>(session.cache.rows(i) - text, 0));
  }
  return rows;
}

double KvBytes(const KvGeometry& kv, std::span<const int64_t> rows) {
  return 2.0 * kv.kv_heads * kv.head_dim * static_cast<double>(SizeOf(kv.dtype)) *
         static_cast<double>(std::accumulate(rows.begin(), rows.end(), int64_t{0}));
}

void CountIngested(const Session& session, VisualWork& work) {
  const Decoder& decoder = session.vlm->decoder();
  const KvGeometry kv = decoder.kv_geometry();
  const PyramidCost cost = PyramidCost::Of(decoder);
  const std::vector<int64_t> held = VisualRows(session);
  const std::vector<int64_t> dense(kv.num_layers, session.visual_tokens);
  work.dense_macs += cost.MultiplyAdds(dense);
  work.ingest_macs += cost.MultiplyAdds(held);
  work.dense_kv_bytes += KvBytes(kv, dense);
  work.kv_bytes += KvBytes(kv, held);
}

void CountAsked(const Session& session, VisualWork& work) {
  const Decoder& decoder = session.vlm->decoder();
  const KvGeometry kv = decoder.kv_geometry();
  const std::vector<int64_t> stages = session.pyramid.QuestionStageSizes();
  const std::vector<int64_t> seen = stages.empty()
                                        ? VisualRows(session)
                                        : session.pyramid.plan().LayerRows(stages, kv.num_layers);
  work.question_kv_bytes += KvBytes(kv, seen);
  if (session.pyramid.replays()) {
    work.question_macs += PyramidCost::Of(decoder).MultiplyAdds(seen);
  }
}

// Plays one clip once and asks all its questions, each on its own.
void EvaluateClip(ExecContext& ctx, const Engine& engine, const Clip& clip,
                  std::span<const FramePtr> frames, int max_questions,
                  const SessionOptions& options, Evaluation& evaluation, Dump& dump) {
  const auto session = engine.NewSession(options);
  const auto batch = static_cast<size_t>(options.frames_per_batch);
  double flops = DecoderFlops(ctx.tracer());
  for (size_t i = 0; i < frames.size(); i += batch) {
    Ingest(ctx, *session, frames.subspan(i, std::min(batch, frames.size() - i)));
  }
  VisualWork& work = evaluation.work;
  work.ingest_flops += DecoderFlops(ctx.tracer()) - flops;
  CountIngested(*session, work);
  evaluation.frames += session->frames_seen;
  evaluation.visual_tokens += session->visual_tokens;
  evaluation.methods.Add(*session);

  for (const auto& question :
       world::AskAll(clip.scene, clip.scene.frames - 1, clip.question_seed, max_questions)) {
    flops = DecoderFlops(ctx.tracer());
    const Generated generated = Ask(ctx, *session, question.text, nullptr);
    work.question_flops += DecoderFlops(ctx.tracer()) - flops;
    CountAsked(*session, work);
    dump.Answer(question, generated);
    const std::string kind(world::KindName(question.kind));
    KindScore& score = evaluation.kinds[kind];
    ++score.asked;
    ++score.expected[question.answer];
    ++evaluation.questions;
    if (generated.text == question.answer) {
      ++score.right;
    } else {
      evaluation.failures.push_back({{"kind", kind},
                                     {"frames", clip.scene.frames},
                                     {"question", question.text},
                                     {"expected", question.answer},
                                     {"answer", generated.text}});
    }
  }
}

double MeanAccuracy(const Evaluation& evaluation) {
  double sum = 0;
  for (const auto& [kind, score] : evaluation.kinds) sum += score.Accuracy();
  return sum / static_cast<double>(evaluation.kinds.size());
}

StageCost CostOf(const Tracer& tracer, std::string_view stage) {
  const auto found = tracer.stages().find(stage);
  return found == tracer.stages().end() ? StageCost() : found->second;
}

// Means of a clip and of a question.
Json ToJson(const VisualWork& work, double clips, double questions) {
  return {{"dense_prefill_gmac_per_clip", 1e-9 * work.dense_macs / clips},
          {"prefill_gmac_per_clip", 1e-9 * work.ingest_macs / clips},
          {"replay_gmac_per_question", 1e-9 * work.question_macs / questions},
          {"traced_ingest_gflop_per_clip", 1e-9 * work.ingest_flops / clips},
          {"traced_gflop_per_question", 1e-9 * work.question_flops / questions},
          {"dense_kv_bytes_per_clip", work.dense_kv_bytes / clips},
          {"kv_bytes_per_clip", work.kv_bytes / clips},
          {"kv_bytes_read_per_answer_token", work.question_kv_bytes / questions}};
}

Json Report(const EvalFlags& flags, const Vlm& vlm, const SessionOptions& options,
            const Evaluation& evaluation, const Tracer& tracer) {
  Json by_kind, majority, asked;
  for (const auto& [kind, score] : evaluation.kinds) {
    by_kind[kind] = score.Accuracy();
    majority[kind] = score.Majority();
    asked[kind] = score.asked;
  }
  const auto frames = static_cast<double>(evaluation.frames);
  const StageCost decode = CostOf(tracer, "decode");
  Json report;
  report["model"] = vlm.info().name;
  report["dtype"] = Name(vlm.info().compute_type);
  report["source"] = flags.source;
  report["seed"] = flags.seed;
  report["clips"] = flags.clips;
  report["frames"] = evaluation.frames;
  report["questions"] = evaluation.questions;
  report["accuracy"] = {{"mean", MeanAccuracy(evaluation)}, {"by_kind", by_kind}};
  report["majority_baseline"] = majority;
  report["questions_by_kind"] = asked;
  report["encode_ms_per_frame"] = CostOf(tracer, "encode").seconds * 1e3 / frames;
  report["prefill_ms_per_frame"] = CostOf(tracer, "prefill").seconds * 1e3 / frames;
  report["tokens_per_frame"] = static_cast<double>(evaluation.visual_tokens) / frames;
  report["encode_gflop_per_frame"] = CostOf(tracer, "encode").flops * 1e-9 / frames;
  report["prefill_gflop_per_frame"] = CostOf(tracer, "prefill").flops * 1e-9 / frames;
  report["methods"] = ToJson(options, evaluation.methods);
  report["decode_tokens_per_s"] =
      decode.seconds > 0 ? static_cast<double>(decode.items) / decode.seconds : 0.0;
  report["question_ms"] =
      CostOf(tracer, "prefill_question").seconds * 1e3 / static_cast<double>(evaluation.questions);
  report["visual_tokens"] =
      ToJson(evaluation.work, flags.clips, static_cast<double>(evaluation.questions));
  return report;
}

std::string Percent(double share) {
  char text[16];
  std::snprintf(text, sizeof text, "%.1f", 100 * share);
  return text;
}

void PrintReport(const EvalFlags& flags, const Evaluation& evaluation, const Tracer& tracer) {
  Table table({"kind", "asked", "right %", "majority %"});
  for (const auto& [kind, score] : evaluation.kinds) {
    table.Add(
        {kind, std::to_string(score.asked), Percent(score.Accuracy()), Percent(score.Majority())});
  }
  table.Add({"mean over kinds", std::to_string(evaluation.questions),
             Percent(MeanAccuracy(evaluation)), ""});
  std::printf("%d clips (%s), seed %llu, %lld frames\n\n%s\n%s", flags.clips, flags.source.c_str(),
              static_cast<unsigned long long>(flags.seed),
              static_cast<long long>(evaluation.frames), table.ToString().c_str(),
              StageTable(tracer).c_str());
}

void Eval(const EvalFlags& flags) {
  SessionOptions options;
  options.keep_dialogue = false;
  ApplyMethods(flags.methods, options);
  const Engine engine = OpenEngine(flags.model);
  const auto context = engine.NewContext();
  const world::Atlas atlas = LoadAtlas();
  const TemporaryDirectory scratch;
  const bool through_video = flags.source == "mp4";

  Evaluation evaluation;
  Dump dump(flags.dump);
  Progress progress;
  for (int i = 0; i < flags.clips; ++i) {
    const Clip clip = MakeClip(flags.seed, i, flags.frames);
    const std::vector<FramePtr> frames =
        through_video ? ReadBack(clip.scene, atlas, scratch.path() / "clip.mp4")
                      : RenderFrames(clip.scene, atlas);
    dump.Frames(i, frames);
    EvaluateClip(*context, engine, clip, frames, flags.questions, options, evaluation, dump);
    char text[80];
    std::snprintf(
        text, sizeof text, "%d of %d clips, %.1f %% right", i + 1, flags.clips,
        100.0 * (1.0 - static_cast<double>(evaluation.failures.size()) /
                           static_cast<double>(std::max<int64_t>(evaluation.questions, 1))));
    progress.Show(static_cast<double>(i + 1) / flags.clips, text);
  }
  progress.Clear();
  if (evaluation.questions == 0) throw Error("[eval] these clips raised no question; use more");

  Json report = Report(flags, *engine.vlm(), options, evaluation, context->tracer());
  if (flags.json) {
    if (flags.list_failures) report["failures"] = evaluation.failures;
    PrintJson(report);
    return;
  }
  PrintReport(flags, evaluation, context->tracer());
  if (!flags.list_failures) return;
  for (const Json& failure : evaluation.failures) std::printf("%s\n", failure.dump().c_str());
}

}  // namespace

void AddEval(CLI::App& app) {
  CLI::App* command = app.add_subcommand("eval", "Accuracy and speed over clips of the demo world");
  auto flags = std::make_shared<EvalFlags>();
  AddModelFlags(*command, flags->model);
  AddMethodFlags(*command, flags->methods);
  AddClipOptions(*command, {flags->clips, flags->seed, flags->frames, flags->questions});
  command
      ->add_option("--source", flags->source,
                   "rendered: pictures as they are; mp4: written as H.264 and read back")
      ->capture_default_str()
      ->check(CLI::IsMember({"rendered", "mp4"}));
  command->add_option("--dump", flags->dump, "Write frames and answers to this directory");
  command->add_flag("--failures", flags->list_failures, "List every wrong answer");
  command->add_flag("--json", flags->json, "Print one JSON object");
  command->callback([flags] { Eval(*flags); });
}

}  // namespace sluice::cli
