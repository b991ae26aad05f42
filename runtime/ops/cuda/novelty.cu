// Six small kernels, each of which reads x at most once; a frame of 196 x 896 is 0.7 MB and stays
// in the second-level cache, so launches and not bytes take the time.
#include "runtime/ops/cuda/launch.cuh"
#include "runtime/ops/cuda/merge.h"
#include "runtime/ops/cuda/novelty.h"

namespace sluice::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kRowLanes = 8;  // rows that a block of columns takes at once
constexpr unsigned kAll = 0xffffffffu;

// Numbers in the order of what they are made of, also where that is no number.
__device__ uint64_t Ordered(double value) {
  const auto bits = static_cast<uint64_t>(__double_as_longlong(value + 0.0));
  return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
}
__device__ uint32_t Ordered(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return bits >> 31 ? ~bits : bits | 1u << 31;
}

// What the kernels of a call share. Frames have N rows; arrays of channels are [F, D].
struct Problem {
  const float* x;
  int64_t stride;
  int frames, rows, width, calm;
  bool by_rank;
  float* means;
  uint64_t* variances;  // Ordered
  int32_t* ranks;       // of a channel, by variance
  int32_t* channels;    // of a rank; only those of calm ones
  float* sums;          // history with the frame, by channel or by rank
  float* norms;         // [F N] of a row's calm channels
  float* spatial;       // mean of the unit rows; 0 where a channel is not calm

  __device__ const float* Row(int frame, int row) const {
    return x + (int64_t{frame} * rows + row) * stride;
  }
  __device__ bool IsCalm(int frame, int channel) const {
    return ranks[int64_t{frame} * width + channel] < calm;
  }
};

// The sum over kRowLanes lanes of each column; valid for threadIdx.y == 0.
template <typename T>
__device__ T ColumnSum(T value) {
  __shared__ T of_lane[kRowLanes][kLanes];
  __syncthreads();
  of_lane[threadIdx.y][threadIdx.x] = value;
  __syncthreads();
  T sum = 0;
  for (int lane = 0; lane < kRowLanes; ++lane) sum += of_lane[lane][threadIdx.x];
  return sum;
}

// Mean and variance of a channel over a frame. A block takes 32 channels of a frame, kRowLanes rows
// at once.
__global__ void MomentsKernel(Problem p) {
  const int channel = blockIdx.x * kLanes + threadIdx.x, frame = blockIdx.y;
  double sum = 0, square = 0;
  if (channel < p.width) {
    for (int i = threadIdx.y; i < p.rows; i += kRowLanes) {
      const double value = p.Row(frame, i)[channel];
      sum += value;
      square += value * value;
    }
  }
  sum = ColumnSum(sum);
  square = ColumnSum(square);
  if (threadIdx.y > 0 || channel >= p.width) return;
  const double mean = sum / p.rows;
  p.means[int64_t{frame} * p.width + channel] = static_cast<float>(mean);
  p.variances[int64_t{frame} * p.width + channel] = Ordered(square / p.rows - mean * mean);
}

// The rank of a channel is how many come before it. A thread takes a channel; all read the others
// by way of shared memory.
__global__ void RankKernel(Problem p) {
  __shared__ uint64_t others[kThreads];
  const int channel = blockIdx.x * kThreads + threadIdx.x, frame = blockIdx.y;
  const uint64_t* const variances = p.variances + int64_t{frame} * p.width;
  const uint64_t mine = channel < p.width ? variances[channel] : 0;
  int rank = 0;
  for (int first = 0; first < p.width; first += kThreads) {
    const int count = min(kThreads, p.width - first);
    __syncthreads();
    if (threadIdx.x < count) others[threadIdx.x] = variances[first + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < count; ++i) {
      rank += others[i] < mine || (others[i] == mine && first + i < channel);
    }
  }
  if (channel >= p.width) return;
  p.ranks[int64_t{frame} * p.width + channel] = rank;
  if (rank < p.calm) p.channels[int64_t{frame} * p.width + rank] = channel;
}

// A thread takes an entry of the history through all frames.
__global__ void HistoryKernel(Problem p, const float* history, float* new_history) {
  const int entry = blockIdx.x * kThreads + threadIdx.x;
  if (entry >= (p.by_rank ? p.calm : p.width)) return;
  float sum = history ? history[entry] : 0;
  for (int64_t f = 0; f < p.frames; ++f) {
    const int channel = p.by_rank ? p.channels[f * p.width + entry] : entry;
    sum += p.means[f * p.width + channel];
    p.sums[f * p.width + entry] = sum;
  }
  new_history[entry] = sum;
}

