#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>

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

// Where Allocate's memory comes from: the driver's pool, which takes and gives back in the order of
// streams. Nobody says which streams use a block, so all are assumed to. Blocks are given back in a
// stream of their own that waits for what all others have queued, and taken in another one, to
// which the pool may hand only blocks whose turn has passed: nothing is ever queued there that
// waits, so what is taken can be used at once.
//
// One a process, as the device and its streams are; never destroyed, since tensors may outlive what
// ends before them.
class Pool {
 public:
  static Pool& Get() {
    static Pool* const pool = new Pool;
    return *pool;
  }

  void* Take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    Open();
    void* memory = nullptr;
    cudaError_t error = cudaMallocFromPoolAsync(&memory, bytes, pool_, taking_);
    if (error == cudaErrorMemoryAllocation) {
      // What is freed may still be in use: then it has to be waited for.
      cudaGetLastError();
      Check(cudaStreamSynchronize(giving_), "waiting for memory");
      error = cudaMallocFromPoolAsync(&memory, bytes, pool_, taking_);
    }
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      return nullptr;
    }
    Check(error, "allocating device memory");
    Check(cudaStreamSynchronize(taking_), "allocating device memory");
    return memory;
  }

  void Give(void* memory) noexcept {
    const std::lock_guard lock(mutex_);
    captures_ > 0 ? given_while_captured_.push_back(memory) : GiveInOrder(memory);
  }

  // Lets the device have what is free. Returns false when nothing was.
  bool Trim() {
    const std::lock_guard lock(mutex_);
    if (!pool_) return false;
    Check(cudaStreamSynchronize(giving_), "waiting for memory");
    uint64_t before = 0, after = 0;
    cudaMemPoolGetAttribute(pool_, cudaMemPoolAttrReservedMemCurrent, &before);
    Check(cudaMemPoolTrimTo(pool_, 0), "giving back memory");
    cudaMemPoolGetAttribute(pool_, cudaMemPoolAttrReservedMemCurrent, &after);
    return after < before;
  }

  void Add(Stream stream) {
    const std::lock_guard lock(mutex_);
    Mark(stream);
  }

  void Remove(Stream stream) {
    const std::lock_guard lock(mutex_);
    const auto found = marks_.find(stream);
    if (found == marks_.end()) return;
    if (giving_) WaitFor(stream, found->second);
    cudaEventDestroy(found->second);
    marks_.erase(found);
  }

  void BeginCapture() {
    const std::lock_guard lock(mutex_);
    ++captures_;
  }

  void EndCapture() {
    const std::lock_guard lock(mutex_);
    if (--captures_ > 0) return;
    for (void* const memory : given_while_captured_) GiveInOrder(memory);
    given_while_captured_.clear();
  }

 private:
  void Open() {
    if (pool_) return;
    Check(cudaStreamCreateWithFlags(&taking_, cudaStreamNonBlocking), "making a stream");
    Check(cudaStreamCreateWithFlags(&giving_, cudaStreamNonBlocking), "making a stream");
    Mark(nullptr);
    cudaMemPoolProps properties = {};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    cudaMemPool_t pool = nullptr;
    Check(cudaMemPoolCreate(&pool, &properties), "making a pool of memory");
    uint64_t keep = std::numeric_limits<uint64_t>::max();
    int off = 0;
    Check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep), "keeping memory");
    Check(cudaMemPoolSetAttribute(pool, cudaMemPoolReuseAllowInternalDependencies, &off),
          "keeping streams apart");
    pool_ = pool;
  }

  void Mark(Stream stream) {
    cudaEvent_t mark = nullptr;
    Check(cudaEventCreateWithFlags(&mark, cudaEventDisableTiming), "making an event");
    marks_.emplace(stream, mark);
  }

  void WaitFor(Stream stream, cudaEvent_t mark) noexcept {
    cudaEventRecord(mark, stream);
    cudaStreamWaitEvent(giving_, mark);
  }

  // Errors mean that the driver is going away, and the memory with it.
  void GiveInOrder(void* memory) noexcept {
    for (const auto& [stream, mark] : marks_) WaitFor(stream, mark);
    cudaFreeAsync(memory, giving_);
  }

  std::mutex mutex_;
  cudaMemPool_t pool_ = nullptr;  // made when first needed
  Stream taking_ = nullptr, giving_ = nullptr;
  std::map<Stream, cudaEvent_t> marks_;  // of all streams that may use memory
  int captures_ = 0;
  std::vector<void*> given_while_captured_;
};

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
  const auto create = Driver<decltype(cuMemCreate)>("cuMemCreate");
  if (create(&handle, more, &properties, 0) != CUDA_SUCCESS &&
      !(Pool::Get().Trim() && create(&handle, more, &properties, 0) == CUDA_SUCCESS)) {
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
  // From pageable memory the copy may still be under way.
  Check(cudaStreamSynchronize(nullptr), "copying");
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
  Pool::Get().Add(stream);
  return stream;
}

void EndStream(Stream stream) noexcept {
  Pool::Get().Remove(stream);
  cudaStreamDestroy(stream);
}

void* Allocate(size_t bytes) { return Pool::Get().Take(bytes); }

void Free(void* memory) noexcept {
  if (memory) Pool::Get().Give(memory);
}

CaptureScope::CaptureScope() { Pool::Get().BeginCapture(); }
CaptureScope::~CaptureScope() { Pool::Get().EndCapture(); }

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
