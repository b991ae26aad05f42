// LLaVA-1.5 (Liu et al. 2023), LLaVA-NeXT and LLaVA-NeXT-Video (Zhang et al. 2024) as Hugging Face
// publishes them: CLIP tower, projector, Llama, Mistral or Qwen2 decoder.
//
// LLaVA-NeXT-Video is made for video: 3 x 336 x 336 centre crops, 12 x 12 mean-pooled tokens a
// frame, nothing between frames or behind them. The other two know images only. A video is for them
// one <image> that is a row of frames:
//   LLaVA-1.5   every frame is preprocessed as an image (centre crop): 24 x 24 tokens;
//   LLaVA-NeXT  every frame is an image's overview, the crop that is the whole picture resized to
//               the tower's input, without finer crops: 24 x 24 tokens; one newline row behind the
//               last frame, as behind an image of a single crop.
#ifndef SLUICE_LLM_FAMILIES_LLAVA_NEXT_H_
#define SLUICE_LLM_FAMILIES_LLAVA_NEXT_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <vector>

#include "llm/families/llama_decoder.h"
#include "llm/vlm.h"
#include "vision/families/clip.h"

namespace sluice {

enum class LlavaGeneration { k15, kNext, kNextVideo };

// Everything config.json and the preprocessor files say, with the defaults of their classes.
struct LlavaNextConfig {
  ClipConfig vision;
  int vision_layers = 0;  // in the file; vision.layers_to_run of them are needed
  LlamaConfig text;
  std::vector<int32_t> eos_ids;  // from text_config; generation_config.json comes first
};

// Both spellings (transformers 4.x and 5.x). Throws InputError naming file and field.
LlavaNextConfig ReadLlavaNextConfig(const std::filesystem::path& directory,
                                    LlavaGeneration generation);

// Throw InputError in one line naming file, tensor or field, expected and found.
std::shared_ptr<const Vlm> LoadLlava15(const std::filesystem::path& directory,
                                       const VlmOptions& options);
std::shared_ptr<const Vlm> LoadLlavaNext(const std::filesystem::path& directory,
                                         const VlmOptions& options);
std::shared_ptr<const Vlm> LoadLlavaNextVideo(const std::filesystem::path& directory,
                                              const VlmOptions& options);

}  // namespace sluice

#endif  // SLUICE_LLM_FAMILIES_LLAVA_NEXT_H_
