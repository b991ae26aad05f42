// What configuration files may say: what is known to be harmless passes, what would change the
// model or its answers is followed or refused in one line.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <vector>

#include "llm/families/llava.h"
#include "llm/families/llava_next.h"
#include "llm/families/llava_onevision.h"
#include "llm/generation_config.h"
#include "llm/generator.h"
#include "runtime/error.h"
#include "tests/support/checkpoint_copy.h"
#include "tests/support/llava_checkpoints.h"

namespace sluice {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

const std::filesystem::path kGoldens = std::filesystem::path(SLUICE_SOURCE_DIR) / "tests/golden";
const std::filesystem::path kOnevision = kGoldens / "tiny_tied";
const std::filesystem::path kVideo = kGoldens / "tiny_next_video";
const std::filesystem::path kQwen = kGoldens / "tiny_next_qwen";

GenerationDefaults ReadDefaults(const std::string& text) {
  const TemporaryDirectory directory;
  std::ofstream(directory.path() / "generation_config.json") << text;
  return ReadGenerationDefaults(directory.path(), {7}, 100);
}

TEST(GenerationConfigTest, WhatChangesAnswersAndIsNotFollowedIsRefusedByName) {
  const std::vector<std::pair<const char*, json>> fields = {
      {"num_beams", 3},
      {"num_beam_groups", 2},
      {"num_return_sequences", 2},
      {"guidance_scale", 1.5},
      {"sequence_bias", {{{5}, -2.0}}},
      {"encoder_repetition_penalty", 1.2},
      {"encoder_no_repeat_ngram_size", 2},
      {"forced_bos_token_id", 3},
      {"forced_eos_token_id", 3},
      {"exponential_decay_length_penalty", {4, 1.1}},
      {"remove_invalid_values", true},
      {"penalty_alpha", 0.6},
      {"dola_layers", "low"},
      {"top_h", 0.4},
      {"token_healing", true},
      {"watermarking_config", {{"bias", 2.0}}},
      {"max_time", 3.0},
      {"prompt_lookup_num_tokens", 4},
      {"assistant_early_exit", 2},
      {"constraints", {1}},
      {"force_words_ids", {{1}}},
      {"cache_implementation", "quantized"},
      {"a_field_of_tomorrow", 1}};
  for (const auto& [field, value] : fields) {
    try {
      ReadDefaults(json{{field, value}}.dump());
      ADD_FAILURE() << field << " was passed over";
    } catch (const InputError& error) {
      EXPECT_THAT(error.what(), HasSubstr(std::string("generation_config.json: ") + field));
      EXPECT_THAT(error.what(), HasSubstr("got "));
      EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    }
  }
}

TEST(GenerationConfigTest, DefaultsWrittenOutAndHarmlessFieldsPass) {
  const GenerationDefaults defaults = ReadDefaults(R"({"_from_model_config": true,
      "bos_token_id": 1, "pad_token_id": 0, "eos_token_id": [2, 5], "transformers_version": "4.45.0",
      "max_length": 4096, "num_beams": 1, "num_return_sequences": 1, "guidance_scale": null,
      "length_penalty": 1.0, "early_stopping": false, "use_cache": true, "diversity_penalty": 0.0,
      "encoder_repetition_penalty": 1.0, "forced_eos_token_id": null, "typical_p": 1.0,
      "output_scores": false, "renormalize_logits": true, "cache_implementation": "static"})");
  EXPECT_THAT(defaults.stop_ids, ElementsAre(2, 5));
  EXPECT_TRUE(defaults.rules.empty());
  EXPECT_TRUE(defaults.limits.none());
  EXPECT_FALSE(defaults.max_new_tokens);
}

