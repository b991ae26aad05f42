#include "llm/families/llava_next.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

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

const std::filesystem::path kGoldens = std::filesystem::path(SLUICE_SOURCE_DIR) / "tests/golden";
const std::filesystem::path kVideo = kGoldens / "tiny_next_video";
const std::filesystem::path kMistral = kGoldens / "tiny_next_mistral";
const std::filesystem::path kLlava15 = kGoldens / "tiny_llava15";

TEST(LlavaNextTest, EveryPublishedLayoutLoadsTheSameModel) {
  for (const auto& directory : {kVideo, kMistral, kLlava15}) {
    const std::vector<float> expected = Fingerprint(directory);
    for (const auto& layout : {LayoutA, LayoutB, LayoutC}) {
      CheckpointCopy copy(directory);
      copy.Rename(layout);
      copy.Write();
      EXPECT_EQ(Fingerprint(copy.directory()), expected)
          << directory << " " << layout("vision_tower.x");
    }
  }
}

TEST(LlavaNextTest, OnlyLlavaNextEndsAVideoWithANewline) {
  EXPECT_TRUE(LoadF32(kVideo)->newline_row().empty());
  EXPECT_TRUE(LoadF32(kLlava15)->newline_row().empty());
  EXPECT_EQ(LoadF32(kMistral)->newline_row().shape(), Shape({48}));
  EXPECT_EQ(LoadF32(kVideo)->info().architecture, "LlavaNextVideoForConditionalGeneration");
  EXPECT_EQ(LoadF32(kMistral)->info().architecture, "LlavaNextForConditionalGeneration");
  EXPECT_EQ(LoadF32(kLlava15)->info().architecture, "LlavaForConditionalGeneration");
}

TEST(LlavaNextTest, FramesBecomeTheTokensOfTheirGeneration) {
  EXPECT_EQ(LoadF32(kVideo)->encoder().tokens_per_frame(), 9);     // 6 x 6, pooled
  EXPECT_EQ(LoadF32(kMistral)->encoder().tokens_per_frame(), 25);  // 5 x 5
  EXPECT_EQ(LoadF32(kLlava15)->encoder().tokens_per_frame(), 25);
  EXPECT_EQ(LoadF32(kVideo)->encoder().preprocess_config().fit, PictureFit::kCenterCrop);
  EXPECT_EQ(LoadF32(kLlava15)->encoder().preprocess_config().fit, PictureFit::kCenterCrop);
  EXPECT_EQ(LoadF32(kMistral)->encoder().preprocess_config().fit, PictureFit::kStretch);
}

TEST(LlavaNextTest, OnlyLinearScalingStretchesTheContext) {
  EXPECT_EQ(LoadF32(kVideo)->decoder().max_positions(), 10240);  // 2.5 x 4096
  EXPECT_EQ(LoadF32(kMistral)->decoder().max_positions(), 4096);
  EXPECT_EQ(LoadF32(kLlava15)->decoder().max_positions(), 4096);
}

TEST(LlavaNextTest, DefaultsAreThoseOfTheClasses) {
  CheckpointCopy copy(kVideo);
  copy.Remove("processor_config.json");
  copy.WriteText("config.json", R"({"model_type": "llava_next_video"})");
  LlavaNextConfig config = ReadLlavaNextConfig(copy.directory(), LlavaGeneration::kNextVideo);
  EXPECT_EQ(config.vision.hidden_size, 1024);
  EXPECT_EQ(config.vision.intermediate_size, 4096);
  EXPECT_EQ(config.vision.num_heads, 16);
  EXPECT_EQ(config.vision.layers_to_run, 23);
  EXPECT_EQ(config.vision.image_size, 336);
  EXPECT_EQ(config.vision.patch_size, 14);
  EXPECT_EQ(config.vision.pool_stride, 2);
  EXPECT_FLOAT_EQ(config.vision.layer_norm_eps, 1e-5f);
  EXPECT_EQ(config.vision.preprocess.width, 336);
  EXPECT_FLOAT_EQ(config.vision.preprocess.mean[1], 0.4578275f);
  EXPECT_EQ(config.text.hidden_size, 4096);
  EXPECT_EQ(config.text.intermediate_size, 11008);
  EXPECT_EQ(config.text.num_kv_heads, 32);
  EXPECT_EQ(config.text.vocab_size, 32000);
  EXPECT_FLOAT_EQ(config.text.rms_norm_eps, 1e-6f);
  EXPECT_FALSE(config.text.qkv_bias);
  EXPECT_THAT(config.eos_ids, ElementsAre(2));
  // llava-1.5-7b says no more than this of its decoder.
  copy.WriteText("config.json", R"({"model_type": "llava", "vision_config": {"image_size": 224},
      "text_config": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064,
                      "num_attention_heads": 16}})");
  config = ReadLlavaNextConfig(copy.directory(), LlavaGeneration::k15);
  EXPECT_EQ(config.vision.hidden_size, 768);
  EXPECT_EQ(config.vision.patch_size, 32);
  EXPECT_EQ(config.vision.layers_to_run, 11);
  EXPECT_EQ(config.vision.pool_stride, 1);
  EXPECT_EQ(config.text.num_kv_heads, 16);
  EXPECT_FLOAT_EQ(config.text.rms_norm_eps, 1e-5f);
  copy.WriteText("config.json", R"({"model_type": "llava_next",
      "text_config": {"model_type": "mistral", "sliding_window": null}})");
  config = ReadLlavaNextConfig(copy.directory(), LlavaGeneration::kNext);
  EXPECT_EQ(config.text.num_kv_heads, 8);
  EXPECT_EQ(config.text.intermediate_size, 14336);
  EXPECT_EQ(config.text.max_positions, 131072);
}

