// How products of many rows of bf16 are multiplied. Few rows, as in decoding, read bf16 weights
// from memory, which is what takes their time; many rows are limited by the arithmetic, and there
// bf16 is not always the faster type: some processors multiply pairs of bf16 at half the rate of
// f32's multiply-add, most not at all.
#ifndef SLUICE_RUNTIME_OPS_BF16_ROWS_H_
#define SLUICE_RUNTIME_OPS_BF16_ROWS_H_

namespace sluice {

enum class Bf16Rows {
  kAmx,      // on AMX-BF16 tiles
  kNative,   // with AVX512-BF16
  kWidened,  // as f32 from bf16 weights, though there is AVX512-BF16
  kPlain,    // as f32 from bf16 weights: nothing multiplies bf16 here
};
// What `sluice info` calls it.
const char* Name(Bf16Rows rows);

// What this process takes. Known from the instruction set, but where AVX512-BF16 is the best there
// is: then a measurement of some 40 ms decides, made once, at the first call. Thread-safe.
//
// kWidened and kPlain sum in one order (runtime/ops/cpu/linear_simd.cc): the same bits with any
// number of threads and whichever rows are multiplied together. The other two promise that within
// rounding only, so the choice must not change from run to run: see ChooseBf16Rows.
Bf16Rows FastestBf16Rows();

// The choice for a product that took so many seconds in either way. Processors with AVX512-BF16
// multiply bf16 either as fast as f32 at best or twice as fast; the border lies between the two,
// where no run comes near it. Pure.
Bf16Rows ChooseBf16Rows(double native_seconds, double widened_seconds);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_BF16_ROWS_H_