TEST(GenerationConfigTest, WhatIsFollowedIsReadAndItsRangeChecked) {
  const GenerationDefaults defaults = ReadDefaults(R"({"do_sample": true, "temperature": 0.7,
      "min_p": 0.1, "typical_p": 0.9, "epsilon_cutoff": 0.01, "eta_cutoff": 0.02,
      "max_new_tokens": 33, "min_new_tokens": 4, "min_length": 9, "no_repeat_ngram_size": 3,
      "suppress_tokens": [1, 2], "begin_suppress_tokens": 3, "bad_words_ids": [[7], [4, 5]],
      "stop_strings": "END"})");
  EXPECT_EQ(defaults.top_k, 50) << "as generate() where a file says nothing";
  EXPECT_EQ(defaults.max_new_tokens, 33);
  EXPECT_EQ(defaults.rules.min_new_tokens, 4);
  EXPECT_EQ(defaults.rules.min_positions, 0) << "min_new_tokens takes precedence";
  EXPECT_EQ(defaults.rules.no_repeat_ngram, 3);
  EXPECT_THAT(defaults.rules.suppress, ElementsAre(1, 2));
  EXPECT_THAT(defaults.rules.begin_suppress, ElementsAre(3));
  EXPECT_THAT(defaults.rules.bad_words, ElementsAre(ElementsAre(4, 5))) << "7 is the stop id";
  EXPECT_THAT(defaults.stop_strings, ElementsAre("END"));
  EXPECT_DOUBLE_EQ(defaults.limits.min_p, 0.1);
  EXPECT_DOUBLE_EQ(defaults.limits.typical_p, 0.9);
  for (const char* bad :
       {R"({"min_p": 1.5})", R"({"typical_p": 0})", R"({"bad_words_ids": []})",
        R"({"bad_words_ids": [[100]]})", R"({"bad_words_ids": [[]]})", R"({"stop_strings": [""]})",
        R"({"suppress_tokens": [-1]})", R"({"no_repeat_ngram_size": -1})",
        R"({"max_new_tokens": 0})", R"({"eos_token_id": 100})"}) {
    EXPECT_THROW(ReadDefaults(bad), InputError) << bad;
  }
}

TEST(GenerationConfigTest, AStopStringOfTheFileEndsAnAnswerAndStaysInIt) {
  CheckpointCopy copy(kOnevision);
  const auto answer = [&](std::vector<std::string> own) {
    const auto vlm = LoadF32(copy.directory());
    ExecContext ctx({.num_threads = 1});
    Tensor rows(DType::kF32, {1, vlm->decoder().hidden_size()});
    vlm->decoder().Embed(ctx, std::vector<int32_t>{5}, rows);
    KvCache cache(std::make_shared<KvBlockPool>(vlm->decoder().kv_geometry(), 0));
    GenerateOptions options;
    options.max_new_tokens = 12;
    options.stop_strings = std::move(own);
    return Generate(ctx, *vlm, cache, std::move(rows), std::vector<int32_t>{5}, options, nullptr);
  };
  // A letter that the answer is made of, whichever it is.
  copy.EditJson("generation_config.json", [](json& config) {
    config["suppress_tokens"] = json::array();
    for (int id = 0; id < 320; ++id) {
      if (id != 36) config["suppress_tokens"].push_back(id);
    }
    config["min_new_tokens"] = 12;
  });
  const Generated whole = answer({});
  ASSERT_EQ(whole.ids.size(), 12u);
  ASSERT_EQ(whole.text.size(), 12u);
  const std::string stop = whole.text.substr(0, 3);
  copy.EditJson("generation_config.json", [&](json& config) { config["stop_strings"] = {stop}; });
  const Generated ended = answer({});
  EXPECT_EQ(ended.text, stop);
  EXPECT_EQ(ended.ids.size(), 3u);
  EXPECT_EQ(ended.reason, FinishReason::kStop);
  EXPECT_EQ(answer({"never"}).text, whole.text) << "a caller's stop strings replace the file's";
}

TEST(ConfigurationTest, FieldsThatNobodyKnowsAreRefusedInEveryFile) {
  struct Bad {
    std::filesystem::path checkpoint;
    const char* file;
    const char* pointer;
    json value;
  };
  const std::vector<Bad> table = {
      {kOnevision, "config.json", "/new_switch", true},
      {kOnevision, "config.json", "/use_image_newline_parameter", false},
      {kOnevision, "config.json", "/text_config/attn_logit_softcapping", 30.0},
      {kOnevision, "config.json", "/text_config/partial_rotary_factor", 0.5},
      {kOnevision, "config.json", "/text_config/per_layer_config", {{"0", {{"hidden_size", 1}}}}},
      {kOnevision, "config.json", "/text_config/rope_parameters/mrope_section", {1, 2}},
      {kOnevision, "config.json", "/vision_config/window_size", 7},
      {kOnevision, "processor_config.json", "/image_token", "<picture>"},
      {kOnevision, "processor_config.json", "/video_processor/do_flip_channel_order", true},
      {kOnevision, "tokenizer_config.json", "/split_special_tokens", true},
      {kOnevision, "tokenizer_config.json", "/do_lower_case", true},
      {kOnevision, "tokenizer_config.json", "/add_prefix_space", true},
      {kVideo, "config.json", "/text_config/attention_bias", true},
      {kVideo, "config.json", "/mm_patch_merge_type", "flat"},
      {kQwen, "preprocessor_config.json", "/pad_size", {{"height", 9}, {"width", 9}}},
      {kQwen, "preprocessor_config.json", "/do_color_jitter", true},
      {kQwen, "generation_config.json", "/num_beams", 2}};
  for (const Bad& bad : table) {
    CheckpointCopy copy(bad.checkpoint);
    copy.EditJson(bad.file, [&](json& file) { file[json::json_pointer(bad.pointer)] = bad.value; });
    const std::string error = LoadError(copy.directory());
    EXPECT_THAT(error, HasSubstr(bad.file)) << bad.pointer;
    std::string field(bad.pointer + 1);
    std::replace(field.begin(), field.end(), '/', '.');
    EXPECT_THAT(error, HasSubstr(field));
    EXPECT_THAT(error, HasSubstr("got " + bad.value.dump()));
  }
}

