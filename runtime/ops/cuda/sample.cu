// All kernels read the logits from front to back, a block one part of them: 0.6 MB for 152 000 ids,
// which lie in the second-level cache; launches take most of the time.
#include "runtime/ops/cuda/launch.cuh"
#include "runtime/ops/cuda/sample.h"

namespace sluice::cuda {
namespace {

void Check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw Error(std::string("[cuda sample] clearing failed: ") + cudaGetErrorString(error));
  }
}

// How far a logit lies below the top decides its bin: by exponent and three bits of the mantissa,
// so that bins are finest at the top. Equals share a bin.
constexpr int kBins = 2048;
__device__ int BinOf(float top, float logit) {
  return static_cast<int>((__float_as_uint(top - logit) & 0x7fffffffu) >> 20);
}

// The ids [begin, end) of a block's part.
struct Part {
  int32_t begin, end;
  __device__ explicit Part(int32_t count) {
    const int32_t length = (count + kSampleParts - 1) / kSampleParts;
    begin = blockIdx.x * length;
    end = min(begin + length, count);
  }
};

struct Scratch {
  double masses[kBins];
  int32_t counts[kBins];
  float tops[kSampleParts];
};

__global__ void PenaliseKernel(float* logits, int32_t count, const int32_t* ids, int64_t listed,
                               float penalty, uint32_t* seen) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= listed) return;
  const int32_t id = ids[i];
  if (id < 0 || id >= count) return;
  const uint32_t bit = 1u << (id % 32);
  if (atomicOr(&seen[id / 32], bit) & bit) return;
  const float logit = logits[id];
  logits[id] = logit < 0 ? __fmul_rn(logit, penalty) : __fdiv_rn(logit, penalty);
}

__global__ void TopKernel(SummariseArgs a, Scratch* scratch) {
  const Part part(a.count);
  float top = -INFINITY;
  bool broken = false;
  for (int32_t id = part.begin + threadIdx.x; id < part.end; id += blockDim.x) {
    const float logit = a.logits[id];
    broken |= logit != logit || logit == INFINITY;
    top = fmaxf(top, logit);
  }
  if (__syncthreads_or(broken) && threadIdx.x == 0) atomicOr(&a.summary->broken, 1);
  top = BlockMax(top);
  if (threadIdx.x == 0) scratch->tops[blockIdx.x] = top;
}

__device__ float TopOfAll(const Scratch* scratch) {
  return BlockMax(threadIdx.x < kSampleParts ? scratch->tops[threadIdx.x] : -INFINITY);
}

// Masses of parts, in an order that is always the same, and, for candidates, of bins.
__global__ void MassKernel(SummariseArgs a, Scratch* scratch) {
  __shared__ double sums[kThreads];
  __shared__ double masses[kBins];
  __shared__ int32_t counts[kBins];
  for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) {
    masses[bin] = 0;
    counts[bin] = 0;
  }
  const float top = TopOfAll(scratch);  // all threads pass a barrier here
  const Part part(a.count);
  double sum = 0;
  for (int32_t id = part.begin + threadIdx.x; id < part.end; id += blockDim.x) {
    const float logit = a.logits[id];
    if (logit == -INFINITY) continue;
    const double mass = exp((static_cast<double>(logit) - top) / a.temperature);
    sum += mass;
    if (!a.wants_candidates) continue;
    atomicAdd(&masses[BinOf(top, logit)], mass);
    atomicAdd(&counts[BinOf(top, logit)], 1);
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    a.summary->masses[blockIdx.x] = sums[0];
    if (blockIdx.x == 0) a.summary->top = top;
  }
  if (!a.wants_candidates) return;
  for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) {
    if (counts[bin] == 0) continue;
    atomicAdd(&scratch->masses[bin], masses[bin]);
    atomicAdd(&scratch->counts[bin], counts[bin]);
  }
}

