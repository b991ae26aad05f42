#include "llm/families/llava_onevision.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "tests/support/checkpoint_copy.h"
#include "tests/support/llava_checkpoints.h"

namespace sluice {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

const std::filesystem::path kTiny =
    std::filesystem::path(SLUICE_SOURCE_DIR) / "tests/golden/tiny_tied";

Tensor RandomTensor(Shape shape, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 0.1f);
  Tensor x(DType::kF32, shape);
  for (int64_t i = 0; i < shape.NumElements(); ++i) x.data<float>()[i] = normal(random);
  return x;
}

TEST(LlavaOnevisionTest, EveryPublishedLayoutLoadsTheSameModel) {
  for (const char* name : {"tiny_tied", "tiny_untied"}) {
    const std::filesystem::path directory = kTiny.parent_path() / name;
    const std::vector<float> expected = Fingerprint(directory);
    for (const auto& layout : {LayoutA, LayoutB, LayoutC}) {
      CheckpointCopy copy(directory);
      copy.Rename(layout);
      copy.Write();
      EXPECT_EQ(Fingerprint(copy.directory()), expected) << name << " " << layout("vision_tower.x");
    }
  }
}

TEST(LlavaOnevisionTest, ShardsAndFileTypesLoadTheSameModel) {
  const std::vector<float> expected = Fingerprint(kTiny);
  CheckpointCopy shards(kTiny);
  shards.WriteShards(3);
  EXPECT_EQ(Fingerprint(shards.directory()), expected);
  CheckpointCopy f32(kTiny);
  for (auto& [name, view] : f32.tensors()) view = f32.Keep(ConvertTo(view, DType::kF32));
  f32.Write();
  EXPECT_EQ(Fingerprint(f32.directory()), expected);
  EXPECT_EQ(LoadF32(f32.directory())->info().file_type, DType::kF32);
  // Values that f16 holds exactly, in f16 and in f32.
  CheckpointCopy f16(kTiny), same(kTiny);
  for (auto& [name, view] : f16.tensors()) view = f16.Keep(ConvertTo(view, DType::kF16));
  for (auto& [name, view] : same.tensors()) {
    view = same.Keep(ConvertTo(f16.tensors().at(name), DType::kF32));
  }
  f16.Write();
  same.Write();
  EXPECT_EQ(Fingerprint(f16.directory()), Fingerprint(same.directory()));
}

TEST(LlavaOnevisionTest, TheHeadIsTheFilesOwnElseTheEmbeddingWhereEitherFlagTies) {
  const std::vector<float> tied = Fingerprint(kTiny);
  const Tensor own = RandomTensor({320, 64}, 9);
  std::vector<float> untied;
  for (const bool with_head : {false, true}) {
    for (const auto& [top, text] :
         {std::pair{true, true}, {true, false}, {false, true}, {false, false}}) {
      CheckpointCopy copy(kTiny);
      if (with_head) copy.tensors()["language_model.lm_head.weight"] = own;
      copy.Write();
      copy.EditJson("config.json", [top = top, text = text](json& config) {
        config["tie_word_embeddings"] = top;
        config["text_config"]["tie_word_embeddings"] = text;
      });
      if (!with_head && !top && !text) {
        EXPECT_THAT(LoadError(copy.directory()),
                    AllOf(HasSubstr("lm_head.weight"), HasSubstr("tie_word_embeddings")));
        continue;
      }
      const std::vector<float> print = Fingerprint(copy.directory());
      if (!with_head) {
        EXPECT_EQ(print, tied) << top << text;
      } else {
        EXPECT_NE(print, tied) << top << text;
        if (untied.empty()) untied = print;
        EXPECT_EQ(print, untied) << top << text;
      }
    }
  }
  // Both flags may be missing: false is their default.
  CheckpointCopy copy(kTiny);
  copy.EditJson("config.json", [](json& config) {
    config.erase("tie_word_embeddings");
    config["text_config"].erase("tie_word_embeddings");
  });
  EXPECT_THAT(LoadError(copy.directory()), HasSubstr("lm_head.weight"));
}

