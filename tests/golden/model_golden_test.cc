// Whole models against transformers (see make_model_golden.py): every intermediate result, the
// logits, the prompt ids and 64 greedy tokens.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "llm/generator.h"
#include "llm/vlm.h"
#include "runtime/safetensors.h"
#include "runtime/transfer.h"
#include "tests/support/gpu_testing.h"

namespace sluice {
namespace {

const std::filesystem::path kSource = SLUICE_SOURCE_DIR;

struct GoldenCase {
  std::string name;
  std::filesystem::path checkpoint;
  std::filesystem::path golden;
  DType dtype;
  Device device;
};

std::ostream& operator<<(std::ostream& os, const GoldenCase& c) {
  return os << c.name << " " << Name(c.dtype) << " " << Name(c.device);
}

class ModelGoldenTest : public ::testing::TestWithParam<GoldenCase> {
 protected:
  void SetUp() override {
    if (::sluice::testing::SkippedWithout(GetParam().device)) return;
    golden_ = SafetensorsFile::Open(GetParam().golden);
    VlmOptions options;
    options.compute_type = GetParam().dtype;
    options.device = GetParam().device;
    vlm_ = Vlm::Load(GetParam().checkpoint, options);
    const ConstTensorView frames = golden_->tensors().at("frames");
    const int height = frames.dim(1), width = frames.dim(2);
    for (int64_t i = 0; i < frames.dim(0); ++i) {
      auto frame = std::make_shared<Frame>();
      frame->width = width;
      frame->height = height;
      const uint8_t* pixels = frames.data<uint8_t>() + i * height * width * 3;
      frame->rgb.assign(pixels, pixels + height * width * 3);
      frame->index = i;
      frame->time = MediaTime::FromSeconds(0.5 * i);
      frames_.push_back(frame);
    }
  }

  std::vector<int32_t> GoldenIds(const std::string& name) const {
    const ConstTensorView ids = golden_->tensors().at(name);
    return std::vector<int32_t>(ids.data<int32_t>(), ids.data<int32_t>() + ids.dim(0));
  }

  // Compares the rows that the golden file kept of result `name`.
  //   f32: relative L2 <= 1e-5 and max |difference| <= 5e-5 max |reference|: sums of at most some
  //   thousand products, in another order. bf16: relative L2 <= 1.5 E + 1e-4, where E is what the
  //   reference itself loses in bf16 (the rows kept are a sample, hence the additional half of E),
  //   and every row's cosine >= 0.999.
  void Compare(const std::string& name, ConstTensorView value) {
    const auto found = golden_->tensors().find(name);
    if (found == golden_->tensors().end()) return;
    ++compared_;
    const ConstTensorView expected = found->second;
    const auto rows =
        nlohmann::json::parse(golden_->metadata().at("rows." + name)).get<std::vector<int64_t>>();
    ASSERT_EQ(value.dim(1), expected.dim(1)) << name;
    double error = 0, norm = 0, max_error = 0, max_value = 0;
    for (size_t r = 0; r < rows.size(); ++r) {
      ASSERT_LT(rows[r], value.dim(0)) << name;
      const float* got = value.data<float>() + rows[r] * value.stride0();
      const float* want = expected.data<float>() + r * expected.dim(1);
      double dot = 0, got2 = 0, want2 = 0;
      for (int64_t c = 0; c < expected.dim(1); ++c) {
        const double difference = got[c] - want[c];
        error += difference * difference;
        max_error = std::max(max_error, std::abs(difference));
        max_value = std::max(max_value, std::abs(double{want[c]}));
        dot += double{got[c]} * want[c];
        got2 += double{got[c]} * got[c];
        want2 += double{want[c]} * want[c];
      }
      norm += want2;
      EXPECT_GE(dot / std::sqrt(got2 * want2), 0.999) << name << " row " << rows[r];
    }
    const double relative = std::sqrt(error / norm);
    if (GetParam().dtype == DType::kF32) {
      EXPECT_LE(relative, 1e-5) << name;
      EXPECT_LE(max_error, 5e-5 * max_value) << name;
    } else {
      const double noise = std::stod(golden_->metadata().at("bf16." + name));
      EXPECT_LE(relative, 1.5 * noise + 1e-4) << name;
      EXPECT_LE(relative, 2.5e-2) << name;
    }
  }

