// What fields of generation_config.json make of an answer and of a draw, against generate() of
// transformers (see make_model_golden.py, "rules").
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "llm/generator.h"
#include "llm/logit_rules.h"
#include "llm/vlm.h"
#include "runtime/safetensors.h"
#include "tests/support/checkpoint_copy.h"

namespace sluice {
namespace {

const std::filesystem::path kSource = SLUICE_SOURCE_DIR;

nlohmann::json ReadRules(const char* file) {
  std::ifstream in(kSource / "tests/golden" / file);
  return nlohmann::json::parse(in);
}

// The golden file's prompt, its frames as the visual rows.
struct Prompt {
  std::vector<int32_t> ids;
  Tensor rows;  // [S, E] f32

  Prompt(ExecContext& ctx, const Vlm& vlm, const std::filesystem::path& golden) {
    const auto file = SafetensorsFile::Open(golden);
    const ConstTensorView pictures = file->tensors().at("frames");
    std::vector<FramePtr> frames;
    for (int64_t i = 0; i < pictures.dim(0); ++i) {
      auto frame = std::make_shared<Frame>();
      frame->height = static_cast<int>(pictures.dim(1));
      frame->width = static_cast<int>(pictures.dim(2));
      const int64_t bytes = pictures.dim(1) * pictures.dim(2) * 3;
      const uint8_t* pixels = pictures.data<uint8_t>() + i * bytes;
      frame->rgb.assign(pixels, pixels + bytes);
      frame->index = i;
      frames.push_back(frame);
    }
    const PreprocessConfig& config = vlm.encoder().preprocess_config();
    Tensor pixels(DType::kF32, {pictures.dim(0), 3, config.height, config.width});
    Preprocess(ctx, frames, config, pixels);
    const VisualTokens visual = vlm.encoder().Encode(ctx, pixels, frames);

    const ConstTensorView golden_ids = file->tensors().at("input_ids");
    ids.assign(golden_ids.data<int32_t>(), golden_ids.data<int32_t>() + golden_ids.dim(0));
    const int64_t width = vlm.decoder().hidden_size();
    rows = Tensor(DType::kF32, {static_cast<int64_t>(ids.size()), width});
    vlm.decoder().Embed(ctx, ids, rows);
    const int32_t placeholder = *vlm.tokenizer().TokenToId(vlm.prompt_format().placeholder());
    const auto first = std::find(ids.begin(), ids.end(), placeholder) - ids.begin();
    ConvertInto(visual.features, rows.view().Slice(first, first + visual.size()));
    std::copy_n(vlm.newline_row().data<float>(), width,
                rows.data<float>() + (first + visual.size()) * width);
  }
};

struct Case {
  const char* name;
  const char* checkpoint;
  const char* golden;
  const char* rules;
};

class GenerationGoldenTest : public ::testing::TestWithParam<Case> {};

TEST_P(GenerationGoldenTest, EveryFieldThatIsFollowedGivesTheReferenceIds) {
  const Case& param = GetParam();
  const nlohmann::json rules = ReadRules(param.rules);
  CheckpointCopy copy(kSource / param.checkpoint);
  ExecContext ctx({.num_threads = 2});
  std::unique_ptr<Prompt> prompt;
  for (const nlohmann::json& row : rules["answers"]) {
    nlohmann::json config = row["fields"];
    config["eos_token_id"] = row["stop"];
    copy.WriteText("generation_config.json", config.dump());
    VlmOptions options;
    options.compute_type = DType::kF32;
    const auto vlm = Vlm::Load(copy.directory(), options);
    if (!prompt) {
      prompt = std::make_unique<Prompt>(ctx, *vlm, kSource / "tests/golden" / param.golden);
    }
    const GenerationDefaults& defaults = vlm->generation_defaults();
    GenerateOptions generate;
    generate.max_new_tokens = defaults.max_new_tokens.value_or(24);
    generate.sampling.repetition_penalty = defaults.repetition_penalty;
    KvCache cache(std::make_shared<KvBlockPool>(vlm->decoder().kv_geometry(), 0));
    Tensor rows(DType::kF32, prompt->rows.shape());
    ConvertInto(prompt->rows, rows);
    std::vector<int32_t> expected = row["ids"];
    if (expected.back() == row["stop"]) expected.pop_back();
    EXPECT_EQ(Generate(ctx, *vlm, cache, std::move(rows), prompt->ids, generate, nullptr).ids,
              expected)
        << row["fields"];
  }
}

INSTANTIATE_TEST_SUITE_P(
    Models, GenerationGoldenTest,
    ::testing::Values(Case{"tiny_tied", "tests/golden/tiny_tied", "tiny_tied.golden.safetensors",
                           "rules_tiny_tied.json"},
                      Case{"sluice_mini", "models/sluice-mini", "sluice_mini.golden.safetensors",
                           "rules_sluice_mini.json"}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(DrawGoldenTest, LimitsLeaveTheIdsThatTheReferenceLeaves) {
  const nlohmann::json rules = ReadRules("rules_tiny_tied.json");
  ASSERT_EQ(rules["draws"].size(), 10u);
  for (const nlohmann::json& row : rules["draws"]) {
    const nlohmann::json& given = row["limits"];
    SamplingOptions options;
    options.temperature = rules["temperature"];
    options.top_k = given.value("top_k", 0);
    options.top_p = given.value("top_p", 1.0f);
    DrawLimits limits;
    limits.min_p = given.value("min_p", 0.0);
    limits.typical_p = given.value("typical_p", 1.0);
    limits.epsilon = given.value("epsilon_cutoff", 0.0);
    limits.eta = given.value("eta_cutoff", 0.0);
    std::vector<float> logits = row["logits"];
    Sampler sampler(options, static_cast<int32_t>(logits.size()), limits);
    std::vector<int32_t> drawn;
    for (int i = 0; i < 4000; ++i) {
      const int32_t id = sampler.Sample(logits, {});
      if (std::find(drawn.begin(), drawn.end(), id) == drawn.end()) drawn.push_back(id);
    }
    std::sort(drawn.begin(), drawn.end());
    const std::vector<int32_t> kept = row["kept"];
    // The rarest may not come in as many draws; nothing else may come at all.
    EXPECT_TRUE(std::includes(kept.begin(), kept.end(), drawn.begin(), drawn.end())) << row;
    double total = 0;
    for (const int32_t id : kept) total += std::exp(logits[id] / options.temperature);
    for (const int32_t id : kept) {
      if (std::exp(logits[id] / options.temperature) / total < 0.005) continue;
      EXPECT_TRUE(std::binary_search(drawn.begin(), drawn.end(), id)) << id << " of " << row;
    }
  }
}

}  // namespace
}  // namespace sluice
