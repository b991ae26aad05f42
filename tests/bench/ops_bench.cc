// Projections, matrix-vector products, norms and packing at the shapes of the models, on all cores.
//   build/release/bin/ops_bench --benchmark_filter=MatVec
// FLOP/s counts two operations for a multiply-add; B/s counts what must be read and written once.
// Weights rotate through copies larger than the caches where a decoder would find them in memory.
#include <benchmark/benchmark.h>

#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "runtime/cpu_info.h"
#include "runtime/ops/activation.h"
#include "runtime/ops/linear.h"
#include "runtime/ops/norm.h"
#include "runtime/parallel.h"

namespace sluice {
namespace {

constexpr size_t kBeyondCaches = size_t{768} << 20;

Tensor RandomTensor(DType dtype, Shape shape) {
  std::mt19937 generator(1);
  Tensor x(DType::kF32, shape);
  // Uniform: a normal distribution would take longer than the benchmark for the largest weights.
  for (int64_t i = 0; i < shape.NumElements(); ++i) {
    x.data<float>()[i] = static_cast<float>(static_cast<int32_t>(generator())) * 0x1p-31f;
  }
  return ConvertTo(x, dtype);
}

int Threads() { return CpuInfo::Detect().physical_cores; }

DType DTypeOf(int64_t argument) { return argument == 0 ? DType::kF32 : DType::kBF16; }

LinearWeight RandomWeight(DType dtype, int64_t n, int64_t k) {
  auto keeper = std::make_shared<Tensor>(RandomTensor(dtype, {n, k}));
  return LinearWeight({keeper->view(), keeper, nullptr}, Tensor());
}

benchmark::Counter Rate(double per_iteration) {
  return benchmark::Counter(per_iteration, benchmark::Counter::kIsIterationInvariantRate);
}

// The bandwidth that matrix-vector products are measured against: sums a large buffer.
void Read(benchmark::State& state) {
  ExecContext ctx({.num_threads = Threads()});
  const Tensor buffer(DType::kU8, {static_cast<int64_t>(kBeyondCaches)});
  std::memset(buffer.data<uint8_t>(), 1, buffer.SizeBytes());
  const auto* words = reinterpret_cast<const uint64_t*>(buffer.data<uint8_t>());
  for (auto _ : state) {
    ParallelFor(ctx, kBeyondCaches / 8, 1, [&](int64_t begin, int64_t end) {
      uint64_t sums[16] = {};
      for (int64_t i = begin; i + 16 <= end; i += 16) {
        for (int j = 0; j < 16; ++j) sums[j] += words[i + j];
      }
      benchmark::DoNotOptimize(std::accumulate(sums, sums + 16, uint64_t{0}));
    });
  }
  state.counters["B/s"] = Rate(kBeyondCaches);
}
BENCHMARK(Read)->UseRealTime()->Unit(benchmark::kMillisecond);

// Arguments: dtype (0 f32, 1 bf16), M, N, K.
void Products(benchmark::State& state) {
  const DType dtype = DTypeOf(state.range(0));
  const int64_t m = state.range(1), n = state.range(2), k = state.range(3);
  ExecContext ctx({.num_threads = Threads()});
  const LinearWeight weight = RandomWeight(dtype, n, k);
  const Tensor x = RandomTensor(dtype, {m, k}), y(dtype, {m, n});
  Linear(ctx, x, weight, y);
  for (auto _ : state) Linear(ctx, x, weight, y);
  state.counters["FLOP/s"] = Rate(2.0 * static_cast<double>(m * n * k));
}
BENCHMARK(Products)
    ->ArgNames({"bf16", "M", "N", "K"})
    ->ArgsProduct({{0, 1}, {196}, {768}, {256}})
    ->ArgsProduct({{0, 1}, {49}, {320}, {320}})
    ->ArgsProduct({{0, 1}, {8, 196}, {9728}, {896}})
    ->ArgsProduct({{0, 1}, {8, 196}, {896}, {4864}})
    ->ArgsProduct({{0, 1}, {729}, {4304}, {1152}})
    ->ArgsProduct({{0, 1}, {729}, {1152}, {4304}})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

// Arguments: dtype, rows, N, K.
void MatVec(benchmark::State& state) {
  const DType dtype = DTypeOf(state.range(0));
  const int64_t m = state.range(1), n = state.range(2), k = state.range(3);
  ExecContext ctx({.num_threads = Threads()});
  std::vector<LinearWeight> weights;
  size_t bytes = 0;
  while (bytes < kBeyondCaches) {
    weights.push_back(RandomWeight(dtype, n, k));
    bytes += weights.back().SizeBytes();
  }
  const Tensor x = RandomTensor(dtype, {m, k}), y(DType::kF32, {m, n});
  size_t next = 0;
  for (auto _ : state) Linear(ctx, x, weights[next++ % weights.size()], y);
  state.counters["B/s"] = Rate(static_cast<double>(n * k * static_cast<int64_t>(SizeOf(dtype))));
}
BENCHMARK(MatVec)
    ->ArgNames({"bf16", "M", "N", "K"})
    ->ArgsProduct({{0, 1}, {1}, {1152}, {896}})
    ->ArgsProduct({{0, 1}, {1, 2, 4}, {9728}, {896}})
    ->ArgsProduct({{0, 1}, {1}, {896}, {4864}})
    ->ArgsProduct({{0, 1}, {1}, {152000}, {896}})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

// Arguments: M, D, dtype of the result.
void Rms(benchmark::State& state) {
  const int64_t m = state.range(0), d = state.range(1);
  const DType dtype = DTypeOf(state.range(2));
  ExecContext ctx({.num_threads = Threads()});
  const Tensor x = RandomTensor(DType::kF32, {m, d}), weight = RandomTensor(DType::kF32, {d});
  const Tensor y(dtype, {m, d});
  for (auto _ : state) RmsNorm(ctx, x, weight, 1e-6f, y);
  state.counters["B/s"] = Rate(static_cast<double>(x.SizeBytes() + y.SizeBytes()));
}
BENCHMARK(Rms)
    ->ArgNames({"M", "D", "bf16"})
    ->ArgsProduct({{1, 196, 729}, {896, 1152}, {1}})
    ->UseRealTime();

void Layer(benchmark::State& state) {
  const int64_t m = state.range(0), d = state.range(1);
  const DType dtype = DTypeOf(state.range(2));
  ExecContext ctx({.num_threads = Threads()});
  const Tensor x = RandomTensor(DType::kF32, {m, d}), weight = RandomTensor(DType::kF32, {d});
  const Tensor bias = RandomTensor(DType::kF32, {d}), y(dtype, {m, d});
  for (auto _ : state) LayerNorm(ctx, x, weight, bias, 1e-6f, y);
  state.counters["B/s"] = Rate(static_cast<double>(x.SizeBytes() + y.SizeBytes()));
}
BENCHMARK(Layer)
    ->ArgNames({"M", "D", "bf16"})
    ->ArgsProduct({{196, 729}, {256, 1152}, {1}})
    ->UseRealTime();

void Silu(benchmark::State& state) {
  const int64_t m = state.range(0), width = state.range(1);
  ExecContext ctx({.num_threads = Threads()});
  const Tensor gate_up = RandomTensor(DType::kBF16, {m, 2 * width}), y(DType::kBF16, {m, width});
  for (auto _ : state) SiluMul(ctx, gate_up, y);
  state.counters["B/s"] = Rate(static_cast<double>(gate_up.SizeBytes() + y.SizeBytes()));
}
BENCHMARK(Silu)->ArgNames({"M", "I"})->ArgsProduct({{1, 196}, {960, 4864}})->UseRealTime();

// What loading a bf16 weight costs beside reading it.
void Pack(benchmark::State& state) {
  const int64_t n = state.range(0), k = state.range(1);
  const auto keeper = std::make_shared<Tensor>(RandomTensor(DType::kBF16, {n, k}));
  for (auto _ : state) {
    const LinearWeight weight({keeper->view(), keeper, nullptr}, Tensor());
    benchmark::DoNotOptimize(weight.SizeBytes());
  }
  state.counters["B/s"] = Rate(static_cast<double>(keeper->SizeBytes()));
}
BENCHMARK(Pack)->ArgNames({"N", "K"})->Args({9728, 896})->Args({896, 4864})->UseRealTime();

}  // namespace
}  // namespace sluice
BENCHMARK_MAIN();
