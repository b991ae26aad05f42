// How products of many rows of bf16 are multiplied. Few rows, as in decoding, read bf16 weights
// from memory, which is what takes their time; many rows are limited by the arithmetic, and there
// bf16 is not always the faster type.
#ifndef SLUICE_RUNTIME_OPS_BF16_ROWS_H_
#define SLUICE_RUNTIME_OPS_BF16_ROWS_H_

#include <cstdint>

#include "runtime/dtype.h"

namespace sluice {

enum class Bf16Rows {
  kAmx,      // on AMX-BF16 tiles
  kNative,   // with AVX512-BF16
  kWidened,  // as f32, though there is AVX512-BF16
  kPlain,    // as f32: nothing multiplies bf16 here
};
// What `sluice info` calls it.
const char* Name(Bf16Rows rows);

// The fastest here: known from the instruction set, but for kNative and kWidened, which a
// measurement of some 30 ms parts. Made once for the process, at the first call. Thread-safe.
Bf16Rows FastestBf16Rows();

// Whether a product of m rows runs as f32 from bf16 weights, whatever ChooseLinear says of it.
// Pure: can be printed and tested.
bool WidensRows(int64_t m, DType dtype, Bf16Rows rows);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_BF16_ROWS_H_