TEST(LlavaOnevisionTest, TensorsWithoutUseAreIgnoredAndUnknownOnesRefused) {
  const std::vector<float> expected = Fingerprint(kTiny);
  const Tensor some = RandomTensor({7}, 1);
  CheckpointCopy harmless(kTiny);
  for (const char* name :
       {"vision_tower.head.probe", "vision_tower.vision_model.head.mlp.fc1.weight",
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq",
        "vision_tower.embeddings.position_ids"}) {
    harmless.tensors()[name] = some;
  }
  harmless.tensors().erase("vision_tower.post_layernorm.weight");
  harmless.Write();
  EXPECT_EQ(Fingerprint(harmless.directory()), expected);

  for (const char* name : {"language_model.model.layers.3.mlp.up_proj.weight", "model.extra",
                           "vision_tower.encoder.layers.3.layer_norm1.bias"}) {
    CheckpointCopy copy(kTiny);
    copy.tensors()[name] = some;
    copy.Write();
    EXPECT_THAT(LoadError(copy.directory()), HasSubstr(name));
  }
}

TEST(LlavaOnevisionTest, MissingAndMisshapenTensorsAreNamed) {
  {
    CheckpointCopy copy(kTiny);
    copy.tensors().erase("language_model.model.layers.1.self_attn.k_proj.bias");
    copy.Write();
    EXPECT_THAT(LoadError(copy.directory()),
                HasSubstr("language_model.layers.1.self_attn.k_proj.bias"));
  }
  {
    CheckpointCopy copy(kTiny);
    copy.tensors()["image_newline"] = copy.Keep(RandomTensor({63}, 2));
    copy.Write();
    EXPECT_THAT(LoadError(copy.directory()),
                AllOf(HasSubstr("model.safetensors"), HasSubstr("image_newline"), HasSubstr("[64]"),
                      HasSubstr("[63]")));
  }
  {
    CheckpointCopy copy(kTiny);
    const ConstTensorView embedding = copy.tensors().at("language_model.model.embed_tokens.weight");
    copy.tensors()["model.language_model.embed_tokens.weight"] = embedding;
    copy.Write();
    EXPECT_THAT(LoadError(copy.directory()), HasSubstr("embed_tokens"));
  }
}

TEST(LlavaOnevisionTest, OlderSpellingsAndSparseFilesMeanTheSame) {
  const std::vector<float> expected = Fingerprint(kTiny);
  CheckpointCopy copy(kTiny);
  copy.EditJson("config.json", [](json& config) {
    config["torch_dtype"] = "float16";
    config.erase("dtype");
    config["image_token_id"] = config["image_token_index"];
    config["video_token_id"] = config["video_token_index"];
    for (const char* key :
         {"image_token_index", "video_token_index", "vision_feature_layer", "projector_hidden_act",
          "vision_feature_select_strategy", "multimodal_projector_bias", "image_grid_pinpoints",
          "vision_aspect_ratio", "tie_word_embeddings"}) {
      config.erase(key);
    }
    json& text = config["text_config"];
    text["rope_theta"] = text["rope_parameters"]["rope_theta"];
    text["rope_scaling"] = nullptr;
    text["sliding_window"] = 4096;
    text["num_hidden_layers"] = 3;
    for (const char* key : {"rope_parameters", "layer_types", "rms_norm_eps", "hidden_act",
                            "use_sliding_window", "model_type"}) {
      text.erase(key);
    }
    for (const char* key : {"hidden_act", "layer_norm_eps", "num_channels", "model_type"}) {
      config["vision_config"].erase(key);
    }
  });
  EXPECT_EQ(Fingerprint(copy.directory()), expected);
  copy.EditJson("config.json", [](json& config) { config.erase("architectures"); });
  EXPECT_EQ(Fingerprint(copy.directory()), expected);
  // Another base of the rotation is another model.
  copy.EditJson("config.json", [](json& config) { config["text_config"].erase("rope_theta"); });
  EXPECT_NE(Fingerprint(copy.directory()), expected);
}

