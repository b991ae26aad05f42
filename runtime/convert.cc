#include "runtime/convert.h"

#include <cstring>
#include <string>
#include <type_traits>

#include "runtime/error.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "runtime/convert.cc"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include <hwy/highway.h>

#include "runtime/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace sluice {
namespace HWY_NAMESPACE {
template <typename From, typename To>
void ConvertRun(const From* from, To* to, int64_t count) {
  const int64_t lanes = hn::Lanes(DF());
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) StoreFloats(LoadFloats(from + i), to + i);
  // The rest passes through whole vectors on the stack, so that it is rounded the same way.
  if (i < count) StoreFloatsN(LoadFloatsN(from + i, count - i), to + i, count - i);
}

void F32ToBF16(const void* from, void* to, int64_t count) {
  ConvertRun(static_cast<const float*>(from), static_cast<BFloat16*>(to), count);
}
void BF16ToF32(const void* from, void* to, int64_t count) {
  ConvertRun(static_cast<const BFloat16*>(from), static_cast<float*>(to), count);
}
void F16ToF32(const void* from, void* to, int64_t count) {
  ConvertRun(static_cast<const Float16*>(from), static_cast<float*>(to), count);
}
void F16ToBF16(const void* from, void* to, int64_t count) {
  ConvertRun(static_cast<const Float16*>(from), static_cast<BFloat16*>(to), count);
}

}  // namespace HWY_NAMESPACE
}  // namespace sluice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice {
namespace {

// One by one: only tools write f16, and Highway rounds it towards zero where the processor cannot.
template <typename From>
void ToF16(const void* from, void* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    From value;
    std::memcpy(&value, static_cast<const char*>(from) + i * sizeof(From), sizeof(From));
    Float16 half;
    if constexpr (std::is_same_v<From, float>) {
      half = Float16::From(value);
    } else {
      half = Float16::From(value.ToFloat());
    }
    std::memcpy(static_cast<char*>(to) + i * sizeof(Float16), &half, sizeof(half));
  }
}

}  // namespace

HWY_EXPORT(F32ToBF16);
HWY_EXPORT(BF16ToF32);
HWY_EXPORT(F16ToF32);
HWY_EXPORT(F16ToBF16);

void ConvertElements(const void* from, DType from_dtype, void* to, DType to_dtype, int64_t count) {
  if (count <= 0) return;
  if (from_dtype == to_dtype) {
    std::memcpy(to, from, count * SizeOf(to_dtype));
  } else if (from_dtype == DType::kF32 && to_dtype == DType::kBF16) {
    HWY_DYNAMIC_DISPATCH(F32ToBF16)(from, to, count);
  } else if (from_dtype == DType::kF32 && to_dtype == DType::kF16) {
    ToF16<float>(from, to, count);
  } else if (from_dtype == DType::kBF16 && to_dtype == DType::kF32) {
    HWY_DYNAMIC_DISPATCH(BF16ToF32)(from, to, count);
  } else if (from_dtype == DType::kBF16 && to_dtype == DType::kF16) {
    ToF16<BFloat16>(from, to, count);
  } else if (from_dtype == DType::kF16 && to_dtype == DType::kF32) {
    HWY_DYNAMIC_DISPATCH(F16ToF32)(from, to, count);
  } else if (from_dtype == DType::kF16 && to_dtype == DType::kBF16) {
    HWY_DYNAMIC_DISPATCH(F16ToBF16)(from, to, count);
  } else {
    throw Error(std::string("[convert] dtypes must be f32, f16 or bf16 (or equal), got ") +
                Name(from_dtype) + " and " + Name(to_dtype));
  }
}

}  // namespace sluice
#endif  // HWY_ONCE
