// Memory and errors of CUDA devices. Needs no CUDA headers. In builds without CUDA there are no
// devices, and everything else here throws Error saying so.
#ifndef SLUICE_RUNTIME_OPS_CUDA_DEVICE_H_
#define SLUICE_RUNTIME_OPS_CUDA_DEVICE_H_

#include <cstddef>
#include <string>

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace sluice::cuda {

// Work that runs in order; null is the device's default stream.
using Stream = CUstream_st*;

// Devices this process may use; 0 without a driver or in builds without CUDA.
int DeviceCount();
// Name of device 0, for instance "NVIDIA H100 80GB HBM3".
std::string DeviceName();
// Waits for everything queued in `stream`. Throws Error with what the device reported.
void Synchronize(Stream stream);

// Memory on the current device. Movable, not copyable. Used by one thread at a time.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  // Throws ResourceExhausted when the device has no such memory.
  explicit DeviceBuffer(size_t bytes);
  ~DeviceBuffer();
  DeviceBuffer(DeviceBuffer&& other) noexcept;
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  // Both wait until the copy is done. REQUIRES: bytes <= bytes().
  void CopyFrom(const void* host, size_t bytes);
  void CopyTo(void* host, size_t bytes) const;

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_DEVICE_H_
