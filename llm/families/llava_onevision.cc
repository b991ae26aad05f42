#include "llm/families/llava_onevision.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <utility>
#include <vector>

#include "llm/config_object.h"
#include "runtime/cpu_info.h"
#include "runtime/error.h"
#include "runtime/weight_store.h"

namespace sluice {
namespace {

constexpr const char* kArchitecture = "LlavaOnevisionForConditionalGeneration";

// Beyond any published model, small enough that sizes computed from them fit 64 bits.
constexpr int64_t kMaxWidth = 1 << 16;
constexpr int64_t kMaxInner = 1 << 20;
constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxHeads = 1024;
constexpr int64_t kMaxVocabulary = 1 << 22;
constexpr int64_t kMaxPositions = 1 << 30;
constexpr int64_t kMaxImageSize = 8192;

// The class defaults of LlavaOnevisionConfig for a file without that part differ from the defaults
// of the part's own class, which fill the gaps of a part that is there.
struct VisionDefaults {
  int64_t hidden, inner, layers, heads, image, patch;
};
constexpr VisionDefaults kSiglipDefaults = {768, 3072, 12, 12, 224, 16};
constexpr VisionDefaults kOnevisionDefaults = {1152, 4304, 26, 16, 384, 14};

void Expect(const ConfigObject& config, const char* key, const std::string& fallback,
            std::initializer_list<const char*> supported) {
  const std::string found = config.String({key}, fallback);
  std::string names;
  for (const char* name : supported) {
    if (found == name) return;
    names += (names.empty() ? "" : " or ") + std::string("\"") + name + "\"";
  }
  config.Refuse(key, names + " (nothing else is supported)");
}

void ReadVision(const ConfigObject& top, LlavaOnevisionConfig& config) {
  const ConfigObject vision = top.Object("vision_config");
  const VisionDefaults& defaults = top.Has("vision_config") ? kSiglipDefaults : kOnevisionDefaults;
  Expect(vision, "model_type", "siglip_vision_model", {"siglip_vision_model"});
  Expect(vision, "hidden_act", "gelu_pytorch_tanh", {"gelu_pytorch_tanh"});
  Expect(top, "projector_hidden_act", "gelu", {"gelu"});
  // "default" drops a class token, which this tower does not have.
  Expect(top, "vision_feature_select_strategy", "full", {"full"});
  vision.Int({"num_channels"}, 3, 3, 3);

  SiglipConfig& siglip = config.vision;
  siglip.hidden_size = vision.Int({"hidden_size"}, defaults.hidden, 1, kMaxWidth);
  siglip.intermediate_size = vision.Int({"intermediate_size"}, defaults.inner, 1, kMaxInner);
  siglip.num_heads = vision.Int({"num_attention_heads"}, defaults.heads, 1, kMaxHeads);
  siglip.image_size = vision.Int({"image_size"}, defaults.image, 1, kMaxImageSize);
  siglip.patch_size = vision.Int({"patch_size"}, defaults.patch, 1, siglip.image_size);
  siglip.layer_norm_eps = vision.Number({"layer_norm_eps"}, 1e-6, 1e-30, 1);
  siglip.projector_bias = top.Bool({"multimodal_projector_bias"}, true);
  if (siglip.hidden_size % siglip.num_heads != 0) {
    vision.Refuse("num_attention_heads",
                  "a divisor of hidden_size " + std::to_string(siglip.hidden_size));
  }
  config.vision_layers = vision.Int({"num_hidden_layers"}, defaults.layers, 1, kMaxLayers);
  // An index into the embeddings followed by every layer's output.
  const int64_t layer =
      top.Int({"vision_feature_layer"}, -1, -config.vision_layers - 1, config.vision_layers);
  siglip.layers_to_run = layer < 0 ? config.vision_layers + 1 + layer : layer;
}

void ReadRope(const ConfigObject& text, Qwen2Config& qwen2) {
  // 5.x: rope_parameters, possibly once more by kind of layer; 4.x: rope_theta and rope_scaling.
  ConfigObject rope = text.Object(text.Has("rope_parameters") ? "rope_parameters" : "rope_scaling");
  if (rope.Has("full_attention")) rope = rope.Object("full_attention");
  for (const char* key : {"rope_type", "type"}) Expect(rope, key, "default", {"default"});
  rope.Number({"partial_rotary_factor"}, 1, 1, 1);
  const double outer = text.Number({"rope_theta"}, 10000, 1, 1e15);
  qwen2.rope_theta = rope.Number({"rope_theta"}, outer, 1, 1e15);
}

void RefuseSlidingWindows(const ConfigObject& text, int num_layers) {
  const std::string expected = "full attention in every layer (sliding windows are not supported)";
  if (const nlohmann::json* types = text.Find({"layer_types"})) {
    if (!types->is_array()) text.Refuse("layer_types", "a list");
    for (const nlohmann::json& type : *types) {
      if (type != "full_attention") text.Refuse("layer_types", expected);
    }
    return;
  }
  // Without the explicit list: layers from max_window_layers on slide, if there is a window. A null
  // window is none, a missing one is 4096.
  if (text.Bool({"use_sliding_window"}, false) &&
      text.Int({"max_window_layers"}, 28, 0, INT64_MAX) < num_layers &&
      !text.IsNull("sliding_window")) {
    text.Refuse("use_sliding_window", expected);
  }
}

std::vector<int32_t> ReadIds(const ConfigObject& config, const char* key) {
  std::vector<int32_t> ids;
  const nlohmann::json* value = config.Find({key});
  if (!value) return ids;
  const nlohmann::json list = value->is_array() ? *value : nlohmann::json::array({*value});
  for (const nlohmann::json& id : list) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= kMaxVocabulary) {
      config.Refuse(key, "a token id or a list of them");
    }
    ids.push_back(id.get<int32_t>());
  }
  return ids;
}

