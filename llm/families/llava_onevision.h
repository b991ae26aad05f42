// LLaVA-OneVision (Li et al. 2024) as Hugging Face publishes it: SigLIP tower, projector, pooling,
// Qwen2 decoder.
#ifndef SLUICE_LLM_FAMILIES_LLAVA_ONEVISION_H_
#define SLUICE_LLM_FAMILIES_LLAVA_ONEVISION_H_

#include <filesystem>
#include <memory>
#include <vector>

#include "llm/families/llama_decoder.h"
#include "llm/vlm.h"
#include "vision/families/siglip.h"

namespace sluice {

// Everything config.json and the preprocessor files say, with the defaults of their classes.
struct LlavaOnevisionConfig {
  TowerConfig vision;
  int vision_layers = 0;  // in the file; vision.layers_to_run of them are needed
  LlamaConfig text;
  std::vector<int32_t> eos_ids;  // from text_config; generation_config.json comes first
};

// Both spellings (transformers 4.x and 5.x). Throws InputError naming file and field.
LlavaOnevisionConfig ReadLlavaOnevisionConfig(const std::filesystem::path& directory);

// Throws InputError in one line naming file, tensor or field, expected and found.
std::shared_ptr<const Vlm> LoadLlavaOnevision(const std::filesystem::path& directory,
                                              const VlmOptions& options);

}  // namespace sluice

#endif  // SLUICE_LLM_FAMILIES_LLAVA_ONEVISION_H_
