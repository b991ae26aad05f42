#include <cstring>
#include <mutex>

#include "runtime/ops/cuda/launch.cuh"
#include "runtime/ops/cuda/resize.h"

namespace sluice::cuda {
namespace {

constexpr int kWeightBits = 22;

void Check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw Error(std::string("[cuda send] copying failed: ") + cudaGetErrorString(error));
  }
}

// Page-locked pieces, used in turn, each made when its turn comes first.
class Pieces {
 public:
  static constexpr size_t kBytes = size_t{1} << 20;

  void Send(void* to, const void* from, size_t bytes, Stream stream) {
    const std::lock_guard lock(mutex_);
    for (size_t done = 0; done < bytes; done += kBytes) {
      Piece& piece = pieces_[next_++ % kCount];
      if (!piece.memory) {
        if (!piece.sent) Check(cudaEventCreateWithFlags(&piece.sent, cudaEventDisableTiming));
        Check(cudaMallocHost(&piece.memory, kBytes));
      }
      Check(cudaEventSynchronize(piece.sent));
      const size_t size = std::min(kBytes, bytes - done);
      std::memcpy(piece.memory, static_cast<const char*>(from) + done, size);
      Check(cudaMemcpyAsync(static_cast<char*>(to) + done, piece.memory, size,
                            cudaMemcpyHostToDevice, stream));
      Check(cudaEventRecord(piece.sent, stream));
    }
  }

 private:
  static constexpr size_t kCount = 16;
  struct Piece {
    void* memory = nullptr;
    cudaEvent_t sent = nullptr;
  };
  std::mutex mutex_;
  Piece pieces_[kCount];
  size_t next_ = 0;
};

__device__ uint8_t Rounded(int32_t sum) {
  return static_cast<uint8_t>(min(max(sum >> kWeightBits, 0), 255));
}

// narrow[y, x] = clamp((2^21 + sum_t w_t rgb[y, first_x + t]) >> 22), a thread a pixel. Neighbours
// read pixels that overlap, from the first-level cache; the picture comes from memory once.
__global__ void HorizontalKernel(ResizeArgs a) {
  const int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y;
  if (x >= a.out_width) return;
  const int64_t row = int64_t{blockIdx.z} * a.in_height + a.top + y;
  const uint8_t* pixel = a.rgb + 3 * (row * a.in_width + a.columns.first[x]);
  const int32_t* const weights = a.columns.weights + int64_t{x} * a.columns.max_taps;
  const int count = a.columns.count[x];
  int32_t red = 1 << (kWeightBits - 1), green = red, blue = red;
  for (int t = 0; t < count; ++t, pixel += 3) {
    const int32_t weight = weights[t];
    red += weight * pixel[0];
    green += weight * pixel[1];
    blue += weight * pixel[2];
  }
  reinterpret_cast<uchar4*>(a.narrow)[(int64_t{blockIdx.z} * a.used_height + y) * a.out_width + x] =
      make_uchar4(Rounded(red), Rounded(green), Rounded(blue), 0);
}

// The same down the columns of `narrow`, then normalised: a subtraction and a division, each
// rounded as on the CPU.
__global__ void VerticalKernel(ResizeArgs a) {
  const int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y;
  if (x >= a.out_width) return;
  const int64_t row = int64_t{blockIdx.z} * a.used_height + a.rows.first[y] - a.top;
  const uchar4* pixel = reinterpret_cast<const uchar4*>(a.narrow) + row * a.out_width + x;
  const int32_t* const weights = a.rows.weights + int64_t{y} * a.rows.max_taps;
  const int count = a.rows.count[y];
  int32_t sums[3] = {1 << (kWeightBits - 1), 1 << (kWeightBits - 1), 1 << (kWeightBits - 1)};
  for (int t = 0; t < count; ++t, pixel += a.out_width) {
    const int32_t weight = weights[t];
    const uchar4 value = *pixel;
    sums[0] += weight * value.x;
    sums[1] += weight * value.y;
    sums[2] += weight * value.z;
  }
  for (int c = 0; c < 3; ++c) {
    const int64_t line = (int64_t{blockIdx.z} * 3 + c) * a.out_height + y;
    a.out[line * a.out_width + x] =
        __fdiv_rn(__fsub_rn(static_cast<float>(Rounded(sums[c])), a.mean[c]), a.deviation[c]);
  }
}

}  // namespace

void Send(void* to, const void* from, size_t bytes, Stream stream) {
  static Pieces* const pieces = new Pieces;  // never destroyed: the driver may end first
  pieces->Send(to, from, bytes, stream);
}

void ResizeAndNormalise(const ResizeArgs& args, Stream stream) {
  constexpr int kPixels = 128;
  const auto across = static_cast<unsigned>((args.out_width + kPixels - 1) / kPixels);
  const auto frames = static_cast<unsigned>(args.frames);
  const auto lines = [&](int count) { return dim3(across, static_cast<unsigned>(count), frames); };
  HorizontalKernel<<<lines(args.used_height), kPixels, 0, stream>>>(args);
  VerticalKernel<<<lines(args.out_height), kPixels, 0, stream>>>(args);
  CheckLaunch("resize");
}

}  // namespace sluice::cuda