void ReadText(const ConfigObject& top, LlavaOnevisionConfig& config) {
  const ConfigObject text = top.Object("text_config");
  Expect(text, "model_type", "qwen2", {"qwen2"});
  Expect(text, "hidden_act", "silu", {"silu", "swish"});
  Qwen2Config& qwen2 = config.text;
  qwen2.hidden_size = text.Int({"hidden_size"}, 4096, 1, kMaxWidth);
  qwen2.intermediate_size = text.Int({"intermediate_size"}, 22016, 1, kMaxInner);
  qwen2.num_layers = text.Int({"num_hidden_layers"}, 32, 1, kMaxLayers);
  qwen2.num_heads = text.Int({"num_attention_heads"}, 32, 1, kMaxHeads);
  // Missing means the class's 32, null means one for each query head.
  qwen2.num_kv_heads =
      text.Int({"num_key_value_heads"}, text.IsNull("num_key_value_heads") ? qwen2.num_heads : 32,
               1, kMaxHeads);
  if (qwen2.num_heads % qwen2.num_kv_heads != 0) {
    text.Refuse("num_key_value_heads",
                "a divisor of num_attention_heads " + std::to_string(qwen2.num_heads));
  }
  if (text.Has("head_dim")) {
    qwen2.head_dim = text.Int({"head_dim"}, std::nullopt, 2, kMaxWidth);
    if (qwen2.head_dim % 2 != 0) text.Refuse("head_dim", "even");
  } else if (qwen2.hidden_size % (2 * qwen2.num_heads) == 0) {
    qwen2.head_dim = qwen2.hidden_size / qwen2.num_heads;
  } else {
    text.Refuse("num_attention_heads", "so that heads of an even size fill hidden_size " +
                                           std::to_string(qwen2.hidden_size));
  }
  qwen2.vocab_size = text.Int({"vocab_size"}, 151936, 1, kMaxVocabulary);
  qwen2.max_positions = text.Int({"max_position_embeddings"}, 32768, 1, kMaxPositions);
  qwen2.rms_norm_eps = text.Number({"rms_norm_eps"}, 1e-6, 1e-30, 1);
  ReadRope(text, qwen2);
  RefuseSlidingWindows(text, qwen2.num_layers);
  // Published files set either flag; with both false the file must bring its own lm_head.
  qwen2.tie_word_embeddings =
      top.Bool({"tie_word_embeddings"}, false) || text.Bool({"tie_word_embeddings"}, false);
  config.vision.output_size = qwen2.hidden_size;
  config.eos_ids = ReadIds(text, "eos_token_id");
  top.Int({"image_token_index", "image_token_id"}, std::min<int64_t>(151646, qwen2.vocab_size - 1),
          0, qwen2.vocab_size - 1);
  top.Int({"video_token_index", "video_token_id"}, std::min<int64_t>(151647, qwen2.vocab_size - 1),
          0, qwen2.vocab_size - 1);
}

