// Which layers of a model bear quantised attention (runtime/ops/attention.h): all, none, or as
// measured by `sluice calibrate`, whose file this reads and writes.
#ifndef SLUICE_LLM_ATTENTION_CALIBRATION_H_
#define SLUICE_LLM_ATTENTION_CALIBRATION_H_

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "runtime/ops/attention.h"
#include "runtime/tensor.h"

namespace sluice {

// What a user asks for.
struct AttentionChoice {
  AttentionPrecision precision = AttentionPrecision::kExact;  // in all layers
  std::filesystem::path file;  // not empty: in each layer as this calibration says
};

// Of each layer of the tower that runs, and of each of the decoder.
struct LayerPrecisions {
  std::vector<AttentionPrecision> tower, decoder;
};

// What quantising a layer's attention does to its outputs, against exact attention on the same
// inputs, in the mean over clips.
struct CalibratedLayer {
  static constexpr double kLeastCosine = 0.998, kMostL1 = 0.06;

  double cosine = 1;       // of all outputs of a clip
  double relative_l1 = 0;  // sum of |difference| of sum of |exact|

  // Whether the layer bears it. Similarity alone would hide values that all moved the same way.
  bool Bears() const { return cosine >= kLeastCosine && relative_l1 <= kMostL1; }
  AttentionPrecision precision() const {
    return Bears() ? AttentionPrecision::kSage : AttentionPrecision::kExact;
  }
};

struct AttentionCalibration {
  static constexpr int kFewestClips = 16;

  std::string model;             // its name, for readers
  std::string fingerprint;       // VlmInfo::fingerprint
  Device device = Device::kCpu;  // the variants of the method differ
  int clips = 0;
  std::vector<CalibratedLayer> tower, decoder;
};

// Writes `calibration` as JSON. Throws InputError when the file cannot be written.
void WriteCalibration(const AttentionCalibration& calibration, const std::filesystem::path& file);
// As text: what the file holds.
std::string ToJson(const AttentionCalibration& calibration);

// What each layer of a model computes with. Throws InputError in one line naming file, field,
// expected and found: on a file that is none, or of another model, another device or too few clips.
LayerPrecisions ChoosePrecisions(const AttentionChoice& choice, const std::string& fingerprint,
                                 Device device, int tower_layers, int decoder_layers);

}  // namespace sluice

#endif  // SLUICE_LLM_ATTENTION_CALIBRATION_H_
