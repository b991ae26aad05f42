// y[m, n] = factor[n] * sum_k x[m, k] W[n, k]
//
// Bound by reading the weight once: N * K * 2 bytes, or half of that in 8 bits. All else is done in
// its shadow by the matrix units. One or two rows, and three to sixteen, take different kernels.
//
// FewRowsKernel. A warp takes some outputs (with silu_mul some gates and their ups). Of each it
// reads 512 bytes of the weight's row at a time, 16 a lane, and as many values of x, which stays in
// the caches. Lane 4 g + q's values are column g of one mma.m16n8k16 after the other and row g of
// x: products of parts g of both, eight parts at once. So sums [g, g] count, which are added up at
// the end, and all the others are for nothing; a second row of x takes rows 8 to 15. An instruction
// takes four values of each lane: which k's they are does not matter as long as x and W agree, so
// nothing is exchanged. Values of 8 bits are widened to bf16, exactly. `splits` warps of a block
// share an output's K, turn by turn, and add their sums in shared memory.
//
// Where rows are normalised first, x[m, k] = r[m] row[m, k] norm[k] with r[m] = 1 / sqrt(mean_k
// row[m, k]^2 + eps), each block puts row * norm into shared memory in bf16, M * K * 2 bytes, while
// it sums the squares, and r joins the factors at the end: nobody waits for the sum. There are then
// no more blocks than run at once; each takes one piece of the outputs after the other, and reads
// the next one's first weights before it adds up this one's sums.
#include "runtime/ops/cuda/launch.cuh"
#include "runtime/ops/cuda/linear_few.h"
#include "runtime/ops/cuda/mma_bf16.cuh"

namespace sluice::cuda {
namespace {

constexpr int kWarps = 8;  // of a block
constexpr int kLanes = 32;
// Reads of a lane at once, of each output.
template <int kOutputs>
constexpr int kReads = kOutputs == 1 ? 4 : 8 / kOutputs;

// How many values 16 bytes hold.
template <WeightFormat kFormat>
constexpr int kValuesOf = kFormat == WeightFormat::kPlain ? 8 : 16;

// Bytes 2 * kHalf and 2 * kHalf + 1 of four e4m3 as two bf16. Moved four bits down, the bits of an
// e4m3 are those of a bf16 with an exponent that is 120 less, subnormal numbers too.
template <int kHalf>
__device__ inline uint32_t WidenFp8(uint32_t four) {
  const uint32_t two = __byte_perm(four, 0, kHalf == 0 ? 0x1404 : 0x3424);  // the upper bytes
  const uint32_t small = (two & 0x80008000u) | (two >> 4 & 0x07f007f0u);
  const __nv_bfloat162 scale = __halves2bfloat162(__ushort_as_bfloat16(0x7b80),  // 2^120
                                                  __ushort_as_bfloat16(0x7b80));
  const __nv_bfloat162 wide = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&small), scale);
  return *reinterpret_cast<const uint32_t*>(&wide);
}

// Likewise of four int8. 0x4300 is 128, whose last place counts 1; with the sign's bit it is 256:
// x = (128 + the lower 7 bits) - (128 or 256).
template <int kHalf>
__device__ inline uint32_t WidenInt8(uint32_t four) {
  const uint32_t two = __byte_perm(four, 0, kHalf == 0 ? 0x4140 : 0x4342);  // the lower bytes
  const uint32_t above = (two & 0x007f007fu) | 0x43004300u;
  const uint32_t base = (two & 0x00800080u) | 0x43004300u;
  const __nv_bfloat162 wide = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&above),
                                      *reinterpret_cast<const __nv_bfloat162*>(&base));
  return *reinterpret_cast<const uint32_t*>(&wide);
}

// Values 4 i to 4 i + 3 of a lane's 16 bytes as two pairs of bf16.
template <WeightFormat kFormat>
__device__ inline uint2 Widen(const uint4& packed, int i) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
  if constexpr (kFormat == WeightFormat::kPlain) {
    return make_uint2(words[2 * i], words[2 * i + 1]);
  } else if constexpr (kFormat == WeightFormat::kFp8) {
    return make_uint2(WidenFp8<0>(words[i]), WidenFp8<1>(words[i]));
  } else {
    return make_uint2(WidenInt8<0>(words[i]), WidenInt8<1>(words[i]));
  }
}

