#include "llm/generation_config.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "llm/config_object.h"
#include "runtime/error.h"

namespace sluice {
namespace {

constexpr int64_t kMostIds = int64_t{1} << 22;
constexpr size_t kMostStopStrings = 64;

constexpr KnownField kFields[] = {
    // Read below.
    {"eos_token_id"},
    {"stop_strings"},
    {"do_sample"},
    {"temperature"},
    {"top_k"},
    {"top_p"},
    {"min_p"},
    {"typical_p"},
    {"epsilon_cutoff"},
    {"eta_cutoff"},
    {"repetition_penalty"},
    {"max_new_tokens"},
    {"min_new_tokens"},
    {"min_length"},
    {"suppress_tokens"},
    {"begin_suppress_tokens"},
    {"bad_words_ids"},
    {"no_repeat_ngram_size"},
    // Of no effect on the ids of one answer without beams. Every answer here has a max_new_tokens,
    // before which a max_length recedes.
    {"_commit_hash"},
    {"_from_model_config"},
    {"_name_or_path"},
    {"transformers_version"},
    {"bos_token_id"},
    {"pad_token_id"},
    {"decoder_start_token_id"},
    {"max_length"},
    {"early_stopping"},
    {"length_penalty"},
    {"low_memory"},
    {"renormalize_logits"},
    {"use_cache"},
    {"cache_config"},
    {"max_cache_len"},
    {"max_matching_ngram_size"},
    {"num_assistant_tokens"},
    {"num_assistant_tokens_schedule"},
    {"assistant_confidence_threshold"},
    {"assistant_lookbehind"},
    {"target_lookbehind"},
    {"compile_config"},
    {"disable_compile"},
    {"prefill_chunk_size"},
    {"output_attentions"},
    {"output_hidden_states"},
    {"output_logits"},
    {"output_scores"},
    {"return_dict_in_generate"},
    {"return_legacy_cache"},
    // Not followed.
    {"cache_implementation",
     R"("dynamic"|"static"|"offloaded"|"offloaded_static"|"hybrid"|"sliding_window"|"paged")"},
    {"is_assistant", "false"},
    {"num_beams", "1"},
    {"num_beam_groups", "1"},
    {"diversity_penalty", "0"},
    {"num_return_sequences", "1"},
    {"constraints", "null"},
    {"force_words_ids", "null"},
    {"forced_bos_token_id", "null"},
    {"forced_eos_token_id", "null"},
    {"force_bos_token_to_be_generated", "false"},
    {"remove_invalid_values", "false"},
    {"exponential_decay_length_penalty", "null"},
    {"sequence_bias", "null"},
    {"encoder_repetition_penalty", "1"},
    {"encoder_no_repeat_ngram_size", "0"},
    {"guidance_scale", "1"},
    {"penalty_alpha", "0"},
    {"dola_layers", "null"},
    {"top_h", "null"},
    {"token_healing", "false"},
    {"watermarking_config", "null"},
    {"max_time", "null"},
    {"use_mtp", "false"},
    {"prompt_lookup_num_tokens", "null"},
    {"assistant_early_exit", "null"},
    {"assistant_ensemble_weight", "null"},
    {"speculation_type", "null"},
    {"continuous_batching_config", "null"},
};

// A string or a list of them.
std::vector<std::string> ReadStrings(const ConfigObject& file, const char* key) {
  std::vector<std::string> strings;
  const nlohmann::json* value = file.Find({key});
  if (!value) return strings;
  const nlohmann::json list = value->is_array() ? *value : nlohmann::json::array({*value});
  for (const nlohmann::json& string : list) {
    if (!string.is_string() || string.get_ref<const std::string&>().empty() ||
        list.size() > kMostStopStrings) {
      file.Refuse(key, "a string or a list of at most " + std::to_string(kMostStopStrings) +
                           ", none of them empty");
    }
    strings.push_back(string.get<std::string>());
  }
  return strings;
}

std::vector<std::vector<int32_t>> ReadWords(const ConfigObject& file, const char* key,
                                            int64_t vocab_size) {
  std::vector<std::vector<int32_t>> words;
  const nlohmann::json* value = file.Find({key});
  if (!value) return words;
  const std::string expected =
      "a list of lists of token ids below vocab_size " + std::to_string(vocab_size);
  if (!value->is_array() || value->empty()) file.Refuse(key, expected);
  for (const nlohmann::json& word : *value) {
    if (!word.is_array() || word.empty()) file.Refuse(key, expected);
    std::vector<int32_t>& ids = words.emplace_back();
    for (const nlohmann::json& id : word) {
      if (!id.is_number_unsigned() || id.get<uint64_t>() >= static_cast<uint64_t>(vocab_size)) {
        file.Refuse(key, expected);
      }
      ids.push_back(id.get<int32_t>());
    }
  }
  return words;
}

LogitRules ReadRules(const ConfigObject& file, const std::vector<int32_t>& stop_ids,
                     int64_t vocab_size) {
  LogitRules rules;
  rules.suppress = file.TokenIds("suppress_tokens");
  rules.begin_suppress = file.TokenIds("begin_suppress_tokens");
  rules.bad_words = ReadWords(file, "bad_words_ids", vocab_size);
  // As generate(): a stop id alone is no bad word.
  std::erase_if(rules.bad_words, [&](const std::vector<int32_t>& word) {
    return word.size() == 1 &&
           std::find(stop_ids.begin(), stop_ids.end(), word[0]) != stop_ids.end();
  });
  rules.no_repeat_ngram = file.Int({"no_repeat_ngram_size"}, 0, 0, kMostIds);
  rules.min_new_tokens = file.Int({"min_new_tokens"}, 0, 0, kMostIds);
  // min_new_tokens takes precedence.
  const int64_t min_length = file.Int({"min_length"}, 0, 0, int64_t{1} << 30);
  if (!file.Has("min_new_tokens")) rules.min_positions = min_length;
  return rules;
}

}  // namespace

GenerationDefaults ReadGenerationDefaults(const std::filesystem::path& directory,
                                          const std::vector<int32_t>& class_stop_ids,
                                          int64_t vocab_size) {
  const std::filesystem::path path = directory / "generation_config.json";
  GenerationDefaults defaults;
  defaults.stop_ids = class_stop_ids;
  if (const auto file = ConfigObject::ReadIfThere(path)) {
    file->CheckFields({kFields});
    if (file->Has("eos_token_id")) defaults.stop_ids = file->TokenIds("eos_token_id");
    defaults.stop_strings = ReadStrings(*file, "stop_strings");
    defaults.do_sample = file->Bool({"do_sample"}, false);
    defaults.temperature = file->Number({"temperature"}, 1, 0, 1000);
    defaults.top_p = file->Number({"top_p"}, 1, 1e-6, 1);
    defaults.top_k = file->Int({"top_k"}, defaults.top_k, 0, kMostIds);
    defaults.repetition_penalty = file->Number({"repetition_penalty"}, 1, 1e-3, 1000);
    if (file->Has("max_new_tokens")) {
      defaults.max_new_tokens = file->Int({"max_new_tokens"}, std::nullopt, 1, 1 << 20);
    }
    defaults.limits.min_p = file->Number({"min_p"}, 0, 0, 1);
    defaults.limits.typical_p = file->Number({"typical_p"}, 1, 1e-6, 1);
    defaults.limits.epsilon = file->Number({"epsilon_cutoff"}, 0, 0, 0.999999);
    defaults.limits.eta = file->Number({"eta_cutoff"}, 0, 0, 0.999999);
    defaults.rules = ReadRules(*file, defaults.stop_ids, vocab_size);
  }
  if (defaults.stop_ids.empty()) {
    throw InputError("[vlm] " + path.string() +
                     ": eos_token_id must name the id that ends an answer, got nothing here nor in "
                     "config.json's text_config");
  }
  for (const int32_t id : defaults.stop_ids) {
    if (id >= vocab_size) {
      throw InputError("[vlm] " + path.string() + ": eos_token_id must be less than vocab_size " +
                       std::to_string(vocab_size) + ", got " + std::to_string(id));
    }
  }
  return defaults;
}

}  // namespace sluice