// A warp takes a row.
__global__ void NormKernel(Problem p) {
  const int row = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes, frame = blockIdx.y;
  if (row >= p.rows) return;
  const float* const x = p.Row(frame, row);
  float square = 0;
  for (int c = threadIdx.x % kLanes; c < p.width; c += kLanes) {
    if (p.IsCalm(frame, c)) square += x[c] * x[c];
  }
  square = WarpSum(square);
  if (threadIdx.x % kLanes > 0) return;
  p.norms[int64_t{frame} * p.rows + row] = fmaxf(sqrtf(square), 1e-12f);
}

// As MomentsKernel.
__global__ void SpatialKernel(Problem p) {
  const int channel = blockIdx.x * kLanes + threadIdx.x, frame = blockIdx.y;
  const bool calm = channel < p.width && p.IsCalm(frame, channel);
  float sum = 0;
  if (calm) {
    for (int i = threadIdx.y; i < p.rows; i += kRowLanes) {
      sum += p.Row(frame, i)[channel] / p.norms[int64_t{frame} * p.rows + i];
    }
  }
  sum = ColumnSum(sum);
  if (threadIdx.y > 0 || channel >= p.width) return;
  p.spatial[int64_t{frame} * p.width + channel] = calm ? sum / p.rows : 0;
}

__device__ float Gaussians(float squared_distance) {
  const float x = fmaxf(squared_distance, 0.0f);
  float sum = 0;
  for (float width = 0.25f; width <= 4.0f; width *= 2) sum += expf(-x / width);
  return sum;
}

// A warp takes a row; it finds the lengths of the anchors on the way, as every warp does.
__global__ void NoveltyKernel(Problem p, NoveltyScore score, float* novelty) {
  const int row = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes, frame = blockIdx.y;
  if (row >= p.rows) return;
  const float* const x = p.Row(frame, row);
  const int64_t base = int64_t{frame} * p.width;
  float to_temporal = 0, to_spatial = 0, temporal = 0, spatial = 0;
  for (int c = threadIdx.x % kLanes; c < p.width; c += kLanes) {
    const int rank = p.ranks[base + c];
    if (rank >= p.calm) continue;
    const float t = p.sums[base + (p.by_rank ? rank : c)], s = p.spatial[base + c];
    to_temporal += x[c] * t;
    to_spatial += x[c] * s;
    temporal += t * t;
    spatial += s * s;
  }
  const float norm = p.norms[int64_t{frame} * p.rows + row];
  to_temporal = WarpSum(to_temporal) / norm;
  to_spatial = WarpSum(to_spatial) / norm;
  to_temporal /= fmaxf(sqrtf(WarpSum(temporal)), 1e-12f);
  spatial = fmaxf(sqrtf(WarpSum(spatial)), 1e-12f);
  if (threadIdx.x % kLanes > 0) return;
  novelty[int64_t{frame} * p.rows + row] =
      score == NoveltyScore::kDualAnchor
          ? -(to_temporal + to_spatial / spatial)
          : -(Gaussians(2 - 2 * to_temporal) + Gaussians(1 + spatial * spatial - 2 * to_spatial));
}

// The sum of a channel over a frame, blocks as in MomentsKernel.
__global__ void ColumnSumsKernel(const float* x, int64_t stride, int rows, int width,
                                 double* sums) {
  const int channel = blockIdx.x * kLanes + threadIdx.x, frame = blockIdx.y;
  double sum = 0;
  if (channel < width) {
    for (int i = threadIdx.y; i < rows; i += kRowLanes) {
      sum += x[(int64_t{frame} * rows + i) * stride + channel];
    }
  }
  sum = ColumnSum(sum);
  if (threadIdx.y == 0 && channel < width) sums[int64_t{frame} * width + channel] = sum;
}

// Makes sums of frames those of all until then; a thread takes a channel.
__global__ void RunningSumsKernel(const double* history, int frames, int width, double* sums,
                                  double* new_history) {
  const int channel = blockIdx.x * kThreads + threadIdx.x;
  if (channel >= width) return;
  double sum = history ? history[channel] : 0;
  for (int64_t f = 0; f < frames; ++f) sum = sums[f * width + channel] += sum;
  new_history[channel] = sum;
}

