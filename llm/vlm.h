// A published vision-language checkpoint, loaded: configuration, tokenizer, prompt format, encoder,
// decoder. Const and shareable between all sessions of the process.
#ifndef SLUICE_LLM_VLM_H_
#define SLUICE_LLM_VLM_H_

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "llm/attention_calibration.h"
#include "llm/decoder.h"
#include "llm/generation_config.h"
#include "llm/prompt.h"
#include "llm/tokenizer.h"
#include "runtime/tensor.h"
#include "runtime/weight_format.h"
#include "vision/vision_encoder.h"

namespace sluice {

struct VlmOptions {
  DType compute_type = DType::kBF16;  // or f32
  Device device = Device::kCpu;       // where the weights lie and everything runs
  // Of the projections of the tower and the decoder's layers. Norms, embeddings and the lm_head
  // stay as they are. 8 bits need a GPU and bf16.
  WeightFormat weights = WeightFormat::kPlain;
  AttentionChoice attention = {};  // exact, quantised, or in each layer as calibrated
};

struct VlmInfo {
  std::string name;          // the directory's, or that of the hub's repository
  std::string architecture;  // "LlavaOnevisionForConditionalGeneration"
  std::string notice;        // what users must know of it: notice.txt, one line; may be empty
  int64_t parameters = 0;
  int64_t file_bytes = 0;
  int64_t weight_bytes = 0;  // in the compute dtype, of projections as `weights` says
  DType file_type = DType::kF32;
  DType compute_type = DType::kF32;
  WeightFormat weights = WeightFormat::kPlain;
  Device device = Device::kCpu;
  double load_seconds = 0;
  std::string fingerprint;  // Checkpoint::Fingerprint and that of config.json
  LayerPrecisions attention;
};

class Vlm {
 public:
  // Throws InputError in one line naming file, tensor or field, expected and found.
  static std::shared_ptr<const Vlm> Load(const std::filesystem::path& directory,
                                         const VlmOptions& options);
  virtual ~Vlm() = default;

  virtual const VlmInfo& info() const = 0;
  virtual const Tokenizer& tokenizer() const = 0;
  virtual const PromptFormat& prompt_format() const = 0;
  virtual const VisionEncoder& encoder() const = 0;
  virtual const Decoder& decoder() const = 0;
  virtual const GenerationDefaults& generation_defaults() const = 0;
  // The row that follows the last frame of a video, [E] f32 in host memory (`image_newline`); empty
  // for families that put none there.
  virtual ConstTensorView newline_row() const = 0;
};

}  // namespace sluice

#endif  // SLUICE_LLM_VLM_H_
