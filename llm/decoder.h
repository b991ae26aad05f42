// The language model's layers over paged KV caches. Weights are const; calls on different contexts
// and caches may overlap.
#ifndef SLUICE_LLM_DECODER_H_
#define SLUICE_LLM_DECODER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string_view>

#include "llm/kv_cache.h"
#include "llm/kv_policy.h"
#include "llm/layer_policy.h"
#include "runtime/exec_context.h"
#include "runtime/tensor.h"

namespace sluice {

// Sees intermediate results by name, each whole; for tests and tools. "layer.3.query" and
// "layer.3.key" (after the rotation, in the compute dtype, rows strided), "layer.3" [rows, E] f32,
// and of the rows whose logits are asked for "norm" [rows, E] f32 and "logits" [rows, V] f32 (the
// latter one sequence a call, or all together). All of them in host memory. With a probe, a step is
// a single chunk, whatever scratch memory that takes.
using DecoderProbe = std::function<void(std::string_view name, ConstTensorView value)>;

// A sequence with a policy or recall whose way through the layers takes several steps.
struct StepInPieces {
  class State {
   public:
    virtual ~State() = default;
  };
  int64_t rows = 0;  // a step does about as much as so many rows cost, at least a chunk of a layer
  std::unique_ptr<State> state;  // the decoder's, from the first step to the one before the last
  bool under_way() const { return state != nullptr; }
};

// One sequence's part of a step.
struct SequenceStep {
  KvCache* cache = nullptr;  // positions continue at cache->length()
  // [S, E] f32: token embeddings and visual tokens, in order; on the host or where the model runs.
  // Empty where `pieces` is under way.
  ConstTensorView embeddings;
  // Where the model runs: [1, V] f32 for the last position, [S, V] for all, or empty for none.
  TensorView logits;
  // Lets rows leave between layers; then no logits of all positions. Such a sequence runs on its
  // own, layer by layer over all its rows, so the residual stream [S, E] is held at once.
  LayerPolicy* policy = nullptr;
  // Fills the cache, which has no rows yet, layer by layer (llm/kv_policy.h). The sequence then
  // runs as with a policy; after an exception the cache may hold some of what was recalled.
  KvPolicy* recall = nullptr;
  // With a policy or recall: may leave the sequence under way. The last piece writes the logits and
  // makes the cache longer; until then neither the cache nor what policy and recall refer to may
  // change. After an exception it is not under way, and cannot go on.
  StepInPieces* pieces = nullptr;
};

class Decoder {
 public:
  virtual ~Decoder() = default;

  // Runs all layers over the new positions of each sequence and appends to the caches. Long steps
  // run in chunks, so that scratch memory does not grow with them. Throws
  // ResourceExhausted when a cache cannot grow, InputError beyond max_positions(); caches are then
  // unchanged.
  virtual void Step(ExecContext& ctx, std::span<SequenceStep> sequences,
                    const DecoderProbe& probe = nullptr) const = 0;

  // Token embeddings. out: [ids.size(), E] f32 where the model runs. Throws
  // Error on ids outside the vocabulary.
  virtual void Embed(ExecContext& ctx, std::span<const int32_t> ids, TensorView out) const = 0;

  // Also says where the model runs.
  virtual KvGeometry kv_geometry() const = 0;
  virtual int num_heads() const = 0;  // of queries
  virtual int64_t hidden_size() const = 0;
  virtual int64_t vocab_size() const = 0;     // rows of the embedding
  virtual int64_t max_positions() const = 0;  // KvCache::Reach() never exceeds it
  // By which keys and queries are rotated (runtime/ops/rope.h): [D / 2] f32, where the model runs.
  virtual ConstTensorView rotary_frequencies() const = 0;
  virtual double FlopsPerToken(
      int64_t context) const = 0;  // products and attention at that context, without the lm_head
  virtual double LmHeadFlops() const = 0;
  virtual int64_t WeightBytesPerToken() const = 0;  // read to decode one token, lm_head included
};

}  // namespace sluice

#endif  // SLUICE_LLM_DECODER_H_
