#include "compression/pyramid_drop.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "tests/support/random_decoder.h"

namespace sluice {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::ThrowsMessage;

constexpr int kLayers = 8, kWidth = 32, kInner = 48, kHeads = 4, kHeadDim = 8, kVocabulary = 40;

using Matrix = std::vector<std::vector<double>>;

// Eight layers with biases, for the reference below.
struct TinyModel : RandomDecoder {
  explicit TinyModel(int kv_heads) : RandomDecoder(Config(kv_heads)), kv_heads(kv_heads) {}
  static LlamaConfig Config(int kv_heads) {
    LlamaConfig config;
    config.hidden_size = kWidth;
    config.intermediate_size = kInner;
    config.num_layers = kLayers;
    config.num_heads = kHeads;
    config.num_kv_heads = kv_heads;
    config.head_dim = kHeadDim;
    config.vocab_size = kVocabulary;
    config.max_positions = 8192;
    config.tie_word_embeddings = true;
    return config;
  }
  int kv_heads;
};

// The whole decoder in doubles, without a cache, written from the paper's description.
class Reference {
 public:
  enum class Drop {
    kRows,  // rows leave (the paper)
    kView,  // rows stay; from `asked` on, rows see only what ranks high
  };
  struct Run {
    std::vector<double> logits;             // of the last row
    std::vector<std::vector<int>> kept;     // tokens, of each stage behind the first
    std::vector<std::vector<double>> rank;  // the ranking row of each boundary
  };

  // The last `ranking` rows of the prompt rank, in the mean.
  Reference(const TinyModel& model, std::vector<int> boundaries, std::vector<double> shares,
            int ranking = 1)
      : model_(model),
        boundaries_(std::move(boundaries)),
        shares_(std::move(shares)),
        ranking_(ranking) {}

  // x: [S, E]; image: which tokens are visual. The first `prompt` rows are the prompt, whose end
  // ranks; rows behind it were decoded later. compact: positions count the rows left.
  Run Forward(const Matrix& x, const std::vector<bool>& image, size_t prompt, bool compact,
              Drop drop, size_t asked = 0) const {
    Run run;
    Matrix h = x;
    std::vector<int> tokens(x.size()), alive;
    std::iota(tokens.begin(), tokens.end(), 0);
    alive = tokens;
    const auto n0 = static_cast<double>(std::count(image.begin(), image.begin() + prompt, true));
    size_t stage = 0;
    for (int layer = 0; layer < kLayers; ++layer) {
      const std::string name = "layers." + std::to_string(layer) + ".";
      if (stage < boundaries_.size() && boundaries_[stage] == layer) {
        Rank(h, tokens, alive, image, prompt, compact, name,
             std::max<size_t>(1, static_cast<size_t>(n0 * shares_[stage] + 1e-9)), run);
        ++stage;
        alive = run.kept.back();
        if (drop == Drop::kRows) {
          Matrix left;
          for (size_t i = 0; i < tokens.size(); ++i) {
            if (std::binary_search(alive.begin(), alive.end(), tokens[i])) left.push_back(h[i]);
          }
          h = left;
          tokens = alive;
        }
      }
      const Matrix a = Norm(h, name + "input_layernorm.weight");
      Matrix q = Project(a, name + "self_attn.q_proj", true);
      Matrix k = Project(a, name + "self_attn.k_proj", true);
      const Matrix v = Project(a, name + "self_attn.v_proj", true);
      for (size_t i = 0; i < h.size(); ++i) {
        const double position = compact ? double(i) : tokens[i];
        Rotate(q[i], position);
        Rotate(k[i], position);
      }
      Matrix mixed(h.size(), std::vector<double>(kHeads * kHeadDim, 0));
      for (size_t i = 0; i < h.size(); ++i) {
        const bool narrow = drop == Drop::kView && tokens[i] >= static_cast<int>(asked);
        std::vector<size_t> seen;
        for (size_t j = 0; j <= i; ++j) {
          if (!narrow || std::binary_search(alive.begin(), alive.end(), tokens[j])) {
            seen.push_back(j);
          }
        }
        for (int head = 0; head < kHeads; ++head) {
          const std::vector<double> p = Softmax(q[i], k, seen, head);
          for (size_t j = 0; j < seen.size(); ++j) {
            for (int d = 0; d < kHeadDim; ++d) {
              mixed[i][head * kHeadDim + d] += p[j] * v[seen[j]][KvHead(head) * kHeadDim + d];
            }
          }
        }
      }
      Accumulate(h, Project(mixed, name + "self_attn.o_proj", false));
      const Matrix m = Norm(h, name + "post_attention_layernorm.weight");
      Matrix gate = Project(m, name + "mlp.gate_proj", false);
      const Matrix up = Project(m, name + "mlp.up_proj", false);
      for (size_t i = 0; i < gate.size(); ++i) {
        for (int d = 0; d < kInner; ++d) {
          gate[i][d] = gate[i][d] / (1 + std::exp(-gate[i][d])) * up[i][d];
        }
      }
      Accumulate(h, Project(gate, name + "mlp.down_proj", false));
    }
    run.logits = Project(Norm({h.back()}, "norm.weight"), "embed_tokens", false)[0];
    return run;
  }

