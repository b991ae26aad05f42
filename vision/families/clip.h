// CLIP vision tower (Radford et al. 2021: pre-norm ViT with a class token), optional mean pooling,
// LLaVA's two-layer projector (Liu et al. 2023; LLaVA-NeXT-Video, Zhang et al. 2024).
//
//   h = pre_layrnorm([class ; patches W^T] + positions)
//   h += out(attention(LN1 h));  h += fc2(gelu_quick(fc1(LN2 h)))    for the layers that count
//   tokens = linear_2(gelu_erf(linear_1(pool(h without the class token))))
//
// The class token stays row 0 of every frame through all layers; only the feature leaves it out.
// Unlike OneVision's, this family pools before it projects.
#ifndef SLUICE_VISION_FAMILIES_CLIP_H_
#define SLUICE_VISION_FAMILIES_CLIP_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "runtime/ops/attention.h"
#include "runtime/weight_store.h"
#include "vision/vision_encoder.h"

namespace sluice {

// Numbers from a configuration file, already checked to be positive and sane.
struct ClipConfig {
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_heads = 0;      // divides hidden_size
  int layers_to_run = 0;  // the feature is the hidden state after so many layers (0: embeddings)
  int image_size = 0;     // pixels, square
  int patch_size = 0;     // pixels, square; a remainder of the image is not read
  int pool_stride = 1;  // side of the squares of patches whose mean is a token; at most the grid's
  float layer_norm_eps = 1e-5f;
  int output_size = 0;  // E of the decoder
  bool projector_bias = true;
  std::vector<AttentionPrecision> attention;  // of each layer that runs; empty: exact in all
  PreprocessConfig preprocess;
};

// Takes `vision_tower.*` (only the layers that run) and `multi_modal_projector.*`, canonical names
// of the LLaVA family, from `weights`. Throws InputError as WeightStore does.
//
// A probe sees "embeddings" (behind pre_layrnorm) and "layer.*" with the class token, F * (1 + N)
// rows; "tower" without it, F * N; "pooled" only where pool_stride > 1; "projector" at the end.
std::unique_ptr<VisionEncoder> LoadClipEncoder(WeightStore& weights, const ClipConfig& config);

}  // namespace sluice

#endif  // SLUICE_VISION_FAMILIES_CLIP_H_
