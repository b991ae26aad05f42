// What a product may do besides: see runtime/ops/linear.h.
#ifndef SLUICE_RUNTIME_OPS_LINEAR_OPTIONS_H_
#define SLUICE_RUNTIME_OPS_LINEAR_OPTIONS_H_

namespace sluice {

enum class Activation {
  kNone,
  kGeluTanh,
  kGeluErf,
  kQuickGelu,  // x / (1 + e^-1.702x), CLIP's
  kSiluMul,    // the outputs are gate | up, and y = silu(gate) * up is [M, N / 2]
};

struct LinearOptions {
  Activation activation = Activation::kNone;
  bool accumulate = false;  // y += instead of y =; y must be f32; not with an activation
};

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_LINEAR_OPTIONS_H_
