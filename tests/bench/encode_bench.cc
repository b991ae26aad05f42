// The vision tower of the default model on frames that resemble each other: every frame whole, and
// all but every second or fourth from the features of that one (STC-Cacher at its published
// settings, patches chosen in every layer or in the first).
// Counters: milliseconds a frame, in all and by stage, and GFLOP a frame. Machines that do
// something else beside: compare minima of interleaved repetitions,
//   build/release/bin/encode_bench --benchmark_enable_random_interleaving=true
//       --benchmark_repetitions=20
#include <benchmark/benchmark.h>

#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "compression/stc_cacher.h"
#include "llm/vlm.h"

namespace sluice {
namespace {

constexpr int kFrames = 8;

const Vlm& Model() {
  static const std::shared_ptr<const Vlm> model =
      Vlm::Load(std::filesystem::path(SLUICE_SOURCE_DIR) / "models/sluice-mini",
                {.compute_type = DType::kBF16});
  return *model;
}

// Noise, and before it a square of other noise that moves a step to the right with every frame.
Tensor Film(const PreprocessConfig& config) {
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform(-1, 1);
  Tensor pixels(DType::kF32, {kFrames, 3, config.height, config.width});
  const int64_t frame = int64_t{3} * config.height * config.width;
  const int side = config.height / 5;
  for (int64_t i = 0; i < kFrames * frame; ++i) {
    const int64_t row = i / config.width % config.height, column = i % config.width;
    const int64_t left = 8 * (i / frame);
    const bool moving = row >= side && row < 2 * side && column >= left && column < left + side;
    pixels.data<float>()[i] =
        i < frame || moving ? uniform(random) : pixels.data<float>()[i % frame];
  }
  return pixels;
}

// Argument: threads.
void Encode(benchmark::State& state, const StcCacherOptions& options) {
  const VisionEncoder& encoder = Model().encoder();
  ExecContext ctx({.num_threads = static_cast<int>(state.range(0))});
  const Tensor pixels = Film(encoder.preprocess_config());
  const std::vector<FramePtr> frames(kFrames, std::make_shared<Frame>());
  StcCacher cacher(options);
  const EncodeHooks hooks = {.reuse = options.interval > 1 ? &cacher : nullptr};
  encoder.Encode(ctx, pixels, frames, hooks);
  ctx.tracer().Clear();
  for (auto _ : state) encoder.Encode(ctx, pixels, frames, hooks);
  for (const auto& [name, cost] : ctx.tracer().stages()) {
    state.counters[name + "_ms"] =
        1e3 * cost.seconds / kFrames / static_cast<double>(state.iterations());
  }
  const StageCost& all = ctx.tracer().stages().find("encode")->second;
  state.counters["gflop"] = 1e-9 * all.flops / static_cast<double>(all.items);
}
BENCHMARK_CAPTURE(Encode, Whole, StcCacherOptions{.interval = 1})
    ->Arg(1)
    ->Arg(2)
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(Encode, EverySecond, StcCacherOptions{.interval = 2})
    ->Arg(1)
    ->Arg(2)
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(Encode, EverySecondShared,
                  (StcCacherOptions{.interval = 2, .shared_selection = true}))
    ->Arg(1)
    ->Arg(2)
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(Encode, EveryFourth, StcCacherOptions{.interval = 4})
    ->Arg(1)
    ->Arg(2)
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(Encode, EveryFourthShared,
                  (StcCacherOptions{.interval = 4, .shared_selection = true}))
    ->Arg(1)
    ->Arg(2)
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace sluice

BENCHMARK_MAIN();