// sums += x w^T; two pairs of a part of one row of x and of another.
__device__ inline void Multiply(uint2 x, uint2 x_below, uint2 w, float (&sums)[4]) {
  const uint32_t rows[] = {x.x, x_below.x, x.y, x_below.y};
  MmaBf16(sums, rows, w.x, w.y);
}

// The values of x that meet a lane's 16 bytes of weight.
template <int kValues>
struct Values {
  uint2 four[kValues / 4] = {};
};
template <int kValues>
__device__ inline Values<kValues> Read(const __nv_bfloat16* from) {
  Values<kValues> x;
#pragma unroll
  for (int i = 0; i < kValues / 8; ++i) {
    const uint4 eight = reinterpret_cast<const uint4*>(from)[i];
    x.four[2 * i] = make_uint2(eight.x, eight.y);
    x.four[2 * i + 1] = make_uint2(eight.z, eight.w);
  }
  return x;
}

// A product's sum with what the weight's format and the bias add to it.
template <WeightFormat kFormat>
__device__ inline float Finished(const FewRowsArgs& a, float sum, int64_t n) {
  if constexpr (kFormat != WeightFormat::kPlain) sum *= a.factors[n];
  return a.bias ? sum + a.bias[n] : sum;
}

// up: with kSiluMul.
template <bool kSiluMul>
__device__ inline void WriteResult(const FewRowsArgs& a, int64_t m, int64_t n, int64_t outputs,
                                   float result, float up) {
  if constexpr (kSiluMul) result = result / (1.f + expf(-result)) * up;
  if (a.y_dtype == DType::kBF16) {
    static_cast<__nv_bfloat16*>(a.y)[m * outputs + n] = __float2bfloat16_rn(result);
  } else {
    float& y = static_cast<float*>(a.y)[m * outputs + n];
    y = a.accumulate ? y + result : result;
  }
}

// Puts row m * norm into shared memory, four values out of 4 * `of` from the `part`-th on, and
// returns the sum of the squares of those of the row.
__device__ inline float Normalise(const FewRowsArgs& a, int m, int part, int of,
                                  __nv_bfloat16* to) {
  const auto* const norm = reinterpret_cast<const float4*>(a.norm);
  const auto* const row =
      reinterpret_cast<const float4*>(static_cast<const float*>(a.x) + m * a.x_stride);
  float squares = 0;
#pragma unroll 4
  for (int i = part; i < a.k / 4; i += of) {
    const float4 x = row[i], w = norm[i];
    squares += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
    reinterpret_cast<uint2*>(to)[i] =
        make_uint2(PackBf16(x.x * w.x, x.y * w.y), PackBf16(x.z * w.z, x.w * w.w));
  }
  return squares;
}
__device__ inline float RowFactor(const FewRowsArgs& a, float squares) {
  return rsqrtf(squares / static_cast<float>(a.k) + a.norm_eps);
}

