// Takes from this process, for good, what decoding does not need.
#ifndef SLUICE_STREAMING_DECODE_CONFINE_H_
#define SLUICE_STREAMING_DECODE_CONFINE_H_

#include <cstdint>

namespace sluice::decode {

// Memory (of data and threads' stacks), open files, no files written, no core dumps. Sanitizers
// take more address space than there is: under them memory is not limited. Throws Error.
void LimitResources(int64_t memory_bytes);

// No new privileges, and a filter of system calls for all threads: nothing is opened, executed,
// started, connected or traced any more; memory, threads, clocks and what is open stay usable.
// With `network` a TCP socket may be made, but not connected. An attempt to run a program or to
// trace ends the process, anything else fails with EPERM. Throws Error where the system cannot.
void FilterSystemCalls(bool network);

}  // namespace sluice::decode

#endif  // SLUICE_STREAMING_DECODE_CONFINE_H_
