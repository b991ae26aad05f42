// Products on a GPU with weights in bf16 and in 8 bits, as decoding (few rows) and prefill (many)
// need them. One run is a graph of as many products as there are copies of the weight, which are
// together too large for the caches; times are those of one product.
#include <benchmark/benchmark.h>

#include <chrono>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "runtime/exec_context.h"
#include "runtime/ops/linear.h"
#include "runtime/transfer.h"

namespace sluice {
namespace {

constexpr int64_t kBeyondCaches = int64_t{256} << 20;  // bytes
constexpr int64_t kMostProducts = 128;

// A short random piece is repeated: only timing reads it, and drawing all of it would take longer.
Tensor Normal(Shape shape, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0, 1);
  std::vector<BFloat16> piece(100003);
  for (BFloat16& value : piece) value = BFloat16::From(normal(generator));
  Tensor x(DType::kBF16, shape);
  for (int64_t i = 0; i < shape.NumElements(); ++i) {
    x.data<BFloat16>()[i] = piece[i % static_cast<int64_t>(piece.size())];
  }
  return x;
}

// Arguments: format, rows, outputs, inputs, gate and up or not.
void Product(benchmark::State& state) {
  if (cuda::DeviceCount() == 0) {
    state.SkipWithError("needs a GPU and a build with -DSLUICE_CUDA=ON");
    return;
  }
  const auto format = static_cast<WeightFormat>(state.range(0));
  const int64_t m = state.range(1), n = state.range(2), k = state.range(3);
  const bool silu_mul = state.range(4) != 0;
  ExecContext ctx({.device = Device::kCuda});
  const auto host = std::make_shared<Tensor>(Normal({n, k}, 1));
  std::vector<LinearWeight> weights;
  int64_t bytes = 0;
  while (weights.empty() ||
         (bytes < kBeyondCaches && static_cast<int64_t>(weights.size()) < kMostProducts)) {
    weights.emplace_back(SharedMatrix{*host, host, nullptr}, Tensor(),
                         WeightPlace(Device::kCuda, format));
    bytes += static_cast<int64_t>(weights.back().SizeBytes());
  }
  const Tensor x = Placed(Normal({m, k}, 2), Device::kCuda);
  const Tensor y(silu_mul ? DType::kBF16 : DType::kF32, {m, silu_mul ? n / 2 : n}, Device::kCuda);
  const auto run = [&] {
    ctx.Recurring("products", [&] {
      for (const LinearWeight& weight : weights) {
        Linear(ctx, x, weight, y,
               {.activation = silu_mul ? Activation::kSiluMul : Activation::kNone});
      }
    });
    ctx.Synchronize();
  };
  for (int i = 0; i < 3; ++i) run();  // as it is, captured, replayed
  const auto products = static_cast<double>(weights.size());
  for (auto _ : state) {
    const auto begin = std::chrono::steady_clock::now();
    run();
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
    state.SetIterationTime(elapsed.count() / products);
  }
  using benchmark::Counter;
  state.counters["weight B/s"] =
      Counter(static_cast<double>(weights[0].SizeBytes()), Counter::kIsIterationInvariantRate);
  state.counters["FLOP/s"] = Counter(2.0 * static_cast<double>(m) * static_cast<double>(n * k),
                                     Counter::kIsIterationInvariantRate);
  state.SetLabel(std::string(Name(format)) + " " +
                 Name(ChooseGpuLinear(m, n, k, true, DType::kBF16, format,
                                      silu_mul ? Activation::kSiluMul : Activation::kNone)));
}

// Projections of Qwen2 with 0.5 and 7 billion weights.
void Models(benchmark::internal::Benchmark* benchmark) {
  for (const int64_t rows : {1, 4, 16, 1024}) {
    for (const auto& [n, k, silu_mul] : {std::tuple<int64_t, int64_t, bool>{1152, 896, false},
                                         {896, 896, false},
                                         {9728, 896, true},
                                         {896, 4864, false},
                                         {151936, 896, false},
                                         {4608, 3584, false},
                                         {3584, 3584, false},
                                         {37888, 3584, true},
                                         {3584, 18944, false},
                                         {152064, 3584, false}}) {
      if (rows > 16 && n > 100000) continue;  // logits are of few rows
      for (const WeightFormat format :
           {WeightFormat::kPlain, WeightFormat::kFp8, WeightFormat::kInt8}) {
        benchmark->Args({static_cast<int64_t>(format), rows, n, k, silu_mul});
      }
    }
  }
}
BENCHMARK(Product)
    ->Apply(Models)
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond)
    ->Iterations(10);  // fixed: every trial for a better number would make the weights again

}  // namespace
}  // namespace sluice

BENCHMARK_MAIN();
