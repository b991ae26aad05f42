// One way of running the model, evaluated clip by clip: what a plain `sluice eval` does once and a
// sweep does for each of its configurations.
#ifndef SLUICE_DEMOS_CLI_EVALUATION_H_
#define SLUICE_DEMOS_CLI_EVALUATION_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "demos/cli/clips.h"
#include "demos/cli/common.h"
#include "demos/cli/methods.h"
#include "demos/world/questions.h"
#include "streaming/engine.h"

namespace sluice::cli {

// Which clips are played.
struct ClipSet {
  int clips = 100;  // of each seed
  std::vector<uint64_t> seeds = {0};
  int frames = 0;
  int questions = 12;  // about a clip, at most
  std::string source = "rendered";
};

struct PlayedClip {
  int number = 0;  // among all of the set
  uint64_t seed = 0;
  const Clip& clip;
  std::span<const FramePtr> frames;
};

// Makes one clip after another and hands it to `play`, which returns a few words for the progress
// bar. Throws what `play` throws.
void PlayClips(const ClipSet& set, const std::function<std::string(const PlayedClip&)>& play);

struct KindScore {
  int64_t asked = 0, right = 0;
  std::map<std::string, int64_t> expected;  // how often each answer was the right one

  double Accuracy() const { return static_cast<double>(right) / static_cast<double>(asked); }
  // What always giving the commonest answer would reach.
  double Majority() const;
};
using KindScores = std::map<std::string, KindScore>;
// Over kinds, so that rare ones count as much as common ones.
double MeanAccuracy(const KindScores& scores);

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

class Evaluation {
 public:
  using AnswerSink = std::function<void(const world::Question&, const Generated&)>;

  // The engine must outlive it. Throws InputError when its sessions refuse `options`.
  Evaluation(const Engine& engine, SessionOptions options);

  // Plays one clip once and asks all its questions, each on its own. Clears the context's tracer.
  void Play(ExecContext& ctx, const PlayedClip& played, int max_questions,
            const AnswerSink& sink = nullptr);

  int64_t frames() const { return frames_; }
  int64_t questions() const { return questions_; }
  double ShareRight() const;
  KindScores Scores() const;  // of all seeds together
  const Json& failures() const { return failures_; }
  const Tracer& tracer() const { return tracer_; }  // of all clips

  // Accuracy, time, work and memory. Times are medians over clips, so that what else ran on the
  // machine during a few of them does not matter.
  Json Report() const;

 private:
  double MedianMs(std::string_view stage) const;
  Json VisualWorkPerClip() const;

  const Engine& engine_;
  const SessionOptions options_;
  std::map<uint64_t, KindScores> seeds_;
  int64_t session_bytes_ = 0;  // at most
  int64_t clips_ = 0, frames_ = 0, visual_tokens_ = 0, questions_ = 0;
  VisualWork work_;
  Json failures_ = Json::array();
  MethodCounts methods_;
  Tracer tracer_;
  // Of each clip, by stage: a frame's, but "prefill_question": a question's.
  std::map<std::string, std::vector<double>, std::less<>> clip_ms_;
};

}  // namespace sluice::cli

#endif  // SLUICE_DEMOS_CLI_EVALUATION_H_