 private:
  void Rank(const Matrix& h, const std::vector<int>& tokens, const std::vector<int>& alive,
            const std::vector<bool>& image, size_t prompt, bool compact, const std::string& name,
            size_t keep, Run& run) const {
    const Matrix a = Norm(h, name + "input_layernorm.weight");
    Matrix q = Project(a, name + "self_attn.q_proj", true);
    Matrix k = Project(a, name + "self_attn.k_proj", true);
    for (size_t i = 0; i < h.size(); ++i) {
      Rotate(q[i], compact ? double(i) : tokens[i]);
      Rotate(k[i], compact ? double(i) : tokens[i]);
    }
    std::vector<size_t> seen;
    for (size_t i = 0; i < tokens.size() && tokens[i] < static_cast<int>(prompt); ++i) {
      if (std::binary_search(alive.begin(), alive.end(), tokens[i])) seen.push_back(i);
    }
    std::vector<double> score(seen.size(), 0);
    for (int row = 0; row < ranking_; ++row) {  // text, so all of them are seen
      const std::vector<size_t> before(seen.begin(), seen.end() - row);
      for (int head = 0; head < kHeads; ++head) {
        const std::vector<double> p = Softmax(q[before.back()], k, before, head);
        for (size_t j = 0; j < p.size(); ++j) score[j] += p[j] / kHeads / ranking_;
      }
    }
    run.rank.push_back(score);
    std::vector<size_t> order;
    for (size_t j = 0; j < seen.size(); ++j) {
      if (image[tokens[seen[j]]]) order.push_back(j);
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t x, size_t y) { return score[x] > score[y]; });
    order.resize(std::min(order.size(), keep));
    std::vector<int> kept;
    for (const int token : alive) {
      if (token >= static_cast<int>(prompt) || !image[token]) kept.push_back(token);
    }
    for (const size_t j : order) kept.push_back(tokens[seen[j]]);
    std::sort(kept.begin(), kept.end());
    run.kept.push_back(kept);
  }

  int KvHead(int head) const { return head / (kHeads / model_.kv_heads); }

  std::vector<double> Softmax(const std::vector<double>& q, const Matrix& k,
                              const std::vector<size_t>& seen, int head) const {
    std::vector<double> p;
    double sum = 0, max = -1e300;
    for (const size_t j : seen) {
      double dot = 0;
      for (int d = 0; d < kHeadDim; ++d) {
        dot += q[head * kHeadDim + d] * k[j][KvHead(head) * kHeadDim + d];
      }
      p.push_back(dot / std::sqrt(double{kHeadDim}));
      max = std::max(max, p.back());
    }
    for (double& value : p) sum += value = std::exp(value - max);
    for (double& value : p) value /= sum;
    return p;
  }

  Matrix Norm(const Matrix& x, const std::string& weight) const {
    const float* w = model_.tensors.at(weight).data<float>();
    Matrix y = x;
    for (auto& row : y) {
      double square = 0;
      for (const double value : row) square += value * value;
      const double scale = 1 / std::sqrt(square / kWidth + 1e-6);
      for (int d = 0; d < kWidth; ++d) row[d] *= scale * w[d];
    }
    return y;
  }

  Matrix Project(const Matrix& x, const std::string& name, bool bias) const {
    const Tensor& w = model_.tensors.at(name + ".weight");
    const int64_t n = w.dim(0), k = w.dim(1);
    Matrix y(x.size(), std::vector<double>(n, 0));
    for (size_t i = 0; i < x.size(); ++i) {
      for (int64_t j = 0; j < n; ++j) {
        double sum = bias ? model_.tensors.at(name + ".bias").data<float>()[j] : 0;
        for (int64_t d = 0; d < k; ++d) sum += x[i][d] * w.data<float>()[j * k + d];
        y[i][j] = sum;
      }
    }
    return y;
  }

  static void Rotate(std::vector<double>& row, double position) {
    for (size_t head = 0; head < row.size() / kHeadDim; ++head) {
      for (int i = 0; i < kHeadDim / 2; ++i) {
        const double angle = position * std::pow(10000.0, -2.0 * i / kHeadDim);
        double &a = row[head * kHeadDim + i], &b = row[head * kHeadDim + i + kHeadDim / 2];
        const double x = a, y = b;
        a = x * std::cos(angle) - y * std::sin(angle);
        b = y * std::cos(angle) + x * std::sin(angle);
      }
    }
  }

  static void Accumulate(Matrix& h, const Matrix& more) {
    for (size_t i = 0; i < h.size(); ++i) {
      for (size_t d = 0; d < h[i].size(); ++d) h[i][d] += more[i][d];
    }
  }

  const TinyModel& model_;
  std::vector<int> boundaries_;
  std::vector<double> shares_;
  int ranking_;
};

// A prompt: text, frames, text.
struct Prompt {
  Prompt(int before, int num_frames, int rows_per_frame, int after, uint32_t seed) {
    frames.assign(before, PyramidDrop::kText);
    for (int f = 0; f < num_frames; ++f) frames.insert(frames.end(), rows_per_frame, 10 + f);
    visual_end = static_cast<int64_t>(frames.size());
    frames.insert(frames.end(), after, PyramidDrop::kText);
    rows = RandomRows(static_cast<int64_t>(frames.size()), seed);
  }
  static Tensor RandomRows(int64_t count, uint32_t seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0, 1);
    Tensor x(DType::kF32, {count, kWidth});
    for (int64_t i = 0; i < count * kWidth; ++i) x.data<float>()[i] = normal(random);
    return x;
  }
  std::vector<bool> Image() const {
    std::vector<bool> image;
    for (const int32_t frame : frames) image.push_back(frame != PyramidDrop::kText);
    return image;
  }
  int64_t size() const { return static_cast<int64_t>(frames.size()); }

  std::vector<int32_t> frames;
  int64_t visual_end = 0;
  Tensor rows;
};

