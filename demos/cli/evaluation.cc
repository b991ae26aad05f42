#include "demos/cli/evaluation.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <numeric>
#include <utility>

#include "demos/cli/atlas.h"
#include "runtime/error.h"
#include "streaming/pipeline.h"

namespace sluice::cli {
namespace {

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

StageCost CostOf(const Tracer& tracer, std::string_view stage) {
  const auto found = tracer.stages().find(stage);
  return found == tracer.stages().end() ? StageCost() : found->second;
}

void Add(const KindScores& more, KindScores& sum) {
  for (const auto& [kind, score] : more) {
    KindScore& to = sum[kind];
    to.asked += score.asked;
    to.right += score.right;
    for (const auto& [answer, count] : score.expected) to.expected[answer] += count;
  }
}

}  // namespace

void PlayClips(const ClipSet& set, const std::function<std::string(const PlayedClip&)>& play) {
  const world::Atlas atlas = LoadAtlas();
  const TemporaryDirectory scratch;
  const int total = set.clips * static_cast<int>(set.seeds.size());
  int number = 0;
  Progress progress;
  for (const uint64_t seed : set.seeds) {
    for (int i = 0; i < set.clips; ++i) {
      const Clip clip = MakeClip(seed, i, set.frames);
      const std::vector<FramePtr> frames =
          set.source == "mp4" ? ReadBack(clip.scene, atlas, scratch.path() / "clip.mp4")
                              : RenderFrames(clip.scene, atlas);
      const std::string words = play({number++, seed, clip, frames});
      progress.Show(static_cast<double>(number) / total,
                    std::to_string(number) + " of " + std::to_string(total) + " clips, " + words);
    }
  }
}

double KindScore::Majority() const {
  int64_t most = 0;
  for (const auto& [answer, count] : expected) most = std::max(most, count);
  return static_cast<double>(most) / static_cast<double>(asked);
}

double MeanAccuracy(const KindScores& scores) {
  double sum = 0;
  for (const auto& [kind, score] : scores) sum += score.Accuracy();
  return sum / static_cast<double>(scores.size());
}

Evaluation::Evaluation(const Engine& engine, SessionOptions options)
    : engine_(engine), options_(std::move(options)) {
  engine_.NewSession(options_);
}

void Evaluation::Play(ExecContext& ctx, const PlayedClip& played, int max_questions,
                      const AnswerSink& sink) {
  ctx.tracer().Clear();
  const auto session = engine_.NewSession(options_);
  const auto batch = static_cast<size_t>(options_.frames_per_batch);
  for (size_t i = 0; i < played.frames.size(); i += batch) {
    Ingest(ctx, *session, played.frames.subspan(i, std::min(batch, played.frames.size() - i)));
  }
  ReadWaiting(ctx, *session);
  double flops = DecoderFlops(ctx.tracer());
  work_.ingest_flops += flops;
  CountIngested(*session, work_);
  ++clips_;
  frames_ += session->frames_seen;
  visual_tokens_ += session->visual_tokens;
  methods_.Add(*session);
  session_bytes_ = std::max(session_bytes_, session->SizeBytes());

  const world::Scene& scene = played.clip.scene;
  const auto questions =
      world::AskAll(scene, scene.frames - 1, played.clip.question_seed, max_questions);
  for (const auto& question : questions) {
    const Generated generated = Ask(ctx, *session, question.text, nullptr);
    work_.question_flops += DecoderFlops(ctx.tracer()) - flops;
    flops = DecoderFlops(ctx.tracer());
    CountAsked(*session, work_);
    if (sink) sink(question, generated);
    const std::string kind(world::KindName(question.kind));
    KindScore& score = seeds_[played.seed][kind];
    ++score.asked;
    ++score.expected[question.answer];
    ++questions_;
    if (generated.text == question.answer) {
      ++score.right;
    } else {
      failures_.push_back({{"kind", kind},
                           {"frames", scene.frames},
                           {"question", question.text},
                           {"expected", question.answer},
                           {"answer", generated.text}});
    }
  }

  for (const auto& [stage, cost] : ctx.tracer().stages()) tracer_.Add(stage, cost);
  for (const char* stage : {"duplicates", "encode", "compress", "prefill", "prefill_question"}) {
    const StageCost cost = CostOf(ctx.tracer(), stage);
    const bool of_question = std::string_view(stage) == "prefill_question";
    const auto items = static_cast<double>(of_question ? cost.calls : session->frames_seen);
    if (items > 0) clip_ms_[stage].push_back(1e3 * cost.seconds / items);
  }
}

double Evaluation::ShareRight() const {
  return questions_ == 0
             ? 0.0
             : 1.0 - static_cast<double>(failures_.size()) / static_cast<double>(questions_);
}

KindScores Evaluation::Scores() const {
  KindScores all;
  for (const auto& [seed, scores] : seeds_) Add(scores, all);
  return all;
}

double Evaluation::MedianMs(std::string_view stage) const {
  const auto found = clip_ms_.find(stage);
  if (found == clip_ms_.end()) return 0;
  std::vector<double> values = found->second;
  std::sort(values.begin(), values.end());
  return (values[(values.size() - 1) / 2] + values[values.size() / 2]) / 2;
}

Json Evaluation::VisualWorkPerClip() const {
  const auto clips = static_cast<double>(clips_), questions = static_cast<double>(questions_);
  return {{"dense_prefill_gmac_per_clip", 1e-9 * work_.dense_macs / clips},
          {"prefill_gmac_per_clip", 1e-9 * work_.ingest_macs / clips},
          {"replay_gmac_per_question", 1e-9 * work_.question_macs / questions},
          {"traced_ingest_gflop_per_clip", 1e-9 * work_.ingest_flops / clips},
          {"traced_gflop_per_question", 1e-9 * work_.question_flops / questions},
          {"dense_kv_bytes_per_clip", work_.dense_kv_bytes / clips},
          {"kv_bytes_per_clip", work_.kv_bytes / clips},
          {"kv_bytes_read_per_answer_token", work_.question_kv_bytes / questions}};
}

Json Evaluation::Report() const {
  if (questions_ == 0) throw Error("[eval] these clips raised no question; use more");
  const KindScores scores = Scores();
  Json by_seed = Json::array(), by_kind, majority, asked;
  for (const auto& [seed, own] : seeds_) by_seed.push_back(MeanAccuracy(own));
  for (const auto& [kind, score] : scores) {
    by_kind[kind] = score.Accuracy();
    majority[kind] = score.Majority();
    asked[kind] = score.asked;
  }
  const auto frames = static_cast<double>(frames_), questions = static_cast<double>(questions_);
  const StageCost decode = CostOf(tracer_, "decode");
  Json report;
  report["frames"] = frames_;
  report["questions"] = questions_;
  report["accuracy"] = {
      {"mean", MeanAccuracy(scores)}, {"mean_by_seed", by_seed}, {"by_kind", by_kind}};
  report["majority_baseline"] = majority;
  report["questions_by_kind"] = asked;
  for (const char* stage : {"duplicates", "encode", "compress", "prefill"}) {
    report[std::string(stage) + "_ms_per_frame"] = MedianMs(stage);
  }
  report["question_ms"] = MedianMs("prefill_question");
  for (const char* stage : {"encode", "prefill"}) {
    report[std::string(stage) + "_gflop_per_frame"] = 1e-9 * CostOf(tracer_, stage).flops / frames;
  }
  report["question_gflop"] = 1e-9 * CostOf(tracer_, "prefill_question").flops / questions;
  report["decode_tokens_per_s"] =
      decode.seconds > 0 ? static_cast<double>(decode.items) / decode.seconds : 0.0;
  report["tokens_per_frame"] = static_cast<double>(visual_tokens_) / frames;
  report["session_bytes"] = session_bytes_;
  report["methods"] = ToJson(options_, methods_);
  report["visual_tokens"] = VisualWorkPerClip();
  return report;
}

}  // namespace sluice::cli
