// Conversion of runs of elements between float types.
#ifndef SLUICE_RUNTIME_CONVERT_H_
#define SLUICE_RUNTIME_CONVERT_H_

#include <cstdint>

#include "runtime/dtype.h"

namespace sluice {

// Converts `count` elements between any two of f32, f16 and bf16, rounding to nearest even. Equal
// dtypes of any kind are copied. Neither pointer needs to be aligned (mapped files are not); the
// ranges must not overlap. Runs on the calling thread. Throws Error on an integer dtype.
void ConvertElements(const void* from, DType from_dtype, void* to, DType to_dtype, int64_t count);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_CONVERT_H_
