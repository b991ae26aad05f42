// What a configuration file says of a vision tower and its projector, of whichever family.
#ifndef SLUICE_VISION_FAMILIES_TOWER_CONFIG_H_
#define SLUICE_VISION_FAMILIES_TOWER_CONFIG_H_

#include <vector>

#include "runtime/ops/attention.h"
#include "vision/preprocess.h"

namespace sluice {

// Already checked to be positive and sane.
struct TowerConfig {
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_heads = 0;      // divides hidden_size
  int layers_to_run = 0;  // the feature is the hidden state after so many layers (0: embeddings)
  int image_size = 0;     // pixels, square
  int patch_size = 0;     // pixels, square; a remainder of the image is not read
  float layer_norm_eps = 0;
  int output_size = 0;  // E of the decoder
  bool projector_bias = true;
  std::vector<AttentionPrecision> attention;  // of each layer that runs; empty: exact in all
  PreprocessConfig preprocess;
};

}  // namespace sluice

#endif  // SLUICE_VISION_FAMILIES_TOWER_CONFIG_H_
