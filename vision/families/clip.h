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

#include <memory>

#include "runtime/weight_store.h"
#include "vision/families/tower_config.h"
#include "vision/vision_encoder.h"

namespace sluice {

struct ClipConfig : TowerConfig {
  int pool_stride = 1;  // side of the squares of patches whose mean is a token; at most the grid's
};

// Takes `vision_tower.*` (only the layers that run) and `multi_modal_projector.*`, canonical names
// of the LLaVA family, from `weights`. Throws InputError as WeightStore does.
//
// A probe sees "embeddings" (behind pre_layrnorm) and "layer.*" with the class token, F * (1 + N)
// rows; "tower" without it, F * N; "pooled" only where pool_stride > 1; "projector" at the end.
std::unique_ptr<VisionEncoder> LoadClipEncoder(WeightStore& weights, const ClipConfig& config);

}  // namespace sluice

#endif  // SLUICE_VISION_FAMILIES_CLIP_H_
