#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "runtime/ops/cuda/device.h"
#include "runtime/ops/cuda/status.cuh"

namespace sluice::cuda {
namespace {

// A function of the driver, asked for at run time: nothing links against it.
template <typename Function>
Function* Driver(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  Check(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found), name);
  if (found != cudaDriverEntryPointSuccess) {
    throw Error(std::string("[cuda] the driver has no ") + name +
                "; it must be of CUDA 12 or newer");
  }
  return reinterpret_cast<Function*>(function);
}

CUmemAllocationProp OnDevice0() {
  CUmemAllocationProp properties = {};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  return properties;
}

constexpr size_t kPieceBytes = size_t{32} << 20;  // a multiple of the 2 MB that devices map by

}  // namespace

GrowingMemory::GrowingMemory(size_t most_bytes) {
  size_t free = 0, total = 0;
  Check(cudaMemGetInfo(&free, &total), "asking for the device's memory");
  reserved_ = most_bytes > 0 ? std::min(most_bytes, total) : total;
  reserved_ = (reserved_ + kPieceBytes - 1) / kPieceBytes * kPieceBytes;
  CUdeviceptr at = 0;
  const CUresult result =
      Driver<decltype(cuMemAddressReserve)>("cuMemAddressReserve")(&at, reserved_, 0, 0, 0);
  if (result != CUDA_SUCCESS) {
    throw Error("[cuda] the driver refused " + std::to_string(reserved_) +
                " bytes of addresses with error " + std::to_string(result));
  }
  data_ = reinterpret_cast<uint8_t*>(at);
}

GrowingMemory::~GrowingMemory() {
  cudaDeviceSynchronize();
  const auto at = reinterpret_cast<CUdeviceptr>(data_);
  try {
    const auto unmap = Driver<decltype(cuMemUnmap)>("cuMemUnmap");
    const auto release = Driver<decltype(cuMemRelease)>("cuMemRelease");
    size_t offset = 0;
    for (const auto& [bytes, handle] : pieces_) {
      unmap(at + offset, bytes);
      release(handle);
      offset += bytes;
    }
    Driver<decltype(cuMemAddressFree)>("cuMemAddressFree")(at, reserved_);
  } catch (const Error&) {
    // The driver is going away, and the memory with it.
  }
}

bool GrowingMemory::GrowTo(size_t bytes) {
  if (bytes <= size_) return true;
  if (bytes > reserved_) return false;
  const size_t more = (bytes - size_ + kPieceBytes - 1) / kPieceBytes * kPieceBytes;
  const CUmemAllocationProp properties = OnDevice0();
  CUmemGenericAllocationHandle handle = 0;
  if (Driver<decltype(cuMemCreate)>("cuMemCreate")(&handle, more, &properties, 0) != CUDA_SUCCESS) {
    return false;
  }
  const CUdeviceptr at = reinterpret_cast<CUdeviceptr>(data_) + size_;
  CUmemAccessDesc access = {};
  access.location = properties.location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  const bool mapped =
      Driver<decltype(cuMemMap)>("cuMemMap")(at, more, 0, handle, 0) == CUDA_SUCCESS;
  if (!mapped ||
      Driver<decltype(cuMemSetAccess)>("cuMemSetAccess")(at, more, &access, 1) != CUDA_SUCCESS) {
    if (mapped) Driver<decltype(cuMemUnmap)>("cuMemUnmap")(at, more);
    Driver<decltype(cuMemRelease)>("cuMemRelease")(handle);
    return false;
  }
  pieces_.emplace_back(more, handle);
  Check(cudaMemset(data_ + size_, 0, more), "clearing memory");
  Check(cudaDeviceSynchronize(), "clearing memory");
  size_ += more;
  return true;
}

void CopyNow(void* to, const void* from, size_t bytes) {
  Check(cudaDeviceSynchronize(), "waiting for the device");
  Check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "copying");
}

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

int ComputeCapability() {
  static const int capability = [] {
    int major = 0, minor = 0;
    if (DeviceCount() == 0) return 0;
    Check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "asking");
    Check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "asking");
    return 10 * major + minor;
  }();
  return capability;
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
