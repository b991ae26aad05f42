// Turns what CUDA reports into errors.
#ifndef SLUICE_RUNTIME_OPS_CUDA_STATUS_CUH_
#define SLUICE_RUNTIME_OPS_CUDA_STATUS_CUH_

#include <cuda_runtime.h>

#include <string>

#include "runtime/error.h"

namespace sluice::cuda {

[[noreturn]] inline void Fail(const std::string& what, const char* reason) {
  throw Error("[cuda] " + what + " failed: " + reason);
}

inline void Check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) Fail(what, cudaGetErrorString(status));
}

// Behind a launch.
inline void CheckLaunch(const char* op) {
  if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess) {
    Fail(std::string("launching ") + op, cudaGetErrorString(status));
  }
}

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_STATUS_CUH_