// kOutputs: rows of W that a warp takes, with kSiluMul the first half of them gates and the others
// their ups. kNorm: rows are normalised.
template <WeightFormat kFormat, int kOutputs, bool kSiluMul, bool kNorm>
__global__ void __launch_bounds__(kLanes* kWarps, kNorm ? 3 : 2)
    FewRowsKernel(FewRowsArgs a, int splits, int pieces) {
  constexpr int kValues = kValuesOf<kFormat>, kAtOnce = kReads<kOutputs>;
  constexpr int kResults = kSiluMul ? kOutputs / 2 : kOutputs;
  constexpr int kRows = kMostSummedRows;
  __shared__ float shared_sums[kWarps][kOutputs * kRows], shared_squares[kWarps][kRows];
  extern __shared__ uint4 shared_x[];  // with kNorm [M, K] bf16
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int part = warp % splits;
  const int64_t outputs = kSiluMul ? a.n / 2 : a.n;
  auto* const normed = reinterpret_cast<__nv_bfloat16*>(shared_x);
  const auto* const x = kNorm ? normed : static_cast<const __nv_bfloat16*>(a.x);
  const int x_stride = static_cast<int>(kNorm ? a.k : a.x_stride);

  // Of the weight in units of 16 bytes: rows of this warp's outputs, and how long they are.
  uint32_t rows[kOutputs];
  const int units = static_cast<int>(a.k / kValues);
  int64_t first;  // output
  const auto take = [&](int piece) {
    first = (piece * int64_t{kWarps} + warp) / splits * kResults;
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      // Outputs beyond the last are read as the last, and not written.
      const int64_t n = min(first + o % kResults, outputs - 1) + o / kResults * outputs;
      rows[o] = static_cast<uint32_t>(n * (a.weight_stride / kValues));
    }
  };
  uint4 w[kOutputs][kAtOnce];
  const auto read_weights = [&](int begin) {
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int unit = begin + j * kLanes + lane;
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        w[o][j] = make_uint4(0, 0, 0, 0);
        if (unit < units) w[o][j] = __ldcs(static_cast<const uint4*>(a.weight) + rows[o] + unit);
      }
    }
  };
  LetNextKernelStart();
  // The first weights, which no kernel writes, are under way before x is there.
  const int begin_of_part = part * kAtOnce * kLanes;
  take(blockIdx.x);
  read_weights(begin_of_part);
  WaitForKernelInFront();
  if constexpr (kNorm) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      float squares = 0;
      if (m < a.m) {
        squares = WarpSum(Normalise(a, m, threadIdx.x, kLanes * kWarps, normed + m * x_stride));
      }
      if (lane == 0) shared_squares[warp][m] = squares;
    }
    __syncthreads();
  }
  int piece = blockIdx.x;
  bool more;
  do {
    float sums[kOutputs][4] = {};
    for (int begin = begin_of_part; begin < units; begin += splits * kAtOnce * kLanes) {
      if (begin > begin_of_part) read_weights(begin);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (begin + j * kLanes >= units) break;
        const int unit = begin + j * kLanes + lane;
        Values<kValues> of_x, below;
        if (unit < units) of_x = Read<kValues>(x + unit * kValues);
        if (unit < units && a.m > 1) below = Read<kValues>(x + x_stride + unit * kValues);
#pragma unroll
        for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
          for (int i = 0; i < kValues / 4; ++i) {
            Multiply(of_x.four[i], below.four[i], Widen<kFormat>(w[o][j], i), sums[o]);
          }
        }
      }
    }
    // The next piece's first weights come while this one's sums are finished.
    const int64_t done = first;
    piece += gridDim.x;
    more = kNorm && piece < pieces;
    if (more) {
      take(piece);
      read_weights(begin_of_part);
    }

    // Lane 4 g + q has columns 2 q and 2 q + 1 of row g, and of row 8 + g behind them.
    const int group = lane / 4;
    const bool counts = lane % 4 == group / 2;
    float of_row[kOutputs][kRows];
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        const float* const at = sums[o] + 2 * m;
        const float sum = WarpSum(counts ? (group % 2 == 0 ? at[0] : at[1]) : 0.f);
        of_row[o][m] = sum;
        if (splits > 1 && lane == 0) shared_sums[warp][o * kRows + m] = sum;
      }
    }
    if (splits > 1) {
      __syncthreads();
      if (part == 0) {
#pragma unroll
        for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
          for (int m = 0; m < kRows; ++m) {
            for (int other = 1; other < splits; ++other) {
              of_row[o][m] += shared_sums[warp + other][o * kRows + m];
            }
          }
        }
      }
      if (more) __syncthreads();  // before they are written again
    }
    if (part != 0) continue;
    float row_factor[kRows];
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      row_factor[m] = 1;
      if constexpr (kNorm) {
        float squares = 0;
#pragma unroll
        for (int of = 0; of < kWarps; ++of) squares += shared_squares[of][m];
        row_factor[m] = RowFactor(a, squares);
      }
    }
    const auto value = [&](int o, int m, int64_t n) {
      return Finished<kFormat>(a, of_row[o][m] * row_factor[m], n);
    };
    // A lane each writes a result.
#pragma unroll
    for (int o = 0; o < kResults; ++o) {
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        const int64_t n = done + o;
        if (lane != o * kRows + m || m >= a.m || n >= outputs) continue;
        WriteResult<kSiluMul>(a, m, n, outputs, value(o, m, n),
                              kSiluMul ? value(kOutputs - kResults + o, m, n + outputs) : 0.f);
      }
    }
  } while (more);
}

