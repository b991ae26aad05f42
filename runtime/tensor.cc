#include "runtime/tensor.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "runtime/convert.h"
#include "runtime/error.h"
#include "runtime/ops/cuda/device.h"

namespace sluice {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kHugePage = size_t{2} << 20;
// Refused without asking the system: address sanitizers end the program at such requests.
constexpr size_t kMostBytes = size_t{1} << 40;

template <typename T>
constexpr DType DTypeOf();
template <>
constexpr DType DTypeOf<float>() {
  return DType::kF32;
}
template <>
constexpr DType DTypeOf<Float16>() {
  return DType::kF16;
}
template <>
constexpr DType DTypeOf<BFloat16>() {
  return DType::kBF16;
}
template <>
constexpr DType DTypeOf<int8_t>() {
  return DType::kI8;
}
template <>
constexpr DType DTypeOf<uint8_t>() {
  return DType::kU8;
}
template <>
constexpr DType DTypeOf<int32_t>() {
  return DType::kI32;
}

int64_t ItemElements(const Shape& shape) {
  int64_t elements = 1;
  for (int axis = 1; axis < shape.rank(); ++axis) elements *= shape[axis];
  return elements;
}

void CheckRange(const char* place, const Shape& shape, int axis, int64_t begin, int64_t end) {
  if (shape.rank() <= axis || begin < 0 || begin > end || end > shape[axis]) {
    throw Error("[" + std::string(place) + "] range must lie within axis " + std::to_string(axis) +
                " of " + shape.ToString() + ", got [" + std::to_string(begin) + ", " +
                std::to_string(end) + ")");
  }
}

void CheckRank2(const Shape& shape) {
  if (shape.rank() != 2) {
    throw Error("[tensor columns] view must have rank 2, got " + shape.ToString());
  }
}

}  // namespace

const char* Name(Device device) { return device == Device::kCuda ? "cuda" : "cpu"; }

Shape::Shape(std::initializer_list<int64_t> dims) {
  if (dims.size() > kMaxRank) {
    throw InputError("[shape] rank must be at most 4, got " + std::to_string(dims.size()));
  }
  int64_t elements = 1;
  for (int64_t dim : dims) {
    if (dim < 0) {
      throw InputError("[shape] sizes must not be negative, got " + std::to_string(dim));
    }
    if (__builtin_mul_overflow(elements, dim, &elements)) {
      throw InputError("[shape] number of elements must fit 63 bits, got " + std::to_string(dim) +
                       " more times than that");
    }
    dims_[rank_++] = dim;
  }
}

int64_t Shape::NumElements() const {
  int64_t elements = 1;
  for (int axis = 0; axis < rank_; ++axis) elements *= dims_[axis];
  return elements;
}

std::string Shape::ToString() const {
  std::string text = "[";
  for (int axis = 0; axis < rank_; ++axis) {
    if (axis > 0) text += ", ";
    text += std::to_string(dims_[axis]);
  }
  return text + "]";
}

ConstTensorView::ConstTensorView(const void* data, DType dtype, Shape shape, int64_t stride0,
                                 Device device)
    : data_(data),
      dtype_(dtype),
      device_(device),
      shape_(shape),
      stride0_(stride0 < 0 ? ItemElements(shape) : stride0) {}

bool ConstTensorView::contiguous() const {
  return shape_.rank() == 0 || shape_[0] <= 1 || stride0_ == ItemElements(shape_);
}

template <typename T>
const T* ConstTensorView::data() const {
  if (dtype_ != DTypeOf<T>()) {
    throw Error(std::string("[tensor] elements must be read as ") + Name(dtype_) + ", got " +
                Name(DTypeOf<T>()));
  }
  if (device_ != Device::kCpu) {
    throw Error("[tensor] " + shape_.ToString() + " " + Name(dtype_) +
                " lies on a GPU and cannot be read here; copy it first");
  }
  return static_cast<const T*>(data_);
}
template const float* ConstTensorView::data<float>() const;
template const Float16* ConstTensorView::data<Float16>() const;
template const BFloat16* ConstTensorView::data<BFloat16>() const;
template const int8_t* ConstTensorView::data<int8_t>() const;
template const uint8_t* ConstTensorView::data<uint8_t>() const;
template const int32_t* ConstTensorView::data<int32_t>() const;