Matrix ToMatrix(ConstTensorView x) {
  Matrix m;
  for (int64_t i = 0; i < x.dim(0); ++i) {
    m.emplace_back(x.data<float>() + i * x.stride0(), x.data<float>() + i * x.stride0() + x.dim(1));
  }
  return m;
}

double RelativeDifference(ConstTensorView got, const std::vector<double>& want) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    error += std::pow(got.data<float>()[i] - want[i], 2);
    norm += want[i] * want[i];
  }
  return std::sqrt(error / norm);
}

Tensor Step(ExecContext& ctx, const Decoder& decoder, KvCache& cache, ConstTensorView rows,
            LayerPolicy* policy = nullptr) {
  Tensor logits(DType::kF32, {1, kVocabulary});
  SequenceStep step{&cache, rows, logits, policy};
  decoder.Step(ctx, {&step, 1});
  return logits;
}

std::vector<int> Tokens(const KvCache& cache, int layer) {
  std::vector<int> tokens;
  for (int64_t row = 0; row < cache.rows(layer); ++row) tokens.push_back(cache.TokenOf(layer, row));
  return tokens;
}

// What a cache holds of the first `length` tokens, byte for byte.
std::vector<float> Contents(const Decoder& decoder, const KvCache& cache, int64_t length) {
  std::vector<float> all;
  const KvGeometry kv = decoder.kv_geometry();
  for (int layer = 0; layer < kv.num_layers; ++layer) {
    const KvLayerView view = cache.layer(layer);
    for (int64_t t = 0; t < length; ++t) {
      const auto* block = static_cast<const float*>(view.blocks[t / kKvBlockTokens]);
      for (int head = 0; head < kv.kv_heads; ++head) {
        const float* k = block + int64_t{head} * kKvBlockTokens * kv.head_dim;
        const float* v = block + int64_t{kv.kv_heads + head} * kKvBlockTokens * kv.head_dim;
        for (int d = 0; d < kv.head_dim; ++d) {
          all.push_back(k[t % kKvBlockTokens * kv.head_dim + d]);
          all.push_back(v[d * kKvBlockTokens + t % kKvBlockTokens]);
        }
      }
    }
  }
  return all;
}

PyramidPlan GlobalPlan(double lambda = 0.5) {
  PyramidOptions options;
  options.boundaries = {2, 4, 6};
  options.lambda = lambda;
  options.quota = PyramidQuota::kGlobal;
  return PyramidPlan::Make(options, kLayers);
}

// ---- The plan ----------------------------------------------------------------------------------

TEST(PyramidPlanTest, BoundariesFollowTheRule) {
  PyramidOptions options;
  EXPECT_THAT(PyramidPlan::Make(options, 32).boundaries, ElementsAre(8, 16, 24));
  EXPECT_THAT(PyramidPlan::Make(options, 28).boundaries, ElementsAre(7, 14, 21));
  EXPECT_THAT(PyramidPlan::Make(options, 24).boundaries, ElementsAre(6, 12, 18));
  EXPECT_THAT(PyramidPlan::Make(options, 40).boundaries, ElementsAre(10, 20, 30));
  EXPECT_THAT(PyramidPlan::Make(options, 16).boundaries, ElementsAre(4, 8, 12));
  EXPECT_THAT(PyramidPlan::Make(options, 8).boundaries, ElementsAre(1, 6, 7));
  EXPECT_THAT(PyramidPlan::Make(options, 4).boundaries, ElementsAre(1, 2, 3));
  options.mode = PyramidMode::kProbe;
  EXPECT_THAT(PyramidPlan::Make(options, 8).boundaries, ElementsAre(2, 4, 6));
  options.mode = PyramidMode::kQuestion;
  options.stages = 2;
  EXPECT_THAT(PyramidPlan::Make(options, 8).boundaries, ElementsAre(1));
  options.stages = 1;
  EXPECT_THAT(PyramidPlan::Make(options, 8).boundaries, ElementsAre());
  options.stages = 3;
  EXPECT_THAT(PyramidPlan::Make(options, 8).boundaries, ElementsAre(1, 7));
  EXPECT_THAT(PyramidPlan::Make(options, 32).boundaries, ElementsAre(10, 20));
  options.stages = 5;
  EXPECT_THAT(PyramidPlan::Make(options, 32).boundaries, ElementsAre(6, 12, 18, 24));
}

TEST(PyramidPlanTest, StageSizesCountFromTheOriginal) {
  const PyramidPlan plan = PyramidPlan::Make({}, 32);
  EXPECT_THAT(plan.StageSizes(576), ElementsAre(576, 288, 144, 72));
  EXPECT_THAT(plan.StageSizes(577), ElementsAre(577, 288, 144, 72));
  EXPECT_THAT(plan.StageSizes(3), ElementsAre(3, 1, 1, 1));
  EXPECT_THAT(plan.StageSizes(0), ElementsAre(0, 0, 0, 0));
  PyramidOptions options;
  options.lambda = 0.7;
  EXPECT_THAT(PyramidPlan::Make(options, 32).StageSizes(100), ElementsAre(100, 70, 49, 34));
}