// The first bin with which there are enough; one block, a thread takes two bins.
constexpr int kCutThreads = kBins / 2;
__global__ void CutKernel(SummariseArgs a, const Scratch* scratch) {
  __shared__ double masses[kCutThreads];
  __shared__ int32_t counts[kCutThreads];
  __shared__ int cut;
  const int first = 2 * threadIdx.x;
  masses[threadIdx.x] = scratch->masses[first] + scratch->masses[first + 1];
  counts[threadIdx.x] = scratch->counts[first] + scratch->counts[first + 1];
  if (threadIdx.x == 0) cut = kBins - 1;
  __syncthreads();
  for (int offset = 1; offset < kCutThreads; offset *= 2) {
    const bool reaches = threadIdx.x >= offset;
    const double mass = reaches ? masses[threadIdx.x - offset] : 0;
    const int32_t count = reaches ? counts[threadIdx.x - offset] : 0;
    __syncthreads();
    masses[threadIdx.x] += mass;
    counts[threadIdx.x] += count;
    __syncthreads();
  }
  // A little more than asked for, since the host adds in another order.
  const double wanted = a.top_p * masses[kCutThreads - 1] * (1 + 1e-9);
  const auto enough = [&](double mass, int32_t count) {
    return a.top_k > 0 ? count >= a.top_k : mass >= wanted;
  };
  if (enough(masses[threadIdx.x], counts[threadIdx.x])) {
    const bool sooner = enough(masses[threadIdx.x] - scratch->masses[first + 1],
                               counts[threadIdx.x] - scratch->counts[first + 1]);
    atomicMin(&cut, first + !sooner);
  }
  __syncthreads();
  if (threadIdx.x == 0) a.summary->cut = cut;
}

__global__ void CandidatesKernel(SummariseArgs a) {
  const int cut = a.summary->cut;
  const float top = a.summary->top;
  const Part part(a.count);
  for (int32_t id = part.begin + threadIdx.x; id < part.end; id += blockDim.x) {
    const float logit = a.logits[id];
    if (logit == -INFINITY || BinOf(top, logit) > cut) continue;
    const int32_t at = atomicAdd(&a.summary->candidates, 1);
    if (at < kMostCandidates) a.candidates[at] = {id, logit};
  }
}

}  // namespace

size_t PenaltyWorkspaceBytes(int32_t count) {
  return (static_cast<size_t>(count) + 31) / 32 * sizeof(uint32_t);
}

void Penalise(float* logits, int32_t count, const int32_t* ids, int64_t listed, float penalty,
              void* seen, Stream stream) {
  if (listed == 0) return;
  Check(cudaMemsetAsync(seen, 0, PenaltyWorkspaceBytes(count), stream));
  const auto blocks = static_cast<unsigned>((listed + kThreads - 1) / kThreads);
  PenaliseKernel<<<blocks, kThreads, 0, stream>>>(logits, count, ids, listed, penalty,
                                                  static_cast<uint32_t*>(seen));
  CheckLaunch("repetition penalty");
}

size_t SummariseWorkspaceBytes() { return sizeof(Scratch); }

void SummariseLogits(const SummariseArgs& args, Stream stream) {
  auto* const scratch = static_cast<Scratch*>(args.workspace);
  Check(cudaMemsetAsync(args.summary, 0, sizeof(LogitSummary), stream));
  if (args.wants_candidates) Check(cudaMemsetAsync(scratch, 0, sizeof(Scratch), stream));
  TopKernel<<<kSampleParts, kThreads, 0, stream>>>(args, scratch);
  MassKernel<<<kSampleParts, kThreads, 0, stream>>>(args, scratch);
  if (args.wants_candidates) {
    CutKernel<<<1, kCutThreads, 0, stream>>>(args, scratch);
    CandidatesKernel<<<kSampleParts, kThreads, 0, stream>>>(args);
  }
  CheckLaunch("summary of logits");
}

}  // namespace sluice::cuda
