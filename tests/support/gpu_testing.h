// Tests on a GPU, skipped where there is none.
#ifndef SLUICE_TESTS_SUPPORT_GPU_TESTING_H_
#define SLUICE_TESTS_SUPPORT_GPU_TESTING_H_

#include <gtest/gtest.h>

#include <memory>

#include "runtime/ops/cuda/device.h"
#include "runtime/transfer.h"

namespace sluice::testing {

// Skips the running test where there is no such device, and says whether it did: whoever calls it
// returns then.
inline bool SkippedWithout(Device device) {
  [device] {
    if (device == Device::kCuda && cuda::DeviceCount() == 0) {
      GTEST_SKIP() << "needs a GPU and a build with -DSLUICE_CUDA=ON";
    }
  }();
  return ::testing::Test::IsSkipped();
}

// A test of what a GPU does, mostly against the references on the CPU.
class GpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (SkippedWithout(Device::kCuda)) return;
    gpu_ = std::make_unique<ExecContext>(ExecOptions{.device = Device::kCuda});
  }
  Tensor There(ConstTensorView x) { return TransferTo(*gpu_, x, Device::kCuda); }
  Tensor Here(ConstTensorView x) { return TransferTo(*gpu_, x, Device::kCpu); }

  ExecContext reference_{ExecOptions{.kernels = KernelChoice::kReference}};
  std::unique_ptr<ExecContext> gpu_;
};

}  // namespace sluice::testing

#endif  // SLUICE_TESTS_SUPPORT_GPU_TESTING_H_
