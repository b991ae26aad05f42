// The default model under a scheduler: frames a second of one and of several streams that each push
// frame by frame, and tokens a second of one and of several answers. Counters: milliseconds a frame
// by stage. Machines that do something
// else beside: compare minima of interleaved repetitions,
//   build/release/bin/scheduler_bench --benchmark_enable_random_interleaving=true
//       --benchmark_repetitions=5
#include <benchmark/benchmark.h>

#include <filesystem>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "streaming/scheduler.h"

namespace sluice {
namespace {

// The default model, never at a loss for a next word: answers are as long as they may be.
class Talkative : public Vlm {
 public:
  Talkative()
      : model_(Vlm::Load(std::filesystem::path(SLUICE_SOURCE_DIR) / "models/sluice-mini", {})) {}
  const VlmInfo& info() const override { return model_->info(); }
  const Tokenizer& tokenizer() const override { return model_->tokenizer(); }
  const PromptFormat& prompt_format() const override { return model_->prompt_format(); }
  const VisionEncoder& encoder() const override { return model_->encoder(); }
  const Decoder& decoder() const override { return model_->decoder(); }
  const GenerationDefaults& generation_defaults() const override { return defaults_; }
  ConstTensorView newline_row() const override { return model_->newline_row(); }

 private:
  const std::shared_ptr<const Vlm> model_;
  const GenerationDefaults defaults_;
};

std::shared_ptr<const Engine> TheEngine() {
  static const auto engine =
      std::make_shared<const Engine>(std::make_shared<const Talkative>(), EngineOptions{});
  return engine;
}

FramePtr Noise(int index) {
  auto frame = std::make_shared<Frame>();
  frame->width = 320;
  frame->height = 240;
  frame->rgb.resize(320 * 240 * 3);
  std::mt19937 random(index);
  for (uint8_t& value : frame->rgb) value = static_cast<uint8_t>(random());
  frame->index = index;
  frame->time = MediaTime::FromSeconds(0.5 * index);
  return frame;
}

struct Streams {
  explicit Streams(int64_t count) : scheduler(TheEngine(), {}, clock, metrics, /*manual=*/true) {
    for (int64_t s = 0; s < count; ++s) ids.push_back(scheduler.Open({}, {}, nullptr));
  }
  void PushAndRun(const FramePtr& frame) {
    for (const StreamId& id : ids) scheduler.Push(id, 0, frame);
    while (scheduler.RunRound()) {
    }
  }
  double Seconds(const char* stage) {
    return metrics.histogram("sluice_stage_seconds", "", {}, {{"stage", stage}}).sum();
  }
  SystemClock clock;
  Metrics metrics;
  Scheduler scheduler;
  std::vector<StreamId> ids;
};

constexpr int kFrames = 16;
constexpr const char* kStages[] = {"preprocess", "encode", "prefill"};

void Frames(benchmark::State& state) {
  std::vector<FramePtr> frames;
  for (int i = 0; i <= kFrames; ++i) frames.push_back(Noise(i));
  int64_t done = 0;
  std::map<std::string, double> seconds;
  for (auto _ : state) {
    state.PauseTiming();
    auto streams = std::make_unique<Streams>(state.range(0));
    streams->PushAndRun(frames[0]);  // and the prefix
    for (const char* stage : kStages) seconds[stage] -= streams->Seconds(stage);
    state.ResumeTiming();
    for (int i = 1; i <= kFrames; ++i) streams->PushAndRun(frames[i]);
    done += kFrames * state.range(0);
    state.PauseTiming();
    for (const char* stage : kStages) seconds[stage] += streams->Seconds(stage);
    streams.reset();
    state.ResumeTiming();
  }
  for (const char* stage : kStages) {
    state.counters[stage] = 1e3 * seconds[stage] / static_cast<double>(done);
  }
  state.counters["frames/s"] =
      benchmark::Counter(static_cast<double>(done), benchmark::Counter::kIsRate);
}
BENCHMARK(Frames)->Arg(1)->Arg(8)->UseRealTime()->Unit(benchmark::kMillisecond);

void Tokens(benchmark::State& state) {
  constexpr int kTokens = 64;
  GenerateOptions generate;
  generate.max_new_tokens = kTokens + 1;
  int64_t done = 0;
  for (auto _ : state) {
    state.PauseTiming();
    auto streams = std::make_unique<Streams>(state.range(0));
    for (int i = 0; i < 8; ++i) streams->PushAndRun(Noise(i));
    for (const StreamId& id : streams->ids) {
      streams->scheduler.Ask(id, {1, "What is there?", generate});
    }
    // The prompts make the first tokens.
    const Counter& answers =
        streams->metrics.counter("sluice_answers_total", "", {{"end", "length"}});
    streams->scheduler.RunRound();
    state.ResumeTiming();
    while (answers.value() < state.range(0)) streams->scheduler.RunRound();
    done += kTokens * state.range(0);
    state.PauseTiming();
    streams.reset();
    state.ResumeTiming();
  }
  state.counters["tokens/s"] =
      benchmark::Counter(static_cast<double>(done), benchmark::Counter::kIsRate);
}
BENCHMARK(Tokens)->Arg(1)->Arg(8)->UseRealTime()->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace sluice

BENCHMARK_MAIN();
