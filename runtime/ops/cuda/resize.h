// Resizing decoded pictures on a CUDA device, bit for bit as on the CPU: see vision/resize.h.
// Arguments have been checked by the caller.
#ifndef SLUICE_RUNTIME_OPS_CUDA_RESIZE_H_
#define SLUICE_RUNTIME_OPS_CUDA_RESIZE_H_

#include <cstddef>
#include <cstdint>

#include "runtime/ops/cuda/device.h"

namespace sluice::cuda {

// Copies host memory to the device by way of page-locked memory, which is the process's and used
// again and again: `from` may be changed once this returns, and unlike a plain copy it does not
// wait for what is queued in the stream, until 16 MB are on their way. Any thread may call.
void Send(void* to, const void* from, size_t bytes, Stream stream);

// One axis, numbers on the device: as sluice::ResizeTaps.
struct AxisTaps {
  int max_taps = 0;
  const int32_t *first = nullptr, *count = nullptr, *weights = nullptr;
};

struct ResizeArgs {
  const uint8_t* rgb = nullptr;  // [frames, in_height, in_width, 3]
  int frames = 0, in_width = 0, in_height = 0;
  int out_width = 0, out_height = 0;
  AxisTaps columns, rows;
  int top = 0, used_height = 0;  // the rows of the picture that are read
  float mean[3] = {}, deviation[3] = {};
  float* out = nullptr;       // [frames, 3, out_height, out_width] = (value - mean) / deviation
  uint8_t* narrow = nullptr;  // scratch: [frames, used_height, out_width, 4], aligned to 4 bytes
};
void ResizeAndNormalise(const ResizeArgs& args, Stream stream);

}  // namespace sluice::cuda

#endif  // SLUICE_RUNTIME_OPS_CUDA_RESIZE_H_
