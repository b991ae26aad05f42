// What a checkpoint's generation_config.json says of how answers are written. Its fields mean what
// they mean to generate() of transformers; those that would change an answer and are not followed
// are refused.
#ifndef SLUICE_LLM_GENERATION_CONFIG_H_
#define SLUICE_LLM_GENERATION_CONFIG_H_

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "llm/logit_rules.h"

namespace sluice {

// Sampling and length are what an answer gets unless its options say otherwise; the rest holds for
// every answer.
struct GenerationDefaults {
  std::vector<int32_t> stop_ids;
  std::vector<std::string> stop_strings;  // an answer ends behind one, unless its options name some
  bool do_sample = false;
  float temperature = 1.0f, top_p = 1.0f;
  int top_k = 50;  // that of generate(), where a file says nothing
  float repetition_penalty = 1.0f;
  std::optional<int> max_new_tokens;
  LogitRules rules;
  DrawLimits limits;
};

// class_stop_ids: where the file names none. Throws InputError in one line naming file and field.
GenerationDefaults ReadGenerationDefaults(const std::filesystem::path& directory,
                                          const std::vector<int32_t>& class_stop_ids,
                                          int64_t vocab_size);

}  // namespace sluice

#endif  // SLUICE_LLM_GENERATION_CONFIG_H_