  int NewlineRows() const { return vlm_->newline_row().empty() ? 0 : 1; }

  // The prompt's embeddings with the visual rows in place: [S, E] f32.
  Tensor PromptEmbeddings(ExecContext& ctx, bool compare) {
    const PreprocessConfig& config = vlm_->encoder().preprocess_config();
    Tensor pixels(DType::kF32,
                  {static_cast<int64_t>(frames_.size()), 3, config.height, config.width});
    Preprocess(ctx.host(), frames_, config, pixels);
    if (compare) {
      const ConstTensorView sample = golden_->tensors().at("pixels.sample");
      const int64_t step = std::max<int64_t>(1, pixels.shape().NumElements() / 4096);
      for (int64_t i = 0; i < sample.dim(0); ++i) {
        EXPECT_EQ(pixels.data<float>()[i * step], sample.data<float>()[i]) << "pixel " << i * step;
      }
    }
    TensorProbe probe;
    if (compare)
      probe = [&](std::string_view name, ConstTensorView value) {
        Compare("vision/" + std::string(name), value);
      };
    VisualTokens visual = vlm_->encoder().Encode(ctx, TransferTo(ctx, pixels, ctx.device()),
                                                 frames_, {.probe = probe});
    visual.features = TransferTo(ctx, visual.features, Device::kCpu);

    const std::vector<int32_t> ids = GoldenIds("input_ids");
    const int32_t video = *vlm_->tokenizer().TokenToId(vlm_->prompt_format().placeholder());
    const int64_t width = vlm_->decoder().hidden_size();
    const Tensor embedded(DType::kF32, {static_cast<int64_t>(ids.size()), width}, ctx.device());
    vlm_->decoder().Embed(ctx, ids, embedded);
    Tensor embeddings = TransferTo(ctx, embedded, Device::kCpu);
    int64_t next = 0;
    for (size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] != video) continue;
      EXPECT_LT(next, visual.size() + NewlineRows());
      const float* row = next < visual.size() ? visual.features.data<float>() + next * width
                                              : vlm_->newline_row().data<float>();
      std::copy(row, row + width, embeddings.data<float>() + i * width);
      ++next;
    }
    EXPECT_EQ(next, visual.size() + NewlineRows());
    return embeddings;
  }

  std::shared_ptr<const SafetensorsFile> golden_;
  std::shared_ptr<const Vlm> vlm_;
  std::vector<FramePtr> frames_;
  int compared_ = 0;
};

TEST_P(ModelGoldenTest, EncodesThePromptToTheReferenceIds) {
  const PromptFormat& format = vlm_->prompt_format();
  std::string text = format.Render({}, golden_->metadata().at("question"));
  const std::string placeholder(format.placeholder());
  const size_t at = text.find(placeholder);
  ASSERT_NE(at, std::string::npos);
  const int count = frames_.size() * vlm_->encoder().tokens_per_frame() + NewlineRows();
  std::string placeholders;
  for (int i = 0; i < count; ++i) placeholders += placeholder;
  text.replace(at, placeholder.size(), placeholders);
  EXPECT_EQ(vlm_->tokenizer().Encode(text, SpecialTokens::kMatch, /*add_special=*/true),
            GoldenIds("input_ids"));
}

