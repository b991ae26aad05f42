// Elements in f32 or bf16, for code on the CPU that is written once for both.
#ifndef SLUICE_RUNTIME_OPS_CPU_ELEMENT_H_
#define SLUICE_RUNTIME_OPS_CPU_ELEMENT_H_

#include "runtime/dtype.h"

namespace sluice::cpu {

inline float ToFloat(float value) { return value; }
inline float ToFloat(BFloat16 value) { return value.ToFloat(); }
inline void Store(float value, float* to) { *to = value; }
inline void Store(float value, BFloat16* to) { *to = BFloat16::From(value); }

// Calls use(T()) with T the type of `dtype`, f32 or bf16.
template <typename Use>
void WithType(DType dtype, const Use& use) {
  dtype == DType::kBF16 ? use(BFloat16()) : use(float());
}

}  // namespace sluice::cpu

#endif  // SLUICE_RUNTIME_OPS_CPU_ELEMENT_H_
