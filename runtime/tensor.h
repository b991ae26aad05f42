// Tensors of up to four dimensions, row-major, in host memory or on a GPU. `Tensor` owns,
// `TensorView` looks.
// Views are cheap values; they never outlive what they look at. Not synchronised.
#ifndef SLUICE_RUNTIME_TENSOR_H_
#define SLUICE_RUNTIME_TENSOR_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>

#include "runtime/dtype.h"

namespace sluice {

// Where elements lie.
enum class Device : uint8_t { kCpu, kCuda };
const char* Name(Device device);

class Shape {
 public:
  static constexpr int kMaxRank = 4;

  Shape() = default;
  // Throws InputError on rank > 4, a negative size, or more elements than 63 bits count.
  Shape(std::initializer_list<int64_t> dims);

  int rank() const { return rank_; }
  int64_t operator[](int axis) const { return dims_[axis]; }
  int64_t NumElements() const;
  // Changes one size; REQUIRES: axis < rank(), 0 <= size.
  void Resize(int axis, int64_t size) { dims_[axis] = size; }
  bool operator==(const Shape&) const = default;
  std::string ToString() const;  // "[196, 256]"

 private:
  std::array<int64_t, kMaxRank> dims_{};
  int rank_ = 0;
};

// A read-only look at elements. Those on a GPU can be cut and handed to ops, and copied (see
// runtime/transfer.h); reading them with data() throws. Rank 0 is a scalar (one element). All
// dimensions are contiguous, except that consecutive items of axis 0 are `stride0` elements apart
// (equal to the item size by default).
class ConstTensorView {
 public:
  ConstTensorView() = default;
  ConstTensorView(const void* data, DType dtype, Shape shape, int64_t stride0 = -1,
                  Device device = Device::kCpu);

  const Shape& shape() const { return shape_; }
  DType dtype() const { return dtype_; }
  Device device() const { return device_; }
  int64_t dim(int axis) const { return shape_[axis]; }
  int64_t stride0() const { return stride0_; }
  bool contiguous() const;
  bool empty() const { return data_ == nullptr; }
  const void* raw() const { return data_; }
  size_t SizeBytes() const { return shape_.NumElements() * SizeOf(dtype_); }

  // Typed access; throws Error when T does not match dtype() or the elements are on a GPU.
  template <typename T>
  const T* data() const;
  // Items [begin, end) of axis 0.
  ConstTensorView Slice(int64_t begin, int64_t end) const;
  // Columns [begin, end) of a rank-2 view (stride0 stays).
  ConstTensorView Columns(int64_t begin, int64_t end) const;

 protected:
  const void* data_ = nullptr;
  DType dtype_ = DType::kF32;
  Device device_ = Device::kCpu;
  Shape shape_;
  int64_t stride0_ = 0;
};

class TensorView : public ConstTensorView {
 public:
  TensorView() = default;
  TensorView(void* data, DType dtype, Shape shape, int64_t stride0 = -1,
             Device device = Device::kCpu)
      : ConstTensorView(data, dtype, shape, stride0, device) {}

  void* raw() const { return const_cast<void*>(data_); }
  template <typename T>
  T* data() const {
    return const_cast<T*>(ConstTensorView::data<T>());
  }
  TensorView Slice(int64_t begin, int64_t end) const;
  TensorView Columns(int64_t begin, int64_t end) const;
};

// Owns uninitialised elements, aligned to 64 bytes (256 on a GPU). Movable, not copyable (see
// Clone).
class Tensor {
 public:
  Tensor() = default;
  // Throws ResourceExhausted when there is no such memory.
  Tensor(DType dtype, Shape shape, Device device = Device::kCpu);

  TensorView view() const { return TensorView(data_.get(), dtype_, shape_, -1, device()); }
  operator TensorView() const { return view(); }
  operator ConstTensorView() const { return view(); }
  const Shape& shape() const { return shape_; }
  DType dtype() const { return dtype_; }
  Device device() const { return data_.get_deleter().device; }
  int64_t dim(int axis) const { return shape_[axis]; }
  bool empty() const { return data_ == nullptr; }
  size_t SizeBytes() const { return empty() ? 0 : shape_.NumElements() * SizeOf(dtype_); }
  template <typename T>
  T* data() const {
    return view().data<T>();
  }
  // Where it lies; on a GPU it waits for all work there.
  Tensor Clone() const;

 private:
  struct Free {
    Free() : device(Device::kCpu) {}
    explicit Free(Device where) : device(where) {}
    void operator()(void* p) const;
    Device device;
  };
  std::unique_ptr<void, Free> data_;
  DType dtype_ = DType::kF32;
  Shape shape_;
};

// Copies with conversion between any two float types, in host memory. Shapes must be equal.
void ConvertInto(ConstTensorView from, TensorView to);
Tensor ConvertTo(ConstTensorView from, DType dtype);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_TENSOR_H_
