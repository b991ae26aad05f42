#include "runtime/transfer.h"

#include <cstring>
#include <functional>
#include <string>
#include <string_view>
#include <utility>

#include "runtime/error.h"

namespace sluice {

void Transfer(ExecContext& ctx, ConstTensorView from, TensorView to) {
  if (from.shape() != to.shape() || from.dtype() != to.dtype()) {
    throw Error("[transfer] expected equal shapes and types, got " + from.shape().ToString() + " " +
                Name(from.dtype()) + " and " + to.shape().ToString() + " " + Name(to.dtype()));
  }
  const int64_t rows = from.shape().rank() == 0 ? 1 : from.dim(0);
  if (rows == 0) return;
  const size_t element = SizeOf(from.dtype()), row = from.SizeBytes() / rows;
  if (from.device() == Device::kCpu && to.device() == Device::kCpu) {
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(static_cast<char*>(to.raw()) + i * to.stride0() * element,
                  static_cast<const char*>(from.raw()) + i * from.stride0() * element, row);
    }
    return;
  }
  if (ctx.recorder() && ctx.recorder()->active() && from.device() != to.device()) {
    throw Error("[transfer] a step that recurs must not wait for host memory");
  }
  const bool whole = from.contiguous() && to.contiguous();
  ctx.Queue([&](cuda::Stream stream) {
    cuda::CopyRows(to.raw(), whole ? row : to.stride0() * element, from.raw(),
                   whole ? row : from.stride0() * element, row, rows, stream);
  });
  if (to.device() == Device::kCpu) cuda::Synchronize(ctx.stream());
}

Tensor TransferTo(ExecContext& ctx, ConstTensorView from, Device device) {
  Tensor to(from.dtype(), from.shape(), device);
  Transfer(ctx, from, to);
  return to;
}

void ShowOnHost(ExecContext& ctx,
                const std::function<void(std::string_view name, ConstTensorView value)>& probe,
                std::string_view name, ConstTensorView value) {
  if (!probe) return;
  if (value.device() == Device::kCpu) return probe(name, value);
  probe(name, TransferTo(ctx, value, Device::kCpu));
}

Tensor Placed(ConstTensorView from, Device device) {
  Tensor copy(from.dtype(), from.shape(), device);
  if (from.device() == Device::kCpu && device == Device::kCpu) {
    std::memcpy(copy.view().raw(), from.raw(), from.SizeBytes());
  } else {
    cuda::CopyNow(copy.view().raw(), from.raw(), from.SizeBytes());
  }
  return copy;
}

Tensor Placed(Tensor from, Device device) {
  return from.empty() || from.device() == device ? std::move(from) : Placed(from.view(), device);
}

const int32_t* Within(ExecContext& ctx, std::span<const int32_t> numbers) {
  if (ctx.device() == Device::kCpu) return numbers.data();
  if (ctx.recorder()->active()) return ctx.recorder()->Numbers(numbers);
  const Shape shape{static_cast<int64_t>(numbers.size())};
  const TensorView copy = ctx.workspace().Allocate(DType::kI32, shape);
  Transfer(ctx, ConstTensorView(numbers.data(), DType::kI32, shape), copy);
  return static_cast<const int32_t*>(copy.raw());
}

bool OnGpu(const char* op, const ExecContext& ctx, std::initializer_list<ConstTensorView> tensors) {
  for (const ConstTensorView& tensor : tensors) {
    if (tensor.empty() || tensor.device() == ctx.device()) continue;
    throw Error(std::string("[") + op + "] expected tensors on the " + Name(ctx.device()) +
                ", got " + tensor.shape().ToString() + " on the " + Name(tensor.device()));
  }
  if (ctx.device() != Device::kCuda) return false;
  if (cuda::Recorder& recorder = *ctx.recorder(); recorder.active()) {
    recorder.Note(std::hash<std::string_view>()(op));  // its place may be on the stack
    for (const ConstTensorView& tensor : tensors) {
      recorder.Note(reinterpret_cast<uintptr_t>(tensor.raw()));
      recorder.Note(static_cast<uint64_t>(tensor.dtype()));
      recorder.Note(static_cast<uint64_t>(tensor.stride0()));
      for (int i = 0; i < tensor.shape().rank(); ++i) recorder.Note(tensor.dim(i));
    }
  }
  return true;
}

}  // namespace sluice
