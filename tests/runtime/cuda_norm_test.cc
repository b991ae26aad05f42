#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "runtime/error.h"
#include "runtime/ops/cuda/norm.h"
#include "runtime/ops/norm.h"
#include "tests/support/tensor_testing.h"

namespace sluice {
namespace {

using ::sluice::testing::At;
using ::sluice::testing::ExpectClose;
using ::sluice::testing::RandomTensor;

TEST(CudaRmsNormTest, AgreesWithTheReferenceOverAwkwardShapes) {
  if (cuda::DeviceCount() == 0) {
    GTEST_SKIP() << "CudaRmsNormTest.AgreesWithTheReferenceOverAwkwardShapes needs a GPU and a "
                    "build with -DSLUICE_CUDA=ON";
  }
  ExecContext reference({.kernels = KernelChoice::kReference});
  // Rows and widths: one, odd, prime, of real models, the longest kept in registers, and beyond.
  const std::pair<int64_t, int64_t> sizes[] = {{1, 1},    {3, 37},    {5, 896},   {196, 1152},
                                               {7, 3584}, {2, 16384}, {3, 20000}, {2, 16381}};
  for (const auto& [m, d] : sizes) {
    for (int64_t gap : {0, 3, 8}) {
      for (DType dtype : {DType::kF32, DType::kBF16}) {
        const Tensor x = RandomTensor(DType::kF32, {m, d + gap}, 1, 4);
        const Tensor weight = RandomTensor(DType::kF32, {d}, 2), y(dtype, {m, d});
        cuda::DeviceBuffer device_x(x.SizeBytes()), device_weight(weight.SizeBytes());
        cuda::DeviceBuffer device_y(y.SizeBytes());
        device_x.CopyFrom(x.view().raw(), x.SizeBytes());
        device_weight.CopyFrom(weight.view().raw(), weight.SizeBytes());
        cuda::RmsNorm({.x = static_cast<const float*>(device_x.data()),
                       .weight = static_cast<const float*>(device_weight.data()),
                       .y = device_y.data(),
                       .y_dtype = dtype,
                       .m = m,
                       .d = d,
                       .x_stride = d + gap,
                       .y_stride = d,
                       .eps = 1e-6f},
                      nullptr);
        cuda::Synchronize(nullptr);
        device_y.CopyTo(y.view().raw(), y.SizeBytes());

        const Tensor want(DType::kF32, {m, d});
        RmsNorm(reference, x.view().Columns(0, d), weight, 1e-6f, want);
        const std::vector<double> values(want.data<float>(), want.data<float>() + m * d);
        // f32: a sum of D squares and rsqrtf (2 ulp) give some 3e-7. bf16: one rounding, 2^-8 of an
        // element at most.
        const double tolerance = dtype == DType::kF32 ? 1e-6 : 4.1e-3;
        ExpectClose(y, values, tolerance, 2 * tolerance,
                    Shape{m, d}.ToString() + " " + Name(dtype));
      }
    }
  }
}

TEST(CudaRmsNormTest, BuildsWithoutDevicesSaySo) {
  if (cuda::DeviceCount() > 0) {
    GTEST_SKIP() << "CudaRmsNormTest.BuildsWithoutDevicesSaySo needs a machine without a GPU";
  }
  EXPECT_THROW(cuda::DeviceBuffer(16), Error);
}

TEST(ChooseRmsNormTest, FollowsItsTable) {
  struct Row {
    int64_t d;
    bool aligned;
    int threads, vector, kept;
  };
  const Row rows[] = {
      {1, false, 32, 1, 1},     {37, true, 64, 1, 1},     {896, true, 224, 4, 1},
      {896, false, 448, 1, 2},  {3584, true, 448, 4, 2},  {8192, true, 512, 4, 4},
      {16384, true, 512, 4, 8}, {20000, true, 512, 4, 0}, {16381, true, 512, 1, 0},
  };
  for (const Row& row : rows) {
    const cuda::RmsNormLaunch launch = cuda::ChooseRmsNorm(row.d, row.aligned);
    EXPECT_EQ(launch.threads, row.threads) << row.d;
    EXPECT_EQ(launch.vector, row.vector) << row.d;
    EXPECT_EQ(launch.kept_vectors, row.kept) << row.d;
    // Whatever is chosen covers the row.
    if (launch.kept_vectors > 0) {
      EXPECT_GE(int64_t{launch.threads} * launch.vector * launch.kept_vectors, row.d);
    }
  }
}

}  // namespace
}  // namespace sluice