// TileKernel. A block takes 16 outputs (with silu_mul 16 gates and their ups) for all rows, each of
// its warps every so manieth step of K, and they add up in shared memory. W is the left side of
// mma.m16n8k16, 8 rows of x the right one. Lane 4 g + t reads 16 bytes of outputs g and g + 8, and
// what they meet of rows g (and 8 + g) of x: four lanes side by side, so 64 bytes of a row. Every
// block reads all of x, from the second-level cache, M * K * 2 bytes; where rows are normalised
// first, twice that, and then as above from shared memory.
constexpr int kTileOutputs = 16, kTileRows = 8;  // of one mma
constexpr int kRowGap = 32;  // between rows in shared memory, in values: other banks
template <WeightFormat kFormat, int kTiles, int kOfBlock, bool kSiluMul, bool kNorm>
__global__ void __launch_bounds__(kLanes* kOfBlock, kOfBlock == kWarps ? 2 : 1)
    TileKernel(FewRowsArgs a) {
  constexpr int kParts = kSiluMul ? 2 : 1;
  constexpr int kValues = kValuesOf<kFormat>, kBytes = 16 / kValues;
  constexpr int kStep = 4 * kValues;         // values of K
  constexpr int kAtOnce = kSiluMul ? 2 : 4;  // steps whose reads are under way
  __shared__ float4 shared_sums[kOfBlock][kParts][kTiles][kLanes];
  __shared__ float row_factors[kTiles * kTileRows];
  extern __shared__ uint4 shared_x[];  // with kNorm [M, K] bf16, rows K + kRowGap apart
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
  const int64_t outputs = kSiluMul ? a.n / 2 : a.n, first = blockIdx.x * int64_t{kTileOutputs};

  const uint8_t* rows[kParts][2];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Outputs beyond the last are read as the last, and not written.
      const int64_t n = min(first + g + 8 * half, outputs - 1) + part * outputs;
      rows[part][half] = static_cast<const uint8_t*>(a.weight) + n * a.weight_stride * kBytes;
    }
  }
  auto* const normed = reinterpret_cast<__nv_bfloat16*>(shared_x);
  const auto* const x = kNorm ? normed : static_cast<const __nv_bfloat16*>(a.x);
  const int64_t x_stride = kNorm ? a.k + kRowGap : a.x_stride;
  float sums[kParts][kTiles][4] = {};
  uint4 w[kAtOnce][kParts][2];
  const auto k_of = [&](int64_t step) { return step * kStep + t * kValues; };
  const auto read_weights = [&](int64_t step) {
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t k = k_of(step + j * kOfBlock);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint4& to = w[j][part][half];
          to = make_uint4(0, 0, 0, 0);
          if (k < a.k) to = __ldcs(reinterpret_cast<const uint4*>(rows[part][half] + k * kBytes));
        }
      }
    }
  };
  LetNextKernelStart();
  read_weights(warp);  // which no kernel writes
  WaitForKernelInFront();
  if constexpr (kNorm) {
    // A warp takes a row.
    for (int m = warp; m < a.m; m += kOfBlock) {
      const float squares = WarpSum(Normalise(a, m, lane, kLanes, normed + m * x_stride));
      if (lane == 0) row_factors[m] = RowFactor(a, squares);
    }
    __syncthreads();
  }
  for (int64_t step = warp; step * kStep < a.k; step += kOfBlock * kAtOnce) {
    if (step > warp) read_weights(step);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t k = k_of(step + j * kOfBlock);
      Values<kValues> of_x[kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int row = kTileRows * tile + g;
        if (k < a.k && row < a.m) {
          of_x[tile] = Read<kValues>(x + row * x_stride + k);
        }
      }
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int i = 0; i < kValues / 4; ++i) {
          const uint2 upper = Widen<kFormat>(w[j][part][0], i);
          const uint2 lower = Widen<kFormat>(w[j][part][1], i);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            Multiply(upper, lower, of_x[tile].four[i], sums[part][tile]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const float* const of = sums[part][tile];
      shared_sums[warp][part][tile][lane] = make_float4(of[0], of[1], of[2], of[3]);
    }
  }
  __syncthreads();

  // A thread takes a result.
  const int row = threadIdx.x / kTileOutputs, output = threadIdx.x % kTileOutputs;
  const int64_t n = first + output;
  if (row >= a.m || n >= outputs) return;
  const auto value = [&](int part) {
    // Lane 4 g + t has columns 2 t and 2 t + 1 of outputs g and, behind them, g + 8.
    const int at = output / 8 * 2 + row % 2, of_lane = output % 8 * 4 + row % kTileRows / 2;
    float sum = 0;
#pragma unroll
    for (int of = 0; of < kOfBlock; ++of) {
      sum += reinterpret_cast<const float*>(&shared_sums[of][part][row / kTileRows][of_lane])[at];
    }
    if constexpr (kNorm) sum *= row_factors[row];
    return Finished<kFormat>(a, sum, n + part * outputs);
  };
  WriteResult<kSiluMul>(a, row, n, outputs, value(0), kSiluMul ? value(kParts - 1) : 0.f);
}