// A warp takes a row.
__global__ void HistoryCosinesKernel(const float* x, int64_t stride, int rows, int width,
                                     const double* sums, float* cosines) {
  const int row = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes, frame = blockIdx.y;
  if (row >= rows) return;
  const float* const mine = x + (int64_t{frame} * rows + row) * stride;
  const double* const sum = sums + int64_t{frame} * width;
  double dot = 0, norm = 0, sum_norm = 0;
  for (int d = threadIdx.x % kLanes; d < width; d += kLanes) {
    const double value = mine[d];
    dot += value * sum[d];
    norm += value * value;
    sum_norm += sum[d] * sum[d];
  }
  dot = WarpSum(dot);
  const double norms = sqrt(WarpSum(norm)) * sqrt(WarpSum(sum_norm));
  if (threadIdx.x % kLanes > 0) return;
  cosines[int64_t{frame} * rows + row] = static_cast<float>(dot / fmax(norms, 1e-12));
}

constexpr int kChoosers = 1024;

// A block takes a group, a thread a value: it stays if fewer than `kept` come before it, and its
// place in the list is the number of those in front of it that stay. Compares all pairs: N^2 / 1024
// steps of a thread, a few microseconds for the hundreds of tokens of a frame.
__global__ void LargestKernel(const float* values, int size, int kept, int32_t* places) {
  __shared__ uint32_t others[kChoosers];
  __shared__ int of_warp[kChoosers / kLanes];
  const float* const value = values + int64_t{blockIdx.x} * size;
  int32_t* const list = places + int64_t{blockIdx.x} * kept;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  int listed = 0;
  for (int begin = 0; begin < size; begin += kChoosers) {
    const int at = begin + threadIdx.x;
    const uint32_t mine = at < size ? Ordered(value[at]) : 0;
    int before = 0;
    for (int first = 0; first < size; first += kChoosers) {
      const int count = min(kChoosers, size - first);
      __syncthreads();
      if (threadIdx.x < count) others[threadIdx.x] = Ordered(value[first + threadIdx.x]);
      __syncthreads();
      for (int i = 0; i < count; ++i) {
        before += others[i] > mine || (others[i] == mine && first + i < at);
      }
    }
    const bool stays = at < size && before < kept;
    const unsigned together = __ballot_sync(kAll, stays);
    if (lane == 0) of_warp[warp] = __popc(together);
    __syncthreads();
    int place = listed + __popc(together & ((1u << lane) - 1));
    for (int w = 0; w < kChoosers / kLanes; ++w) {
      if (w < warp) place += of_warp[w];
      listed += of_warp[w];
    }
    if (stays) list[place] = at;
  }
}

// A block takes a row of x, a warp every fourth of those that stay.
constexpr int kJoinWarps = 4;
__global__ void NearestKeptKernel(const float* x, int64_t stride, int rows, int64_t width,
                                  const int32_t* kept, int left, float join_from, int32_t* to) {
  __shared__ float cosines[kJoinWarps];
  __shared__ int nearest[kJoinWarps];
  const int frame = blockIdx.x / rows, row = blockIdx.x % rows;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const float* const mine = x + int64_t{blockIdx.x} * stride;
  float best = join_from;
  int place = -1;
  for (int k = warp; k < left; k += kJoinWarps) {
    const int other = kept[int64_t{frame} * left + k];
    const float* const theirs = x + (int64_t{frame} * rows + other) * stride;
    float dot = 0, first = 0, second = 0;
    for (int64_t d = lane; d < width; d += kLanes) {
      dot += mine[d] * theirs[d];
      first += mine[d] * mine[d];
      second += theirs[d] * theirs[d];
    }
    dot = WarpSum(dot);
    first = fmaxf(sqrtf(WarpSum(first)), 1e-12f);
    second = fmaxf(sqrtf(WarpSum(second)), 1e-12f);
    const float cosine = other == row ? INFINITY : dot / (first * second);
    if (cosine < best) continue;
    best = cosine;
    place = k;
  }
  if (lane == 0) {
    cosines[warp] = best;
    nearest[warp] = place;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < kJoinWarps; ++w) {
    if (nearest[w] < 0 || cosines[w] < best) continue;
    if (place >= 0 && cosines[w] == best && nearest[w] < place) continue;
    best = cosines[w];
    place = nearest[w];
  }
  to[blockIdx.x] = place;
}

