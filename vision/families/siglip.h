// SigLIP vision tower (Zhai et al. 2023: pre-norm ViT without class token) followed by LLaVA's
// two-layer projector and bilinear pooling to half the grid (Li et al. 2024, LLaVA-OneVision).
//
//   h = patches W^T + b + positions
//   h += out(attention(LN1 h));  h += fc2(gelu_tanh(fc1(LN2 h)))     for the layers that count
//   tokens = pool(linear_2(gelu_erf(linear_1 h)))
//
// The tower's post-layernorm is no part of it: LLaVA takes the hidden state before.
#ifndef SLUICE_VISION_FAMILIES_SIGLIP_H_
#define SLUICE_VISION_FAMILIES_SIGLIP_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "runtime/ops/attention.h"
#include "runtime/weight_store.h"
#include "vision/vision_encoder.h"

namespace sluice {

// Numbers from a configuration file, already checked to be positive and sane.
struct SiglipConfig {
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_heads = 0;      // divides hidden_size
  int layers_to_run = 0;  // the feature is the hidden state after so many layers (0: embeddings)
  int image_size = 0;     // pixels, square
  int patch_size = 0;     // pixels, square; a remainder of the image is not read
  float layer_norm_eps = 1e-6f;
  int output_size = 0;  // E of the decoder
  bool projector_bias = true;
  std::vector<AttentionPrecision> attention;  // of each layer that runs; empty: exact in all
  PreprocessConfig preprocess;
};

// Takes `vision_tower.*` (only the layers that run) and `multi_modal_projector.*`, canonical names
// of the LLaVA family, from `weights`. Throws InputError as WeightStore does.
std::unique_ptr<VisionEncoder> LoadSiglipEncoder(WeightStore& weights, const SiglipConfig& config);

}  // namespace sluice

#endif  // SLUICE_VISION_FAMILIES_SIGLIP_H_
