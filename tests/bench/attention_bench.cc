// Attention at the shapes of the models, in GFLOP/s (4 * queries * keys * D * heads, of which
// causal masks need a part) or bytes of cache read per second.
//   attention_bench --benchmark_filter=Encoder
#include <benchmark/benchmark.h>

#include <algorithm>
#include <random>
#include <vector>

#include "runtime/cpu_info.h"
#include "runtime/ops/attention.h"

namespace sluice {
namespace {

Tensor RandomTensor(DType dtype, int64_t rows, int64_t columns) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  Tensor x(DType::kF32, {rows, columns});
  for (int64_t i = 0; i < rows * columns; ++i) x.data<float>()[i] = normal(generator);
  return ConvertTo(x, dtype);
}

int Threads() { return CpuInfo::Detect().physical_cores; }

DType DTypeOf(int64_t arg) { return arg == 0 ? DType::kF32 : DType::kBF16; }

AttentionPrecision PrecisionOf(int64_t arg) {
  return arg == 0 ? AttentionPrecision::kExact : AttentionPrecision::kSageAlways;
}

// Arguments: dtype (0 f32, 1 bf16), batch, S, heads, D, precision (0 exact, 1 sage).
void Encoder(benchmark::State& state) {
  const DType dtype = DTypeOf(state.range(0));
  const int64_t batch = state.range(1), length = state.range(2);
  const int heads = static_cast<int>(state.range(3)), head_dim = static_cast<int>(state.range(4));
  ExecContext ctx({.num_threads = Threads()});
  const int64_t width = heads * head_dim;
  const Tensor qkv = RandomTensor(dtype, batch * length, 3 * width);
  const ConstTensorView q = qkv.view().Columns(0, width), k = qkv.view().Columns(width, 2 * width);
  const ConstTensorView v = qkv.view().Columns(2 * width, 3 * width);
  Tensor out(dtype, {batch * length, heads * head_dim});
  const AttentionPrecision precision = PrecisionOf(state.range(5));
  for (auto _ : state) {
    EncoderAttention(ctx, q, k, v, batch, heads, head_dim, 0.125f, out, {}, precision);
  }
  state.counters["FLOP/s"] = benchmark::Counter(4.0 * batch * length * length * head_dim * heads,
                                                benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(Encoder)
    ->Name("Encoder")
    ->ArgsProduct({{0, 1}, {4}, {196}, {4}, {64}, {0, 1}})   // sluice-mini, four frames
    ->ArgsProduct({{0, 1}, {1}, {729}, {16}, {72}, {0, 1}})  // SigLIP so400m
    ->ArgsProduct({{0, 1}, {1}, {577}, {16}, {64}, {0, 1}})  // CLIP ViT-L/14 at 336
    ->UseRealTime();

// Arguments: dtype, begin, S, heads, kv heads, D, precision.
void Causal(benchmark::State& state) {
  const DType dtype = DTypeOf(state.range(0));
  const int64_t begin = state.range(1), length = state.range(2), keys = begin + length;
  const int heads = static_cast<int>(state.range(3)), kv_heads = static_cast<int>(state.range(4));
  const int head_dim = static_cast<int>(state.range(5));
  ExecContext ctx({.num_threads = Threads()});
  // As many layers as it takes to push each other out of the caches (256 MB), but at most 24.
  const size_t block_bytes = KvBlockBytes(kv_heads, head_dim, dtype);
  const int64_t blocks_per_layer = (keys + kKvBlockTokens - 1) / kKvBlockTokens;
  const int64_t layers = std::clamp<int64_t>((256 << 20) / (block_bytes * blocks_per_layer), 1, 24);
  const Tensor kv = RandomTensor(dtype, keys, kv_heads * head_dim);
  std::vector<Tensor> storage;
  std::vector<std::vector<void*>> blocks(layers);
  for (auto& layer : blocks) {
    for (int64_t i = 0; i < blocks_per_layer; ++i) {
      storage.emplace_back(DType::kU8, Shape{static_cast<int64_t>(block_bytes)});
      layer.push_back(storage.back().view().raw());
    }
    StoreKv(ctx, kv, kv, 0, {layer, kv_heads, head_dim, dtype});
  }
  const Tensor q = RandomTensor(dtype, length, heads * head_dim);
  Tensor out(dtype, {length, heads * head_dim});
  size_t layer = 0;
  for (auto _ : state) {
    const KvLayerView view{blocks[layer++ % layers], kv_heads, head_dim, dtype};
    CausalAttention(ctx, q, begin, heads, 0.125f, view, out, PrecisionOf(state.range(6)));
  }
  const double pairs = static_cast<double>(length) * begin + length * (length + 1) / 2.0;
  state.counters["FLOP/s"] = benchmark::Counter(4.0 * pairs * head_dim * heads,
                                                benchmark::Counter::kIsIterationInvariantRate);
  state.counters["B/s"] =
      benchmark::Counter(static_cast<double>(block_bytes) / kKvBlockTokens * keys,
                         benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(Causal)
    ->Name("Prefill")
    ->ArgsProduct({{0, 1}, {0, 1000, 8000}, {196}, {14}, {2}, {64}, {0, 1}})  // Qwen2-0.5B
    ->ArgsProduct({{0, 1}, {0, 1000}, {196}, {5}, {1}, {64}, {0, 1}})         // sluice-mini
    ->ArgsProduct({{0, 1}, {1000}, {196}, {28}, {4}, {128}, {0, 1}})          // Qwen2-7B
    ->UseRealTime();
BENCHMARK(Causal)
    ->Name("Decode")
    ->ArgsProduct({{0, 1}, {1000, 8000}, {1}, {14}, {2}, {64}, {0, 1}})
    ->ArgsProduct({{0, 1}, {1000, 8000}, {1}, {5}, {1}, {64}, {0, 1}})
    ->UseRealTime();

}  // namespace
}  // namespace sluice

BENCHMARK_MAIN();