TEST(PyramidPlanTest, CostModelGivesThePapersFigures) {
  const auto tera = [](double per_row, double width, int layers, int64_t rows, double lambda) {
    PyramidOptions options;
    options.lambda = lambda;
    const PyramidPlan plan = PyramidPlan::Make(options, layers);
    const PyramidCost cost{per_row, 2 * width};
    return 1e-12 * cost.MultiplyAdds(plan.LayerRows(plan.StageSizes(rows), layers));
  };
  const double vicuna = 4.0 * 4096 * 4096 + 3.0 * 4096 * 11008;
  struct Case {
    int64_t rows;
    double lambda, want;
  };
  // Printed with three digits: half a unit of the last is up to 0.33 %.
  for (const Case& c :
       {Case{576, 1, 3.82}, Case{576, 0.5, 1.78}, Case{576, 0.4, 1.54}, Case{576, 0.6, 2.06},
        Case{2880, 1, 20.8}, Case{2880, 0.5, 9.46}, Case{2880, 0.4, 8.22}, Case{2880, 0.6, 11.0},
        Case{5184, 1, 40.6}, Case{5184, 0.5, 18.1}}) {
    EXPECT_NEAR(tera(vicuna, 4096, 32, c.rows, c.lambda) / c.want, 1, 0.005)
        << c.rows << " rows, lambda " << c.lambda;
  }
  const double qwen = 2.0 * 3584 * 3584 + 2.0 * 3584 * 512 + 3.0 * 3584 * 18944;
  for (const Case& c : {Case{6272, 1, 48.8}, Case{6272, 0.5, 21.8}, Case{12544, 1, 113.4},
                        Case{12544, 0.5, 48.9}}) {
    EXPECT_NEAR(tera(qwen, 3584, 28, c.rows, c.lambda) / c.want, 1, 0.005) << c.rows;
  }
}

TEST(PyramidPlanTest, CostModelReadsItsSizesFromADecoder) {
  const TinyModel model(2);
  const PyramidCost cost = PyramidCost::Of(*model.decoder);
  EXPECT_DOUBLE_EQ(cost.per_row, 2.0 * 32 * 32 + 2.0 * 32 * 16 + 3.0 * 32 * 48);
  EXPECT_DOUBLE_EQ(cost.per_pair, 2.0 * 32);
}

TEST(PyramidPlanTest, WrongSettingsSayWhatToChange) {
  // Sets one field of the defaults.
  const auto with = [](auto field, auto value) {
    PyramidOptions options;
    options.*field = value;
    return options;
  };
  const auto refused = [](const PyramidOptions& options, const char* part) {
    EXPECT_THAT([&] { PyramidPlan::Make(options, 8); }, ThrowsMessage<InputError>(HasSubstr(part)));
  };
  using Options = PyramidOptions;
  refused(with(&Options::stages, 9), "8 layers");
  refused(with(&Options::stages, 0), "0 stages");
  refused(with(&Options::lambda, 0), "(0, 1]");
  refused(with(&Options::lambda, 1.5), "1.5");
  refused(with(&Options::lambda, std::nan("")), "lambda");
  refused(with(&Options::shares, std::vector<double>{0.5, 0.6, 0.1}), "not increase");
  refused(with(&Options::shares, std::vector<double>{0.5}), "3 boundaries and shares");
  refused(with(&Options::boundaries, std::vector<int>{2, 2, 6}), "[2, 2, 6]");
  refused(with(&Options::boundaries, std::vector<int>{2, 4, 8}), "1..7");
  refused(with(&Options::frame_share, 2), "frame_share");
  for (const char* spec : {"", "quest", "question=", "question=x", "replay=0.5y"}) {
    EXPECT_THROW(ParsePyramid(spec), InputError) << spec;
  }
  EXPECT_EQ(ParsePyramid("question=0.6").lambda, 0.6);
  EXPECT_EQ(ParsePyramid("query-free").mode, PyramidMode::kQueryFree);
}

TEST(PyramidChoiceTest, QuotasKeepEveryFrameInSight) {
  const std::vector<int32_t> frames = {0, 0, 0, 0, 1, 1, 1, 1};
  const std::vector<float> scores = {9, 8, 7, 6, 1, 4, 3, 2};
  const std::vector<PyramidFrameTotal> totals = {{0, 4}, {1, 4}};
  PyramidPlan plan;
  plan.quota = PyramidQuota::kGlobal;
  EXPECT_THAT(ChoosePyramidRows(plan, 0.5, scores, frames, totals), ElementsAre(0, 1, 2, 3));
  plan.quota = PyramidQuota::kFrame;
  EXPECT_THAT(ChoosePyramidRows(plan, 0.5, scores, frames, totals), ElementsAre(0, 1, 5, 6));
  plan.quota = PyramidQuota::kHybrid;
  EXPECT_THAT(ChoosePyramidRows(plan, 0.5, scores, frames, totals), ElementsAre(0, 1, 2, 5));
  EXPECT_THAT(ChoosePyramidRows(plan, 0.01, scores, frames, totals), ElementsAre(0, 5));
}

