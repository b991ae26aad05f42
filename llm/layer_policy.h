// The seam through which visual tokens may leave between decoder layers during prefill.
#ifndef SLUICE_LLM_LAYER_POLICY_H_
#define SLUICE_LLM_LAYER_POLICY_H_

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "runtime/exec_context.h"
#include "runtime/tensor.h"

namespace sluice {

class LayerPolicy {
 public:
  virtual ~LayerPolicy() = default;

  // Called after decoder layer `layer` of a prefill with the residual stream. Returns the rows
  // (ascending) that go on, or nothing to keep all. hidden: [S, E] f32; positions: S values.
  virtual std::optional<std::vector<int32_t>> KeepAfter(ExecContext& ctx, int layer,
                                                        ConstTensorView hidden,
                                                        std::span<const int32_t> positions) = 0;
};

}  // namespace sluice

#endif  // SLUICE_LLM_LAYER_POLICY_H_