TEST(LlavaNextTest, OlderSpellingsMeanTheSame) {
  const std::vector<float> expected = Fingerprint(kVideo);
  CheckpointCopy copy(kVideo);
  copy.EditJson("config.json", [](json& config) {
    for (const char* key : {"vision_feature_layer", "vision_feature_select_strategy",
                            "projector_hidden_act", "spatial_pool_mode", "spatial_pool_stride",
                            "multimodal_projector_bias", "tie_word_embeddings", "architectures"}) {
      config.erase(key);
    }
    config["text_config"].erase("rope_parameters");
    config["text_config"]["rope_scaling"] = {{"type", "linear"}, {"factor", 2.5}};
    config["text_config"].erase("head_dim");
    config["text_config"].erase("num_key_value_heads");
    config["text_config"].erase("model_type");
    config["vision_config"].erase("hidden_act");
    config["vision_config"]["vocab_size"] = 32000;
  });
  EXPECT_EQ(Fingerprint(copy.directory()), expected);
  // The rotation without its factor answers fluently, and differently.
  copy.EditJson("config.json", [](json& config) { config["text_config"].erase("rope_scaling"); });
  EXPECT_NE(Fingerprint(copy.directory()), expected);
}

TEST(LlavaNextTest, PreprocessingSettingsComeInEverySpelling) {
  const std::vector<float> expected = Fingerprint(kLlava15);
  CheckpointCopy copy(kLlava15);
  copy.EditJson("preprocessor_config.json", [](json& settings) {
    settings["size"] = 60;
    settings["crop_size"] = 60;
  });
  EXPECT_EQ(Fingerprint(copy.directory()), expected);
  copy.Remove("preprocessor_config.json");
  EXPECT_EQ(Fingerprint(copy.directory()), expected);
  copy.WriteText("processor_config.json", json{{"image_processor",
                                                {{"size", {{"height", 60}, {"width", 60}}},
                                                 {"crop_size", {{"height", 60}, {"width", 60}}},
                                                 {"image_mean", 0.5}}}}
                                              .dump());
  const PreprocessConfig config = LoadF32(copy.directory())->encoder().preprocess_config();
  EXPECT_EQ(config.fit, PictureFit::kStretch) << "a size of both sides does not keep the aspect";
  EXPECT_FLOAT_EQ(config.mean[2], 0.5f);
}

