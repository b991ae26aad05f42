// Memory and errors of CUDA devices. Needs no CUDA headers. In builds without CUDA there are no
// devices, and everything else here throws Error saying so.
#ifndef SLUICE_RUNTIME_OPS_CUDA_DEVICE_H_
#define SLUICE_RUNTIME_OPS_CUDA_DEVICE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace sluice::cuda {

// Work that runs in order; null is the device's default stream.
using Stream = CUstream_st*;

// Devices this process may use; 0 without a driver or in builds without CUDA.
int DeviceCount();
// Name of device 0, for instance "NVIDIA H100 80GB HBM3".
std::string DeviceName();
// Of device 0, 90 for 9.0; 0 where there is none.
int ComputeCapability();
// Waits for everything queued in `stream`. Throws Error with what the device reported.
void Synchronize(Stream stream);

// A stream that does not wait for the default one.
Stream NewStream();
void EndStream(Stream stream) noexcept;

// Memory of the current device, aligned to 256 bytes, that any stream may use at once. Null when
// the device has no such memory. Neither call waits for what runs, so that both may come between
// steps: a block that is freed serves again when all is done that was queued in any stream until
// then, so its owner need not know which streams still read it. Blocks that are free stay with the
// process. Any thread may call.
void* Allocate(size_t bytes);
void Free(void* memory) noexcept;

// To be held while a stream is captured into a graph. What is freed meanwhile is given back
// afterwards: that marks a place in every stream, which must not become part of the graph.
class CaptureScope {
 public:
  CaptureScope();
  ~CaptureScope();
  CaptureScope(const CaptureScope&) = delete;
  CaptureScope& operator=(const CaptureScope&) = delete;
};

// A range of addresses that memory is mapped into as it is needed, so that what grows stays in one
// piece. One thread at a time.
class GrowingMemory {
 public:
  // Reserves addresses for at most so many bytes, no memory yet; 0: as many as the device has.
  // Throws Error when the driver refuses.
  explicit GrowingMemory(size_t most_bytes);
  ~GrowingMemory();  // waits for what runs
  GrowingMemory(const GrowingMemory&) = delete;
  GrowingMemory& operator=(const GrowingMemory&) = delete;

  // Makes at least the first `bytes` memory, new bytes being zero. Returns false when the device
  // has no more or the addresses end.
  bool GrowTo(size_t bytes);
  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }  // of the part that is memory

 private:
  uint8_t* data_ = nullptr;
  size_t reserved_ = 0, size_ = 0;
  std::vector<std::pair<size_t, unsigned long long>> pieces_;  // their bytes and driver handles
};

// Copies on the device once all that was queued in any stream is done, and waits for it.
void CopyNow(void* to, const void* from, size_t bytes);

// `rows` pieces of `row_bytes`, so many bytes apart, between host and device or on the device: the
// direction follows from the addresses. Queued in `stream`; host memory has been read, or written
// once Synchronize has returned.
void CopyRows(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t row_bytes,
              size_t rows, Stream stream);

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_DEVICE_H_
