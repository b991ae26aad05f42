// What the LLaVA families share: how their files name tensors, the fields all of them have, and the
// model that is made of a tower, a decoder and the rest of the files.
#ifndef SLUICE_LLM_FAMILIES_LLAVA_H_
#define SLUICE_LLM_FAMILIES_LLAVA_H_

#include <array>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "llm/config_object.h"
#include "llm/families/llama_decoder.h"
#include "llm/vlm.h"
#include "runtime/weight_store.h"
#include "vision/families/tower_config.h"

namespace sluice {

// Beyond any published model, small enough that sizes computed from them fit 64 bits.
struct LlavaBounds {
  static constexpr int64_t kWidth = 1 << 16;
  static constexpr int64_t kInner = 1 << 20;
  static constexpr int64_t kLayers = 1024;
  static constexpr int64_t kHeads = 1024;
  static constexpr int64_t kVocabulary = 1 << 22;
  static constexpr int64_t kPositions = 1 << 30;
};

// All that read throw InputError naming file, field, expected and found.

// The field's text must be one of `supported`.
void ExpectOneOf(const ConfigObject& config, const char* key, const std::string& fallback,
                 std::initializer_list<const char*> supported);
// A number, or three, one a channel.
std::array<float, 3> ReadChannels(const ConfigObject& config, const char* key,
                                  std::array<float, 3> fallback, double least, double most);
// config.json must be of `model_type`, not quantised, and hold no fields but those of every LLaVA
// family and `more_fields`.
void CheckTop(const ConfigObject& top, const char* model_type,
              std::span<const KnownField> more_fields);
// The settings of the processor that makes a model's frames, where transformers 5.x looks for them:
// `part` of processor_config.json, else the first of `files` that is there.
std::optional<ConfigObject> FindPixelSettings(const std::filesystem::path& directory,
                                              const char* part,
                                              std::initializer_list<const char*> files);
// A processor's settings must resize bicubically, rescale by 1/255 and normalise.
void CheckPixelSettings(const ConfigObject& settings);

// What a decoder's class assumes where its file says nothing.
struct DecoderDefaults {
  int64_t hidden, inner, layers, heads;
  int64_t kv_heads;  // 0: as many as heads
  int64_t vocabulary, positions;
};
// Sizes of the decoder described by `text`, the "text_config" of `top`; its rotation and biases are
// left as they are.
LlamaConfig ReadDecoder(const ConfigObject& top, const ConfigObject& text,
                        const DecoderDefaults& defaults);
// rope_theta and rope_scaling in the spellings of transformers 4.x and 5.x. `types`: the supported
// ones among "default", "linear" and "llama3". "linear" stretches the context by its factor.
void ReadRope(const ConfigObject& text, std::initializer_list<const char*> types,
              LlamaConfig& decoder);
// A decoder of Qwen2's class, with its rotation.
LlamaConfig ReadQwen2Decoder(const ConfigObject& top, const ConfigObject& text);

// What a tower's class assumes where its file says nothing.
struct TowerDefaults {
  int64_t hidden, inner, layers, heads, image, patch;
};
// What towers differ in besides.
struct TowerRules {
  double layer_norm_eps;  // the class's default
  int64_t most_pixels;    // of a side
  int64_t feature_layer;  // the family's default
};
// Sizes of the tower described by `vision`, the "vision_config" of `top`, and the projector's bias.
// Returns how many layers the file has.
int ReadTower(const ConfigObject& top, const ConfigObject& vision, const TowerDefaults& defaults,
              const TowerRules& rules, TowerConfig& tower);

// What a checkpoint is called: its directory's name; of a snapshot in a cache of the Hugging Face
// hub (models--OWNER--NAME/snapshots/REVISION) the repository's.
std::string CheckpointName(const std::filesystem::path& directory);

// The canonical name (`vision_tower.encoder...`, `multi_modal_projector...`, `image_newline`,
// `language_model.layers...`, `lm_head.weight`) of a tensor in any of the four published layouts,
// or nothing for what no family needs: the tower's head, its last norm and its layers from
// `layers_to_run` on, buffers.
std::optional<std::string> CanonicalTensorName(int layers_to_run, int vision_layers,
                                               const std::string& name);

// What makes one family's checkpoint a model.
struct LlavaParts {
  const char* architecture = nullptr;
  LlamaConfig text;
  std::vector<int32_t> eos_ids;  // for files without a generation_config.json
  std::function<std::optional<std::string>(const std::string&)> canonical;  // see WeightStore
  int tower_layers = 0;                                                     // that run
  // attention: of each of them.
  std::function<std::unique_ptr<VisionEncoder>(WeightStore&,
                                               const std::vector<AttentionPrecision>& attention)>
      load_encoder;
  bool has_newline = false;  // `image_newline` follows the last frame
};

// Throws InputError in one line naming file, tensor or field, expected and found.
std::shared_ptr<const Vlm> LoadLlava(const std::filesystem::path& directory,
                                     const VlmOptions& options, const LlavaParts& parts);

}  // namespace sluice

#endif  // SLUICE_LLM_FAMILIES_LLAVA_H_
