// Products of many bf16 rows where f32 multiplies faster: without AVX512-BF16 nothing multiplies
// bf16 natively, and vdpbf16ps of some processors runs at half the rate of f32's multiply-add.
// Weights stay bf16 in memory. A strip of outputs at a time is widened into a part of scratch that
// stays in the caches, then oneDNN multiplies it in f32:
//
//   strip = f32(W[n0, n1)),  y[:, n0, n1) = act(f32(x) strip^T + b)
//
// A product of two bf16 numbers is exact in f32, so that only the order of sums differs. What is
// moved besides: 6 bytes a weight, once for all M rows.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>

#include "runtime/convert.h"
#include "runtime/ops/cpu/linear.h"
#include "runtime/parallel.h"

namespace sluice {
namespace {

constexpr int64_t kStripBytes = int64_t{1} << 20;  // of widened weights: about an L2 cache

// One packed block, whose first output is `first`, as columns [0, rows) of `to`: [K, ..] f32, rows
// `stride` apart. A pair of inputs lies together for each output: two rows of `to`.
void WidenBlock(const BFloat16* packed, int64_t first, int64_t rows, int64_t k, int64_t stride,
                float* to) {
  const BFloat16* block = packed + PackedIndex(first, 0, k);
  for (int64_t i = 0; i < k; i += 2, block += 2 * kPackedOutputs) {
    uint32_t even[kPackedOutputs], odd[kPackedOutputs];
    for (int64_t n = 0; n < kPackedOutputs; ++n) {
      even[n] = static_cast<uint32_t>(block[2 * n].bits) << 16;
      odd[n] = static_cast<uint32_t>(block[2 * n + 1].bits) << 16;
    }
    std::memcpy(to + i * stride, even, rows * sizeof(float));
    if (i + 1 < k) std::memcpy(to + (i + 1) * stride, odd, rows * sizeof(float));
  }
}

// Puts [M, rows] `sums` into columns [first, first + rows) of y.
void PutColumns(ExecContext& ctx, ConstTensorView sums, const LinearArgs& args, int64_t first) {
  const int64_t rows = sums.dim(1);
  constexpr int64_t kGrain = 16;
  ParallelFor(ctx, args.m, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const float* from = sums.data<float>() + m * rows;
      if (args.y.dtype() == DType::kBF16) {
        ConvertElements(from, DType::kF32, args.y.data<BFloat16>() + m * args.n + first,
                        DType::kBF16, rows);
        continue;
      }
      float* to = args.y.data<float>() + m * args.n + first;
      for (int64_t i = 0; i < rows; ++i)
        to[i] = args.options.accumulate ? to[i] + from[i] : from[i];
    }
  });
}

}  // namespace

void LinearWidened(ExecContext& ctx, const LinearArgs& args) {
  const Workspace::Scope scope(ctx.workspace());
  const TensorView x = ctx.workspace().Allocate(DType::kF32, {args.m, args.k});
  ConvertInto(args.x, x);
  const int64_t fits = kStripBytes / (args.k * static_cast<int64_t>(sizeof(float)));
  const int64_t strip = std::max<int64_t>(fits / kPackedOutputs, 1) * kPackedOutputs;
  const int64_t most = std::min(strip, args.n);
  const TensorView weight = ctx.workspace().Allocate(DType::kF32, {args.k, most});
  const TensorView sums = ctx.workspace().Allocate(DType::kF32, {args.m, most});
  for (int64_t first = 0; first < args.n; first += most) {
    const int64_t rows = std::min(most, args.n - first);
    const int64_t blocks = (rows + kPackedOutputs - 1) / kPackedOutputs;
    ParallelFor(ctx, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t at = b * kPackedOutputs;
        WidenBlock(static_cast<const BFloat16*>(args.weight), first + at,
                   std::min(kPackedOutputs, rows - at), args.k, rows, weight.data<float>() + at);
      }
    });
    LinearArgs part = args;
    part.n = rows;
    part.x = x;
    part.weight = weight.raw();
    part.weight_by_inputs = true;
    part.dtype = DType::kF32;
    if (args.bias) part.bias = args.bias + first;
    part.y = TensorView(sums.raw(), DType::kF32, {args.m, rows});
    part.options.accumulate = false;
    LinearOneDnn(ctx, part);
    PutColumns(ctx, part.y, args, first);
  }
}

bool WideningIsFaster() {
  // About the shape of a frame's products in a small tower; 0.3 GFLOP, some milliseconds.
  constexpr int64_t kRows = 256, kWidth = 768;
  constexpr int kRepeats = 3;
  ExecContext ctx({.num_threads = 1});
  const auto weight = std::make_shared<Tensor>(DType::kBF16, Shape{kWidth, kWidth});
  const LinearWeight packed({*weight, weight, nullptr}, Tensor(), Device::kCpu);
  const Tensor x(DType::kBF16, {kRows, kWidth}), y(DType::kF32, {kRows, kWidth});
  std::memset(weight->view().raw(), 0, weight->SizeBytes());
  std::memset(x.view().raw(), 0, x.SizeBytes());
  const auto seconds = [&](bool widened) {
    double best = 1e9;
    for (int i = 0; i <= kRepeats; ++i) {  // the first prepares
      const auto begin = std::chrono::steady_clock::now();
      RunMany(ctx, widened, x, packed, y);
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
      if (i > 0) best = std::min(best, took.count());
    }
    return best;
  };
  return seconds(true) < seconds(false);
}

}  // namespace sluice
