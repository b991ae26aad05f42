// What builds without CUDA link instead of the .cu files: there are no devices.
#ifndef SLUICE_HAS_CUDA

#include "runtime/error.h"
#include "runtime/ops/cuda/device.h"
#include "runtime/ops/cuda/norm.h"

namespace sluice::cuda {
namespace {

[[noreturn]] void Refuse() {
  throw Error("[cuda] this build has no CUDA kernels; configure with -DSLUICE_CUDA=ON");
}

}  // namespace

int DeviceCount() { return 0; }
std::string DeviceName() { Refuse(); }
void Synchronize(Stream) { Refuse(); }
DeviceBuffer::DeviceBuffer(size_t) { Refuse(); }
DeviceBuffer::~DeviceBuffer() = default;
DeviceBuffer::DeviceBuffer(DeviceBuffer&&) noexcept = default;
DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&&) noexcept = default;
void DeviceBuffer::CopyFrom(const void*, size_t) { Refuse(); }
void DeviceBuffer::CopyTo(void*, size_t) const { Refuse(); }
void RmsNorm(const RmsNormArgs&, Stream) { Refuse(); }

}  // namespace sluice::cuda
#endif  // !SLUICE_HAS_CUDA
