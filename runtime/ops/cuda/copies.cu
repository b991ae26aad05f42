#include <cuda_runtime.h>

#include <string>

#include "runtime/error.h"
#include "runtime/ops/cuda/copies.h"

namespace sluice::cuda {
namespace {

void Check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw Error(std::string("[cuda copies] ") + what + " failed: " + cudaGetErrorString(error));
  }
}

}  // namespace

Event NewEvent() {
  cudaEvent_t event = nullptr;
  Check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event");
  return event;
}

void EndEvent(Event event) noexcept { cudaEventDestroy(event); }

void Mark(Event event, Stream stream) { Check(cudaEventRecord(event, stream), "marking an event"); }

void WaitFor(Event event, Stream stream) {
  Check(cudaStreamWaitEvent(stream, event, 0), "letting a stream wait");
}

bool IsReached(Event event) {
  const cudaError_t error = cudaEventQuery(event);
  if (error == cudaErrorNotReady) {
    cudaGetLastError();
    return false;
  }
  Check(error, "asking for an event");
  return true;
}

void Synchronize(Event event) { Check(cudaEventSynchronize(event), "waiting for an event"); }

void* AllocatePinned(size_t bytes) {
  void* memory = nullptr;
  const cudaError_t error = cudaMallocHost(&memory, bytes);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return nullptr;
  }
  Check(error, "allocating pinned host memory");
  return memory;
}

void FreePinned(void* memory) noexcept { cudaFreeHost(memory); }

int64_t MemoryInUse() {
  size_t free = 0, total = 0;
  Check(cudaMemGetInfo(&free, &total), "asking for the device's memory");
  return static_cast<int64_t>(total - free);
}

}  // namespace sluice::cuda