TEST(PyramidChoiceTest, EqualScoresKeepTheEarlierRows) {
  PyramidPlan plan;
  plan.quota = PyramidQuota::kGlobal;
  EXPECT_THAT(ChoosePyramidRows(plan, 0.5, std::vector<float>(6, 1.0f), std::vector<int32_t>(6, 0),
                                std::vector<PyramidFrameTotal>{{0, 6}}),
              ElementsAre(0, 1, 2));
}

// ---- Ranking -----------------------------------------------------------------------------------

TEST(MeanAttentionRowTest, NormalisesEachHeadOverTheWholeRow) {
  // One dimension a head, q = 1: keys are logits. Head 0 looks at the text; among image rows it
  // would prefer the first. Raw logits, or a softmax over image rows alone, choose that one.
  const float text[] = {10, -10}, first[] = {2, 0}, second[] = {0, 1}, ones[] = {1, 1};
  std::vector<float> more;
  for (const auto* key : {text, first, second}) more.insert(more.end(), key, key + 2);
  std::vector<float> out(3);
  ExecContext ctx({});
  KvCache cache(std::make_shared<KvBlockPool>(
      KvGeometry{.num_layers = 1, .kv_heads = 2, .head_dim = 1, .dtype = DType::kF32}, 0));
  MeanAttentionRow(ctx, ConstTensorView(ones, DType::kF32, {1, 2}), 2, 1, cache.layer(0), {},
                   ConstTensorView(more.data(), DType::kF32, {3, 2}), out);
  EXPECT_GT(out[2], out[1]);
  EXPECT_GT((first[0] + first[1]) / 2, (second[0] + second[1]) / 2);
  EXPECT_NEAR(out[0] + out[1] + out[2], 1, 1e-6);
  EXPECT_NEAR(out[2], 0.5 * (std::exp(-10.0) + std::exp(1.0) / (1 + std::exp(1.0))), 1e-4);
}

TEST(MeanAttentionRowTest, EqualsTheNaiveRowOverCachedAndNewKeys) {
  constexpr int kKv = 2, kDim = 11, kQueries = 6;  // grouped, and a size no vector divides
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    ExecContext ctx({.num_threads = 2});
    KvCache cache(std::make_shared<KvBlockPool>(
        KvGeometry{.num_layers = 1, .kv_heads = kKv, .head_dim = kDim, .dtype = dtype}, 0));
    cache.Reserve(ctx, 150);
    std::mt19937 random(3);
    std::normal_distribution<float> normal(0, 1);
    const auto rows = [&](int64_t count, int64_t width) {
      Tensor x(DType::kF32, {count, width});
      for (int64_t i = 0; i < count * width; ++i) x.data<float>()[i] = normal(random);
      return ConvertTo(x, dtype);
    };
    const Tensor keys = rows(150, kKv * kDim), more = rows(20, kKv * kDim);
    const Tensor q = rows(1, kQueries * kDim);
    StoreKv(ctx, keys, keys, 0, cache.layer(0));
    const std::vector<int32_t> chosen = {0, 3, 63, 64, 127, 128, 149};
    std::vector<float> got(chosen.size() + 20);
    MeanAttentionRow(ctx, q, kQueries, 0.4f, cache.layer(0), chosen, more, got);
    const Tensor k = ConvertTo(keys, DType::kF32), m = ConvertTo(more, DType::kF32),
                 query = ConvertTo(q, DType::kF32);
    std::vector<double> want(got.size(), 0);
    for (int head = 0; head < kQueries; ++head) {
      std::vector<double> p(got.size());
      double sum = 0;
      for (size_t i = 0; i < p.size(); ++i) {
        const float* row = i < chosen.size() ? k.data<float>() + chosen[i] * kKv * kDim
                                             : m.data<float>() + (i - chosen.size()) * kKv * kDim;
        double dot = 0;
        for (int d = 0; d < kDim; ++d) {
          dot += double{query.data<float>()[head * kDim + d]} * row[head / 3 * kDim + d];
        }
        sum += p[i] = std::exp(0.4 * dot);
      }
      for (size_t i = 0; i < p.size(); ++i) want[i] += p[i] / sum / kQueries;
    }
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT_NEAR(got[i], want[i], 1e-5 * want[i] + 1e-7) << Name(dtype) << " " << i;
    }
  }
}

TEST(PyramidDropTest, AnImageRowThatTheQuestionLooksForSurvivesEveryStage) {
  // Head 0 is busy with the text in front; by raw logits the decoys, which please head 0, come
  // before the needle, which pleases head 1.
  constexpr int kRows = 17, kNeedle = 11;
  std::vector<float> keys;
  std::vector<int32_t> tokens, frames;
  for (int i = 0; i < kRows; ++i) {
    keys.push_back(i == 0 ? 12 : i == kNeedle ? 0 : 5);
    keys.push_back(i == kNeedle ? 4 : 0);
    tokens.push_back(i);
    frames.push_back(i == 0 ? PyramidDrop::kText : 0);
  }
  const float query[] = {1, 1};
  ExecContext ctx({});
  const PyramidPlan plan = GlobalPlan();
  PyramidDrop drop(plan, frames, 0);
  for (const int layer : plan.boundaries) {
    LayerBoundary boundary;
    boundary.layer = layer;
    boundary.tokens = tokens;
    boundary.attention = [&](int64_t) {
      KvCache cache(std::make_shared<KvBlockPool>(
          KvGeometry{.num_layers = 1, .kv_heads = 2, .head_dim = 1, .dtype = DType::kF32}, 0));
      std::vector<float> left, out(tokens.size());
      for (const int32_t token : tokens) {
        left.insert(left.end(), keys.begin() + 2 * token, keys.begin() + 2 * token + 2);
      }
      MeanAttentionRow(
          ctx, ConstTensorView(query, DType::kF32, {1, 2}), 2, 1, cache.layer(0), {},
          ConstTensorView(left.data(), DType::kF32, {static_cast<int64_t>(out.size()), 2}), out);
      return out;
    };
    const auto kept = drop.Keep(boundary);
    ASSERT_TRUE(kept.has_value());
    std::vector<int32_t> next;
    for (const int32_t i : *kept) next.push_back(tokens[i]);
    tokens = next;
    EXPECT_EQ(tokens.front(), 0);
    EXPECT_THAT(tokens, testing::Contains(kNeedle)) << "before layer " << layer;
  }
  EXPECT_THAT(drop.stage_sizes(), ElementsAre(16, 8, 4, 2));
}