// Cuts one piece of memory into arrays aligned to 256 bytes.
class Cutter {
 public:
  explicit Cutter(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <typename T>
  T* Cut(int64_t count) {
    const size_t at = used_;
    used_ += (count * sizeof(T) + 255) / 256 * 256;
    return memory_ ? reinterpret_cast<T*>(memory_ + at) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

Problem ProblemOf(const NoveltyArgs& args, Cutter& cutter) {
  const int64_t width = args.x.dim(1), channels = args.frames * width;
  Problem p = {};
  p.x = static_cast<const float*>(args.x.raw());
  p.stride = args.x.stride0();
  p.frames = static_cast<int>(args.frames);
  p.rows = static_cast<int>(args.x.dim(0) / args.frames);
  p.width = static_cast<int>(width);
  p.calm = static_cast<int>(CalmChannels(width));
  p.by_rank = args.by_rank;
  p.means = cutter.Cut<float>(channels);
  p.variances = cutter.Cut<uint64_t>(channels);
  p.ranks = cutter.Cut<int32_t>(channels);
  p.channels = cutter.Cut<int32_t>(channels);
  p.sums = cutter.Cut<float>(channels);
  p.norms = cutter.Cut<float>(args.x.dim(0));
  p.spatial = cutter.Cut<float>(channels);
  return p;
}

unsigned Pieces(int count, int piece) { return static_cast<unsigned>((count + piece - 1) / piece); }

}  // namespace

size_t NoveltyWorkspaceBytes(const NoveltyArgs& args) {
  Cutter cutter(nullptr);
  ProblemOf(args, cutter);
  return cutter.used();
}

void Novelty(const NoveltyArgs& args, void* workspace, Stream stream) {
  Cutter cutter(workspace);
  const Problem p = ProblemOf(args, cutter);
  const auto frames = static_cast<unsigned>(p.frames);
  const dim3 columns(Pieces(p.width, kLanes), frames), column_block(kLanes, kRowLanes);
  const dim3 rows(Pieces(p.rows, kThreads / kLanes), frames);
  const unsigned channels = Pieces(p.width, kThreads);
  MomentsKernel<<<columns, column_block, 0, stream>>>(p);
  RankKernel<<<dim3(channels, frames), kThreads, 0, stream>>>(p);
  HistoryKernel<<<channels, kThreads, 0, stream>>>(p, static_cast<const float*>(args.history.raw()),
                                                   static_cast<float*>(args.new_history.raw()));
  NormKernel<<<rows, kThreads, 0, stream>>>(p);
  SpatialKernel<<<columns, column_block, 0, stream>>>(p);
  NoveltyKernel<<<rows, kThreads, 0, stream>>>(p, args.score,
                                               static_cast<float*>(args.novelty.raw()));
  CheckLaunch("novelty");
}

void HistoryCosines(ConstTensorView x, int64_t frames, ConstTensorView history,
                    TensorView new_history, TensorView sums, TensorView cosines, Stream stream) {
  const int rows = static_cast<int>(x.dim(0) / frames), width = static_cast<int>(x.dim(1));
  const auto count = static_cast<unsigned>(frames);
  const float* const from = static_cast<const float*>(x.raw());
  auto* const running = static_cast<double*>(sums.raw());
  ColumnSumsKernel<<<dim3(Pieces(width, kLanes), count), dim3(kLanes, kRowLanes), 0, stream>>>(
      from, x.stride0(), rows, width, running);
  RunningSumsKernel<<<Pieces(width, kThreads), kThreads, 0, stream>>>(
      static_cast<const double*>(history.raw()), static_cast<int>(frames), width, running,
      static_cast<double*>(new_history.raw()));
  HistoryCosinesKernel<<<dim3(Pieces(rows, kThreads / kLanes), count), kThreads, 0, stream>>>(
      from, x.stride0(), rows, width, running, static_cast<float*>(cosines.raw()));
  CheckLaunch("history cosines");
}

void LargestOfGroups(ConstTensorView values, int64_t groups, TensorView places, Stream stream) {
  LargestKernel<<<static_cast<unsigned>(groups), kChoosers, 0, stream>>>(
      static_cast<const float*>(values.raw()), static_cast<int>(values.dim(0) / groups),
      static_cast<int>(places.dim(0) / groups), static_cast<int32_t*>(places.raw()));
  CheckLaunch("largest of groups");
}

void JoinRows(ConstTensorView x, int64_t frames, ConstTensorView kept, float join_from,
              TensorView to, TensorView y, Stream stream) {
  NearestKeptKernel<<<static_cast<unsigned>(x.dim(0)), kJoinWarps * kLanes, 0, stream>>>(
      static_cast<const float*>(x.raw()), x.stride0(), static_cast<int>(x.dim(0) / frames),
      x.dim(1), static_cast<const int32_t*>(kept.raw()), static_cast<int>(y.dim(0) / frames),
      join_from, static_cast<int32_t*>(to.raw()));
  CheckLaunch("nearest kept rows");
  MergeRowsArgs args;
  args.x = x;
  args.groups = frames;
  args.to = static_cast<const int32_t*>(to.raw());
  args.merged = y;
  MergeRows(args, stream);
}

}  // namespace sluice::cuda