ConstTensorView ConstTensorView::Slice(int64_t begin, int64_t end) const {
  CheckRange("tensor slice", shape_, 0, begin, end);
  ConstTensorView part = *this;
  part.data_ = static_cast<const char*>(data_) + begin * stride0_ * int64_t(SizeOf(dtype_));
  part.shape_.Resize(0, end - begin);
  return part;
}

ConstTensorView ConstTensorView::Columns(int64_t begin, int64_t end) const {
  CheckRank2(shape_);
  CheckRange("tensor columns", shape_, 1, begin, end);
  ConstTensorView part = *this;
  part.data_ = static_cast<const char*>(data_) + begin * int64_t(SizeOf(dtype_));
  part.shape_.Resize(1, end - begin);
  return part;
}

TensorView TensorView::Slice(int64_t begin, int64_t end) const {
  const ConstTensorView part = ConstTensorView::Slice(begin, end);
  return TensorView(const_cast<void*>(part.raw()), dtype_, part.shape(), part.stride0(), device_);
}

TensorView TensorView::Columns(int64_t begin, int64_t end) const {
  const ConstTensorView part = ConstTensorView::Columns(begin, end);
  return TensorView(const_cast<void*>(part.raw()), dtype_, part.shape(), part.stride0(), device_);
}

Tensor::Tensor(DType dtype, Shape shape, Device device)
    : data_(nullptr, Free{device}), dtype_(dtype), shape_(shape) {
  size_t bytes = 0;
  const bool too_large =
      __builtin_mul_overflow(static_cast<size_t>(shape.NumElements()), SizeOf(dtype), &bytes) ||
      bytes > kMostBytes - kHugePage;
  if (!too_large && device == Device::kCuda) {
    data_.reset(cuda::Allocate(std::max<size_t>(bytes, 1)));
  } else if (!too_large) {
    // Large tensors sit on huge pages: weights and caches are read end to end for every token, and
    // 4 KB pages cost that scan a quarter of its bandwidth in address translation.
    const size_t alignment = bytes >= 2 * kHugePage ? kHugePage : kAlignment;
    bytes = (std::max<size_t>(bytes, 1) + alignment - 1) / alignment * alignment;
    data_.reset(std::aligned_alloc(alignment, bytes));
    // The rest behind the last whole huge page stays on small ones, or it would take a whole one.
    if (data_ && alignment == kHugePage) {
      madvise(data_.get(), shape.NumElements() * SizeOf(dtype) / kHugePage * kHugePage,
              MADV_HUGEPAGE);
    }
  }
  if (!data_) {
    throw ResourceExhausted("[tensor] no memory for " + shape.ToString() + " " + Name(dtype) +
                            " on the " + Name(device));
  }
}

void Tensor::Free::operator()(void* p) const {
  device == Device::kCuda ? cuda::Free(p) : std::free(p);
}

Tensor Tensor::Clone() const {
  if (empty()) return {};
  Tensor copy(dtype_, shape_, device());
  if (device() == Device::kCuda) {
    cuda::CopyNow(copy.data_.get(), data_.get(), SizeBytes());
  } else {
    std::memcpy(copy.data_.get(), data_.get(), SizeBytes());
  }
  return copy;
}

void ConvertInto(ConstTensorView from, TensorView to) {
  if (from.device() != Device::kCpu || to.device() != Device::kCpu) {
    throw Error(std::string("[convert] expected host memory, got ") + Name(from.device()) +
                " and " + Name(to.device()));
  }
  if (from.shape() != to.shape()) {
    throw Error("[convert] shapes must be equal, got " + from.shape().ToString() + " and " +
                to.shape().ToString());
  }
  if (from.contiguous() && to.contiguous()) {
    ConvertElements(from.raw(), from.dtype(), to.raw(), to.dtype(), from.shape().NumElements());
    return;
  }
  const int64_t item = ItemElements(from.shape());
  for (int64_t i = 0; i < from.dim(0); ++i) {
    ConvertElements(
        static_cast<const char*>(from.raw()) + i * from.stride0() * int64_t(SizeOf(from.dtype())),
        from.dtype(), static_cast<char*>(to.raw()) + i * to.stride0() * int64_t(SizeOf(to.dtype())),
        to.dtype(), item);
  }
}

Tensor ConvertTo(ConstTensorView from, DType dtype) {
  Tensor to(dtype, from.shape());
  ConvertInto(from, to);
  return to;
}

}  // namespace sluice
