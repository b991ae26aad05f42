// Rotary positions, for kernels that rotate.
#ifndef SLUICE_RUNTIME_OPS_CUDA_ROPE_CUH_
#define SLUICE_RUNTIME_OPS_CUDA_ROPE_CUH_

#include "runtime/ops/cuda/launch.cuh"
#include "runtime/ops/rope.h"

namespace sluice::cuda {

// Of the angle position * frequency, formed as runtime/ops/rope.h says.
__device__ inline void SineAndCosine(int position, float frequency, float& sine, float& cosine) {
  if (position < kExactRopeFrom && position > -kExactRopeFrom) {
    sincosf(static_cast<float>(position) * frequency, &sine, &cosine);
  } else {
    double s, c;
    sincos(static_cast<double>(position) * frequency, &s, &c);
    sine = static_cast<float>(s);
    cosine = static_cast<float>(c);
  }
}

// Turns a pair of channels by an angle.
template <typename T>
__device__ void Rotate(float sine, float cosine, T& low, T& high) {
  const float a = ToFloat(low), b = ToFloat(high);
  low = FromFloat<T>(a * cosine - b * sine);
  high = FromFloat<T>(b * cosine + a * sine);
}

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_ROPE_CUH_
