#include "llm/families/llama_decoder.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "runtime/error.h"

namespace sluice {
namespace {

constexpr int64_t kWidth = 64, kVocabulary = 320, kMaxPositions = 4096;

std::optional<std::string> Canonical(const std::string& name) {
  const std::string prefix = "language_model.model.";
  return name.starts_with(prefix) ? "language_model." + name.substr(prefix.size()) : name;
}

// The decoder of the random checkpoint beside the golden values (3 layers, 4 heads over 2).
std::unique_ptr<Decoder> LoadTiny(DType dtype, std::vector<AttentionPrecision> attention = {}) {
  const Checkpoint checkpoint =
      Checkpoint::Open(std::filesystem::path(SLUICE_SOURCE_DIR) / "tests/golden/tiny_tied");
  WeightStore weights(checkpoint, Canonical, dtype);
  LlamaConfig config;
  config.family = "qwen2";
  config.hidden_size = kWidth;
  config.intermediate_size = 112;
  config.num_layers = 3;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 16;
  config.vocab_size = kVocabulary;
  config.max_positions = kMaxPositions;
  config.rope_theta = 1e6;
  config.tie_word_embeddings = true;
  config.attention = std::move(attention);
  return LoadLlamaDecoder(weights, config);
}

Tensor RandomRows(int64_t rows, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 0.3f);
  Tensor x(DType::kF32, {rows, kWidth});
  for (int64_t i = 0; i < rows * kWidth; ++i) x.data<float>()[i] = normal(random);
  return x;
}

std::shared_ptr<KvBlockPool> Pool(const Decoder& decoder, int64_t budget_bytes = 0) {
  return std::make_shared<KvBlockPool>(decoder.kv_geometry(), budget_bytes);
}

// Logits of the last position after appending `rows`.
Tensor Append(ExecContext& ctx, const Decoder& decoder, KvCache& cache, ConstTensorView rows) {
  Tensor logits(DType::kF32, {1, kVocabulary});
  SequenceStep step{&cache, rows, logits};
  decoder.Step(ctx, {&step, 1});
  return logits;
}

double RelativeDifference(ConstTensorView got, ConstTensorView want) {
  double error = 0, norm = 0;
  EXPECT_EQ(got.shape(), want.shape());
  const int64_t count = want.shape().NumElements();
  for (int64_t i = 0; i < count; ++i) {
    const double difference = got.data<float>()[i] - want.data<float>()[i];
    error += difference * difference;
    norm += double{want.data<float>()[i]} * want.data<float>()[i];
  }
  return std::sqrt(error / norm);
}

class LlamaDecoderTest : public testing::TestWithParam<DType> {
 protected:
  // The same sums in another order: 1e-5 in f32; in bf16 every value that rounds the other way
  // differs by 2^-8 of itself, and three layers carry that on.
  double bound() const { return GetParam() == DType::kF32 ? 1e-5 : 2e-2; }
  ExecContext ctx_{ExecOptions{.num_threads = 2}};
  std::unique_ptr<Decoder> decoder_ = LoadTiny(GetParam());
};

TEST_P(LlamaDecoderTest, ChunkedPrefillEqualsTheWhole) {
  constexpr int64_t kRows = 1137;  // three chunks inside
  const Tensor rows = RandomRows(kRows, 1);
  const auto pool = Pool(*decoder_);
  KvCache whole(pool), chunked(pool), pieces(pool);
  Tensor expected(DType::kF32, {kRows, kVocabulary});
  SequenceStep step{&whole, rows, expected};
  decoder_->Step(ctx_, {&step, 1}, [](std::string_view, ConstTensorView) {});  // one chunk
  Tensor all(DType::kF32, {kRows, kVocabulary});
  step = {&chunked, rows, all};
  decoder_->Step(ctx_, {&step, 1});
  EXPECT_LE(RelativeDifference(all, expected), bound());

  int64_t begin = 0;
  for (const int64_t end : {1, 2, 65, 400, 1136, 1137}) {
    const Tensor last = Append(ctx_, *decoder_, pieces, rows.view().Slice(begin, end));
    EXPECT_LE(RelativeDifference(last, expected.view().Slice(end - 1, end)), bound())
        << "up to " << end;
    begin = end;
  }
}

TEST_P(LlamaDecoderTest, PrefillWithoutLogitsLeavesTheSameCache) {
  const Tensor rows = RandomRows(700, 2), question = RandomRows(9, 3);
  const auto pool = Pool(*decoder_);
  KvCache with(pool), without(pool);
  Append(ctx_, *decoder_, with, rows);
  SequenceStep step{&without, rows, {}};
  decoder_->Step(ctx_, {&step, 1});
  EXPECT_EQ(without.length(), 700);
  EXPECT_LE(RelativeDifference(Append(ctx_, *decoder_, without, question),
                               Append(ctx_, *decoder_, with, question)),
            bound());
}

TEST_P(LlamaDecoderTest, RewindingToAMarkEqualsAFreshRun) {
  const Tensor video = RandomRows(90, 4), asked = RandomRows(40, 5), more = RandomRows(70, 6);
  const auto pool = Pool(*decoder_);
  KvCache rewound(pool), fresh(pool);
  Append(ctx_, *decoder_, rewound, video);
  const KvCache::Mark mark = rewound.MarkHere();
  for (int turn = 0; turn < 2; ++turn) {
    Append(ctx_, *decoder_, rewound, asked);
    rewound.RewindTo(mark);
  }
  Append(ctx_, *decoder_, fresh, video);
  EXPECT_EQ(RelativeDifference(Append(ctx_, *decoder_, rewound, more),
                               Append(ctx_, *decoder_, fresh, more)),
            0);
}

TEST_P(LlamaDecoderTest, SequencesInOneStepEqualSeparateSteps) {
  const auto pool = Pool(*decoder_);
  const int64_t lengths[] = {3, 600, 64};
  std::vector<std::unique_ptr<KvCache>> together, apart;
  std::vector<Tensor> rows, logits;
  std::vector<SequenceStep> steps;
  for (int s = 0; s < 3; ++s) {
    together.push_back(std::make_unique<KvCache>(pool));
    apart.push_back(std::make_unique<KvCache>(pool));
    rows.push_back(RandomRows(lengths[s], 10 + s));
    // The last position's, every position's, and none.
    logits.emplace_back(DType::kF32, Shape{s == 1 ? lengths[s] : 1, kVocabulary});
    steps.push_back({together[s].get(), rows[s], s == 2 ? TensorView() : logits[s].view()});
  }
  decoder_->Step(ctx_, steps);
  for (int s = 0; s < 3; ++s) {
    const Tensor expected = Append(ctx_, *decoder_, *apart[s], rows[s]);
    if (s == 2) continue;
    const int64_t last = logits[s].dim(0);
    EXPECT_LE(RelativeDifference(logits[s].view().Slice(last - 1, last), expected), bound())
        << "sequence " << s;
  }
  // Now all of them decode.
  std::vector<Tensor> next;
  steps.clear();
  for (int s = 0; s < 3; ++s) {
    next.push_back(RandomRows(1, 20 + s));
    logits[s] = Tensor(DType::kF32, {1, kVocabulary});
    steps.push_back({together[s].get(), next[s], logits[s]});
  }
  decoder_->Step(ctx_, steps);
  for (int s = 0; s < 3; ++s) {
    EXPECT_LE(RelativeDifference(logits[s], Append(ctx_, *decoder_, *apart[s], next[s])), bound())
        << "sequence " << s;
  }
}

TEST_P(LlamaDecoderTest, ReferenceKernelsAgreeWithFastOnes) {
  ExecContext reference({.num_threads = 1, .kernels = KernelChoice::kReference});
  const auto pool = Pool(*decoder_);
  KvCache a(pool), b(pool);
  const Tensor rows = RandomRows(150, 7), one = RandomRows(1, 8);
  EXPECT_LE(
      RelativeDifference(Append(ctx_, *decoder_, a, rows), Append(reference, *decoder_, b, rows)),
      bound());
  EXPECT_LE(
      RelativeDifference(Append(ctx_, *decoder_, a, one), Append(reference, *decoder_, b, one)),
      bound());
}

TEST_P(LlamaDecoderTest, ExhaustedMemoryLeavesEveryCacheUnchanged) {
  const int64_t block = KvBlockBytes(2, 16, GetParam());
  const auto pool = Pool(*decoder_, 3 * 4 * block);  // four blocks a layer
  KvCache a(pool), b(pool);
  const Tensor first = RandomRows(70, 30), second = RandomRows(50, 31),
               long_one = RandomRows(100, 32);
  Append(ctx_, *decoder_, a, first);   // two blocks
  Append(ctx_, *decoder_, b, second);  // one block
  Tensor logits(DType::kF32, {1, kVocabulary});
  SequenceStep steps[] = {{&b, second, logits}, {&a, long_one, logits}};
  EXPECT_THROW(decoder_->Step(ctx_, steps), ResourceExhausted);
  EXPECT_EQ(a.length(), 70);
  EXPECT_EQ(b.length(), 50);
  EXPECT_EQ(pool->bytes_in_use(), 3 * 3 * block);
  const auto roomy = Pool(*decoder_);
  KvCache fresh(roomy);
  Append(ctx_, *decoder_, fresh, first);
  EXPECT_EQ(RelativeDifference(Append(ctx_, *decoder_, a, second),
                               Append(ctx_, *decoder_, fresh, second)),
            0);
}

TEST_P(LlamaDecoderTest, PositionsBeyondTheContextAreRefused) {
  const auto pool = Pool(*decoder_);
  KvCache cache(pool);
  SequenceStep step{&cache, {}, {}};
  const Tensor rows = RandomRows(kMaxPositions, 40);
  step.embeddings = rows;
  decoder_->Step(ctx_, {&step, 1});
  const Tensor one = RandomRows(1, 41);
  EXPECT_THROW(Append(ctx_, *decoder_, cache, one), InputError);
  EXPECT_EQ(cache.length(), kMaxPositions);
}

TEST_P(LlamaDecoderTest, EmbedGivesTheTablesRows) {
  const std::vector<int32_t> ids = {0, 319, 7, 7};
  Tensor rows(DType::kF32, {4, kWidth});
  decoder_->Embed(ctx_, ids, rows);
  const Checkpoint checkpoint =
      Checkpoint::Open(std::filesystem::path(SLUICE_SOURCE_DIR) / "tests/golden/tiny_tied");
  const Tensor table = ConvertTo(
      checkpoint.tensors().at("language_model.model.embed_tokens.weight").view, DType::kF32);
  for (size_t i = 0; i < ids.size(); ++i) {
    for (int64_t d = 0; d < kWidth; ++d) {
      ASSERT_EQ(rows.data<float>()[i * kWidth + d], table.data<float>()[ids[i] * kWidth + d]);
    }
  }
  for (const int32_t id : {-1, 320}) {
    Tensor row(DType::kF32, {1, kWidth});
    EXPECT_THROW(decoder_->Embed(ctx_, {&id, 1}, row), Error) << id;
  }
}

TEST_P(LlamaDecoderTest, WrongShapesAreRefusedBeforeAnythingHappens) {
  KvCache cache(Pool(*decoder_));
  const Tensor rows = RandomRows(3, 50);
  Tensor logits(DType::kF32, {2, kVocabulary});
  SequenceStep step{&cache, rows, logits};
  EXPECT_THROW(decoder_->Step(ctx_, {&step, 1}), Error);
  const Tensor narrow(DType::kF32, {3, kWidth - 1});
  step = {&cache, narrow, {}};
  EXPECT_THROW(decoder_->Step(ctx_, {&step, 1}), Error);
  EXPECT_EQ(cache.length(), 0);
}

INSTANTIATE_TEST_SUITE_P(Types, LlamaDecoderTest, testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& info) { return Name(info.param); });

