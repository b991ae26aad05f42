// The angle of a rotary position, for kernels that rotate.
#ifndef SLUICE_RUNTIME_OPS_CUDA_ROPE_CUH_
#define SLUICE_RUNTIME_OPS_CUDA_ROPE_CUH_

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

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_ROPE_CUH_