TEST(LlavaOnevisionTest, DefaultsAreThoseOfTheClasses) {
  CheckpointCopy copy(kTiny);
  copy.WriteText("config.json", R"({"model_type": "llava_onevision"})");
  copy.Remove("processor_config.json");
  LlavaOnevisionConfig config = ReadLlavaOnevisionConfig(copy.directory());
  EXPECT_EQ(config.vision.hidden_size, 1152);
  EXPECT_EQ(config.vision.layers_to_run, 26);
  EXPECT_EQ(config.vision.num_heads, 16);
  EXPECT_EQ(config.vision.image_size, 384);
  EXPECT_EQ(config.text.hidden_size, 4096);
  EXPECT_EQ(config.text.head_dim, 128);
  EXPECT_EQ(config.text.vocab_size, 151936);
  EXPECT_EQ(config.text.rope_theta, 10000);
  EXPECT_FALSE(config.text.tie_word_embeddings);
  copy.WriteText("config.json", R"({"model_type": "llava_onevision", "vision_config": {},
      "vision_feature_layer": -2, "text_config": {"num_key_value_heads": null}})");
  config = ReadLlavaOnevisionConfig(copy.directory());
  EXPECT_EQ(config.vision.hidden_size, 768);
  EXPECT_EQ(config.vision_layers, 12);
  EXPECT_EQ(config.vision.layers_to_run, 11);
  EXPECT_EQ(config.vision.image_size, 224);
  EXPECT_EQ(config.text.num_kv_heads, 32);
}

TEST(LlavaOnevisionTest, EarlierFeatureLayersNeedNoLaterTensors) {
  CheckpointCopy with(kTiny), without(kTiny);
  for (CheckpointCopy* copy : {&with, &without}) {
    copy->EditJson("config.json", [](json& config) { config["vision_feature_layer"] = -2; });
  }
  std::erase_if(without.tensors(), [](const auto& item) {
    return item.first.starts_with("vision_tower.encoder.layers.2.");
  });
  without.Write();
  const std::vector<float> print = Fingerprint(with.directory());
  EXPECT_EQ(Fingerprint(without.directory()), print);
  EXPECT_NE(Fingerprint(kTiny), print);
}

TEST(LlavaOnevisionTest, PreprocessingSettingsComeFromTheFirstFileThatHasThem) {
  CheckpointCopy copy(kTiny);
  const auto settings = [](double mean) {
    return json{{"image_mean", {mean, mean, mean}},
                {"image_std", 0.25},
                {"size", {{"height", 74}, {"width", 74}}}};
  };
  copy.WriteText("preprocessor_config.json", settings(0.1).dump());
  copy.WriteText("video_preprocessor_config.json", settings(0.2).dump());
  copy.WriteText("processor_config.json", json{{"video_processor", settings(0.3)}}.dump());
  const auto mean = [&] {
    return ReadLlavaOnevisionConfig(copy.directory()).vision.preprocess.mean[1];
  };
  EXPECT_FLOAT_EQ(mean(), 0.3f);
  EXPECT_FLOAT_EQ(ReadLlavaOnevisionConfig(copy.directory()).vision.preprocess.std[2], 0.25f);
  copy.WriteText("processor_config.json", R"({"num_image_tokens": 25})");
  EXPECT_FLOAT_EQ(mean(), 0.2f);
  copy.Remove("video_preprocessor_config.json");
  EXPECT_FLOAT_EQ(mean(), 0.1f);
  copy.Remove("preprocessor_config.json");
  EXPECT_FLOAT_EQ(mean(), 0.5f);
}

TEST(LlavaOnevisionTest, StopIdsComeFromTheGenerationFileAndTheTokenizer) {
  EXPECT_THAT(LoadF32(kTiny)->generation_defaults().stop_ids, ElementsAre(292, 290));
  CheckpointCopy copy(kTiny);
  copy.WriteText("generation_config.json", R"({"eos_token_id": [290, 7], "do_sample": true,
      "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05})");
  const GenerationDefaults defaults = LoadF32(copy.directory())->generation_defaults();
  EXPECT_THAT(defaults.stop_ids, ElementsAre(290, 7));
  EXPECT_TRUE(defaults.do_sample);
  EXPECT_FLOAT_EQ(defaults.temperature, 0.7f);
  EXPECT_EQ(defaults.top_k, 20);
  EXPECT_FLOAT_EQ(defaults.top_p, 0.8f);
  EXPECT_FLOAT_EQ(defaults.repetition_penalty, 1.05f);
  copy.Remove("generation_config.json");
  EXPECT_THAT(LoadF32(copy.directory())->generation_defaults().stop_ids, ElementsAre(292, 290));
  copy.EditJson("config.json", [](json& config) { config["text_config"].erase("eos_token_id"); });
  EXPECT_THAT(LoadError(copy.directory()), HasSubstr("eos_token_id"));
}

