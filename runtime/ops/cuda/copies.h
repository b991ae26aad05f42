// What copies beside the computing need: events that order streams, host memory that the device
// copies from and to by itself. Needs no CUDA headers; in builds without CUDA all of it throws
// Error saying so.
#ifndef SLUICE_RUNTIME_OPS_CUDA_COPIES_H_
#define SLUICE_RUNTIME_OPS_CUDA_COPIES_H_

#include <cstddef>
#include <cstdint>

#include "runtime/ops/cuda/device.h"

struct CUevent_st;  // cudaEvent_t is a pointer to it

namespace sluice::cuda {

// A point in a stream; before the first Mark it counts as reached.
using Event = CUevent_st*;

Event NewEvent();
void EndEvent(Event event) noexcept;
// The event is now the end of what has been queued in `stream` so far.
void Mark(Event event, Stream stream);
// What is queued in `stream` from now on waits for the event as it is marked now. Nothing waits on
// the host.
void WaitFor(Event event, Stream stream);
bool IsReached(Event event);
void Synchronize(Event event);  // waits on the host

// Pinned host memory: copies from and to it wait for nothing. Null when the system has none. Slow
// to get, and taken from everybody else while it is held.
void* AllocatePinned(size_t bytes);
void FreePinned(void* memory) noexcept;

// Bytes of the device's memory that all processes hold together, drivers included.
int64_t MemoryInUse();

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_COPIES_H_
