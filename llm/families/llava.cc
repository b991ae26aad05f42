#include "llm/families/llava.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <map>
#include <utility>

#include "llm/families/known_fields.h"
#include "llm/json_file.h"
#include "runtime/archive.h"
#include "runtime/error.h"

namespace sluice {
namespace {

constexpr const char* kFullAttention =
    "full attention in every layer (sliding windows are not supported)";

bool EndsWith(const std::string& name, const std::string& end) {
  return name.size() >= end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0;
}

// Replaces a beginning of `name`; false when it begins otherwise.
bool ReplacePrefix(std::string& name, const std::string& prefix, const std::string& by) {
  if (name.compare(0, prefix.size(), prefix) != 0) return false;
  name.replace(0, prefix.size(), by);
  return true;
}

// A tower's index into the embeddings followed by every layer's output, as a number of layers.
int ReadFeatureLayer(const ConfigObject& top, int64_t fallback, int vision_layers) {
  const auto layer = static_cast<int>(
      top.Int({"vision_feature_layer"}, fallback, -vision_layers - 1, vision_layers));
  return layer < 0 ? vision_layers + 1 + layer : layer;
}

class Llava : public Vlm {
 public:
  Llava(const std::filesystem::path& directory, const VlmOptions& options, const LlavaParts& parts);

  const VlmInfo& info() const override { return info_; }
  const Tokenizer& tokenizer() const override { return *tokenizer_; }
  const PromptFormat& prompt_format() const override { return prompt_format_; }
  const VisionEncoder& encoder() const override { return *encoder_; }
  const Decoder& decoder() const override { return *decoder_; }
  const GenerationDefaults& generation_defaults() const override { return generation_; }
  ConstTensorView newline_row() const override { return newline_; }

 private:
  void AddEndOfText();
  void LoadWeights(const std::filesystem::path& directory, const VlmOptions& options,
                   const LlavaParts& parts);

