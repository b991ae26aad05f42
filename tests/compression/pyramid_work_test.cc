// How much PyramidDrop saves in a decoder with the layers of LLaVA-NeXT-7B, counted while it runs.
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "compression/pyramid_drop.h"
#include "tests/support/random_decoder.h"

namespace sluice {
namespace {

constexpr int kLayers = 32;

// Operations by kind.
struct Work {
  double products = 0, attention = 0, ranking = 0;
  double Sum() const { return products + attention + ranking; }
};

Work Traced(const Tracer& tracer) {
  const auto flops = [&](const char* stage) {
    const auto found = tracer.stages().find(stage);
    return found == tracer.stages().end() ? 0 : found->second.flops;
  };
  return {flops("decoder/qkv") + flops("decoder/out") + flops("decoder/mlp"),
          flops("decoder/attention"), flops("decoder/rank")};
}

// What a prefill of visual rows and the token that asks costs. The last layer is whole, as the
// paper counts, or as the decoder runs it where nobody looks: only its last row behind the keys
// and values.
Work Formula(const LlamaConfig& c, const PyramidPlan& plan, int64_t visual, bool whole) {
  const double width = c.hidden_size, q = double{1} * c.num_heads * c.head_dim,
               kv = double{1} * c.num_kv_heads * c.head_dim;
  const double qkv = 2 * width * (q + 2 * kv), rest = 2 * width * (q + 3.0 * c.intermediate_size);
  const std::vector<int64_t> rows = plan.LayerRows(plan.StageSizes(visual), c.num_layers);
  Work work;
  for (int layer = 0; layer < c.num_layers; ++layer) {
    const auto n = static_cast<double>(rows[layer] + 1);
    const bool cut = !whole && layer + 1 == c.num_layers;
    work.products += n * qkv + (cut ? 1 : n) * rest;
    work.attention += 4 * q * (cut ? n : n * (n + 1) / 2);
    if (layer == 0 || rows[layer] == rows[layer - 1]) continue;
    const auto left = static_cast<double>(rows[layer - 1] - rows[layer]);
    work.products += left * 2 * width * kv + 2 * width * q;  // keys to rank, the query
    work.ranking += 2 * q * (n + left);
  }
  return work;
}

LlamaConfig Vicuna7B() {
  LlamaConfig config;
  config.hidden_size = 4096;
  config.intermediate_size = 11008;
  config.num_layers = kLayers;
  config.num_heads = config.num_kv_heads = 32;
  config.head_dim = 128;
  config.vocab_size = 32064;
  config.max_positions = 4096;
  config.qkv_bias = false;
  config.tie_word_embeddings = true;
  return config;
}

LlamaConfig Mistral7B() {
  LlamaConfig config = Vicuna7B();
  config.intermediate_size = 14336;
  config.num_kv_heads = 8;
  return config;
}

// The same layers, 32 times narrower: the shares of the products stay.
LlamaConfig Narrow(LlamaConfig config) {
  config.hidden_size /= 32;
  config.intermediate_size /= 32;
  config.head_dim /= 32;
  config.vocab_size = 64;
  return config;
}

PyramidPlan Published(double lambda) {
  PyramidOptions options;
  options.lambda = lambda;
  options.quota = PyramidQuota::kGlobal;
  return PyramidPlan::Make(options, kLayers);
}

// Prefills one picture of 576 rows and a last token.
Work Prefill(const RandomDecoder& model, const PyramidPlan& plan, bool whole) {
  constexpr int64_t kVisual = 576;
  const int64_t width = model.decoder->hidden_size();
  std::mt19937 random(5);
  std::normal_distribution<float> normal(0, 1);
  const Tensor rows(DType::kF32, {kVisual + 1, width});
  for (int64_t i = 0; i < rows.shape().NumElements(); ++i) rows.data<float>()[i] = normal(random);
  const std::vector<int32_t> frames(kVisual, 0);
  PyramidDrop drop(plan, frames, 0);
  ExecContext ctx({.num_threads = 1});
  KvCache cache(std::make_shared<KvBlockPool>(model.decoder->kv_geometry(), 0), KvPositions::kRows);
  const Tensor logits(DType::kF32, {1, model.decoder->vocab_size()});
  SequenceStep step{&cache, rows, logits, &drop};
  // A probe is shown whole layers.
  DecoderProbe probe;
  if (whole) probe = [](std::string_view, ConstTensorView) {};
  model.decoder->Step(ctx, {&step, 1}, probe);
  EXPECT_EQ(drop.stage_sizes(), plan.StageSizes(kVisual));
  return Traced(ctx.tracer());
}

class PyramidWorkTest : public testing::TestWithParam<bool> {
 protected:
  const LlamaConfig config_ = GetParam() ? Mistral7B() : Vicuna7B();
};

TEST_P(PyramidWorkTest, TheDecoderDoesWhatTheFormulaSays) {
  const RandomDecoder model(Narrow(config_));
  for (const double lambda : {1.0, 0.5}) {
    const PyramidPlan plan = Published(lambda);
    for (const bool whole : {true, false}) {
      const Work want = Formula(Narrow(config_), plan, 576, whole),
                 got = Prefill(model, plan, whole);
      EXPECT_NEAR(got.products / want.products, 1, 1e-9) << lambda << whole;
      EXPECT_NEAR(got.attention / want.attention, 1, 1e-9) << lambda << whole;
      EXPECT_NEAR(got.ranking, want.ranking, 1e-9 * want.ranking) << lambda << whole;
    }
  }
}

TEST_P(PyramidWorkTest, HalvingAtThePublishedBoundariesSavesMoreThanHalf) {
  // Of the work for visual rows: without what the token that asks costs on its own.
  const auto saved = [&](int64_t visual, bool whole) {
    const double text = Formula(config_, Published(1), 0, whole).Sum();
    return 1 - (Formula(config_, Published(0.5), visual, whole).Sum() - text) /
                   (Formula(config_, Published(1), visual, whole).Sum() - text);
  };
  for (const int64_t visual : {576, 2880, 5184}) {  // LLaVA-1.5, 5 and 9 crops
    EXPECT_GE(saved(visual, true), 0.53) << visual;
    // Of a last layer that is hardly run in the first place, less can be saved.
    EXPECT_GE(saved(visual, false), 0.52) << visual;
    RecordProperty("saved_" + std::to_string(visual), std::to_string(saved(visual, true)));
    RecordProperty("saved_cut_" + std::to_string(visual), std::to_string(saved(visual, false)));
  }
}

INSTANTIATE_TEST_SUITE_P(Decoders, PyramidWorkTest, testing::Bool(),
                         [](const auto& info) { return info.param ? "Mistral7B" : "Vicuna7B"; });

}  // namespace
}  // namespace sluice