// ---- The decoder with rows that leave
// ------------------------------------------------------------

class PyramidDecoderTest : public testing::TestWithParam<int> {
 protected:
  std::shared_ptr<KvBlockPool> Pool() const {
    return std::make_shared<KvBlockPool>(model_.decoder->kv_geometry(), 0);
  }
  const TinyModel model_{GetParam()};
  ExecContext ctx_{ExecOptions{.num_threads = 2}};
};

TEST_P(PyramidDecoderTest, SharesOfOneAreThePlainDecoderBitForBit) {
  const Prompt prompt(5, 30, 49, 7, 1);  // two chunks
  const PyramidPlan plan = GlobalPlan(1);
  KvCache plain(Pool()), staged(Pool()), compact(Pool(), KvPositions::kRows);
  PyramidDrop drop(plan, prompt.frames, 0), again(plan, prompt.frames, 0);
  const Tensor want = Step(ctx_, *model_.decoder, plain, prompt.rows);
  const Tensor got[] = {Step(ctx_, *model_.decoder, staged, prompt.rows, &drop),
                        Step(ctx_, *model_.decoder, compact, prompt.rows, &again)};
  for (const Tensor& logits : got) {
    EXPECT_EQ(std::memcmp(logits.data<float>(), want.data<float>(), want.SizeBytes()), 0);
  }
  EXPECT_EQ(Contents(*model_.decoder, staged, prompt.size()),
            Contents(*model_.decoder, plain, prompt.size()));
  for (int i = 0; i < 4; ++i) {
    const Tensor next = Prompt::RandomRows(1, 50 + i);
    const Tensor expected = Step(ctx_, *model_.decoder, plain, next);
    for (KvCache* cache : {&staged, &compact}) {
      const Tensor logits = Step(ctx_, *model_.decoder, *cache, next);
      EXPECT_EQ(std::memcmp(logits.data<float>(), expected.data<float>(), expected.SizeBytes()), 0);
    }
  }
}

TEST_P(PyramidDecoderTest, EqualsTheReferenceInPrefillAndDecoding) {
  for (const KvPositions positions : {KvPositions::kRows, KvPositions::kTokens}) {
    const Prompt prompt(6, 4, 17, 9, 2);
    const PyramidPlan plan = GlobalPlan();
    const Reference reference(model_, {2, 4, 6}, {0.5, 0.25, 0.125});
    const bool compact = positions == KvPositions::kRows;
    Matrix x = ToMatrix(prompt.rows);
    std::vector<bool> image = prompt.Image();
    const size_t length = x.size();
    const Reference::Run want =
        reference.Forward(x, image, length, compact, Reference::Drop::kRows);
    KvCache cache(Pool(), positions);
    PyramidDrop drop(plan, prompt.frames, 0);
    const Tensor logits = Step(ctx_, *model_.decoder, cache, prompt.rows, &drop);
    EXPECT_LE(RelativeDifference(logits, want.logits), 1e-5);
    EXPECT_THAT(drop.stage_sizes(), ElementsAre(68, 34, 17, 8));
    for (int layer = 2; layer < kLayers; ++layer) {
      EXPECT_EQ(Tokens(cache, layer), want.kept[layer / 2 - 1]) << "layer " << layer;
    }
    // Every decoded token as if the whole had been run again on the rows that are left.
    for (int i = 0; i < 32; ++i) {
      const Tensor next = Prompt::RandomRows(1, 100 + i);
      x.push_back(ToMatrix(next)[0]);
      image.push_back(false);
      const Tensor got = Step(ctx_, *model_.decoder, cache, next);
      if (i % 8 != 7) continue;  // the reference is slow
      const auto again = reference.Forward(x, image, length, compact, Reference::Drop::kRows);
      EXPECT_LE(RelativeDifference(got, again.logits), 1e-5) << "token " << i;
    }
  }
}