  VlmInfo info_;
  std::shared_ptr<const Tokenizer> tokenizer_;
  PromptFormat prompt_format_;
  GenerationDefaults generation_;
  std::unique_ptr<VisionEncoder> encoder_;
  std::unique_ptr<Decoder> decoder_;
  Tensor newline_;  // [E] f32, or empty
};

// The first line of notice.txt, if there is one and it is no longer than a line may be.
std::string ReadNotice(const std::filesystem::path& directory) {
  constexpr std::streamsize kMostBytes = 512;
  std::ifstream file(directory / "notice.txt", std::ios::binary);
  std::string text(kMostBytes, '\0');
  file.read(text.data(), kMostBytes);
  text.resize(static_cast<size_t>(file.gcount()));
  text.resize(std::min(text.size(), text.find('\n')));
  std::replace_if(
      text.begin(), text.end(), [](unsigned char c) { return c < ' ' || c > '~'; }, '?');
  return text;
}

Llava::Llava(const std::filesystem::path& directory, const VlmOptions& options,
             const LlavaParts& parts)
    : prompt_format_(PromptFormat::Load(directory)) {
  const auto begin = std::chrono::steady_clock::now();
  info_.name = CheckpointName(directory);
  info_.architecture = parts.architecture;
  info_.notice = ReadNotice(directory);
  info_.device = options.device;
  info_.weights = options.weights;
  info_.compute_type = options.compute_type;
  if (info_.compute_type != DType::kF32 && info_.compute_type != DType::kBF16) {
    throw InputError(std::string("[vlm] the compute type must be f32 or bf16, got ") +
                     Name(info_.compute_type));
  }
  CheckTokenizerConfig(directory);
  tokenizer_ = Tokenizer::Load(directory / "tokenizer.json");
  if (tokenizer_->vocab_size() > parts.text.vocab_size) {
    throw InputError("[vlm] " + (directory / "tokenizer.json").string() + ": its largest id is " +
                     std::to_string(tokenizer_->vocab_size() - 1) +
                     ", but config.json's vocab_size is " + std::to_string(parts.text.vocab_size) +
                     ": they belong to different models");
  }
  generation_ = ReadGenerationDefaults(directory, parts.eos_ids, parts.text.vocab_size);
  AddEndOfText();
  LoadWeights(directory, options, parts);
  info_.load_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Qwen2's own end of text: the published files leave it out, the base model still says it. Yi has
// it as well, other Llama vocabularies do not.
void Llava::AddEndOfText() {
  const std::optional<int32_t> end = tokenizer_->TokenToId("<|endoftext|>");
  std::vector<int32_t>& ids = generation_.stop_ids;
  if (end && std::find(ids.begin(), ids.end(), *end) == ids.end()) ids.push_back(*end);
}

void Llava::LoadWeights(const std::filesystem::path& directory, const VlmOptions& options,
                        const LlavaParts& parts) {
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
  info_.fingerprint =
      checkpoint.Fingerprint() +
      std::to_string(ArchiveChecksum(ReadSmallFile("vlm", directory / "config.json", 1 << 20)));

  info_.attention = ChoosePrecisions(options.attention, info_.fingerprint, info_.device,
                                     parts.tower_layers, parts.text.num_layers);
  WeightStore weights(checkpoint, parts.canonical, info_.compute_type,
                      {info_.device, info_.weights});
  if (parts.has_newline) {
    newline_ = weights.TakeF32("image_newline", {parts.text.hidden_size});
  }
  encoder_ = parts.load_encoder(weights, info_.attention.tower);
  LlamaConfig text = parts.text;
  text.attention = info_.attention.decoder;
  decoder_ = LoadLlamaDecoder(weights, text);
  weights.CheckAllTaken();
  const int64_t narrow = weights.quantised_elements();
  info_.weight_bytes =
      (info_.parameters - narrow) * static_cast<int64_t>(SizeOf(info_.compute_type)) + narrow;
}

}  // namespace

std::string CheckpointName(const std::filesystem::path& directory) {
  std::filesystem::path path = std::filesystem::absolute(directory).lexically_normal();
  if (path.filename().empty()) path = path.parent_path();  // it ended with a slash
  const std::filesystem::path snapshots = path.parent_path();
  const std::string repository = snapshots.parent_path().filename().string();
  if (snapshots.filename() == "snapshots" && repository.starts_with("models--")) {
    return repository.substr(repository.rfind("--") + 2);
  }
  return path.filename().string();
}

void ExpectOneOf(const ConfigObject& config, const char* key, const std::string& fallback,
                 std::initializer_list<const char*> supported) {
  const std::string found = config.String({key}, fallback);
  std::string names;
  for (const char* name : supported) {
    if (found == name) return;
    names += (names.empty() ? "" : " or ") + std::string("\"") + name + "\"";
  }
  config.Refuse(key, names + " (nothing else is supported)");
}

std::array<float, 3> ReadChannels(const ConfigObject& config, const char* key,
                                  std::array<float, 3> fallback, double least, double most) {
  std::array<float, 3> values = fallback;
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

void CheckTop(const ConfigObject& top, const char* model_type,
              std::span<const KnownField> more_fields) {
  ExpectOneOf(top, "model_type", model_type, {model_type});
  if (top.Has("quantization_config")) {
    top.Refuse("quantization_config", "absent (quantised checkpoints are not supported)");
  }
  top.CheckFields({CommonFields(), TopFields(), more_fields});
}

std::optional<ConfigObject> FindPixelSettings(const std::filesystem::path& directory,
                                              const char* part,
                                              std::initializer_list<const char*> files) {
  std::optional<ConfigObject> settings;
  if (const auto processor = ConfigObject::ReadIfThere(directory / "processor_config.json")) {
    processor->CheckFields({ProcessorFields()});
    if (processor->Has(part)) settings = processor->Object(part);
  }
  for (const char* file : files) {
    if (!settings) settings = ConfigObject::ReadIfThere(directory / file);
  }
  return settings;
}

void CheckPixelSettings(const ConfigObject& settings) {
  settings.CheckFields({PixelFields()});
  for (const char* key : {"do_resize", "do_rescale", "do_normalize"}) {
    if (!settings.Bool({key}, true)) settings.Refuse(key, "true");
  }
  if (settings.Int({"resample"}, 3, 0, 5) != 3) settings.Refuse("resample", "3 (bicubic)");
  if (std::abs(settings.Number({"rescale_factor"}, 1.0 / 255, 0, 1) * 255 - 1) > 1e-6) {
    settings.Refuse("rescale_factor", "1/255");
  }
}

LlamaConfig ReadDecoder(const ConfigObject& top, const ConfigObject& text,
                        const DecoderDefaults& defaults) {
  text.CheckFields({CommonFields(), TextFields()});
  ExpectOneOf(text, "hidden_act", "silu", {"silu", "swish"});
  LlamaConfig decoder;
  decoder.hidden_size = text.Int({"hidden_size"}, defaults.hidden, 1, LlavaBounds::kWidth);
  decoder.intermediate_size =
      text.Int({"intermediate_size"}, defaults.inner, 1, LlavaBounds::kInner);
  decoder.num_layers = text.Int({"num_hidden_layers"}, defaults.layers, 1, LlavaBounds::kLayers);
  decoder.num_heads = text.Int({"num_attention_heads"}, defaults.heads, 1, LlavaBounds::kHeads);
  // Missing means the class's number, null means one for each query head.
  decoder.num_kv_heads =
      text.Int({"num_key_value_heads"},
               text.IsNull("num_key_value_heads") || defaults.kv_heads == 0 ? decoder.num_heads
                                                                            : defaults.kv_heads,
               1, LlavaBounds::kHeads);
  if (decoder.num_heads % decoder.num_kv_heads != 0) {
    text.Refuse("num_key_value_heads",
                "a divisor of num_attention_heads " + std::to_string(decoder.num_heads));
  }
  if (text.Has("head_dim")) {
    decoder.head_dim = text.Int({"head_dim"}, std::nullopt, 2, LlavaBounds::kWidth);
    if (decoder.head_dim % 2 != 0) text.Refuse("head_dim", "even");
  } else if (decoder.hidden_size % (2 * decoder.num_heads) == 0) {
    decoder.head_dim = decoder.hidden_size / decoder.num_heads;
  } else {
    text.Refuse("num_attention_heads", "so that heads of an even size fill hidden_size " +
                                           std::to_string(decoder.hidden_size));
  }
  decoder.vocab_size = text.Int({"vocab_size"}, defaults.vocabulary, 1, LlavaBounds::kVocabulary);
  decoder.max_positions =
      text.Int({"max_position_embeddings"}, defaults.positions, 1, LlavaBounds::kPositions);
  decoder.rms_norm_eps = text.Number({"rms_norm_eps"}, 1e-6, 1e-30, 1);
  if (const nlohmann::json* types = text.Find({"layer_types"})) {
    if (!types->is_array()) text.Refuse("layer_types", "a list");
    for (const nlohmann::json& type : *types) {
      if (type != "full_attention") text.Refuse("layer_types", kFullAttention);
    }
  }
  // Published files set either flag; with both false the file must bring its own lm_head.
  decoder.tie_word_embeddings =
      top.Bool({"tie_word_embeddings"}, false) || text.Bool({"tie_word_embeddings"}, false);
  return decoder;
}

void ReadRope(const ConfigObject& text, std::initializer_list<const char*> types,
              LlamaConfig& decoder) {
  // 5.x: rope_parameters, possibly once more by kind of layer; 4.x: rope_theta and rope_scaling,
  // which replaces the others where both are there.
  const nlohmann::json* scaling_field = text.Find({"rope_scaling"});
  const bool scales = scaling_field && !(scaling_field->is_object() && scaling_field->empty());
  ConfigObject rope = text.Object(scales ? "rope_scaling" : "rope_parameters");
  rope.CheckFields({RopeFields()});
  if (rope.Has("full_attention")) {
    rope = rope.Object("full_attention");
    rope.CheckFields({RopeFields()});
  }
  for (const char* key : {"rope_type", "type"}) ExpectOneOf(rope, key, "default", types);
  rope.Number({"partial_rotary_factor"}, 1, 1, 1);
  const double outer = text.Number({"rope_theta"}, 10000, 1, 1e15);
  decoder.rope_theta = rope.Number({"rope_theta"}, outer, 1, 1e15);

  const std::string type = rope.String({"rope_type", "type"}, "default");
  if (type == "default") return;
  RopeScaling& scaling = decoder.rope_scaling;
  if (!rope.Has("factor")) rope.Refuse("factor", "a number");
  scaling.factor = rope.Number({"factor"}, 1, 1, 1e6);
  scaling.kind = type == "linear" ? RopeScaling::Kind::kLinear : RopeScaling::Kind::kLlama3;
  if (type == "linear") {
    // The file names the positions before the stretch; LLaVA-NeXT-Video is trained beyond them.
    decoder.max_positions = static_cast<int64_t>(
        std::min<double>(decoder.max_positions * scaling.factor, LlavaBounds::kPositions));
    return;
  }
  for (const char* key :
       {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}) {
    if (!rope.Has(key)) rope.Refuse(key, "a number");
  }
  scaling.low_frequency = rope.Number({"low_freq_factor"}, 1, 1e-6, 1e6);
  scaling.high_frequency = rope.Number({"high_freq_factor"}, 4, 1e-6, 1e6);
  scaling.original_positions = rope.Number({"original_max_position_embeddings"}, 8192, 1, 1e9);
  if (!(scaling.low_frequency < scaling.high_frequency)) {
    rope.Refuse("high_freq_factor", "more than low_freq_factor");
  }
}

LlamaConfig ReadQwen2Decoder(const ConfigObject& top, const ConfigObject& text) {
  constexpr DecoderDefaults kDefaults = {.hidden = 4096,
                                         .inner = 22016,
                                         .layers = 32,
                                         .heads = 32,
                                         .kv_heads = 32,
                                         .vocabulary = 151936,
                                         .positions = 32768};
  LlamaConfig decoder = ReadDecoder(top, text, kDefaults);
  decoder.family = "qwen2";
  decoder.qkv_bias = true;
  ReadRope(text, {"default"}, decoder);
  // Without layer_types: layers from max_window_layers on slide, if there is a window. A null
  // window is none, a missing one is 4096.
  if (!text.Has("layer_types") && text.Bool({"use_sliding_window"}, false) &&
      text.Int({"max_window_layers"}, 28, 0, INT64_MAX) < decoder.num_layers &&
      !text.IsNull("sliding_window")) {
    text.Refuse("use_sliding_window", kFullAttention);
  }
  return decoder;
}

int ReadTower(const ConfigObject& top, const ConfigObject& vision, const TowerDefaults& defaults,
              const TowerRules& rules, TowerConfig& tower) {
  vision.CheckFields({CommonFields(), TowerFields()});
  ExpectOneOf(top, "projector_hidden_act", "gelu", {"gelu"});
  vision.Int({"num_channels"}, 3, 3, 3);
  tower.hidden_size = vision.Int({"hidden_size"}, defaults.hidden, 1, LlavaBounds::kWidth);
  tower.intermediate_size =
      vision.Int({"intermediate_size"}, defaults.inner, 1, LlavaBounds::kInner);
  tower.num_heads = vision.Int({"num_attention_heads"}, defaults.heads, 1, LlavaBounds::kHeads);
  tower.image_size = vision.Int({"image_size"}, defaults.image, 1, rules.most_pixels);
  tower.patch_size = vision.Int({"patch_size"}, defaults.patch, 1, tower.image_size);
  tower.layer_norm_eps = vision.Number({"layer_norm_eps"}, rules.layer_norm_eps, 1e-30, 1);
  tower.projector_bias = top.Bool({"multimodal_projector_bias"}, true);
  if (tower.hidden_size % tower.num_heads != 0) {
    vision.Refuse("num_attention_heads",
                  "a divisor of hidden_size " + std::to_string(tower.hidden_size));
  }
  const int layers = vision.Int({"num_hidden_layers"}, defaults.layers, 1, LlavaBounds::kLayers);
  tower.layers_to_run = ReadFeatureLayer(top, rules.feature_layer, layers);
  return layers;
}

std::optional<std::string> CanonicalTensorName(int layers_to_run, int vision_layers,
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
    for (int i = layers_to_run; i < vision_layers; ++i) {
      if (number == std::to_string(i)) return std::nullopt;
    }
  }
  return canonical;
}

std::shared_ptr<const Vlm> LoadLlava(const std::filesystem::path& directory,
                                     const VlmOptions& options, const LlavaParts& parts) {
  return std::make_shared<Llava>(directory, options, parts);
}

}  // namespace sluice
