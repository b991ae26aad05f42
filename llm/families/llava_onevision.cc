#include "llm/families/llava_onevision.h"

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "llm/config_object.h"
#include "llm/families/llava.h"
#include "runtime/error.h"

namespace sluice {
namespace {

constexpr const char* kArchitecture = "LlavaOnevisionForConditionalGeneration";

constexpr int64_t kMaxImageSize = 8192;

// The class defaults of LlavaOnevisionConfig for a file without that part differ from the defaults
// of the part's own class, which fill the gaps of a part that is there.
constexpr TowerDefaults kSiglipDefaults = {768, 3072, 12, 12, 224, 16};
constexpr TowerDefaults kOnevisionDefaults = {1152, 4304, 26, 16, 384, 14};
// The processor class's default is CLIP's, which is wrong for this family: every published file
// says 0.5.
constexpr std::array<float, 3> kHalf = {0.5f, 0.5f, 0.5f};

void ReadVision(const ConfigObject& top, LlavaOnevisionConfig& config) {
  const ConfigObject vision = top.Object("vision_config");
  const TowerDefaults& defaults = top.Has("vision_config") ? kSiglipDefaults : kOnevisionDefaults;
  ExpectOneOf(vision, "model_type", "siglip_vision_model", {"siglip_vision_model"});
  ExpectOneOf(vision, "hidden_act", "gelu_pytorch_tanh", {"gelu_pytorch_tanh"});
  // "default" drops a class token, which this tower does not have.
  ExpectOneOf(top, "vision_feature_select_strategy", "full", {"full"});
  config.vision_layers = ReadTower(
      top, vision, defaults,
      {.layer_norm_eps = 1e-6, .most_pixels = kMaxImageSize, .feature_layer = -1}, config.vision);
}

void ReadText(const ConfigObject& top, LlavaOnevisionConfig& config) {
  const ConfigObject text = top.Object("text_config");
  ExpectOneOf(text, "model_type", "qwen2", {"qwen2"});
  config.text = ReadQwen2Decoder(top, text);
  config.vision.output_size = config.text.hidden_size;
  config.eos_ids = text.TokenIds("eos_token_id");
  const int64_t most = config.text.vocab_size - 1;
  top.Int({"image_token_index", "image_token_id"}, std::min<int64_t>(151646, most), 0, most);
  top.Int({"video_token_index", "video_token_id"}, std::min<int64_t>(151647, most), 0, most);
}

// Any other form of "size" (a number, shortest_edge) keeps the aspect ratio.
void CheckSize(const ConfigObject& config, int image_size) {
  const nlohmann::json expected = {{"height", image_size}, {"width", image_size}};
  const nlohmann::json* size = config.Find({"size"});
  const bool fits = size ? size->is_object() &&
                               size->value("height", nlohmann::json()) == image_size &&
                               size->value("width", nlohmann::json()) == image_size
                         : image_size == 384;  // the class's default
  if (!fits) config.Refuse("size", expected.dump() + ", the tower's image_size");
}

PreprocessConfig ReadPreprocessing(const std::filesystem::path& directory, int image_size) {
  PreprocessConfig preprocess;
  preprocess.width = preprocess.height = image_size;
  const std::optional<ConfigObject> settings = FindPixelSettings(
      directory, "video_processor", {"video_preprocessor_config.json", "preprocessor_config.json"});
  if (!settings) return preprocess;
  CheckPixelSettings(*settings);
  if (settings->Bool({"do_center_crop"}, false)) settings->Refuse("do_center_crop", "false");
  CheckSize(*settings, image_size);
  preprocess.mean = ReadChannels(*settings, "image_mean", kHalf, -10, 10);
  preprocess.std = ReadChannels(*settings, "image_std", kHalf, 1e-6, 100);
  return preprocess;
}

}  // namespace

LlavaOnevisionConfig ReadLlavaOnevisionConfig(const std::filesystem::path& directory) {
  const ConfigObject top = ConfigObject::Read(directory / "config.json");
  CheckTop(top, "llava_onevision", {});
  LlavaOnevisionConfig config;
  ReadVision(top, config);
  ReadText(top, config);
  config.vision.preprocess = ReadPreprocessing(directory, config.vision.image_size);
  return config;
}

std::shared_ptr<const Vlm> LoadLlavaOnevision(const std::filesystem::path& directory,
                                              const VlmOptions& options) {
  const LlavaOnevisionConfig config = ReadLlavaOnevisionConfig(directory);
  LlavaParts parts;
  parts.architecture = kArchitecture;
  parts.text = config.text;
  parts.eos_ids = config.eos_ids;
  parts.canonical = [&](const std::string& name) {
    return CanonicalTensorName(config.vision.layers_to_run, config.vision_layers, name);
  };
  parts.tower_layers = config.vision.layers_to_run;
  parts.load_encoder = [&](WeightStore& weights, const std::vector<AttentionPrecision>& attention) {
    TowerConfig vision = config.vision;
    vision.attention = attention;
    return LoadSiglipEncoder(weights, vision);
  };
  parts.has_newline = true;
  return LoadLlava(directory, options, parts);
}

}  // namespace sluice
