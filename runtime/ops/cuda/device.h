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

// A stream that does not wait for the default one.
Stream NewStream();
void EndStream(Stream stream) noexcept;

// Memory of the current device, aligned to 256 bytes. Null when the device has no such memory.
void* Allocate(size_t bytes);
void Free(void* memory) noexcept;  // waits for what runs

// `rows` pieces of `row_bytes`, so many bytes apart, between host and device or on the device: the
// direction follows from the addresses. Queued in `stream`; host memory has been read, or written
// once Synchronize has returned.
void CopyRows(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t row_bytes,
              size_t rows, Stream stream);

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_DEVICE_H_
