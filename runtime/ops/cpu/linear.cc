// The plain reference of Linear: what every fast path is compared with.
#include "runtime/ops/cpu/linear.h"

#include <cmath>

namespace sluice {
namespace {

double Activate(double value, Activation activation) {
  constexpr double kSqrt2OverPi = 0.79788456080286535588, kSqrtHalf = 0.70710678118654752440;
  switch (activation) {
    case Activation::kNone:
      return value;
    case Activation::kGeluTanh:
      return 0.5 * value *
             (1 + std::tanh(kSqrt2OverPi * (value + 0.044715 * value * value * value)));
    case Activation::kGeluErf:
      return 0.5 * value * (1 + std::erf(value * kSqrtHalf));
    case Activation::kQuickGelu:
      return value / (1 + std::exp(-1.702 * value));
    case Activation::kSiluMul:  // of two values; Linear does it after the product
      break;
  }
  return value;
}

}  // namespace

void LinearReference(const LinearArgs& args) {
  const bool packed = args.dtype == DType::kBF16;
  const auto weight = [&](int64_t n, int64_t k) -> double {
    if (!packed) return static_cast<const float*>(args.weight)[n * args.k + k];
    return static_cast<const BFloat16*>(args.weight)[PackedIndex(n, k, args.k)].ToFloat();
  };
  const auto input = [&](int64_t m, int64_t k) -> double {
    if (!packed) return args.x.data<float>()[m * args.k + k];
    return args.x.data<BFloat16>()[m * args.k + k].ToFloat();
  };
  for (int64_t m = 0; m < args.m; ++m) {
    for (int64_t n = 0; n < args.n; ++n) {
      double sum = args.bias ? args.bias[n] : 0;
      for (int64_t k = 0; k < args.k; ++k) sum += input(m, k) * weight(n, k);
      const float value = static_cast<float>(Activate(sum, args.options.activation));
      if (args.y.dtype() == DType::kBF16) {
        args.y.data<BFloat16>()[m * args.n + n] = BFloat16::From(value);
      } else if (args.options.accumulate) {
        args.y.data<float>()[m * args.n + n] += value;
      } else {
        args.y.data<float>()[m * args.n + n] = value;
      }
    }
  }
}

}  // namespace sluice