// As saved by transformers 4.x, where every field of the base classes is written out.
constexpr const char* kVerboseBase = R"({"_name_or_path": "x/y", "add_cross_attention": false,
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bad_words_ids": null,
    "begin_suppress_tokens": null, "bos_token_id": 1, "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": null, "decoder_start_token_id": null, "diversity_penalty": 0.0,
    "do_sample": false, "early_stopping": false, "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": null, "finetuning_task": null, "forced_bos_token_id": null,
    "forced_eos_token_id": null, "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "initializer_range": 0.02, "is_decoder": false, "is_encoder_decoder": false,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20,
    "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1,
    "num_return_sequences": 1, "output_attentions": false, "output_hidden_states": false,
    "output_scores": false, "pad_token_id": null, "prefix": null, "problem_type": null,
    "pruned_heads": {}, "remove_invalid_values": false, "repetition_penalty": 1.0,
    "return_dict": true, "return_dict_in_generate": false, "sep_token_id": null,
    "suppress_tokens": null, "task_specific_params": null, "temperature": 1.0,
    "tf_legacy_loss": false, "tie_encoder_decoder": false, "tokenizer_class": null, "top_k": 50,
    "top_p": 1.0, "torch_dtype": "float16", "torchscript": false, "typical_p": 1.0,
    "use_bfloat16": false, "use_cache": true, "transformers_version": "4.45.0"})";

TEST(ConfigurationTest, WhatOlderVersionsWriteOutPasses) {
  for (const auto& checkpoint : {kOnevision, kVideo, kQwen}) {
    const std::vector<float> expected = Fingerprint(checkpoint);
    CheckpointCopy copy(checkpoint);
    copy.EditJson("config.json", [](json& config) {
      json base = json::parse(kVerboseBase);
      const auto add = [&](json& to) {
        for (const auto& [key, value] : base.items()) {
          if (!to.contains(key)) to[key] = value;
        }
      };
      add(config["text_config"]);
      add(config["vision_config"]);
      base.erase("architectures");
      add(config);
      config["ignore_index"] = -100;
      config["use_image_newline_parameter"] = true;
    });
    copy.EditJson("tokenizer_config.json", [](json& config) {
      config.update(json::parse(R"({"add_bos_token": true, "add_eos_token": false,
          "added_tokens_decoder": {}, "clean_up_tokenization_spaces": false, "legacy": false,
          "model_max_length": 1e30, "padding_side": "left", "sp_model_kwargs": {},
          "trust_remote_code": false, "use_default_system_prompt": false, "errors": "replace",
          "split_special_tokens": false, "extra_special_tokens": {}, "image_token": "<image>",
          "processor_class": "LlavaProcessor", "add_prefix_space": false})"));
    });
    EXPECT_EQ(Fingerprint(copy.directory()), expected) << checkpoint;
  }
}

TEST(ConfigurationTest, RopeScalingReplacesRopeParametersAsInTheReference) {
  const std::vector<float> expected = Fingerprint(kVideo);  // linear, 2.5
  CheckpointCopy copy(kVideo);
  const auto scaling = [&](const json& value) {
    copy.EditJson("config.json",
                  [&](json& config) { config["text_config"]["rope_scaling"] = value; });
  };
  scaling({{"type", "linear"}, {"factor", 4.0}});
  EXPECT_NE(Fingerprint(copy.directory()), expected);
  scaling({{"type", "linear"}, {"factor", 2.5}});
  EXPECT_EQ(Fingerprint(copy.directory()), expected);
  scaling(nullptr);
  EXPECT_EQ(Fingerprint(copy.directory()), expected);
  scaling({{"type", "banana"}, {"factor", 4.0}});
  EXPECT_THAT(LoadError(copy.directory()), HasSubstr("rope_scaling.type"));
}