std::array<float, 3> ReadChannels(const ConfigObject& config, const char* key, double least,
                                  double most) {
  // The class default is CLIP's, which is wrong for this family: every published file says 0.5.
  std::array<float, 3> values = {0.5f, 0.5f, 0.5f};
  const nlohmann::json* value = config.Find({key});
  if (!value) return values;
  const bool list = value->is_array() && value->size() == 3;
  for (size_t c = 0; c < 3; ++c) {
    const nlohmann::json& item = list ? (*value)[c] : *value;
    if (!item.is_number() || !(item.get<double>() >= least && item.get<double>() <= most)) {
      config.Refuse(key, "a number or three numbers, one a channel, in a sensible range");
    }
    values[c] = item.get<float>();
  }
  return values;
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
  // As transformers 5.x looks for the video processor's settings.
  std::optional<ConfigObject> settings;
  if (auto processor = ConfigObject::ReadIfThere(directory / "processor_config.json");
      processor && processor->Has("video_processor")) {
    settings = processor->Object("video_processor");
  }
  for (const char* name : {"video_preprocessor_config.json", "preprocessor_config.json"}) {
    if (!settings) settings = ConfigObject::ReadIfThere(directory / name);
  }
  if (!settings) return preprocess;
  for (const char* key : {"do_resize", "do_rescale", "do_normalize"}) {
    if (!settings->Bool({key}, true)) settings->Refuse(key, "true");
  }
  if (settings->Bool({"do_center_crop"}, false)) settings->Refuse("do_center_crop", "false");
  if (settings->Int({"resample"}, 3, 0, 5) != 3) settings->Refuse("resample", "3 (bicubic)");
  if (std::abs(settings->Number({"rescale_factor"}, 1.0 / 255, 0, 1) * 255 - 1) > 1e-6) {
    settings->Refuse("rescale_factor", "1/255");
  }
  CheckSize(*settings, image_size);
  preprocess.mean = ReadChannels(*settings, "image_mean", -10, 10);
  preprocess.std = ReadChannels(*settings, "image_std", 1e-6, 100);
  return preprocess;
}

bool EndsWith(const std::string& name, const std::string& end) {
  return name.size() >= end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0;
}

// Replaces a beginning of `name`; false when it begins otherwise.
bool ReplacePrefix(std::string& name, const std::string& prefix, const std::string& by) {
  if (name.compare(0, prefix.size(), prefix) != 0) return false;
  name.replace(0, prefix.size(), by);
  return true;
}

class LlavaOnevision : public Vlm {
 public:
  LlavaOnevision(const std::filesystem::path& directory, const VlmOptions& options);

  const VlmInfo& info() const override { return info_; }
  const Tokenizer& tokenizer() const override { return *tokenizer_; }
  const PromptFormat& prompt_format() const override { return prompt_format_; }
  const VisionEncoder& encoder() const override { return *encoder_; }
  const Decoder& decoder() const override { return *decoder_; }
  const GenerationDefaults& generation_defaults() const override { return generation_; }
  ConstTensorView newline_row() const override { return newline_; }

 private:
  void ReadGeneration(const std::filesystem::path& directory, const LlavaOnevisionConfig& config);
  void LoadWeights(const std::filesystem::path& directory, const LlavaOnevisionConfig& config);

  VlmInfo info_;
  std::shared_ptr<const Tokenizer> tokenizer_;
  PromptFormat prompt_format_;
  GenerationDefaults generation_;
  std::unique_ptr<VisionEncoder> encoder_;
  std::unique_ptr<Decoder> decoder_;
  Tensor newline_;  // [E] f32
};

