// Qwen2 decoder (Yang et al. 2024): pre-norm transformer with RMSNorm, rotary positions, grouped
// queries and a gated MLP. Llama (Touvron et al. 2023) and Mistral (Jiang et al. 2023) are the same
// without biases.
//
//   h += Wo attention(rope(Wq a + bq), rope(Wk a + bk), Wv a + bv),  a = RMSNorm(h)
//   h += Wd (silu(Wg m) * Wu m),                                     m = RMSNorm(h)
//   logits = Wlm RMSNorm(h)
#ifndef SLUICE_LLM_FAMILIES_QWEN2_H_
#define SLUICE_LLM_FAMILIES_QWEN2_H_

#include <cstdint>
#include <memory>

#include "llm/decoder.h"
#include "runtime/tensor.h"
#include "runtime/weight_store.h"

namespace sluice {

// How the frequencies of rotary positions differ from theta^(-2i/D).
struct RopeScaling {
  enum class Kind {
    kNone,
    kLinear,  // divided by `factor`
    kLlama3,  // long wavelengths divided by `factor`, short ones as they are, a blend between
  };
  Kind kind = Kind::kNone;
  double factor = 1;
  // kLlama3 only: wavelengths above original_positions / low_frequency are long, below
  // original_positions / high_frequency short. REQUIRES: low_frequency < high_frequency.
  double low_frequency = 1, high_frequency = 4;
  double original_positions = 8192;
};

// Numbers from a configuration file, already checked to be positive and sane.
struct Qwen2Config {
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_layers = 0;
  int num_heads = 0;
  int num_kv_heads = 0;  // divides num_heads
  int head_dim = 0;      // even
  int64_t vocab_size = 0;
  int64_t max_positions = 0;
  float rms_norm_eps = 1e-6f;
  double rope_theta = 10000.0;
  RopeScaling rope_scaling;
  bool qkv_bias = true;
  bool tie_word_embeddings = false;
};

// [head_dim / 2] f32, computed in f32 as the reference does.
Tensor InverseFrequencies(const Qwen2Config& config);

// Takes `language_model.*` and `lm_head.weight` from `weights`. A file with an lm_head uses it,
// tied or not; one without must be tied. Throws InputError as WeightStore does.
std::unique_ptr<Decoder> LoadQwen2Decoder(WeightStore& weights, const Qwen2Config& config);

}  // namespace sluice

#endif  // SLUICE_LLM_FAMILIES_QWEN2_H_
