#include <cuda_runtime.h>

#include <utility>

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

DeviceBuffer::DeviceBuffer(size_t bytes) : bytes_(bytes) {
  const cudaError_t error = cudaMalloc(&data_, bytes);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw ResourceExhausted("[cuda] no device memory for " + std::to_string(bytes) + " bytes");
  }
  Check(error, "allocating device memory");
}

DeviceBuffer::~DeviceBuffer() { cudaFree(data_); }

DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

void DeviceBuffer::CopyFrom(const void* host, size_t bytes) {
  Check(cudaMemcpy(data_, host, bytes, cudaMemcpyHostToDevice), "copying to the device");
}

void DeviceBuffer::CopyTo(void* host, size_t bytes) const {
  Check(cudaMemcpy(host, data_, bytes, cudaMemcpyDeviceToHost), "copying from the device");
}

}  // namespace sluice::cuda
