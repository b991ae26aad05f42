// The Hopper instructions that CUDA C++ has no words for: barriers that count bytes, the tensor
// copy engine (TMA), and products of a whole warpgroup (wgmma). Only for code compiled for sm_90a.
//
// Operands of a product in shared memory lie in rows of 128 bytes, their 16-byte pieces permuted by
// the row's number modulo 8, as TMA writes them with CU_TENSOR_MAP_SWIZZLE_128B; or, what is left
// of rows behind the last 128 bytes, in rows of 32 bytes (CU_TENSOR_MAP_SWIZZLE_32B). Every such
// area begins at a multiple of 1024 bytes.
#ifndef SLUICE_RUNTIME_OPS_CUDA_HOPPER_CUH_
#define SLUICE_RUNTIME_OPS_CUDA_HOPPER_CUH_

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace sluice::cuda::hopper {

constexpr int kSwizzleBytes = 128;
constexpr int kNarrowBytes = 32;
constexpr int kWarpgroup = 128;  // threads
constexpr int kMmaRows = 64;     // rows of one wgmma

__device__ inline uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- barriers in shared memory -------------------------------------------------------------
// `bar` is a shared address of 8 bytes. A phase ends when `count` arrivals and all announced bytes
// have come; waiting for parity p returns once the phase of that parity has ended.
__device__ inline void InitBarrier(uint32_t bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
__device__ inline void Arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ inline void ArriveExpecting(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}
__device__ inline void Wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}\n" ::"r"(bar),
      "r"(parity)
      : "memory");
}
// Makes initialised barriers visible to the copy engine.
__device__ inline void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Orders this thread's ordinary writes to shared memory before later reads by wgmma and TMA.
__device__ inline void FenceAsyncProxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Barriers of `threads` threads of the block by number; number 0 is __syncthreads.
__device__ inline void NamedSync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void NamedArrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// A place in a ring of kStages buffers and the parity its barriers have there.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void Next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// ---- the copy engine -----------------------------------------------------------------------
__device__ inline void Load3(const CUtensorMap& map, uint32_t to, uint32_t bar, int x, int y,
                             int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(&map), "r"(bar), "r"(x), "r"(y), "r"(z)
      : "memory");
}
__device__ inline void Load4(const CUtensorMap& map, uint32_t to, uint32_t bar, int x, int y, int z,
                             int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(&map), "r"(bar), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
__device__ inline void PrefetchMap(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// ---- registers -----------------------------------------------------------------------------
template <int kCount>
__device__ inline void MoreRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ inline void FewerRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- wgmma ---------------------------------------------------------------------------------
// Before the first product that reads registers written by ordinary instructions.
__device__ inline void MmaFence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void MmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kPending groups are under way.
template <int kPending>
__device__ inline void MmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Describes an operand at a shared address. Groups of 8 rows are 1024 bytes apart. Where the rows
// run along the summed index (a transposed operand), `slab_bytes` separates the columns' 128-byte
// slabs; otherwise it has no meaning. A step of 32 bytes along a row adds 2.
__device__ inline uint64_t Describe(uint32_t address, uint32_t slab_bytes = 16) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kGroupOfRows = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kGroupOfRows | uint64_t{slab_bytes >> 4} << 16 | (address & 0x3ffff) >> 4;
}

// The same for rows of 32 bytes, which hold all that one product sums. Groups of 8 rows follow each
// other.
__device__ inline uint64_t DescribeNarrow(uint32_t address) {
  constexpr uint64_t kSwizzle32 = uint64_t{3} << 62;
  constexpr uint64_t kGroupOfRows = uint64_t{8 * kNarrowBytes >> 4} << 32;
  return kSwizzle32 | kGroupOfRows | uint64_t{1} << 16 | (address & 0x3ffff) >> 4;
}

// d[64, N] (+)= a[64, K] b[K, N] where a thread holds N / 2 elements of d: element 4 * i + j is in
// row 16 * warp + lane / 4 + 8 * (j / 2), column 8 * i + 2 * (lane % 4) + j % 2.
//   Bf16   K = 16, a and b in shared memory, rows along K
//   Bf16P  K = 16, a in registers, b in shared memory with rows along N
//   S8     K = 32, a and b in shared memory, rows along K
//   Fp8P   K = 32, e4m3, a in registers, b in shared memory with rows along K
template <int N>
struct Mma;

// The registers %0, %1, ... of a product with N columns, N / 2 of them, and the operands d[0],
// d[1], ... that they stand for: each list begins with the one before.
#define SLUICE_LIST_64                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SLUICE_LIST_72 SLUICE_LIST_64 ", %32, %33, %34, %35"
#define SLUICE_LIST_80 SLUICE_LIST_72 ", %36, %37, %38, %39"
#define SLUICE_LIST_88 SLUICE_LIST_80 ", %40, %41, %42, %43"
#define SLUICE_LIST_96 SLUICE_LIST_88 ", %44, %45, %46, %47"
#define SLUICE_LIST_128                                                           \
  SLUICE_LIST_96                                                                  \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, " \
  "%63"
#define SLUICE_LIST_136 SLUICE_LIST_128 ", %64, %65, %66, %67"

#define SLUICE_OUT_64(c, d)                                                                     \
  c(d[0]), c(d[1]), c(d[2]), c(d[3]), c(d[4]), c(d[5]), c(d[6]), c(d[7]), c(d[8]), c(d[9]),     \
      c(d[10]), c(d[11]), c(d[12]), c(d[13]), c(d[14]), c(d[15]), c(d[16]), c(d[17]), c(d[18]), \
      c(d[19]), c(d[20]), c(d[21]), c(d[22]), c(d[23]), c(d[24]), c(d[25]), c(d[26]), c(d[27]), \
      c(d[28]), c(d[29]), c(d[30]), c(d[31])
#define SLUICE_OUT_72(c, d) SLUICE_OUT_64(c, d), c(d[32]), c(d[33]), c(d[34]), c(d[35])
#define SLUICE_OUT_80(c, d) SLUICE_OUT_72(c, d), c(d[36]), c(d[37]), c(d[38]), c(d[39])
#define SLUICE_OUT_88(c, d) SLUICE_OUT_80(c, d), c(d[40]), c(d[41]), c(d[42]), c(d[43])
#define SLUICE_OUT_96(c, d) SLUICE_OUT_88(c, d), c(d[44]), c(d[45]), c(d[46]), c(d[47])
#define SLUICE_OUT_128(c, d)                                                                 \
  SLUICE_OUT_96(c, d), c(d[48]), c(d[49]), c(d[50]), c(d[51]), c(d[52]), c(d[53]), c(d[54]), \
      c(d[55]), c(d[56]), c(d[57]), c(d[58]), c(d[59]), c(d[60]), c(d[61]), c(d[62]), c(d[63])
#define SLUICE_OUT_136(c, d) SLUICE_OUT_128(c, d), c(d[64]), c(d[65]), c(d[66]), c(d[67])

#define SLUICE_REGS(N) "{" SLUICE_LIST_##N "}"

// p0 .. p5: the numbers of the operands behind the elements of d.
#define SLUICE_MMA(N, p0, p1, p2, p3, p4, p5)                                                    \
  template <>                                                                                    \
  struct Mma<N> {                                                                                \
    static __device__ void Bf16(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {            \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" p2                                       \
                   ", 0;\n"                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #N                                        \
                   "k16.f32.bf16.bf16 " SLUICE_REGS(N) ", %" p0 ", %" p1 ", p, 1, 1, 0, 0;\n}\n" \
                   : SLUICE_OUT_##N("+f", d)                                                     \
                   : "l"(a), "l"(b), "r"(add));                                                  \
    }                                                                                            \
    static __device__ void Bf16P(float (&d)[N / 2], const uint32_t* a, uint64_t b, int add) {    \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" p5                                       \
                   ", 0;\n"                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #N                                        \
                   "k16.f32.bf16.bf16 " SLUICE_REGS(N) ", {%" p0 ", %" p1 ", %" p2 ", %" p3      \
                                                       "}, %" p4 ", p, 1, 1, 1;\n}\n"            \
                   : SLUICE_OUT_##N("+f", d)                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));              \
    }                                                                                            \
    static __device__ void S8(int (&d)[N / 2], uint64_t a, uint64_t b, int add) {                \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" p2                                       \
                   ", 0;\n"                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #N                                        \
                   "k32.s32.s8.s8 " SLUICE_REGS(N) ", %" p0 ", %" p1 ", p;\n}\n"                 \
                   : SLUICE_OUT_##N("+r", d)                                                     \
                   : "l"(a), "l"(b), "r"(add));                                                  \
    }                                                                                            \
    static __device__ void Fp8P(float (&d)[N / 2], const uint32_t* a, uint64_t b, int add) {     \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" p5                                       \
                   ", 0;\n"                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #N                                        \
                   "k32.f32.e4m3.e4m3 " SLUICE_REGS(N) ", {%" p0 ", %" p1 ", %" p2 ", %" p3      \
                                                       "}, %" p4 ", p, 1, 1;\n}\n"               \
                   : SLUICE_OUT_##N("+f", d)                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));              \
    }                                                                                            \
  };

SLUICE_MMA(64, "32", "33", "34", "35", "36", "37")
SLUICE_MMA(72, "36", "37", "38", "39", "40", "41")
SLUICE_MMA(80, "40", "41", "42", "43", "44", "45")
SLUICE_MMA(96, "48", "49", "50", "51", "52", "53")
SLUICE_MMA(128, "64", "65", "66", "67", "68", "69")

SLUICE_MMA(88, "44", "45", "46", "47", "48", "49")
SLUICE_MMA(136, "68", "69", "70", "71", "72", "73")

#undef SLUICE_MMA
#undef SLUICE_REGS
#undef SLUICE_LIST_64
#undef SLUICE_OUT_64
#undef SLUICE_LIST_72
#undef SLUICE_OUT_72
#undef SLUICE_LIST_80
#undef SLUICE_OUT_80
#undef SLUICE_LIST_88
#undef SLUICE_OUT_88
#undef SLUICE_LIST_96
#undef SLUICE_OUT_96
#undef SLUICE_LIST_128
#undef SLUICE_OUT_128
#undef SLUICE_LIST_136
#undef SLUICE_OUT_136

}  // namespace sluice::cuda::hopper

#endif  // SLUICE_RUNTIME_OPS_CUDA_HOPPER_CUH_
