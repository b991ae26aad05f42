// Attention on a GPU, quantisation included: Attention by the kernels of the chip, MmaAttention by
// those of mma.sync, which Hopper has too, though fp8 and int4 are emulated there. One run is
// kQueued calls in a row and one wait, so that launches overlap with work as in a model; times are
// those of one call.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "runtime/dtype.h"
#include "runtime/error.h"
#include "runtime/ops/cuda/attention.h"
#include "tests/support/device_buffer.h"

namespace sluice {
namespace {

using cuda::AttentionArgs;
using cuda::AttentionFamily;
using cuda::AttentionPrecision;
using ::sluice::testing::DeviceBuffer;

constexpr int kQueued = 10;

// [tokens, heads, head_dim] of normal numbers. A short random piece is repeated: only timing reads
// it, and drawing all of it would take longer than the measurement.
DeviceBuffer Normal(int64_t elements, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0, 1);
  std::vector<BFloat16> piece(100003), x(elements);
  for (BFloat16& value : piece) value = BFloat16::From(normal(generator));
  for (int64_t i = 0; i < elements; i += piece.size()) {
    std::copy_n(piece.begin(), std::min<int64_t>(piece.size(), elements - i), x.begin() + i);
  }
  DeviceBuffer buffer(x.size() * sizeof(BFloat16));
  buffer.CopyFrom(x.data(), buffer.bytes());
  return buffer;
}

// Arguments: something about precision, batch, length, heads, kv heads, head size, causal.
void Measure(benchmark::State& state, AttentionPrecision precision, AttentionFamily family) {
  AttentionArgs args;
  args.precision = precision;
  args.family = family;
  try {
    if (cuda::DeviceCount() == 0) throw Error("needs a GPU and a build with -DSLUICE_CUDA=ON");
    cuda::ChooseAttentionVariant(cuda::ComputeCapability(), args);
  } catch (const Error& refusal) {
    state.SkipWithError(refusal.what());
    return;
  }
  args.batch = state.range(1);
  args.q_len = args.kv_len = state.range(2);
  args.heads = static_cast<int>(state.range(3));
  args.kv_heads = static_cast<int>(state.range(4));
  args.head_dim = static_cast<int>(state.range(5));
  args.causal = state.range(6) != 0;
  args.q_stride = args.out_stride = int64_t{args.heads} * args.head_dim;
  args.k_stride = args.v_stride = int64_t{args.kv_heads} * args.head_dim;
  args.scale = 1 / std::sqrt(static_cast<float>(args.head_dim));
  const int64_t rows = args.batch * args.q_len;
  const DeviceBuffer q = Normal(rows * args.q_stride, 1), k = Normal(rows * args.k_stride, 2);
  const DeviceBuffer v = Normal(rows * args.v_stride, 3);
  const DeviceBuffer out(rows * args.out_stride * sizeof(BFloat16));
  args.q = q.data();
  args.k = k.data();
  args.v = v.data();
  args.out = out.data();
  const DeviceBuffer workspace(cuda::AttentionWorkspaceBytes(args));
  cuda::Attention(args, workspace.data(), workspace.bytes(), nullptr);  // loads the kernels
  cuda::Synchronize(nullptr);
  for (auto _ : state) {
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < kQueued; ++i) {
      cuda::Attention(args, workspace.data(), workspace.bytes(), nullptr);
    }
    cuda::Synchronize(nullptr);
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
    state.SetIterationTime(elapsed.count() / kQueued);
  }
  const double pairs = static_cast<double>(args.q_len) * args.kv_len / (args.causal ? 2 : 1);
  state.counters["FLOP/s"] =
      benchmark::Counter(4.0 * args.batch * args.heads * pairs * args.head_dim,
                         benchmark::Counter::kIsIterationInvariantRate);
}

// First argument: quantised or not.
void Attention(benchmark::State& state) {
  Measure(state, state.range(0) ? AttentionPrecision::kInt8Fp8 : AttentionPrecision::kBF16,
          AttentionFamily::kByChip);
}

// First argument: the number of an AttentionPrecision.
void MmaAttention(benchmark::State& state) {
  Measure(state, static_cast<AttentionPrecision>(state.range(0)), AttentionFamily::kMma);
}

BENCHMARK(Attention)
    ->ArgNames({"quantised", "batch", "length", "heads", "kv_heads", "head_dim", "causal"})
    ->ArgsProduct({{0, 1}, {1}, {16384}, {32}, {32}, {128}, {1}})
    ->ArgsProduct({{0, 1}, {1}, {16384}, {28}, {4}, {128}, {1}})  // Qwen2-7B
    ->ArgsProduct({{0, 1}, {1}, {4096}, {32}, {32}, {128}, {1}})
    ->ArgsProduct({{0, 1}, {1}, {32768}, {32}, {32}, {128}, {0}})
    ->ArgsProduct({{0, 1}, {4}, {4096}, {32}, {32}, {64}, {0}})
    ->ArgsProduct({{0, 1}, {8}, {729}, {16}, {16}, {72}, {0}})  // SigLIP-so400m, 8 frames
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond)
    ->Iterations(10);  // fixed: every trial for a better number would draw the operands again

BENCHMARK(MmaAttention)
    ->ArgNames({"precision", "batch", "length", "heads", "kv_heads", "head_dim", "causal"})
    ->ArgsProduct({{0, 1, 2, 3, 4, 5}, {1}, {16384}, {32}, {32}, {128}, {1}})
    ->ArgsProduct({{0, 1, 2, 3, 4, 5}, {4}, {4096}, {32}, {32}, {64}, {0}})
    ->ArgsProduct({{0, 3}, {8}, {729}, {16}, {16}, {72}, {0}})
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond)
    ->Iterations(10);

}  // namespace
}  // namespace sluice

BENCHMARK_MAIN();