TEST(LlamaDecoderTest, AttentionIsQuantisedInTheLayersThatAskForIt) {
  constexpr auto kExact = AttentionPrecision::kExact, kSage = AttentionPrecision::kSageAlways;
  ExecContext ctx({.num_threads = 1});
  const Tensor rows = RandomRows(40, 3);
  const auto run = [&](std::vector<AttentionPrecision> attention) {
    const auto decoder = LoadTiny(DType::kF32, std::move(attention));
    KvCache cache(Pool(*decoder));
    std::map<std::string, std::vector<float>> layers;
    SequenceStep step{&cache, rows, {}};
    decoder->Step(ctx, {&step, 1}, [&](std::string_view name, ConstTensorView value) {
      if (name.find('.') != name.rfind('.') || !name.starts_with("layer.")) return;
      layers[std::string(name)] = {value.data<float>(),
                                   value.data<float>() + value.shape().NumElements()};
    });
    return layers;
  };
  const auto exact = run({}), second = run({kExact, kSage, kExact});
  EXPECT_EQ(ctx.tracer().stages().at("attention/sage").items, 40);
  EXPECT_EQ(exact.at("layer.0"), second.at("layer.0"));
  EXPECT_NE(exact.at("layer.1"), second.at("layer.1"));
  double difference = 0, size = 0;
  for (size_t i = 0; i < exact.at("layer.2").size(); ++i) {
    difference += std::abs(exact.at("layer.2")[i] - second.at("layer.2")[i]);
    size += std::abs(exact.at("layer.2")[i]);
  }
  EXPECT_LE(difference, 0.02 * size);
}

TEST(LlamaDecoderWorkTest, CountsTheWorkItTraces) {
  const auto decoder = LoadTiny(DType::kF32);
  ExecContext ctx({.num_threads = 1});
  KvCache cache(Pool(*decoder));
  const Tensor rows = RandomRows(1, 60);
  Append(ctx, *decoder, cache, rows);
  double flops = 0;
  for (const char* stage : {"qkv", "attention", "out", "mlp"}) {
    flops += ctx.tracer().stages().at(std::string("decoder/") + stage).flops;
  }
  EXPECT_DOUBLE_EQ(flops, decoder->FlopsPerToken(1));
  EXPECT_DOUBLE_EQ(ctx.tracer().stages().at("decoder/lm_head").flops, decoder->LmHeadFlops());
}

}  // namespace
}  // namespace sluice