TEST(LlavaNextTest, ConfigurationErrorsNameFieldExpectedAndFound) {
  struct Case {
    std::filesystem::path directory;
    const char* file;
    BadSetting bad;
  };
  const char* config = "config.json";
  const char* processor = "preprocessor_config.json";
  const Case cases[] = {
      {kVideo, config, {"/model_type", "llava", {"model_type", "llava_next_video", "\"llava\""}}},
      {kVideo, config, {"/quantization_config", {{"bits", 4}}, {"quantization_config"}}},
      {kVideo, config, {"/vision_feature_select_strategy", "full", {"\"default\"", "\"full\""}}},
      {kVideo, config, {"/vision_feature_layer", {-2, -1}, {"vision_feature_layer", "integer"}}},
      {kVideo, config, {"/vision_feature_layer", -5, {"vision_feature_layer", "-5"}}},
      {kVideo, config, {"/vision_feature_layer", -1, {"vision_tower", "layers.2"}}},
      {kVideo, config, {"/spatial_pool_mode", "conv", {"spatial_pool_mode", "average", "conv"}}},
      {kVideo, config, {"/spatial_pool_stride", 7, {"spatial_pool_stride", "6", "7"}}},
      {kVideo, config, {"/vision_config/hidden_act", "gelu", {"vision_config.hidden_act"}}},
      {kVideo, config, {"/vision_config/model_type", "siglip_vision_model", {"clip_vision_model"}}},
      {kVideo, config, {"/vision_config/image_size", 4096, {"image_size", "2000", "4096"}}},
      {kVideo, config, {"/video_token_index", 336, {"video_token_index", "335"}}},
      {kVideo, config, {"/text_config/model_type", "gemma", {"llama", "mistral", "qwen2"}}},
      {kVideo, config, {"/text_config/attention_bias", true, {"attention_bias", "false"}}},
      {kVideo, config, {"/text_config/mlp_bias", true, {"mlp_bias", "false"}}},
      {kVideo, config, {"/text_config/rope_parameters/rope_type", "yarn", {"rope_type", "linear"}}},
      {kVideo, config, {"/text_config/rope_parameters/factor", 0, {"factor"}}},
      {kVideo, config, {"/text_config/rope_parameters/factor", nullptr, {"factor"}}},
      {kLlava15,
       config,
       {"/text_config/rope_parameters/high_freq_factor",
        1,
        {"high_freq_factor", "low_freq_factor"}}},
      {kLlava15,
       config,
       {"/text_config/rope_parameters/original_max_position_embeddings",
        nullptr,
        {"original_max_position_embeddings"}}},
      {kMistral, config, {"/text_config/sliding_window", 4096, {"sliding_window", "null", "4096"}}},
      {kLlava15, processor, {"/do_center_crop", false, {"do_center_crop", "true"}}},
      {kLlava15, processor, {"/do_pad", true, {"do_pad", "false"}}},
      {kLlava15, processor, {"/size/shortest_edge", 61, {"size", "60", "61"}}},
      {kLlava15, processor, {"/crop_size/width", 59, {"crop_size", "60", "59"}}},
      {kLlava15, processor, {"/size", nullptr, {"size", "60"}}},
      {kLlava15, processor, {"/resample", 2, {"resample", "bicubic"}}},
      {kLlava15, processor, {"/image_std", {0.5, 0, 0.5}, {"image_std"}}},
  };
  for (const Case& c : cases) {
    CheckpointCopy copy(c.directory);
    // A tensor that only the layer of index 2 would need.
    if (c.bad.value == -1) {
      copy.tensors().erase("vision_tower.encoder.layers.2.layer_norm1.weight");
      copy.Write();
    }
    ExpectRefused(copy, c.file, c.bad);
  }
  // Mistral's class slides where its file says nothing.
  CheckpointCopy copy(kMistral);
  copy.EditJson("config.json", [](json& object) { object["text_config"].erase("sliding_window"); });
  EXPECT_THAT(LoadError(copy.directory()), AllOf(HasSubstr("sliding_window"), HasSubstr("null")));
}

TEST(LlavaNextTest, ErrorsOfTheDecoderNameItsFamily) {
  for (const auto& [directory, family] :
       {std::pair(kVideo, "[llama]"), std::pair(kLlava15, "[llama]"),
        std::pair(kMistral, "[mistral]"), std::pair(kGoldens / "tiny_untied", "[qwen2]")}) {
    CheckpointCopy copy(directory);
    copy.tensors().erase("language_model.lm_head.weight");
    copy.Write();
    EXPECT_THAT(LoadError(copy.directory()), AllOf(HasSubstr(family), HasSubstr("lm_head")));
    const auto vlm = LoadF32(directory);
    ExecContext ctx({.num_threads = 1});
    const Tensor rows(DType::kF32, {1, vlm->decoder().hidden_size() + 1});
    KvCache cache(std::make_shared<KvBlockPool>(vlm->decoder().kv_geometry(), 0));
    SequenceStep step{&cache, rows, {}};
    EXPECT_THAT(
        [&] {
          vlm->decoder().Step(ctx, {&step, 1});
        },
        testing::ThrowsMessage<Error>(HasSubstr(family)));
  }
}

TEST(LlavaNextTest, MissingTensorsAreNamed) {
  for (const char* name :
       {"vision_tower.embeddings.class_embedding", "vision_tower.pre_layrnorm.bias",
        "multi_modal_projector.linear_2.bias", "image_newline"}) {
    CheckpointCopy copy(kMistral);
    copy.tensors().erase(name);
    copy.Write();
    EXPECT_THAT(LoadError(copy.directory()), HasSubstr(name));
  }
  CheckpointCopy biased(kVideo);
  const Tensor bias(DType::kF32, {48});
  biased.tensors()["language_model.model.layers.0.self_attn.q_proj.bias"] = bias;
  biased.Write();
  EXPECT_THAT(LoadError(biased.directory()), HasSubstr("q_proj.bias"));
}

}  // namespace
}  // namespace sluice
