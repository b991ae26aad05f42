// What a product may do besides: see runtime/ops/linear.h.
#ifndef SLUICE_RUNTIME_OPS_LINEAR_OPTIONS_H_
#define SLUICE_RUNTIME_OPS_LINEAR_OPTIONS_H_

#include "runtime/tensor.h"

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
  // Where set, [K] f32: x is [M, K] f32, and what is multiplied are its rows after RmsNorm with
  // this weight and `rms_eps` (runtime/ops/norm.h). On a GPU few rows take no launch more for it;
  // they are rounded before they are divided by their norm, which loses no more.
  ConstTensorView rms_norm = {};
  float rms_eps = 0;
};

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_LINEAR_OPTIONS_H_
