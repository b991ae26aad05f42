// The seam through which visual tokens may leave between decoder layers.
//
// A step with a policy stops before certain layers, the boundaries, and asks which rows go on. Rows
// of the step that do not leave the residual stream: layers from there on neither compute nor cache
// them. Rows that earlier steps cached are hidden from this layer and the ones behind it until the
// cache is rewound to where the step began (KvCache::KeepRows); nothing cached is destroyed.
#ifndef SLUICE_LLM_LAYER_POLICY_H_
#define SLUICE_LLM_LAYER_POLICY_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

namespace sluice {

// What a policy may know before `layer` runs. Valid during the call it is given to.
struct LayerBoundary {
  int layer = 0;  // about to run, counted from zero; its weights make the queries and keys below
  // The rows still there, by their number in the sequence (the first token of a cache is 0),
  // ascending: those of earlier steps, then those of this step.
  std::span<const int32_t> tokens;
  int64_t cached = 0;  // so many of `tokens` are of earlier steps

  // The query of the step's last row in this layer before its rotation, [H D].
  std::function<std::vector<float>()> last_query;
  // How the step's last `queries` rows attend to `tokens`, one value each: the mean over heads of
  // softmax(q K^T D^-0.5) over all tokens up to a row's own, text included, and the mean of that
  // over the rows. A query costs 2 H D operations a token, and reads the keys once.
  std::function<std::vector<float>(int64_t queries)> attention;
  // The same of one query [H D] from elsewhere that stands at the last row's position.
  std::function<std::vector<float>(std::span<const float> query)> attention_of;
};

class LayerPolicy {
 public:
  virtual ~LayerPolicy() = default;

  // The layers before which Keep is called: ascending, each in [1, number of layers).
  virtual std::span<const int> boundaries() const = 0;

  // The rows that go on, as ascending indices into boundary.tokens; nothing: all of them. At least
  // one row of the step goes on, and where its logits are read, the last.
  virtual std::optional<std::vector<int32_t>> Keep(const LayerBoundary& boundary) = 0;
};

}  // namespace sluice

#endif  // SLUICE_LLM_LAYER_POLICY_H_
