// Bytes on the GPU, for tests and benchmarks of kernels that take addresses.
#ifndef SLUICE_TESTS_SUPPORT_DEVICE_BUFFER_H_
#define SLUICE_TESTS_SUPPORT_DEVICE_BUFFER_H_

#include <cstddef>

#include "runtime/ops/cuda/device.h"
#include "runtime/tensor.h"

namespace sluice::testing {

class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(size_t bytes)
      : memory_(DType::kU8, {static_cast<int64_t>(bytes)}, Device::kCuda) {}
  void* data() const { return memory_.view().raw(); }
  size_t bytes() const { return memory_.SizeBytes(); }
  // Both wait until the copy is done. REQUIRES: size <= bytes().
  void CopyFrom(const void* host, size_t size) { Copy(data(), host, size); }
  void CopyTo(void* host, size_t size) const { Copy(host, data(), size); }

 private:
  static void Copy(void* to, const void* from, size_t size) {
    cuda::CopyRows(to, 0, from, 0, size, 1, nullptr);
    cuda::Synchronize(nullptr);
  }
  Tensor memory_;
};

}  // namespace sluice::testing

#endif  // SLUICE_TESTS_SUPPORT_DEVICE_BUFFER_H_