TEST(ConfigurationTest, ATiedTensorThatTheIndexNamesAndNoShardHoldsIsNotMissed) {
  const std::vector<float> expected = Fingerprint(kOnevision);
  CheckpointCopy copy(kOnevision);
  copy.WriteShards(2);
  const auto name = [&](const char* tensor) {
    copy.EditJson("model.safetensors.index.json",
                  [&](json& index) { index["weight_map"][tensor] = "model-1-of-2.safetensors"; });
  };
  name("lm_head.weight");
  EXPECT_EQ(Fingerprint(copy.directory()), expected);
  // One that is needed.
  copy.tensors().erase("language_model.model.norm.weight");
  copy.WriteShards(2);
  name("language_model.model.norm.weight");
  const std::string error = LoadError(copy.directory());
  EXPECT_THAT(error, HasSubstr("model-1-of-2.safetensors"));
  EXPECT_THAT(error, HasSubstr("norm.weight"));
}

TEST(ConfigurationTest, AHubSnapshotIsCalledAsItsRepository) {
  const std::string hub =
      "/cache/hub/models--llava-hf--llava-onevision-qwen2-0.5b-ov-hf/snapshots/";
  EXPECT_EQ(CheckpointName(hub + "2c9ba3d"), "llava-onevision-qwen2-0.5b-ov-hf");
  EXPECT_EQ(CheckpointName(hub + "2c9ba3d/"), "llava-onevision-qwen2-0.5b-ov-hf");
  EXPECT_EQ(CheckpointName("/models/mine/"), "mine");
  EXPECT_EQ(CheckpointName("/models/snapshots/mine"), "mine");
}

// config.json of llava-hf/llama3-llava-next-8b-hf and llava-next-72b-hf: class defaults fill them.
TEST(ConfigurationTest, PublishedLlavaNextDecodersAreReadWithTheirClassesDefaults) {
  CheckpointCopy copy(kQwen);
  copy.Remove("preprocessor_config.json");
  copy.WriteText("config.json", R"({"architectures": ["LlavaNextForConditionalGeneration"],
      "ignore_index": -100, "image_token_index": 128256, "model_type": "llava_next",
      "projector_hidden_act": "gelu", "use_image_newline_parameter": true,
      "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
      "text_config": {"_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 128000, "eos_token_id": 128009,
        "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "llama",
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
        "torch_dtype": "bfloat16", "vocab_size": 128320},
      "vision_config": {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
        "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24,
        "patch_size": 14, "projection_dim": 768, "vocab_size": 32000}})");
  LlavaNextConfig config = ReadLlavaNextConfig(copy.directory(), LlavaGeneration::kNext);
  EXPECT_EQ(config.text.hidden_size, 4096);
  EXPECT_EQ(config.text.num_kv_heads, 8);
  EXPECT_DOUBLE_EQ(config.text.rope_theta, 500000.0);
  EXPECT_EQ(config.text.rope_scaling.kind, RopeScaling::Kind::kNone);
  EXPECT_FALSE(config.text.qkv_bias);
  EXPECT_THAT(config.eos_ids, ElementsAre(128009));
  copy.EditJson("config.json", [](json& file) {
    file["image_token_index"] = 151646;
    file["text_config"] = json::parse(R"({"_name_or_path": "Qwen/Qwen1.5-72B-Chat",
        "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151645,
        "hidden_size": 8192, "intermediate_size": 24576, "max_window_layers": 70,
        "model_type": "qwen2", "num_attention_heads": 64, "num_hidden_layers": 80,
        "num_key_value_heads": 64, "rope_theta": 1000000.0, "sliding_window": 32768,
        "torch_dtype": "bfloat16", "use_sliding_window": false, "vocab_size": 152064})");
  });
  config = ReadLlavaNextConfig(copy.directory(), LlavaGeneration::kNext);
  EXPECT_STREQ(config.text.family, "qwen2");
  EXPECT_TRUE(config.text.qkv_bias);
  EXPECT_EQ(config.text.num_layers, 80);
  EXPECT_EQ(config.text.max_positions, 32768);
  EXPECT_DOUBLE_EQ(config.text.rope_theta, 1e6);
}

TEST(ConfigurationTest, ALlama3ConversationIsRenderedAsItsTemplateDoes) {
  const PromptFormat format = PromptFormat::Load(kGoldens / "tiny_next_llama3");
  EXPECT_STREQ(format.name(), "llama3");
  const std::vector<PromptFormat::Turn> turns = {{"Q1", "A1"}, {"Q2", ""}};
  EXPECT_EQ(format.Render("S", turns),
            "<|start_header_id|>system<|end_header_id|>\n\n\nS<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n<image>\nQ1<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n\nA1<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n\nQ2<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n");
  const auto tokenizer = Tokenizer::Load(kGoldens / "tiny_next_llama3/tokenizer.json");
  EXPECT_EQ(tokenizer->Encode(format.BeforeQuestion(true) + "Q2" + format.AfterQuestion()),
            format.EncodeQuestion(*tokenizer, "Q2", /*follow_up=*/true));
}

}  // namespace
}  // namespace sluice