LlavaOnevision::LlavaOnevision(const std::filesystem::path& directory, const VlmOptions& options)
    : prompt_format_(PromptFormat::Load(directory)) {
  const auto begin = std::chrono::steady_clock::now();
  info_.name = std::filesystem::absolute(directory).lexically_normal().filename().string();
  if (info_.name.empty()) {  // the path ended with a slash
    info_.name = std::filesystem::absolute(directory).lexically_normal().parent_path().filename();
  }
  info_.architecture = kArchitecture;
  info_.compute_type =
      options.compute_type ? *options.compute_type : CpuInfo::Detect().BestComputeType();
  if (info_.compute_type != DType::kF32 && info_.compute_type != DType::kBF16) {
    throw InputError(std::string("[vlm] the compute type must be f32 or bf16, got ") +
                     Name(info_.compute_type));
  }
  const LlavaOnevisionConfig config = ReadLlavaOnevisionConfig(directory);
  tokenizer_ = Tokenizer::Load(directory / "tokenizer.json");
  if (tokenizer_->vocab_size() > config.text.vocab_size) {
    throw InputError("[vlm] " + (directory / "tokenizer.json").string() + ": its largest id is " +
                     std::to_string(tokenizer_->vocab_size() - 1) +
                     ", but config.json's vocab_size is " + std::to_string(config.text.vocab_size) +
                     ": they belong to different models");
  }
  ReadGeneration(directory, config);
  LoadWeights(directory, config);
  info_.load_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

void LlavaOnevision::ReadGeneration(const std::filesystem::path& directory,
                                    const LlavaOnevisionConfig& config) {
  generation_.stop_ids = config.eos_ids;
  const std::filesystem::path path = directory / "generation_config.json";
  if (const auto file = ConfigObject::ReadIfThere(path)) {
    if (file->Has("eos_token_id")) generation_.stop_ids = ReadIds(*file, "eos_token_id");
    generation_.do_sample = file->Bool({"do_sample"}, false);
    generation_.temperature = file->Number({"temperature"}, 1, 0, 1000);
    generation_.top_p = file->Number({"top_p"}, 1, 1e-6, 1);
    generation_.top_k = file->Int({"top_k"}, 0, 0, kMaxVocabulary);
    generation_.repetition_penalty = file->Number({"repetition_penalty"}, 1, 1e-3, 1000);
  }
  if (generation_.stop_ids.empty()) {
    throw InputError("[vlm] " + path.string() +
                     ": eos_token_id must name the id that ends an answer, got nothing here nor in "
                     "config.json's text_config");
  }
  for (int32_t id : generation_.stop_ids) {
    if (id >= config.text.vocab_size) {
      throw InputError("[vlm] " + path.string() + ": eos_token_id must be less than vocab_size " +
                       std::to_string(config.text.vocab_size) + ", got " + std::to_string(id));
    }
  }
  // Qwen2's own end of text: the published files leave it out, the base model still says it.
  const std::optional<int32_t> end = tokenizer_->TokenToId("<|endoftext|>");
  if (end && std::find(generation_.stop_ids.begin(), generation_.stop_ids.end(), *end) ==
                 generation_.stop_ids.end()) {
    generation_.stop_ids.push_back(*end);
  }
}

void LlavaOnevision::LoadWeights(const std::filesystem::path& directory,
                                 const LlavaOnevisionConfig& config) {
  const Checkpoint checkpoint = Checkpoint::Open(directory);
  std::map<DType, int64_t> elements;
  for (const auto& [name, entry] : checkpoint.tensors()) {
    const int64_t count = entry.view.shape().NumElements();
    elements[entry.view.dtype()] += count;
    info_.parameters += count;
  }
  for (const auto& [dtype, count] : elements) {
    if (count > elements[info_.file_type]) info_.file_type = dtype;
  }
  info_.file_bytes = checkpoint.TotalBytes();
  info_.weight_bytes = info_.parameters * static_cast<int64_t>(SizeOf(info_.compute_type));

  WeightStore weights(
      checkpoint, [&](const std::string& name) { return CanonicalLlavaName(config, name); },
      info_.compute_type);
  newline_ = weights.TakeF32("image_newline", {config.text.hidden_size});
  encoder_ = LoadSiglipEncoder(weights, config.vision);
  decoder_ = LoadQwen2Decoder(weights, config.text);
  weights.CheckAllTaken();
}

}  // namespace

LlavaOnevisionConfig ReadLlavaOnevisionConfig(const std::filesystem::path& directory) {
  const ConfigObject top = ConfigObject::Read(directory / "config.json");
  Expect(top, "model_type", "llava_onevision", {"llava_onevision"});
  if (top.Has("quantization_config")) {
    top.Refuse("quantization_config", "absent (quantised checkpoints are not supported)");
  }
  LlavaOnevisionConfig config;
  ReadVision(top, config);
  ReadText(top, config);
  config.vision.preprocess = ReadPreprocessing(directory, config.vision.image_size);
  return config;
}

std::optional<std::string> CanonicalLlavaName(const LlavaOnevisionConfig& config,
                                              const std::string& name) {
  std::string canonical = name;
  // In memory since 4.52: everything but the lm_head below "model.".
  for (const char* part :
       {"vision_tower.", "multi_modal_projector.", "image_newline", "language_model."}) {
    if (ReplacePrefix(canonical, std::string("model.") + part, part)) break;
  }
  // Before 5.6 the tower stood inside a wrapper; files of the decoder stand inside another.
  ReplacePrefix(canonical, "vision_tower.vision_model.", "vision_tower.");
  if (!ReplacePrefix(canonical, "language_model.lm_head.", "lm_head.")) {
    ReplacePrefix(canonical, "language_model.model.", "language_model.");
  }
  std::string rest = canonical;
  if (EndsWith(canonical, ".inv_freq") || EndsWith(canonical, ".position_ids")) return std::nullopt;
  if (ReplacePrefix(rest, "vision_tower.head.", "") ||
      ReplacePrefix(rest, "vision_tower.post_layernorm.", "")) {
    return std::nullopt;
  }
  // Layers of the tower behind the one whose feature is taken.
  if (ReplacePrefix(rest, "vision_tower.encoder.layers.", "")) {
    const std::string number = rest.substr(0, rest.find('.'));
    for (int i = config.vision.layers_to_run; i < config.vision_layers; ++i) {
      if (number == std::to_string(i)) return std::nullopt;
    }
  }
  return canonical;
}

std::shared_ptr<const Vlm> LoadLlavaOnevision(const std::filesystem::path& directory,
                                              const VlmOptions& options) {
  return std::make_shared<LlavaOnevision>(directory, options);
}

}  // namespace sluice