TEST_P(PyramidDecoderTest, TheQuestionsRowsRankInTheMeanAsInTheReference) {
  const Prompt prompt(6, 4, 17, 9, 2);
  const PyramidPlan plan = GlobalPlan();
  for (const int ranking : {2, 9}) {
    const Reference reference(model_, {2, 4, 6}, {0.5, 0.25, 0.125}, ranking);
    for (const bool view : {false, true}) {
      // All at once, or the question alone behind what was there.
      const Reference::Run want = reference.Forward(
          ToMatrix(prompt.rows), prompt.Image(), prompt.size(), false,
          view ? Reference::Drop::kView : Reference::Drop::kRows, prompt.visual_end);
      KvCache cache(Pool());
      if (view) {
        SequenceStep frames{&cache, prompt.rows.view().Slice(0, prompt.visual_end), {}};
        model_.decoder->Step(ctx_, {&frames, 1});
      }
      PyramidDrop drop(plan, prompt.frames, 0);
      drop.RankByLastRows(ranking);
      const Tensor logits =
          Step(ctx_, *model_.decoder, cache,
               prompt.rows.view().Slice(view ? prompt.visual_end : 0, prompt.size()), &drop);
      EXPECT_LE(RelativeDifference(logits, want.logits), 1e-5);
      for (int layer = 2; layer < kLayers; ++layer) {
        EXPECT_EQ(Tokens(cache, layer), want.kept[layer / 2 - 1]) << "layer " << layer;
      }
    }
  }
}

TEST_P(PyramidDecoderTest, RowsAreNestedAscendingAndTextStays) {
  const Prompt prompt(3, 5, 11, 4, 3);
  PyramidOptions options;
  options.mode = PyramidMode::kQuestion;
  options.boundaries = {2, 4, 6};
  const PyramidPlan plan = PyramidPlan::Make(options, kLayers);
  KvCache cache(Pool());
  PyramidDrop drop(plan, prompt.frames, 0);
  Step(ctx_, *model_.decoder, cache, prompt.rows, &drop);
  std::vector<int> before = Tokens(cache, 0);
  EXPECT_EQ(before.size(), 62u);
  for (int layer = 1; layer < kLayers; ++layer) {
    const std::vector<int> now = Tokens(cache, layer);
    EXPECT_TRUE(std::is_sorted(now.begin(), now.end()));
    EXPECT_TRUE(std::includes(before.begin(), before.end(), now.begin(), now.end()));
    for (int token = 0; token < prompt.size(); ++token) {
      if (prompt.frames[token] != PyramidDrop::kText) continue;
      EXPECT_TRUE(std::binary_search(now.begin(), now.end(), token)) << token;
    }
    EXPECT_EQ(static_cast<int64_t>(now.size()) - 7, drop.stage_sizes()[layer / 2]);
    before = now;
  }
  EXPECT_THAT(drop.stage_sizes(), ElementsAre(55, 27, 13, 6));
}

TEST_P(PyramidDecoderTest, TheCacheShrinksAsPredicted) {
  const Prompt prompt(0, 16, 64, 1, 4);  // whole blocks of visual rows
  KvCache dense(Pool()), dropped(Pool(), KvPositions::kRows);
  const PyramidPlan plan = GlobalPlan();
  PyramidDrop drop(plan, prompt.frames, 0);
  Step(ctx_, *model_.decoder, dense, prompt.rows);
  Step(ctx_, *model_.decoder, dropped, prompt.rows, &drop);
  const std::vector<int64_t> rows = plan.LayerRows(plan.StageSizes(1024), kLayers);
  int64_t visual = 0;
  for (int layer = 0; layer < kLayers; ++layer) {
    EXPECT_EQ(dropped.rows(layer), rows[layer] + 1);
    visual += rows[layer];
  }
  EXPECT_NEAR(1 - visual / (1024.0 * kLayers), 0.531, 0.001);
  EXPECT_EQ(dropped.RowsOfAllLayers(), visual + kLayers);
  const auto block = static_cast<int64_t>(KvBlockBytes(GetParam(), kHeadDim, DType::kF32));
  EXPECT_EQ(dense.SizeBytes(), kLayers * 17 * block);
  EXPECT_EQ(dropped.SizeBytes(), 2 * (17 + 9 + 5 + 3) * block);
}

TEST_P(PyramidDecoderTest, LongPromptsInChunksEqualASingleOne) {
  const Prompt prompt(4, 40, 49, 9, 5);  // two chunks until the first boundary
  const PyramidPlan plan = GlobalPlan(0.7);
  KvCache whole(Pool()), chunked(Pool());
  PyramidDrop a(plan, prompt.frames, 0), b(plan, prompt.frames, 0);
  Tensor want(DType::kF32, {1, kVocabulary});
  SequenceStep step{&whole, prompt.rows, want, &a};
  model_.decoder->Step(ctx_, {&step, 1}, [](std::string_view, ConstTensorView) {});
  const Tensor got = Step(ctx_, *model_.decoder, chunked, prompt.rows, &b);
  EXPECT_LE(RelativeDifference(got, ToMatrix(want)[0]), 1e-5);
}