template <WeightFormat kFormat>
void LaunchTiles(const FewRowsArgs& a, Stream stream) {
  constexpr unsigned kFewBlocks = 132;  // there more warps share each
  const int64_t results = a.silu_mul ? a.n / 2 : a.n;
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<unsigned>((results + kTileOutputs - 1) / kTileOutputs);
  config.dynamicSmemBytes = a.norm ? a.m * (a.k + kRowGap) * sizeof(__nv_bfloat16) : 0;
  config.stream = stream;
  const auto run = [&](auto tiles, auto warps, auto silu_mul) {
    config.blockDim = kLanes * warps();
    LaunchAhead(a.norm ? TileKernel<kFormat, tiles(), warps(), silu_mul(), true>
                       : TileKernel<kFormat, tiles(), warps(), silu_mul(), false>,
                config, a);
  };
  constexpr std::integral_constant<int, kWarps> kFew;
  constexpr std::integral_constant<int, 2 * kWarps> kMany;
  const auto with_tiles = [&](auto tiles) {
    if (a.silu_mul) {  // of many, sums and rows would not fit into shared memory together
      run(tiles, kFew, std::true_type());
    } else if (config.gridDim.x > kFewBlocks) {
      run(tiles, kFew, std::false_type());
    } else {
      run(tiles, kMany, std::false_type());
    }
  };
  a.m > kTileRows ? with_tiles(std::integral_constant<int, 2>())
                  : with_tiles(std::integral_constant<int, 1>());
}

// How many blocks the device runs at once, by their registers and threads.
int BlocksAtOnce(const void* kernel, int threads) {
  int of_each = 0;
  Check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_each, kernel, threads, 0),
        "asking how many blocks run at once");
  return Multiprocessors() * of_each;
}

template <WeightFormat kFormat, int kOutputs, bool kSiluMul, bool kNorm>
void LaunchFewRows(const FewRowsArgs& a, int splits, Stream stream) {
  const auto kernel = FewRowsKernel<kFormat, kOutputs, kSiluMul, kNorm>;
  const int64_t results = kSiluMul ? a.n / 2 : a.n;
  constexpr int kResults = kSiluMul ? kOutputs / 2 : kOutputs;
  const int64_t warps = (results + kResults - 1) / kResults * splits;
  const auto pieces = static_cast<int>((warps + kWarps - 1) / kWarps);
  cudaLaunchConfig_t config = {};
  config.gridDim = pieces;
  if constexpr (kNorm) {
    static const int at_once = BlocksAtOnce(reinterpret_cast<const void*>(kernel), kLanes * kWarps);
    config.gridDim = std::min(pieces, at_once);
  }
  config.blockDim = kLanes * kWarps;
  config.dynamicSmemBytes = kNorm ? a.m * a.k * sizeof(__nv_bfloat16) : 0;
  config.stream = stream;
  LaunchAhead(kernel, config, a, splits, pieces);
}

template <WeightFormat kFormat>
void Launch(const FewRowsArgs& a, Stream stream) {
  if (a.m > kMostSummedRows) return LaunchTiles<kFormat>(a, stream);
  const FewRowsLaunch launch = ChooseFewRows(a.n, a.k, a.format, a.silu_mul);
  const auto run = [&](auto outputs, auto silu_mul) {
    a.norm ? LaunchFewRows<kFormat, outputs(), silu_mul(), true>(a, launch.splits, stream)
           : LaunchFewRows<kFormat, outputs(), silu_mul(), false>(a, launch.splits, stream);
  };
  constexpr std::integral_constant<int, 1> kOne;
  constexpr std::integral_constant<int, 2> kTwo;
  constexpr std::integral_constant<int, 4> kFour;
  if (a.silu_mul) {
    launch.outputs == 4 ? run(kFour, std::true_type()) : run(kTwo, std::true_type());
  } else if (launch.outputs == 1) {
    run(kOne, std::false_type());
  } else if (launch.outputs == 2) {
    run(kTwo, std::false_type());
  } else {
    run(kFour, std::false_type());
  }
}

}  // namespace

void FewRows(const FewRowsArgs& a, Stream stream) {
  switch (a.format) {
    case WeightFormat::kPlain:
      Launch<WeightFormat::kPlain>(a, stream);
      break;
    case WeightFormat::kFp8:
      Launch<WeightFormat::kFp8>(a, stream);
      break;
    case WeightFormat::kInt8:
      Launch<WeightFormat::kInt8>(a, stream);
      break;
  }
}

}  // namespace sluice::cuda