TEST(LlavaOnevisionTest, InfoTellsSizesAndTypes) {
  const auto vlm = LoadF32(kTiny);
  EXPECT_EQ(vlm->info().name, "tiny_tied");
  EXPECT_EQ(vlm->info().architecture, "LlavaOnevisionForConditionalGeneration");
  EXPECT_EQ(vlm->info().file_type, DType::kBF16);
  EXPECT_EQ(vlm->info().compute_type, DType::kF32);
  EXPECT_EQ(vlm->info().file_bytes, 2 * vlm->info().parameters);
  EXPECT_EQ(vlm->info().weight_bytes, 4 * vlm->info().parameters);
  EXPECT_EQ(LoadF32(kTiny / "")->info().name, "tiny_tied");
}

TEST(LlavaOnevisionTest, DamagedSurroundingsAreNamed) {
  EXPECT_THAT(LoadError(kTiny / "nowhere"), AllOf(HasSubstr("nowhere"), HasSubstr("not there")));
  EXPECT_THAT(LoadError(kTiny / "config.json"), HasSubstr("not a directory"));
  struct Case {
    const char* file;
    const char* text;  // null: the file is removed
    std::vector<const char*> expected;
  };
  const Case cases[] = {
      {"config.json", nullptr, {"config.json"}},
      {"config.json", "{\"model_type\": \"llava_onevision\",", {"config.json", "byte 34"}},
      {"config.json", "[1]", {"config.json", "object", "array"}},
      {"config.json",
       R"({"architectures": ["Qwen3VLForConditionalGeneration"]})",
       {"Qwen3VLForConditionalGeneration", "LlavaOnevisionForConditionalGeneration"}},
      {"config.json", "{}", {"architectures", "nothing"}},
      {"config.json", R"({"architectures": "x"})", {"architectures", "list"}},
      {"tokenizer.json", nullptr, {"tokenizer.json"}},
      {"tokenizer.json", "{", {"tokenizer.json"}},
      {"generation_config.json", "{\"eos_token_id\": 2x}", {"generation_config.json", "byte"}},
      {"generation_config.json", "{\"eos_token_id\": -1}", {"eos_token_id", "-1"}},
      {"generation_config.json", "{\"eos_token_id\": 320}", {"eos_token_id", "320"}},
      {"processor_config.json", "null", {"processor_config.json", "object"}},
      {"model.safetensors", nullptr, {"safetensors"}},
      {"model.safetensors", "short", {"model.safetensors"}},
      {"chat_template.json", nullptr, {"chat"}},
  };
  for (const Case& c : cases) {
    CheckpointCopy copy(kTiny);
    if (c.text) {
      copy.WriteText(c.file, c.text);
    } else {
      copy.Remove(c.file);
    }
    const std::string error = LoadError(copy.directory());
    for (const char* expected : c.expected) {
      EXPECT_THAT(error, HasSubstr(expected)) << c.file << " " << (c.text ? c.text : "removed");
    }
  }
}

