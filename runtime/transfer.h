// Copies between host memory and the GPU.
#ifndef SLUICE_RUNTIME_TRANSFER_H_
#define SLUICE_RUNTIME_TRANSFER_H_

#include <cstdint>
#include <functional>
#include <span>
#include <string_view>

#include "runtime/exec_context.h"
#include "runtime/tensor.h"

namespace sluice {

// to = from; equal shapes and dtypes, rows may be strided, on any device. Queued in the context's
// stream; `from` on the host may be changed, and `to` on the host be read, once this returns.
void Transfer(ExecContext& ctx, ConstTensorView from, TensorView to);
// A copy on that device.
Tensor TransferTo(ExecContext& ctx, ConstTensorView from, Device device);

// Calls probe(name, value) with the value in host memory; nothing without a probe.
void ShowOnHost(ExecContext& ctx,
                const std::function<void(std::string_view name, ConstTensorView value)>& probe,
                std::string_view name, ConstTensorView value);

// A copy on that device outside of any step, for what stays: waits for all work on the GPU and
// until all is copied. Of a tensor that is there already, itself.
Tensor Placed(ConstTensorView from, Device device);
Tensor Placed(Tensor from, Device device);

// Numbers that an op's caller has on the host, where the context works: themselves, or a copy in
// its workspace.
const int32_t* Within(ExecContext& ctx, std::span<const int32_t> numbers);

// Whether an op runs on the GPU: then it says so to a step that recurs, whose replays must look the
// same. Throws Error naming the op unless all its tensors (empty ones
// aside) lie where the context works.
bool OnGpu(const char* op, const ExecContext& ctx, std::initializer_list<ConstTensorView> tensors);

}  // namespace sluice

#endif  // SLUICE_RUNTIME_TRANSFER_H_
