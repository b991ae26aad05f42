// What tests of the LLaVA families do to checkpoints.
#ifndef SLUICE_TESTS_SUPPORT_LLAVA_CHECKPOINTS_H_
#define SLUICE_TESTS_SUPPORT_LLAVA_CHECKPOINTS_H_

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "llm/vlm.h"
#include "runtime/error.h"
#include "tests/support/checkpoint_copy.h"

namespace sluice {

inline std::shared_ptr<const Vlm> LoadF32(const std::filesystem::path& directory) {
  VlmOptions options;
  options.compute_type = DType::kF32;
  return Vlm::Load(directory, options);
}

// What a model makes of one random frame and a few tokens, logits and features: equal for equal
// weights and settings.
inline std::vector<float> Fingerprint(const std::filesystem::path& directory) {
  const auto vlm = LoadF32(directory);
  const Decoder& decoder = vlm->decoder();
  ExecContext ctx({.num_threads = 1});
  std::mt19937 random(3);
  auto frame = std::make_shared<Frame>();
  frame->width = 90;
  frame->height = 60;
  frame->rgb.resize(3 * 90 * 60);
  for (uint8_t& v : frame->rgb) v = random() >> 24;
  const std::vector<FramePtr> frames = {frame};
  const PreprocessConfig& config = vlm->encoder().preprocess_config();
  Tensor pixels(DType::kF32, {1, 3, config.height, config.width});
  Preprocess(ctx, frames, config, pixels);
  const VisualTokens visual = vlm->encoder().Encode(ctx, pixels, frames);
  const std::vector<int32_t> ids = {5, 17, 80, 3};
  const int64_t newlines = vlm->newline_row().empty() ? 0 : 1, text = visual.size() + newlines;
  Tensor rows(DType::kF32, {text + 4, decoder.hidden_size()});
  ConvertInto(visual.features, rows.view().Slice(0, visual.size()));
  if (newlines > 0) {
    std::memcpy(rows.data<float>() + visual.size() * rows.dim(1), vlm->newline_row().data<float>(),
                vlm->newline_row().SizeBytes());
  }
  decoder.Embed(ctx, ids, rows.view().Slice(text, text + 4));
  KvCache cache(std::make_shared<KvBlockPool>(decoder.kv_geometry(), 0));
  Tensor logits(DType::kF32, {rows.dim(0), decoder.vocab_size()});
  SequenceStep step{&cache, rows, logits};
  decoder.Step(ctx, {&step, 1});
  std::vector<float> print;
  for (const ConstTensorView part : {logits.view(), visual.features.view()}) {
    print.insert(print.end(), part.data<float>(), part.data<float>() + part.shape().NumElements());
  }
  return print;
}

// The one line of the InputError that loading throws.
inline std::string LoadError(const std::filesystem::path& directory) {
  try {
    LoadF32(directory);
  } catch (const InputError& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
    return error.what();
  } catch (const std::exception& error) {
    ADD_FAILURE() << "not an InputError: " << error.what();
  }
  return "";
}

// A value that loading must refuse, and parts of what it says.
struct BadSetting {
  const char* pointer;
  nlohmann::json value;
  std::vector<const char*> expected;
};
inline void ExpectRefused(const CheckpointCopy& copy, const char* file, const BadSetting& bad) {
  copy.EditJson(file, [&](nlohmann::json& object) {
    object[nlohmann::json::json_pointer(bad.pointer)] = bad.value;
  });
  const std::string error = LoadError(copy.directory());
  for (const char* expected : bad.expected) {
    EXPECT_THAT(error, testing::HasSubstr(expected)) << bad.pointer << " = " << bad.value;
  }
}

inline std::string Replaced(std::string text, const std::string& from, const std::string& to) {
  if (text.starts_with(from)) text.replace(0, from.size(), to);
  return text;
}

// Names of tensors in the other published layouts. Ours is D: without "vision_model", decoder below
// "language_model.model".
inline std::string LayoutA(const std::string& name) {
  return Replaced(name, "vision_tower.", "vision_tower.vision_model.");
}
inline std::string LayoutC(const std::string& name) {
  if (name == "language_model.lm_head.weight") return "lm_head.weight";
  return "model." + Replaced(name, "language_model.model.", "language_model.");
}
inline std::string LayoutB(const std::string& name) { return LayoutC(LayoutA(name)); }

}  // namespace sluice

#endif  // SLUICE_TESTS_SUPPORT_LLAVA_CHECKPOINTS_H_
