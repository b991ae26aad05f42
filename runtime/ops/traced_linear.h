// A product that tells the tracer its time, its operations and the bytes it had to move.
#ifndef SLUICE_RUNTIME_OPS_TRACED_LINEAR_H_
#define SLUICE_RUNTIME_OPS_TRACED_LINEAR_H_

#include <string_view>

#include "runtime/ops/linear.h"
#include "runtime/trace.h"

namespace sluice {

// `Linear` inside a scope `stage`, with one item a row.
inline void TracedLinear(ExecContext& ctx, std::string_view stage, ConstTensorView x,
                         const LinearWeight& weight, TensorView y,
                         const LinearOptions& options = {}) {
  TraceScope scope(&ctx.tracer(), stage, x.dim(0));
  const double written = static_cast<double>(y.SizeBytes());
  scope.AddWork(2.0 * x.dim(0) * weight.n() * weight.k(),
                static_cast<double>(x.SizeBytes()) + weight.SizeBytes() +
                    (options.accumulate ? 2 * written : written));
  Linear(ctx, x, weight, y, options);
}

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_TRACED_LINEAR_H_
