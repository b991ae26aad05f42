#include "llm/families/known_fields.h"

#include <optional>

namespace sluice {
namespace {

constexpr KnownField kCommonFields[] = {
    {"_attn_implementation_autoset"},
    {"_attn_implementation_internal"},
    {"_commit_hash"},
    {"_experts_implementation_internal"},
    {"_flash_attn_2_enabled"},
    {"_name_or_path"},
    {"name_or_path"},
    {"architectures"},
    {"attn_implementation"},
    {"auto_map"},
    {"dtype"},
    {"torch_dtype"},
    {"model_type"},
    {"tokenizer_class"},
    {"transformers_version"},
    {"add_cross_attention", "false"},
    {"chunk_size_feed_forward"},
    {"cross_attention_hidden_size", "null"},
    {"finetuning_task"},
    {"gradient_checkpointing"},
    {"id2label"},
    {"label2id"},
    {"num_labels"},
    {"problem_type"},
    {"initializer_factor"},
    {"initializer_range"},
    {"is_decoder"},
    {"is_encoder_decoder", "false"},
    {"output_attentions"},
    {"output_hidden_states"},
    {"return_dict"},
    {"per_layer_config", "{}"},
    {"prefix"},
    {"pruned_heads", "{}"},
    {"task_specific_params"},
    {"tf_legacy_loss"},
    {"tie_encoder_decoder", "false"},
    {"tie_word_embeddings"},
    {"torchscript"},
    {"use_bfloat16"},
    {"use_cache"},
    {"bos_token_id"},
    {"eos_token_id"},
    {"pad_token_id"},
    {"sep_token_id"},
    {"decoder_start_token_id"},
    // Of how answers are written: transformers 5.x reads none of them here.
    {"bad_words_ids"},
    {"begin_suppress_tokens"},
    {"diversity_penalty"},
    {"do_sample"},
    {"early_stopping"},
    {"encoder_no_repeat_ngram_size"},
    {"encoder_repetition_penalty"},
    {"epsilon_cutoff"},
    {"eta_cutoff"},
    {"exponential_decay_length_penalty"},
    {"forced_bos_token_id"},
    {"forced_eos_token_id"},
    {"length_penalty"},
    {"max_length"},
    {"min_length"},
    {"no_repeat_ngram_size"},
    {"num_beam_groups"},
    {"num_beams"},
    {"num_return_sequences"},
    {"output_scores"},
    {"remove_invalid_values"},
    {"repetition_penalty"},
    {"return_dict_in_generate"},
    {"suppress_tokens"},
    {"temperature"},
    {"top_k"},
    {"top_p"},
    {"typical_p"},
    // Of training.
    {"attention_dropout"},
    {"dropout"},
    {"hidden_dropout"},
    {"quantization_config"},  // refused where it is read
};

constexpr KnownField kTopFields[] = {
    {"text_config"},
    {"vision_config"},
    {"ignore_index"},
    {"image_grid_pinpoints"},
    {"image_seq_length"},
    {"image_token_id"},
    {"image_token_index"},
    {"video_token_id"},
    {"video_token_index"},
    {"multimodal_projector_bias"},
    {"projector_hidden_act"},
    {"use_image_newline_parameter", "true"},
    {"vision_aspect_ratio"},
    {"vision_feature_layer"},
    {"vision_feature_select_strategy"},
    {"vocab_size"},
    {"hidden_size"},
};

constexpr KnownField kVideoPoolFields[] = {
    {"spatial_pool_mode"},
    {"spatial_pool_out_channels"},
    {"spatial_pool_stride"},
    {"video_seq_length"},
};

constexpr KnownField kTextFields[] = {
    {"attention_bias", "false"},
    {"mlp_bias", "false"},
    {"head_dim"},
    {"hidden_act"},
    {"hidden_size"},
    {"intermediate_size"},
    {"is_causal", "true"},
    {"layer_types"},
    {"max_position_embeddings"},
    {"max_window_layers"},
    {"num_attention_heads"},
    {"num_hidden_layers"},
    {"num_key_value_heads"},
    {"original_max_position_embeddings", "null"},
    {"partial_rotary_factor", "1"},
    {"pretraining_tp"},
    {"rms_norm_eps"},
    {"rope_parameters"},
    {"rope_scaling"},
    {"rope_theta"},
    {"sliding_window"},
    {"use_sliding_window"},
    {"vocab_size"},
};

constexpr KnownField kRopeFields[] = {
    {"factor"},
    {"full_attention"},
    {"high_freq_factor"},
    {"low_freq_factor"},
    {"original_max_position_embeddings"},
    {"partial_rotary_factor"},
    {"rope_theta"},
    {"rope_type"},
    {"type"},
};

constexpr KnownField kTowerFields[] = {
    {"hidden_act"},     {"hidden_size"},         {"image_size"},      {"intermediate_size"},
    {"layer_norm_eps"}, {"num_attention_heads"}, {"num_channels"},    {"num_hidden_layers"},
    {"patch_size"},     {"projection_dim"},      {"vision_use_head"}, {"vocab_size"},
};

constexpr KnownField kProcessorFields[] = {
    {"auto_map"},
    {"chat_template"},
    {"image_processor"},
    {"video_processor"},
    {"tokenizer"},
    {"image_token", R"("<image>")"},
    {"video_token", R"("<video>")"},
    {"num_additional_image_tokens"},
    {"num_image_tokens"},
    {"patch_size"},
    {"processor_class"},
    {"transformers_version"},
    {"vision_aspect_ratio"},
    {"vision_feature_select_strategy"},
};

constexpr KnownField kPixelFields[] = {
    {"_processor_class"},
    {"_valid_processor_keys"},
    {"aspect_ratio_setting"},
    {"auto_map"},
    {"crop_size"},
    {"data_format", R"("channels_first")"},
    {"default_to_square"},
    {"device"},
    {"disable_grouping"},
    {"do_center_crop"},
    {"do_convert_rgb"},
    {"do_normalize"},
    {"do_pad"},
    {"do_rescale"},
    {"do_resize"},
    {"do_sample_frames"},
    {"feature_extractor_type"},
    {"fps"},
    {"image_grid_pinpoints"},
    {"image_mean"},
    {"image_processor_type"},
    {"image_seq_length"},
    {"image_std"},
    {"input_data_format"},
    {"model_input_names"},
    {"num_frames"},
    {"pad_size", "null"},
    {"patch_size"},
    {"processor_class"},
    {"resample"},
    {"rescale_factor"},
    {"return_metadata"},
    {"return_tensors"},
    {"size"},
    {"size_divisor", "null"},
    {"transformers_version"},
    {"vision_feature_select_strategy"},
    {"video_metadata"},
    {"video_processor_type"},
};

constexpr KnownField kTokenizerFields[] = {
    // How text is cut and rewritten.
    {"add_prefix_space"},  // read below
    {"add_eos_token", "false"},
    {"do_lower_case", "false"},
    {"split_special_tokens", "false"},
    {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", "false"},
    // What tokenizer.json says as well, or of other uses.
    {"add_bos_token"},
    {"added_tokens_decoder"},
    {"additional_special_tokens"},
    {"auto_map"},
    {"backend"},
    {"bos_token"},
    {"chat_template"},
    {"clean_up_tokenization_spaces"},
    {"cls_token"},
    {"device_map"},
    {"eos_token"},
    {"errors"},
    {"extra_special_tokens"},
    {"fix_mistral_regex"},
    {"from_slow"},
    {"image_token"},
    {"is_local"},
    {"legacy"},
    {"local_files_only"},
    {"mask_token"},
    {"max_length"},
    {"merges_file"},
    {"model_input_names"},
    {"model_max_length"},
    {"model_specific_special_tokens"},
    {"name_or_path"},
    {"pad_to_multiple_of"},
    {"pad_token"},
    {"pad_token_type_id"},
    {"padding_side"},
    {"processor_class"},
    {"return_token_type_ids"},
    {"sep_token"},
    {"sp_model_kwargs"},
    {"spaces_between_special_tokens"},
    {"special_tokens_map_file"},
    {"stride"},
    {"tokenizer_class"},
    {"tokenizer_file"},
    {"transformers_version"},
    {"truncation_side"},
    {"truncation_strategy"},
    {"trust_remote_code"},
    {"unk_token"},
    {"use_default_system_prompt"},
    {"use_fast"},
    {"video_token"},
    {"vocab_file"},
    {"vocab_size"},
};

}  // namespace

std::span<const KnownField> CommonFields() { return kCommonFields; }
std::span<const KnownField> TopFields() { return kTopFields; }
std::span<const KnownField> VideoPoolFields() { return kVideoPoolFields; }
std::span<const KnownField> TextFields() { return kTextFields; }
std::span<const KnownField> RopeFields() { return kRopeFields; }
std::span<const KnownField> TowerFields() { return kTowerFields; }
std::span<const KnownField> ProcessorFields() { return kProcessorFields; }
std::span<const KnownField> PixelFields() { return kPixelFields; }

void CheckTokenizerConfig(const std::filesystem::path& directory) {
  const auto config = ConfigObject::ReadIfThere(directory / "tokenizer_config.json");
  if (!config) return;
  config->CheckFields({kTokenizerFields});
  // Llama's tokenizers begin with a space anyway, as their tokenizer.json says.
  const std::string name = config->String({"tokenizer_class"}, "");
  if (config->Bool({"add_prefix_space"}, false) && !name.starts_with("Llama")) {
    config->Refuse("add_prefix_space",
                   "false: tokenizer.json says whether text begins with a space");
  }
}

}  // namespace sluice
