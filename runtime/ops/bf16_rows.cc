#include "runtime/ops/bf16_rows.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>

#include "runtime/ops/cpu/amx.h"
#include "runtime/ops/cpu/linear.h"
#include "runtime/tensor.h"

namespace sluice {
namespace {

// Numbers in (-1, 1) with all bits in use: zeros would take less power and time.
void FillRandomly(const Tensor& x, uint32_t seed) {
  BFloat16* values = x.data<BFloat16>();
  for (int64_t i = 0; i < x.shape().NumElements(); ++i) {
    seed = seed * 1664525 + 1013904223;
    values[i] = BFloat16::From(static_cast<float>(static_cast<int32_t>(seed)) * 0x1p-31f);
  }
}

Bf16Rows Measure() {
  // About a product of a small tower, 0.3 GFLOP: some milliseconds on one thread.
  constexpr int64_t kRows = 256, kWidth = 768;
  static_assert(kWidth % kPackedOutputs == 0 && kWidth % kPackedInputs == 0);
  constexpr int kRounds = 4;
  const Tensor x(DType::kBF16, {kRows, kWidth}), y(DType::kF32, {kRows, kWidth});
  const Tensor packed(DType::kBF16, {kWidth, kWidth});
  FillRandomly(x, 1);
  FillRandomly(packed, 2);
  ExecContext ctx({.num_threads = 1});
  const LinearArgs args{.m = kRows,
                        .n = kWidth,
                        .k = kWidth,
                        .x = x,
                        .weight = packed.view().raw(),
                        .dtype = DType::kBF16,
                        .bias = nullptr,
                        .y = y,
                        .options = {}};
  const auto seconds = [&](void (*product)(ExecContext&, const LinearArgs&)) {
    const auto begin = std::chrono::steady_clock::now();
    product(ctx, args);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  // In turn, so that others on this core disturb both; the first round prepares and warms up.
  double native = std::numeric_limits<double>::infinity(), widened = native;
  for (int round = 0; round <= kRounds; ++round) {
    const double a = seconds(LinearOneDnn), b = seconds(LinearVector);
    if (round == 0) continue;
    native = std::min(native, a);
    widened = std::min(widened, b);
  }
  return ChooseBf16Rows(native, widened);
}

}  // namespace

const char* Name(Bf16Rows rows) {
  switch (rows) {
    case Bf16Rows::kAmx:
      return "amx";
    case Bf16Rows::kNative:
      return "avx512_bf16";
    case Bf16Rows::kWidened:
      return "f32 (measured: avx512_bf16 is not faster)";
    case Bf16Rows::kPlain:
      return "f32 (no native bf16)";
  }
  return "?";
}

Bf16Rows ChooseBf16Rows(double native_seconds, double widened_seconds) {
  constexpr double kGain = 1.3;
  return widened_seconds > kGain * native_seconds ? Bf16Rows::kNative : Bf16Rows::kWidened;
}

Bf16Rows FastestBf16Rows() {
  static const Bf16Rows rows = cpu::AmxAllowed() ? Bf16Rows::kAmx
                               : OneDnnHasBf16() ? Measure()
                                                 : Bf16Rows::kPlain;
  return rows;
}

}  // namespace sluice