// What a session feeds: the prefix, the visual rows, the question.
TEST_P(ModelGoldenTest, PartsOfAStreamGiveTheReferenceIds) {
  const PromptFormat& format = vlm_->prompt_format();
  std::vector<int32_t> ids = format.EncodePrefix(vlm_->tokenizer());
  const int count = frames_.size() * vlm_->encoder().tokens_per_frame() + NewlineRows();
  ids.insert(ids.end(), count, *vlm_->tokenizer().TokenToId(format.placeholder()));
  const std::vector<int32_t> question = format.EncodeQuestion(
      vlm_->tokenizer(), golden_->metadata().at("question"), /*follow_up=*/false);
  ids.insert(ids.end(), question.begin(), question.end());
  EXPECT_EQ(ids, GoldenIds("input_ids"));
}

TEST_P(ModelGoldenTest, EveryLayerMatchesTheReference) {
  ExecContext ctx({.num_threads = 2, .device = GetParam().device});
  Tensor prompt = PromptEmbeddings(ctx, /*compare=*/true);
  Compare("decoder/inputs", prompt);
  auto pool = std::make_shared<KvBlockPool>(vlm_->decoder().kv_geometry(), 0);
  KvCache cache(pool);
  Tensor logits(DType::kF32, {prompt.dim(0), vlm_->decoder().vocab_size()}, ctx.device());
  SequenceStep step{&cache, prompt, logits};
  vlm_->decoder().Step(ctx, {&step, 1}, [&](std::string_view name, ConstTensorView value) {
    Compare("decoder/" + std::string(name), value);
  });
  Compare("decoder/logits", TransferTo(ctx, logits, Device::kCpu));
  // Everything in the file except frames, ids (2) and the pixels' sample was seen; the logits
  // possibly twice.
  EXPECT_GE(compared_, static_cast<int>(golden_->tensors().size()) - 4);
}

TEST_P(ModelGoldenTest, GreedyTokensEqualTheReference) {
  if (GetParam().dtype != DType::kF32) GTEST_SKIP() << "equality of ids is a criterion in f32 only";
  ExecContext ctx({.num_threads = 2, .device = GetParam().device});
  Tensor prompt = PromptEmbeddings(ctx, /*compare=*/false);
  auto pool = std::make_shared<KvBlockPool>(vlm_->decoder().kv_geometry(), 0);
  KvCache cache(pool);
  GenerateOptions options;
  options.max_new_tokens = 64;
  std::vector<int32_t> expected = GoldenIds("greedy_ids");
  const std::vector<int32_t>& stops = vlm_->generation_defaults().stop_ids;
  if (!expected.empty() && std::find(stops.begin(), stops.end(), expected.back()) != stops.end())
    expected.pop_back();
  const Generated generated = Generate(ctx, *vlm_, cache, TransferTo(ctx, prompt, ctx.device()),
                                       GoldenIds("input_ids"), options, nullptr);
  EXPECT_EQ(generated.ids, expected);
}

std::vector<GoldenCase> Cases() {
  std::vector<GoldenCase> cases;
  for (const auto& [dtype, device] :
       {std::pair(DType::kF32, Device::kCpu), std::pair(DType::kBF16, Device::kCpu),
        std::pair(DType::kF32, Device::kCuda), std::pair(DType::kBF16, Device::kCuda)}) {
    for (const char* name : {"tiny_tied", "tiny_untied", "tiny_next_video", "tiny_next_mistral",
                             "tiny_next_llama3", "tiny_next_qwen", "tiny_llava15"}) {
      cases.push_back({name, kSource / "tests/golden" / name,
                       kSource / "tests/golden" / (std::string(name) + ".golden.safetensors"),
                       dtype, device});
    }
    cases.push_back({"sluice_mini", kSource / "models/sluice-mini",
                     kSource / "tests/golden/sluice_mini.golden.safetensors", dtype, device});
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Models, ModelGoldenTest, ::testing::ValuesIn(Cases()),
                         [](const auto& info) {
                           return info.param.name + "_" + sluice::Name(info.param.dtype) +
                                  (info.param.device == Device::kCuda ? "_cuda" : "");
                         });

}  // namespace
}  // namespace sluice
