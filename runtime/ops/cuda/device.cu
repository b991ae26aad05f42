#include <cuda_runtime.h>

#include "runtime/error.h"
#include "runtime/ops/cuda/device.h"

namespace sluice::cuda {
namespace {

void Check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw Error(std::string("[cuda] ") + what + " failed: " + cudaGetErrorString(error));
  }
}

}  // namespace

int DeviceCount() {
  int count = 0;
  // No driver and no device are ordinary answers; the sticky error must not reach a later call.
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

std::string DeviceName() {
  cudaDeviceProp properties;
  Check(cudaGetDeviceProperties(&properties, 0), "reading the device's properties");
  return properties.name;
}

void Synchronize(Stream stream) { Check(cudaStreamSynchronize(stream), "waiting for a stream"); }

Stream NewStream() {
  cudaStream_t stream = nullptr;
  Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
  return stream;
}

void EndStream(Stream stream) noexcept { cudaStreamDestroy(stream); }

void* Allocate(size_t bytes) {
  void* memory = nullptr;
  const cudaError_t error = cudaMalloc(&memory, bytes);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return nullptr;
  }
  Check(error, "allocating device memory");
  return memory;
}

void Free(void* memory) noexcept { cudaFree(memory); }

void CopyRows(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t row_bytes,
              size_t rows, Stream stream) {
  if (row_bytes == 0 || rows == 0) return;
  if (rows == 1 || (to_pitch == row_bytes && from_pitch == row_bytes)) {
    Check(cudaMemcpyAsync(to, from, row_bytes * rows, cudaMemcpyDefault, stream), "copying");
    return;
  }
  Check(
      cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, row_bytes, rows, cudaMemcpyDefault, stream),
      "copying rows");
}

}  // namespace sluice::cuda
