#include "runtime/ops/cuda/launch.cuh"
#include "runtime/ops/cuda/merge.h"

namespace sluice::cuda {
namespace {

// merged_p = sum over i with to_i = p of s_i x_i / sum of s_i.
// A block takes kThreads columns of a row of the result, a thread one of them: it walks the list of
// the group, which all threads read at once, and the rows it names. Reads x once.
__global__ void MergeRowsKernel(const float* x, int64_t x_stride, const float* sizes,
                                const int32_t* to, int rows, int left, int64_t width, float* merged,
                                int64_t merged_stride, float* merged_sizes) {
  const int64_t column = blockIdx.y * int64_t{blockDim.x} + threadIdx.x;
  const int64_t group = blockIdx.x / left, first = group * rows;
  const int place = static_cast<int>(blockIdx.x % left);
  const bool inside = column < width;
  double sum = 0;
  float size = 0, alone = 0;
  int members = 0;
  for (int i = 0; i < rows; ++i) {
    if (to[first + i] != place) continue;
    const float weight = sizes ? sizes[first + i] : 1;
    ++members;
    size += weight;
    if (!inside) continue;
    alone = x[(first + i) * x_stride + column];
    sum += double{weight} * alone;
  }
  if (inside) {
    merged[blockIdx.x * merged_stride + column] =
        members == 1 ? alone : static_cast<float>(sum / size);
  }
  if (merged_sizes && column == 0) merged_sizes[blockIdx.x] = size;
}

constexpr int kPairWarps = 8;

// A block takes a row at an even place, a warp every kPairWarps-th row at an odd one, lanes every
// 32nd channel. N^2 / 4 dot products a part, read from the second-level cache: about 30 MB for 196
// rows of 896.
__global__ void NearestOfPairsKernel(const float* x, int64_t stride, int rows, int64_t width,
                                     int32_t* nearest, float* cosines) {
  __shared__ float best_of[kPairWarps];
  __shared__ int place_of[kPairWarps];
  const int evens = (rows + 1) / 2, odds = rows / 2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float* const part = x + blockIdx.x / evens * int64_t{rows} * stride;
  const float* const mine = part + blockIdx.x % evens * int64_t{2} * stride;
  float best = -INFINITY;
  int place = odds;
  for (int j = warp; j < odds; j += kPairWarps) {
    const float* const other = part + (int64_t{2} * j + 1) * stride;
    float dot = 0, first = 0, second = 0;
    for (int64_t d = lane; d < width; d += 32) {
      dot += mine[d] * other[d];
      first += mine[d] * mine[d];
      second += other[d] * other[d];
    }
    first = fmaxf(sqrtf(WarpSum(first)), 1e-12f);
    second = fmaxf(sqrtf(WarpSum(second)), 1e-12f);
    const float cosine = WarpSum(dot) / (first * second);
    if (place < odds && !(cosine > best)) continue;
    best = cosine;
    place = j;
  }
  if (lane == 0) {
    best_of[warp] = best;
    place_of[warp] = place;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < min(kPairWarps, odds); ++w) {
    if (best_of[w] < best || (best_of[w] == best && place_of[w] > place)) continue;
    best = best_of[w];
    place = place_of[w];
  }
  nearest[blockIdx.x] = place;
  cosines[blockIdx.x] = best;
}

}  // namespace

void NearestOfPairs(ConstTensorView x, int64_t groups, TensorView nearest, TensorView cosines,
                    Stream stream) {
  NearestOfPairsKernel<<<static_cast<unsigned>(nearest.dim(0)), kPairWarps * 32, 0, stream>>>(
      static_cast<const float*>(x.raw()), x.stride0(), static_cast<int>(x.dim(0) / groups),
      x.dim(1), static_cast<int32_t*>(nearest.raw()), static_cast<float*>(cosines.raw()));
  CheckLaunch("nearest of pairs");
}

void MergeRows(const MergeRowsArgs& args, Stream stream) {
  const int64_t width = args.x.dim(1), rows = args.merged.dim(0);
  if (rows * width == 0) return;
  const dim3 grid(static_cast<unsigned>(rows),
                  static_cast<unsigned>((width + kThreads - 1) / kThreads));
  MergeRowsKernel<<<grid, kThreads, 0, stream>>>(
      static_cast<const float*>(args.x.raw()), args.x.stride0(), args.sizes, args.to,
      static_cast<int>(args.x.dim(0) / args.groups), static_cast<int>(rows / args.groups), width,
      static_cast<float*>(args.merged.raw()), args.merged.stride0(), args.merged_sizes);
  CheckLaunch("merge rows");
}

}  // namespace sluice::cuda