TEST_P(PyramidDecoderTest, AQuestionsViewEqualsTheReferenceAndLeavesTheCacheAlone) {
  const Prompt prompt(5, 4, 19, 0, 6);
  const PyramidPlan plan = GlobalPlan();
  const Reference reference(model_, {2, 4, 6}, {0.5, 0.25, 0.125});
  KvCache cache(Pool());
  SequenceStep ingest{&cache, prompt.rows.view().Slice(0, 40), {}};
  model_.decoder->Step(ctx_, {&ingest, 1});
  ingest.embeddings = prompt.rows.view().Slice(40, prompt.size());
  model_.decoder->Step(ctx_, {&ingest, 1});
  const std::vector<float> before = Contents(*model_.decoder, cache, prompt.size());
  const int64_t bytes = cache.SizeBytes();
  const KvCache::Mark mark = cache.MarkHere();
  for (const uint32_t seed : {21u, 22u, 21u}) {
    const Tensor question = Prompt::RandomRows(8, seed);
    Matrix x = ToMatrix(prompt.rows);
    for (const auto& row : ToMatrix(question)) x.push_back(row);
    std::vector<bool> image = prompt.Image();
    image.resize(x.size(), false);
    const size_t length = x.size();
    const auto forward = [&] {
      return reference.Forward(x, image, length, false, Reference::Drop::kView, prompt.size());
    };
    PyramidDrop drop(plan, prompt.frames, 0);
    const Tensor got = Step(ctx_, *model_.decoder, cache, question, &drop);
    const Reference::Run want = forward();
    EXPECT_LE(RelativeDifference(got, want.logits), 1e-5);
    for (int layer = 2; layer < kLayers; ++layer) {
      EXPECT_EQ(Tokens(cache, layer), want.kept[layer / 2 - 1]) << "layer " << layer;
    }
    for (int i = 0; i < 3; ++i) {
      const Tensor next = Prompt::RandomRows(1, seed + 100 + i);
      x.push_back(ToMatrix(next)[0]);
      image.push_back(false);
      EXPECT_LE(RelativeDifference(Step(ctx_, *model_.decoder, cache, next), forward().logits),
                1e-5);
    }
    cache.RewindTo(mark);
    EXPECT_EQ(Contents(*model_.decoder, cache, prompt.size()), before);
    EXPECT_EQ(cache.SizeBytes(), bytes);
  }
}

TEST_P(PyramidDecoderTest, RowsThatLeftOnArrivalStayOutAndBatchesDoNotMatter) {
  const Prompt prompt(5, 6, 16, 0, 8);
  std::vector<float> scores(prompt.size());
  std::mt19937 random(9);
  for (float& score : scores) score = std::uniform_real_distribution<float>(0, 1)(random);
  PyramidOptions options;
  options.mode = PyramidMode::kQueryFree;
  options.boundaries = {2, 4, 6};
  const PyramidPlan plan = PyramidPlan::Make(options, kLayers);
  const Tensor question = Prompt::RandomRows(6, 30);
  for (const KvPositions positions : {KvPositions::kRows, KvPositions::kTokens}) {
    std::vector<Tensor> answers;
    for (const int frames : {1, 2, 6}) {
      KvCache cache(Pool(), positions);
      SequenceStep step{&cache, prompt.rows.view().Slice(0, 5), {}};
      model_.decoder->Step(ctx_, {&step, 1});
      for (int64_t begin = 5; begin < prompt.size(); begin += 16 * frames) {
        PyramidDrop drop(plan, prompt.frames, begin);
        drop.RankByScores(std::span(scores).subspan(begin));
        step = {&cache, prompt.rows.view().Slice(begin, begin + 16 * frames), {}, &drop};
        model_.decoder->Step(ctx_, {&step, 1});
      }
      EXPECT_EQ(cache.rows(1), 5 + 96);
      EXPECT_EQ(cache.rows(2), 5 + 48);
      EXPECT_EQ(cache.rows(7), 5 + 12);
      // Each frame's best two are in the last stage.
      const std::vector<int> left = Tokens(cache, 7);
      for (int f = 0; f < 6; ++f) {
        const float* frame = scores.data() + 5 + 16 * f;
        const int best = static_cast<int>(std::max_element(frame, frame + 16) - scores.data());
        EXPECT_TRUE(std::binary_search(left.begin(), left.end(), best)) << best;
      }
      answers.push_back(Step(ctx_, *model_.decoder, cache, question));
    }
    for (const Tensor& answer : answers) {
      EXPECT_LE(RelativeDifference(answer, ToMatrix(answers[0])[0]), 1e-5);
    }
  }
}

TEST_P(PyramidDecoderTest, AFullPoolLeavesTheCacheAsItWas) {
  const auto block = static_cast<int64_t>(KvBlockBytes(GetParam(), kHeadDim, DType::kF32));
  const Prompt prompt(5, 8, 30, 0, 10);
  // Four blocks a layer for the frames; a view needs two more in layers from the first boundary on.
  const auto pool =
      std::make_shared<KvBlockPool>(model_.decoder->kv_geometry(), (kLayers * 4 + 4) * block);
  KvCache cache(pool);
  Step(ctx_, *model_.decoder, cache, prompt.rows);
  const std::vector<float> before = Contents(*model_.decoder, cache, prompt.size());
  const int64_t bytes = pool->bytes_in_use();
  const PyramidPlan plan = GlobalPlan(0.9);
  PyramidDrop drop(plan, prompt.frames, 0);
  const Tensor question = Prompt::RandomRows(8, 33);
  EXPECT_THROW(Step(ctx_, *model_.decoder, cache, question, &drop), ResourceExhausted);
  EXPECT_EQ(cache.length(), prompt.size());
  EXPECT_EQ(pool->bytes_in_use(), bytes);
  EXPECT_EQ(Contents(*model_.decoder, cache, prompt.size()), before);
  EXPECT_EQ(Tokens(cache, 7).size(), static_cast<size_t>(prompt.size()));
}

INSTANTIATE_TEST_SUITE_P(Heads, PyramidDecoderTest, testing::Values(kHeads, 2, 1),
                         [](const auto& info) { return "Kv" + std::to_string(info.param); });

}  // namespace
}  // namespace sluice
