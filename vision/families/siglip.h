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

#include <memory>

#include "runtime/weight_store.h"
#include "vision/families/tower_config.h"
#include "vision/vision_encoder.h"

namespace sluice {

// Takes `vision_tower.*` (only the layers that run) and `multi_modal_projector.*`, canonical names
// of the LLaVA family, from `weights`. Throws InputError as WeightStore does.
std::unique_ptr<VisionEncoder> LoadSiglipEncoder(WeightStore& weights, const TowerConfig& config);

}  // namespace sluice

#endif  // SLUICE_VISION_FAMILIES_SIGLIP_H_