TEST(LlavaOnevisionTest, ConfigurationErrorsNameFieldExpectedAndFound) {
  const BadSetting cases[] = {
      {"/text_config/hidden_size", "big", {"text_config.hidden_size", "integer", "\"big\""}},
      {"/text_config/hidden_size", -64, {"text_config.hidden_size", "-64"}},
      {"/text_config/hidden_size", 1e300, {"text_config.hidden_size", "1e+300"}},
      {"/text_config/hidden_size", uint64_t{1} << 63, {"text_config.hidden_size"}},
      {"/text_config/hidden_size", 128, {"[128]", "[64]"}},
      {"/text_config/num_hidden_layers", 1 << 30, {"num_hidden_layers", "1073741824"}},
      {"/text_config/num_hidden_layers", 4, {"language_model.layers.3."}},
      {"/text_config/num_hidden_layers", 2, {"layers.2."}},
      {"/text_config/vocab_size", 1 << 30, {"vocab_size"}},
      {"/text_config/num_attention_heads", 0, {"num_attention_heads", "got 0"}},
      {"/text_config/num_attention_heads", 7, {"num_attention_heads"}},
      {"/text_config/num_key_value_heads", 3, {"num_key_value_heads", "divisor"}},
      {"/text_config/head_dim", 15, {"head_dim", "even"}},
      {"/text_config/hidden_act", "gelu", {"text_config.hidden_act", "silu", "\"gelu\""}},
      {"/text_config/model_type", "qwen3", {"text_config.model_type", "qwen2", "qwen3"}},
      {"/text_config/rms_norm_eps", -1, {"rms_norm_eps"}},
      {"/text_config/rms_norm_eps", true, {"rms_norm_eps", "number", "true"}},
      {"/text_config/rope_parameters/rope_type", "linear", {"rope_type", "default", "linear"}},
      {"/text_config/rope_parameters/rope_theta", 0, {"rope_theta"}},
      {"/text_config/layer_types/1", "sliding_attention", {"layer_types", "sliding"}},
      {"/text_config", 5, {"text_config", "object", "5"}},
      {"/vision_config/hidden_act", "quick_gelu", {"vision_config.hidden_act", "quick_gelu"}},
      {"/vision_config/model_type", "clip_vision_model", {"siglip_vision_model"}},
      {"/vision_config/image_size", 1 << 20, {"image_size"}},
      {"/vision_config/image_size", 88, {"size", "88"}},
      {"/vision_config/image_size", {74, 74}, {"image_size", "integer"}},
      {"/vision_config/patch_size", 75, {"patch_size"}},
      {"/vision_config/patch_size", 0, {"patch_size"}},
      {"/vision_config/num_attention_heads", 5, {"vision_config.num_attention_heads", "divisor"}},
      {"/vision_config/num_channels", 4, {"num_channels"}},
      {"/vision_config/num_hidden_layers", 27, {"vision_tower.encoder.layers.3."}},
      {"/vision_feature_layer", -5, {"vision_feature_layer"}},
      {"/vision_feature_layer", {-1, -2}, {"vision_feature_layer", "integer"}},
      {"/vision_feature_select_strategy", "default", {"vision_feature_select_strategy", "full"}},
      {"/projector_hidden_act", "relu", {"projector_hidden_act", "gelu"}},
      {"/multimodal_projector_bias", "yes", {"multimodal_projector_bias", "true or false"}},
      {"/multimodal_projector_bias", false, {"multi_modal_projector.linear_1.bias"}},
      {"/tie_word_embeddings", 1, {"tie_word_embeddings", "true or false"}},
      {"/video_token_index", 320, {"video_token_index", "319"}},
      {"/model_type", "llava", {"model_type", "llava_onevision"}},
      {"/quantization_config", {{"bits", 4}}, {"quantization_config"}},
  };
  for (const BadSetting& c : cases) {
    ExpectRefused(CheckpointCopy(kTiny), "config.json", c);
  }
  CheckpointCopy small(kTiny);
  small.EditJson("config.json", [](json& config) {
    config["text_config"]["vocab_size"] = 290;
    config["image_token_index"] = config["video_token_index"] = 1;
  });
  EXPECT_THAT(LoadError(small.directory()),
              AllOf(HasSubstr("tokenizer.json"), HasSubstr("294"), HasSubstr("290")));
  CheckpointCopy sliding(kTiny);
  sliding.EditJson("config.json", [](json& config) {
    json& text = config["text_config"];
    text.erase("layer_types");
    text["use_sliding_window"] = true;
    text["sliding_window"] = 128;
    text["max_window_layers"] = 1;
  });
  EXPECT_THAT(LoadError(sliding.directory()), HasSubstr("use_sliding_window"));
  const BadSetting settings[] = {
      {"/video_processor/do_resize", false, {"video_processor.do_resize", "true", "false"}},
      {"/video_processor/do_center_crop", true, {"do_center_crop"}},
      {"/video_processor/resample", 2, {"resample", "bicubic"}},
      {"/video_processor/rescale_factor", 1, {"rescale_factor", "1/255"}},
      {"/video_processor/size", {{"shortest_edge", 74}}, {"size", "shortest_edge"}},
      {"/video_processor/size/height", 75, {"size", "75"}},
      {"/video_processor/image_std", {0.5, 0, 0.5}, {"image_std"}},
      {"/video_processor/image_mean", {0.5, 0.5}, {"image_mean"}},
  };
  for (const BadSetting& c : settings) {
    ExpectRefused(CheckpointCopy(kTiny), "processor_config.json", c);
  }
}

}  // namespace
}  // namespace sluice
