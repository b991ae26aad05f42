// The decoder of Llama (Touvron et al. 2023), Mistral (Jiang et al. 2023) and Qwen2 (Yang et al.
// 2024), which adds biases: a pre-norm transformer with RMSNorm, rotary positions, grouped queries
// and a gated MLP.
//
//   h += Wo attention(rope(Wq a + bq), rope(Wk a + bk), Wv a + bv),  a = RMSNorm(h)
//   h += Wd (silu(Wg m) * Wu m),                                     m = RMSNorm(h)
//   logits = Wlm RMSNorm(h)
#ifndef SLUICE_LLM_FAMILIES_LLAMA_DECODER_H_
#define SLUICE_LLM_FAMILIES_LLAMA_DECODER_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "llm/decoder.h"
#include "runtime/ops/attention.h"
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
struct LlamaConfig {
  const char* family = "llama";  // "llama", "mistral", "qwen2": what errors call it
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
  std::vector<AttentionPrecision> attention;  // of each layer; empty: exact in all
};

// [head_dim / 2] f32, computed in f32 as the reference does.
Tensor InverseFrequencies(const LlamaConfig& config);

// Takes `language_model.*` and `lm_head.weight` from `weights`. A file with an lm_head uses it,
// tied or not; one without must be tied. Throws InputError as WeightStore does.
std::unique_ptr<Decoder> LoadLlamaDecoder(WeightStore& weights, const LlamaConfig& config);

}  // namespace sluice

#endif  // SLUICE_LLM_FAMILIES_LLAMA_DECODER_H_
