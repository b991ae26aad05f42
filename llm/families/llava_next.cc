#include "llm/families/llava_next.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "llm/config_object.h"
#include "llm/families/known_fields.h"
#include "llm/families/llava.h"
#include "runtime/error.h"

namespace sluice {
namespace {

constexpr int64_t kMaxImageSize = 2000;  // what Preprocess can crop

// What a file without that part means differs from the defaults of the part's own class, which fill
// the gaps of a part that is there.
constexpr TowerDefaults kClipDefaults = {768, 3072, 12, 12, 224, 32};
constexpr TowerDefaults kLlavaDefaults = {1024, 4096, 24, 16, 336, 14};
constexpr DecoderDefaults kLlamaDefaults = {.hidden = 4096,
                                            .inner = 11008,
                                            .layers = 32,
                                            .heads = 32,
                                            .kv_heads = 0,
                                            .vocabulary = 32000,
                                            .positions = 2048};
constexpr DecoderDefaults kMistralDefaults = {.hidden = 4096,
                                              .inner = 14336,
                                              .layers = 32,
                                              .heads = 32,
                                              .kv_heads = 8,
                                              .vocabulary = 32000,
                                              .positions = 131072};
constexpr int32_t kClassEos = 2;  // of Llama and Mistral
constexpr std::array<float, 3> kClipMean = {0.48145466f, 0.4578275f, 0.40821073f};
constexpr std::array<float, 3> kClipStd = {0.26862954f, 0.26130258f, 0.27577711f};

struct Names {
  const char* architecture;
  const char* model_type;
};
Names NamesOf(LlavaGeneration generation) {
  switch (generation) {
    case LlavaGeneration::k15:
      return {"LlavaForConditionalGeneration", "llava"};
    case LlavaGeneration::kNext:
      return {"LlavaNextForConditionalGeneration", "llava_next"};
    case LlavaGeneration::kNextVideo:
      break;
  }
  return {"LlavaNextVideoForConditionalGeneration", "llava_next_video"};
}

void ReadVision(const ConfigObject& top, LlavaGeneration generation, LlavaNextConfig& config) {
  const ConfigObject vision = top.Object("vision_config");
  const TowerDefaults& defaults = top.Has("vision_config") ? kClipDefaults : kLlavaDefaults;
  ExpectOneOf(vision, "model_type", "clip_vision_model", {"clip_vision_model"});
  ExpectOneOf(vision, "hidden_act", "quick_gelu", {"quick_gelu"});
  // "full" keeps the class token, which has no place in a frame's grid.
  ExpectOneOf(top, "vision_feature_select_strategy", "default", {"default"});

  ClipConfig& clip = config.vision;
  config.vision_layers =
      ReadTower(top, vision, defaults,
                {.layer_norm_eps = 1e-5, .most_pixels = kMaxImageSize, .feature_layer = -2}, clip);
  if (generation == LlavaGeneration::kNextVideo) {
    ExpectOneOf(top, "spatial_pool_mode", "average", {"average"});
    clip.pool_stride = top.Int({"spatial_pool_stride"}, 2, 1, clip.image_size / clip.patch_size);
  }
}

// Of Llama's or Mistral's class.
LlamaConfig ReadLlamaDecoder(const ConfigObject& top, const ConfigObject& text,
                             const std::string& type) {
  const bool mistral = type == "mistral";
  LlamaConfig decoder = ReadDecoder(top, text, mistral ? kMistralDefaults : kLlamaDefaults);
  decoder.family = mistral ? "mistral" : "llama";
  decoder.qkv_bias = false;
  ReadRope(text, {"default", "linear", "llama3"}, decoder);
  // Of Mistral's class a missing window is one of 4096 positions, null is none.
  if (mistral ? !text.IsNull("sliding_window") : text.Has("sliding_window")) {
    text.Refuse("sliding_window", "null: full attention (sliding windows are not supported)");
  }
  return decoder;
}

void ReadText(const ConfigObject& top, LlavaGeneration generation, LlavaNextConfig& config) {
  const ConfigObject text = top.Object("text_config");
  ExpectOneOf(text, "model_type", "llama", {"llama", "mistral", "qwen2"});
  const std::string type = text.String({"model_type"}, "llama");
  config.text = type == "qwen2" ? ReadQwen2Decoder(top, text) : ReadLlamaDecoder(top, text, type);
  config.vision.output_size = config.text.hidden_size;
  config.eos_ids = text.TokenIds("eos_token_id");
  if (!text.Has("eos_token_id") && type != "qwen2") config.eos_ids = {kClassEos};
  const bool video = generation == LlavaGeneration::kNextVideo;
  const int64_t most = config.text.vocab_size - 1;
  top.Int({"image_token_index", "image_token_id"}, std::min<int64_t>(video ? 32001 : 32000, most),
          0, most);
  if (video) {
    top.Int({"video_token_index", "video_token_id"}, std::min<int64_t>(32000, most), 0, most);
  }
}

// The side that `key` asks for in one of its spellings: a number, {"shortest_edge": n} or
// {"height": n, "width": n}. *keeps_aspect: not of the last.
void CheckSide(const ConfigObject& settings, const char* key, int image_size,
               bool* keeps_aspect = nullptr) {
  const nlohmann::json side = image_size;
  const nlohmann::json* value = settings.Find({key});
  const auto field = [&](const char* name) {
    return value->is_object() ? value->value(name, nlohmann::json()) : nlohmann::json();
  };
  bool fits = image_size == 224, square = false;  // the classes' default
  if (value) {
    square = field("height") == side && field("width") == side;
    fits = square || *value == side || field("shortest_edge") == side;
  }
  if (!fits) settings.Refuse(key, "the tower's image_size " + std::to_string(image_size));
  if (keeps_aspect) *keeps_aspect = !square;
}

PreprocessConfig ReadPreprocessing(const std::filesystem::path& directory,
                                   LlavaGeneration generation, int image_size) {
  const bool overview = generation == LlavaGeneration::kNext;
  PreprocessConfig preprocess;
  preprocess.width = preprocess.height = image_size;
  preprocess.fit = overview ? PictureFit::kStretch : PictureFit::kCenterCrop;
  preprocess.mean = kClipMean;
  preprocess.std = kClipStd;
  const std::optional<ConfigObject> settings =
      generation == LlavaGeneration::kNextVideo
          ? FindPixelSettings(directory, "video_processor",
                              {"video_preprocessor_config.json", "preprocessor_config.json"})
          : FindPixelSettings(directory, "image_processor", {"preprocessor_config.json"});
  if (!settings) return preprocess;
  CheckPixelSettings(*settings);
  if (!settings->Bool({"do_center_crop"}, true)) settings->Refuse("do_center_crop", "true");
  // Of LLaVA-NeXT's processor this pads lists of crops, not pictures.
  if (!overview && settings->Bool({"do_pad"}, false)) settings->Refuse("do_pad", "false");
  const nlohmann::json* size = settings->Find({"size"});
  if (size && size->is_number() && settings->Bool({"default_to_square"}, false)) {
    settings->Refuse("default_to_square", "false");
  }
  bool keeps_aspect = true;
  CheckSide(*settings, "size", image_size, &keeps_aspect);
  CheckSide(*settings, "crop_size", image_size);
  if (!keeps_aspect) preprocess.fit = PictureFit::kStretch;
  preprocess.mean = ReadChannels(*settings, "image_mean", kClipMean, -10, 10);
  preprocess.std = ReadChannels(*settings, "image_std", kClipStd, 1e-6, 100);
  return preprocess;
}

std::shared_ptr<const Vlm> Load(const std::filesystem::path& directory, const VlmOptions& options,
                                LlavaGeneration generation) {
  const LlavaNextConfig config = ReadLlavaNextConfig(directory, generation);
  LlavaParts parts;
  parts.architecture = NamesOf(generation).architecture;
  parts.text = config.text;
  parts.eos_ids = config.eos_ids;
  parts.has_newline = generation == LlavaGeneration::kNext;
  parts.canonical = [&](const std::string& name) {
    auto canonical = CanonicalTensorName(config.vision.layers_to_run, config.vision_layers, name);
    // LLaVA-NeXT-Video has one for images.
    if (canonical == "image_newline" && !parts.has_newline) canonical.reset();
    return canonical;
  };
  parts.tower_layers = config.vision.layers_to_run;
  parts.load_encoder = [&](WeightStore& weights, const std::vector<AttentionPrecision>& attention) {
    ClipConfig vision = config.vision;
    vision.attention = attention;
    return LoadClipEncoder(weights, vision);
  };
  return LoadLlava(directory, options, parts);
}

}  // namespace

LlavaNextConfig ReadLlavaNextConfig(const std::filesystem::path& directory,
                                    LlavaGeneration generation) {
  const ConfigObject top = ConfigObject::Read(directory / "config.json");
  const char* model_type = NamesOf(generation).model_type;
  const bool video = generation == LlavaGeneration::kNextVideo;
  CheckTop(top, model_type, video ? VideoPoolFields() : std::span<const KnownField>());
  LlavaNextConfig config;
  ReadVision(top, generation, config);
  ReadText(top, generation, config);
  config.vision.preprocess = ReadPreprocessing(directory, generation, config.vision.image_size);
  return config;
}

std::shared_ptr<const Vlm> LoadLlava15(const std::filesystem::path& directory,
                                       const VlmOptions& options) {
  return Load(directory, options, LlavaGeneration::k15);
}

std::shared_ptr<const Vlm> LoadLlavaNext(const std::filesystem::path& directory,
                                         const VlmOptions& options) {
  return Load(directory, options, LlavaGeneration::kNext);
}

std::shared_ptr<const Vlm> LoadLlavaNextVideo(const std::filesystem::path& directory,
                                              const VlmOptions& options) {
  return Load(directory, options, LlavaGeneration::kNextVideo);
}

}  // namespace sluice
