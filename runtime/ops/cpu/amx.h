// Tiles of Intel AMX (Advanced Matrix Extensions), bf16: eight registers of 16 rows x 64 bytes.
// Private to runtime/; everything but AmxAllowed exists only on x86-64.
//
// The state belongs to the thread: whoever uses tiles loads their configuration first and releases
// them before returning, because other libraries of the process (oneDNN) do the same.
#ifndef SLUICE_RUNTIME_OPS_CPU_AMX_H_
#define SLUICE_RUNTIME_OPS_CPU_AMX_H_

#include <cstdint>

namespace sluice::cpu {

// Whether this process may multiply bf16 tiles. The first call asks the kernel for the permission
// (it covers all threads); later calls cost nanoseconds. Thread-safe.
bool AmxAllowed();

#if defined(__x86_64__)

// What a function needs that works on tiles and on the vectors between them.
#define SLUICE_AMX_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define SLUICE_AMX_INLINE SLUICE_AMX_TARGET inline __attribute__((always_inline))

// All eight tiles full: 16 rows of 32 bf16 or 16 f32. Lives as long as the tiles are used.
// The compiler's own intrinsics neither say that they read all of the configuration nor that loads
// read memory, so that stores before them may be dropped or moved; hence the assembly.
class AmxTiles {
 public:
  AmxTiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  ~AmxTiles() { asm volatile("tilerelease" ::: "memory"); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
};

template <int kTile>
inline __attribute__((always_inline)) void TileZero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// Rows of 64 bytes, `stride_bytes` apart.
template <int kTile>
inline __attribute__((always_inline)) void TileLoad(const void* from, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(kTile)
               : "memory");
}
// The same for data that passes by: a hint to leave the first-level cache to others.
template <int kTile>
inline __attribute__((always_inline)) void TileLoadPassing(const void* from, int64_t stride_bytes) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(kTile)
               : "memory");
}
template <int kTile>
inline __attribute__((always_inline)) void TileStore(void* to, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(kTile)
               : "memory");
}
// C[i][j] += sum over the 16 pairs p of A[i][2p] B[p][2j] + A[i][2p + 1] B[p][2j + 1]: B holds two
// consecutive rows of the second factor interleaved ("VNNI").
template <int kC, int kA, int kB>
inline __attribute__((always_inline)) void TileMultiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

#endif  // __x86_64__

}  // namespace sluice::cpu

#endif  // SLUICE_RUNTIME_OPS_CPU_AMX_H_
