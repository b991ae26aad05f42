// The seam through which a question is answered from what left the window.
//
// A step with a KvPolicy runs layer by layer on a cache of its own that begins empty, with
// positions of rows. Before each layer the policy is shown the question's queries in that layer and
// puts in front of the step's rows whatever they shall see there. Later steps go on over the same
// cache.
#ifndef SLUICE_LLM_KV_POLICY_H_
#define SLUICE_LLM_KV_POLICY_H_

#include <cstdint>

#include "llm/kv_cache.h"
#include "runtime/clock.h"
#include "runtime/exec_context.h"
#include "runtime/tensor.h"

namespace sluice {

// A moment of the video that an answer rests on.
struct Evidence {
  MediaTime begin, end;  // of its first and last frame
  double weight = 0;     // its share of the attention that all recalled frames got, in [0, 1]
  int layers = 0;        // that recalled one of its frames
};

class KvPolicy {
 public:
  virtual ~KvPolicy() = default;

  // The question is the step's last so many rows; at least 1.
  virtual int64_t question_rows() const = 0;

  // Called once for every layer, in order. queries: of the question's rows in this layer before
  // their rotation, [question_rows(), H D] in the compute dtype. Appends rows to `layer` of `cache`
  // (KvCache::ReserveRows with tokens below length(), StoreKv), keys rotated to the numbers of
  // their rows; `step_rows` rows follow.
  virtual void Recall(ExecContext& ctx, int layer, ConstTensorView queries, int64_t step_rows,
                      KvCache& cache) = 0;
};

}  // namespace sluice

#endif  // SLUICE_LLM_KV_POLICY_H_
