#include "compression/stream_memory.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "runtime/error.h"
#include "runtime/ops/attention.h"
#include "runtime/transfer.h"
#include "tests/support/gpu_testing.h"
#include "tests/support/random_decoder.h"
#include "tests/support/tensor_testing.h"

namespace sluice {
namespace {

using ::sluice::testing::SkippedWithout;

constexpr int kLayers = 2, kHeads = 4, kKvHeads = 2, kSize = 8, kWidth = 32;
constexpr int64_t kVocabulary = 48, kPinned = 5, kWindow = 100;

LlamaConfig Config() {
  LlamaConfig config;
  config.hidden_size = kWidth;
  config.intermediate_size = 40;
  config.num_layers = kLayers;
  config.num_heads = kHeads;
  config.num_kv_heads = kKvHeads;
  config.head_dim = kSize;
  config.vocab_size = kVocabulary;
  config.max_positions = 2048;
  config.tie_word_embeddings = true;
  return config;
}

using Row = std::vector<double>;

// The decoder in double, one row after another, with every token's keys and values kept as they are
// before their rotation, so that a row may see any tokens at any positions.
class Reference {
 public:
  explicit Reference(const RandomDecoder& decoder)
      : tensors_(decoder.tensors), frequencies_(InverseFrequencies(Config())) {}

  struct Seen {
    int64_t token, position;
  };
  // What stands in front of the step's rows in a layer, given the rows' queries there.
  using Context = std::function<std::vector<Seen>(int layer, const std::vector<Row>& queries)>;

  // Runs rows, the first at the position behind the last one seen, and returns the last one's
  // logits. The tokens are remembered only if `keep`.
  Row Step(ConstTensorView rows, const Context& context, bool keep) {
    const int64_t first = static_cast<int64_t>(keys_[0].size()), count = rows.dim(0);
    std::vector<Row> hidden;
    for (int64_t i = 0; i < count; ++i) {
      hidden.emplace_back(rows.data<float>() + i * kWidth, rows.data<float>() + (i + 1) * kWidth);
    }
    for (int layer = 0; layer < kLayers; ++layer) {
      const std::string at = "layers." + std::to_string(layer) + ".";
      std::vector<Row> queries;
      for (const Row& h : hidden) {
        const Row a = Norm(h, at + "input_layernorm.weight");
        queries.push_back(Project(a, at + "self_attn.q_proj"));
        keys_[layer].push_back(Project(a, at + "self_attn.k_proj"));
        values_[layer].push_back(Project(a, at + "self_attn.v_proj"));
      }
      std::vector<Seen> seen = context(layer, queries);
      const int64_t begin = seen.empty() ? 0 : seen.back().position + 1;
      for (int64_t i = 0; i < count; ++i) {
        seen.push_back({first + i, begin + i});
        const Row mixed = Attend(layer, queries[i], seen);
        Add(Project(mixed, at + "self_attn.o_proj"), hidden[i]);
        const Row m = Norm(hidden[i], at + "post_attention_layernorm.weight");
        Row gate = Project(m, at + "mlp.gate_proj");
        const Row up = Project(m, at + "mlp.up_proj");
        for (size_t j = 0; j < gate.size(); ++j) gate[j] *= up[j] / (1 + std::exp(-gate[j]));
        Add(Project(gate, at + "mlp.down_proj"), hidden[i]);
      }
    }
    if (!keep) {
      for (int layer = 0; layer < kLayers; ++layer) {
        keys_[layer].resize(first);
        values_[layer].resize(first);
      }
    }
    return Product(Norm(hidden.back(), "norm.weight"), tensors_.at("embed_tokens.weight"), nullptr);
  }

  // The mean key of tokens [begin, end), and its product with the mean query, for all query heads.
  double Score(int layer, const std::vector<Row>& queries, int64_t begin, int64_t end) const {
    double score = 0;
    for (const Row& q : queries) {
      for (int64_t token = begin; token < end; ++token) {
        for (int i = 0; i < kHeads * kSize; ++i) {
          const int head = i / kSize / (kHeads / kKvHeads);
          score += q[i] * keys_[layer][token][head * kSize + i % kSize];
        }
      }
    }
    return score / static_cast<double>(queries.size()) / static_cast<double>(end - begin);
  }

 private:
  Row Norm(const Row& x, const std::string& weight) const {
    double sum = 0;
    for (const double v : x) sum += v * v;
    const double scale = 1 / std::sqrt(sum / kWidth + Config().rms_norm_eps);
    Row y(kWidth);
    for (int i = 0; i < kWidth; ++i) y[i] = x[i] * scale * tensors_.at(weight).data<float>()[i];
    return y;
  }
  static Row Product(const Row& x, const Tensor& weight, const Tensor* bias) {
    Row y(weight.dim(0));
    for (int64_t i = 0; i < weight.dim(0); ++i) {
      y[i] = bias ? bias->data<float>()[i] : 0;
      for (size_t j = 0; j < x.size(); ++j) y[i] += x[j] * weight.data<float>()[i * x.size() + j];
    }
    return y;
  }
  Row Project(const Row& x, const std::string& name) const {
    const auto bias = tensors_.find(name + ".bias");
    return Product(x, tensors_.at(name + ".weight"),
                   bias == tensors_.end() ? nullptr : &bias->second);
  }
  static void Add(const Row& more, Row& sum) {
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += more[i];
  }
  // One head of `row`, rotated.
  Row Rotated(const Row& row, int head, int64_t position) const {
    Row y(kSize);
    for (int i = 0; i < kSize / 2; ++i) {
      const double angle = static_cast<double>(position) * frequencies_.data<float>()[i];
      const double a = row[head * kSize + i], b = row[head * kSize + kSize / 2 + i];
      y[i] = a * std::cos(angle) - b * std::sin(angle);
      y[kSize / 2 + i] = b * std::cos(angle) + a * std::sin(angle);
    }
    return y;
  }
  Row Attend(int layer, const Row& query, const std::vector<Seen>& seen) const {
    Row mixed(kHeads * kSize);
    for (int head = 0; head < kHeads; ++head) {
      const int kv = head / (kHeads / kKvHeads);
      const Row q = Rotated(query, head, seen.back().position);
      double sum = 0;
      for (const Seen& s : seen) {
        const Row k = Rotated(keys_[layer][s.token], kv, s.position);
        const double p = std::exp(std::inner_product(q.begin(), q.end(), k.begin(), 0.0) /
                                  std::sqrt(static_cast<double>(kSize)));
        sum += p;
        for (int i = 0; i < kSize; ++i) {
          mixed[head * kSize + i] += p * values_[layer][s.token][kv * kSize + i];
        }
      }
      for (int i = 0; i < kSize; ++i) mixed[head * kSize + i] /= sum;
    }
    return mixed;
  }

  const std::map<std::string, Tensor>& tensors_;
  const Tensor frequencies_;
  std::vector<Row> keys_[kLayers], values_[kLayers];
};

Tensor RandomRows(int64_t rows, std::mt19937& random) {
  std::normal_distribution<float> normal(0, 0.5f);
  Tensor x(DType::kF32, {rows, kWidth});
  for (int64_t i = 0; i < rows * kWidth; ++i) x.data<float>()[i] = normal(random);
  return x;
}

// Frames of 9 to 23 tokens, in a cache and in the reference.
class Stream {
 public:
  explicit Stream(const MemoryOptions& options, Device device = Device::kCpu)
      : ctx({.device = device}),
        random_decoder_(Config(), DType::kF32, device),
        memory(options, decoder().kv_geometry(), decoder().rotary_frequencies(), kPinned),
        cache(std::make_shared<KvBlockPool>(decoder().kv_geometry(), 0)),
        reference(random_decoder_) {
    Append(RandomRows(kPinned, random_));
  }
  const Decoder& decoder() const { return *random_decoder_.decoder; }

  void Show(int frames) {
    for (int f = 0; f < frames; ++f) {
      const int64_t first = cache.length();
      VisualTokens tokens;
      tokens.features = RandomRows(9 + static_cast<int64_t>(random_() % 15), random_);
      for (int64_t i = 0; i < tokens.features.dim(0); ++i) {
        tokens.origins.push_back({.frame = frame_, .time = MediaTime::FromSeconds(frame_)});
      }
      begins.push_back(first);
      ++frame_;
      Append(tokens.features);
      memory.Arrived(ctx, cache, tokens, first);
      memory.Trim(ctx, cache);
    }
  }

  Row Ask(StreamRecall* recall, ConstTensorView question) {
    const Tensor there(DType::kF32, {1, kVocabulary}, ctx.device());
    KvCache own(cache.pool(), KvPositions::kRows);
    own.Advance(cache.length());
    const KvCache::Mark mark = cache.MarkHere();
    SequenceStep step{recall ? &own : &cache, question, there, nullptr, recall};
    decoder().Step(ctx, {&step, 1});
    cache.RewindTo(mark);
    const Tensor logits = TransferTo(ctx, there, Device::kCpu);
    return Row(logits.data<float>(), logits.data<float>() + kVocabulary);
  }

  ExecContext ctx;

 private:
  const RandomDecoder random_decoder_;

 public:
  StreamMemory memory;
  KvCache cache;
  Reference reference;
  std::vector<int64_t> begins;  // of frames

 private:
  // Seen: the prompt's beginning, right in front of the window.
  void Append(ConstTensorView rows) {
    SequenceStep step{&cache, rows, {}};
    const int64_t gone = cache.gone(), held = cache.length();
    decoder().Step(ctx, {&step, 1});
    reference.Step(
        rows,
        [&](int, const std::vector<Row>&) {
          std::vector<Reference::Seen> seen;
          for (int64_t row = 0; row < held - gone; ++row) {
            seen.push_back({row < kPinned ? row : row + gone, row + gone});
          }
          return seen;
        },
        /*keep=*/true);
  }

  std::mt19937 random_{11};
  int32_t frame_ = 0;
};

double RelativeDifference(const Row& got, const Row& want) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(error / norm);
}

// f32 sums of some hundred terms, and angles up to 1000 that are rounded to 2^-15 of a radian and
// turned twice.
constexpr double kClose = 2e-4;

struct RecallCase {
  const char* name;
  int blocks, chunk;
  int64_t host_bytes;
};

class StreamMemoryTest : public ::testing::TestWithParam<std::tuple<RecallCase, Device>> {
 protected:
  void SetUp() override { SkippedWithout(std::get<Device>(GetParam())); }
};

TEST_P(StreamMemoryTest, AnswersAsTheAssemblyWorkedOutInDouble) {
  const auto& [c, device] = GetParam();
  MemoryOptions options{
      .window_tokens = kWindow, .recall_blocks = c.blocks, .recall_chunk = c.chunk};
  options.store.host_bytes = c.host_bytes;
  if (c.host_bytes < 10000) {
    options.store.disk_bytes = 1 << 20;
    options.store.disk_directory = ::testing::TempDir();
  }
  Stream stream(options, device);
  std::mt19937 random(5);
  const Tensor question = RandomRows(7, random);
  constexpr int64_t kQuestionRows = 4;
  for (const int frames : {15, 9}) {
    stream.Show(frames);
    ASSERT_TRUE(stream.memory.Recalls(stream.cache));
    const auto& begins = stream.begins;
    const auto count = static_cast<int64_t>(begins.size());
    const auto end_of = [&](int64_t b) {
      return b + 1 < count ? begins[b + 1] : stream.cache.length();
    };
    std::vector<std::vector<int64_t>> chosen;
    const Row want = stream.reference.Step(
        question,
        [&](int layer, const std::vector<Row>& queries) {
          const std::vector<Row> asked(queries.end() - kQuestionRows, queries.end());
          std::vector<std::pair<double, int64_t>> ranked;
          for (int64_t first = 0; first < count; first += c.chunk) {
            const int64_t last = std::min<int64_t>(first + c.chunk, count);
            double score = 0;
            for (int64_t b = first; b < last; ++b) {
              score += stream.reference.Score(layer, asked, begins[b], end_of(b));
            }
            ranked.emplace_back(-score / static_cast<double>(last - first), first);
          }
          // The newest quarter comes first, then the best.
          const size_t taken = std::min<size_t>(ranked.size(), c.blocks / c.chunk);
          std::rotate(ranked.begin(), ranked.end() - taken / 4, ranked.end());
          std::sort(ranked.begin() + taken / 4, ranked.end());
          ranked.resize(taken);
          std::vector<int64_t> blocks;
          for (const auto& [score, first] : ranked) {
            for (int64_t b = first; b < std::min<int64_t>(first + c.chunk, count); ++b) {
              blocks.push_back(b);
            }
          }
          std::sort(blocks.begin(), blocks.end());
          std::vector<Reference::Seen> seen;
          for (int64_t i = 0; i < kPinned; ++i) seen.push_back({i, i});
          for (const int64_t b : blocks) {
            for (int64_t token = begins[b]; token < end_of(b); ++token) {
              seen.push_back({token, static_cast<int64_t>(seen.size())});
            }
          }
          chosen.push_back(blocks);
          return seen;
        },
        /*keep=*/false);
    StreamRecall recall(stream.memory, stream.cache, kQuestionRows);
    const int64_t bytes = stream.cache.pool()->bytes_in_use();
    const Row got = stream.Ask(&recall, question);
    EXPECT_EQ(recall.chosen(), chosen);
    EXPECT_LE(RelativeDifference(got, want), kClose);
    EXPECT_EQ(stream.cache.pool()->bytes_in_use(), bytes);
    // Asked again, the same answer: the first pass left no trace.
    StreamRecall again(stream.memory, stream.cache, kQuestionRows);
    EXPECT_EQ(stream.Ask(&again, question), got);

    double weight = 0;
    MediaTime before = MediaTime::FromSeconds(-1);
    for (const Evidence& e : recall.evidence()) {
      EXPECT_GT(e.begin.seconds(), before.seconds());
      EXPECT_LE(e.begin.seconds(), e.end.seconds());
      EXPECT_TRUE(e.layers == 1 || e.layers == 2);
      weight += e.weight;
      before = e.end;
    }
    EXPECT_NEAR(weight, 1, 1e-6);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Assemblies, StreamMemoryTest,
    ::testing::Combine(::testing::Values(RecallCase{"AllBlocks", 100, 1, 1 << 20},
                                         RecallCase{"OneThatIsNewest", 5, 1, 1 << 20},
                                         RecallCase{"ThreeOfTwelveAreNewest", 12, 1, 1 << 20},
                                         RecallCase{"BestAlone", 3, 1, 1 << 20},
                                         RecallCase{"FromDisk", 6, 1, 6000},
                                         RecallCase{"Chunks", 6, 3, 1 << 20}),
                       ::testing::Values(Device::kCpu, Device::kCuda)),
    [](const auto& info) {
      return std::string(std::get<0>(info.param).name) + "_" + Name(std::get<1>(info.param));
    });

class StreamMemoryWindowTest : public ::testing::TestWithParam<Device> {
 protected:
  void SetUp() override { SkippedWithout(GetParam()); }
};
INSTANTIATE_TEST_SUITE_P(Devices, StreamMemoryWindowTest,
                         ::testing::Values(Device::kCpu, Device::kCuda),
                         [](const auto& info) { return Name(info.param); });

TEST_P(StreamMemoryWindowTest, TheWindowAloneAnswersAsWorkedOutInDouble) {
  Stream stream({.window_tokens = kWindow, .recall_blocks = 0}, GetParam());
  stream.Show(24);
  EXPECT_FALSE(stream.memory.Recalls(stream.cache));
  EXPECT_TRUE(stream.memory.blocks().empty());
  const int64_t gone = stream.cache.gone(), held = stream.cache.length() - gone;
  EXPECT_GT(gone, 0);
  EXPECT_GE(held, kPinned + kWindow);
  EXPECT_LT(held, kPinned + kWindow + kKvBlockTokens);
  std::mt19937 random(5);
  const Tensor question = RandomRows(7, random);
  const Row want = stream.reference.Step(
      question,
      [&](int, const std::vector<Row>&) {
        std::vector<Reference::Seen> seen;
        for (int64_t row = 0; row < held; ++row) {
          seen.push_back({row < kPinned ? row : row + gone, row});
        }
        return seen;
      },
      /*keep=*/false);
  EXPECT_LE(RelativeDifference(stream.Ask(nullptr, question), want), kClose);
}

TEST_P(StreamMemoryWindowTest, RewindingForgetsFramesAndGivesTheirBytesBack) {
  MemoryOptions options{.window_tokens = kWindow};
  Stream stream(options, GetParam());
  stream.Show(10);
  const StreamMemory::Counts before = stream.memory.counts();
  stream.Show(1);
  stream.memory.RewindTo(stream.begins.back());
  EXPECT_EQ(stream.memory.counts().blocks, before.blocks);
  stream.memory.RewindTo(0);
  stream.memory.Settle();  // what was on its way is forgotten as well
  const StreamMemory::Counts now = stream.memory.counts();
  EXPECT_EQ(now.host_bytes + now.disk_bytes + now.index_bytes, 0);
}

// Off and back: bit for bit, or as int8 within half a step of each head's largest value.
TEST_P(StreamMemoryWindowTest, AnswersFromEightBitsStayClose) {
  std::mt19937 random(5);
  const Tensor question = RandomRows(7, random);
  std::vector<Row> answers;
  std::vector<int64_t> bytes;
  for (const bool int8 : {false, true}) {
    Stream stream({.window_tokens = kWindow, .recall_blocks = 100, .int8 = int8}, GetParam());
    stream.Show(30);
    StreamRecall recall(stream.memory, stream.cache, 7);
    answers.push_back(stream.Ask(&recall, question));
    bytes.push_back(stream.memory.counts().host_bytes);
  }
  // A step of 1/127 of the largest of some hundred values is about 2 % of a typical one, and errors
  // of many keys and values average out.
  EXPECT_LE(RelativeDifference(answers[1], answers[0]), 0.03);
  EXPECT_GT(RelativeDifference(answers[1], answers[0]), 0);
  EXPECT_LT(bytes[1], bytes[0] / 3);  // f32 here: a quarter, and the scales
}

TEST_P(StreamMemoryWindowTest, ARestoredStreamGoesOnBitForBit) {
  for (const bool int8 : {false, true}) {
    const MemoryOptions options{.window_tokens = kWindow, .recall_blocks = 6, .int8 = int8};
    Stream stream(options, GetParam());
    stream.Show(20);
    stream.memory.Settle();
    const KvGeometry kv = stream.decoder().kv_geometry();
    const KvCache& cache = stream.cache;
    StreamMemory memory(options, kv, stream.decoder().rotary_frequencies(), kPinned);
    for (const StreamMemory::Block& block : stream.memory.blocks()) {
      memory.Restore(cache, block,
                     block.off_loaded ? stream.memory.OffLoaded(block) : std::vector<uint8_t>());
    }
    std::vector<Tensor> pinned;
    for (int i = 0; i < kLayers; ++i) {
      pinned.push_back(TransferTo(stream.ctx, cache.PinnedKeys(i), Device::kCpu));
    }
    KvCache restored(cache.pool());
    restored.Restore(stream.ctx, cache.length(), cache.gone(), pinned);
    const Shape shape{cache.Reach(), kKvHeads * kSize};
    const Tensor keys(kv.dtype, shape, kv.device), values(kv.dtype, shape, kv.device);
    for (int i = 0; i < kLayers; ++i) {
      LoadKv(stream.ctx, cache.layer(i), 0, keys, values);
      StoreKv(stream.ctx, keys, values, 0, restored.layer(i));
    }
    std::mt19937 random(5);
    const Tensor question = RandomRows(7, random);
    StreamRecall before(stream.memory, cache, 7), after(memory, restored, 7);
    const Row want = stream.Ask(&before, question);
    EXPECT_EQ(stream.Ask(&after, question), want);
    restored.Slide(stream.ctx, stream.decoder().rotary_frequencies(), kPinned, 1);
    EXPECT_EQ(restored.gone(), cache.gone() + kKvBlockTokens);
  }
}

TEST_P(StreamMemoryWindowTest, FramesThatDoNotFitAreNotRestored) {
  Stream stream({.window_tokens = kWindow}, GetParam());
  stream.Show(20);
  stream.memory.Settle();
  const StreamMemory::Block first = stream.memory.blocks().front();
  const std::vector<uint8_t> bytes = stream.memory.OffLoaded(first);
  const auto refused = [&](const std::function<void(StreamMemory::Block&)>& change) {
    StreamMemory memory({}, stream.decoder().kv_geometry(), stream.decoder().rotary_frequencies(),
                        kPinned);
    StreamMemory::Block block = first;
    change(block);
    try {
      memory.Restore(stream.cache, block, bytes);
    } catch (const InputError&) {
      return true;
    }
    return false;
  };
  EXPECT_FALSE(refused([](auto&) {}));
  EXPECT_TRUE(refused([](auto& b) { ++b.tokens; }));
  EXPECT_TRUE(refused([](auto& b) { b.tokens = int64_t{1} << 60; }));
  EXPECT_TRUE(refused([](auto& b) { b.begin = 0; }));
  EXPECT_TRUE(refused([&](auto& b) { b.begin = stream.cache.length() - b.tokens + 1; }));
  EXPECT_TRUE(refused([](auto& b) { b.begin = std::numeric_limits<int64_t>::max(); }));
  EXPECT_TRUE(refused([](auto& b) { b.number = std::numeric_limits<int64_t>::max(); }));
  EXPECT_TRUE(refused([](auto& b) { b.index.pop_back(); }));
  EXPECT_TRUE(refused([](auto& b) { b.off_loaded = false; }));
  EXPECT_THROW(stream.memory.Restore(stream.cache, first, bytes), InputError);
}

// What is still on its way when a question comes, or when a stream ends, is neither lost nor left
// behind.
TEST_P(StreamMemoryWindowTest, AQuestionRightAfterManyFramesSeesAllOfThem) {
  std::mt19937 random(5);
  const Tensor question = RandomRows(7, random);
  for (const bool int8 : {false, true}) {
    const MemoryOptions options{.window_tokens = kWindow, .recall_blocks = 100, .int8 = int8};
    std::vector<Row> answers;
    for (const bool waits : {false, true}) {
      Stream stream(options, GetParam());
      for (int i = 0; i < 60; ++i) {
        stream.Show(1);
        if (waits) stream.memory.Settle();
      }
      StreamRecall recall(stream.memory, stream.cache, 7);
      answers.push_back(stream.Ask(&recall, question));
      EXPECT_EQ(recall.chosen().front().size(), 60u);
      const StreamMemory::Counts counts = stream.memory.counts();
      EXPECT_EQ(counts.blocks, 60);
      EXPECT_EQ(counts.host_blocks,
                std::count_if(stream.memory.blocks().begin(), stream.memory.blocks().end(),
                              [](const auto& b) { return b.off_loaded; }));
    }
    EXPECT_EQ(answers[0], answers[1]);
  }
  Stream ends({.window_tokens = kWindow}, GetParam());
  ends.Show(30);
}

TEST_P(StreamMemoryWindowTest, AFullDiskTakesNothingFromWhatIsHeld) {
  MemoryOptions options{.window_tokens = kWindow, .recall_blocks = 100};
  options.store = {
      .host_bytes = 20'000, .disk_bytes = 1 << 20, .disk_directory = ::testing::TempDir()};
  Stream stream(options, GetParam());
  stream.Show(30);
  rlimit before;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small = {.rlim_cur = 64, .rlim_max = before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  stream.Show(30);
  stream.memory.Settle();
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_TRUE(stream.memory.TakeWarning().has_value());
  const StreamMemory::Counts counts = stream.memory.counts();
  EXPECT_GT(counts.dropped, 0);
  EXPECT_EQ(counts.blocks + counts.dropped, 60);
  EXPECT_LE(counts.host_bytes, options.store.host_bytes);
  std::mt19937 random(5);
  StreamRecall recall(stream.memory, stream.cache, 7);
  const Row answer = stream.Ask(&recall, RandomRows(7, random));
  EXPECT_TRUE(std::isfinite(answer[0]));
  EXPECT_EQ(static_cast<int64_t>(recall.chosen().front().size()), counts.blocks);
}

// Rows of random numbers in caches on the CPU and on the GPU: what leaves, and what comes back.
TEST(StreamMemoryGpuTest, StoresAndRecallsTheSameBytesAsTheCpu) {
  if (SkippedWithout(Device::kCuda)) return;
  constexpr int64_t kFrame = 21, kFrames = 20, kTokens = kPinned + kFrame * kFrames;
  const Tensor frequencies = InverseFrequencies(Config());
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const bool int8 : {false, true}) {
      SCOPED_TRACE(std::string(Name(dtype)) + (int8 ? " int8" : ""));
      std::vector<std::vector<uint8_t>> stored[2];
      std::vector<std::vector<float>> indices[2];
      std::vector<float> keys[2], values[2];
      for (const Device device : {Device::kCpu, Device::kCuda}) {
        const int at = device == Device::kCuda;
        ExecContext ctx({.device = device});
        const KvGeometry geometry{.num_layers = kLayers,
                                  .kv_heads = kKvHeads,
                                  .head_dim = kSize,
                                  .dtype = dtype,
                                  .device = device};
        const Tensor there = Placed(frequencies.view(), device);
        StreamMemory memory({.window_tokens = kWindow, .recall_blocks = 100, .int8 = int8},
                            geometry, there, kPinned);
        const auto pool = std::make_shared<KvBlockPool>(geometry, 0);
        KvCache cache(pool);
        const auto append = [&](int64_t count, uint32_t seed) {
          const int64_t row = cache.Reserve(ctx, count) - cache.gone();
          for (int layer = 0; layer < kLayers; ++layer) {
            const Tensor rows = ::sluice::testing::RandomTensor(
                dtype, {2 * count, kKvHeads * kSize}, 100 * seed + layer);
            const Tensor on_device = TransferTo(ctx, rows, device);
            StoreKv(ctx, on_device.view().Slice(0, count), on_device.view().Slice(count, 2 * count),
                    row, cache.layer(layer));
          }
        };
        append(kPinned, 1);
        for (int32_t frame = 0; frame < kFrames; ++frame) {
          const int64_t first = cache.length();
          append(kFrame, 2 + frame);
          VisualTokens tokens;
          tokens.origins.resize(kFrame, {.frame = frame, .time = {}});
          memory.Arrived(ctx, cache, tokens, first);
          memory.Trim(ctx, cache);
        }
        memory.Settle();
        for (const StreamMemory::Block& block : memory.blocks()) {
          if (block.off_loaded) stored[at].push_back(memory.OffLoaded(block));
          indices[at].push_back(block.index);
        }
        StreamRecall recall(memory, cache, 1);
        KvCache own(pool, KvPositions::kRows);
        own.Advance(cache.length());
        const Tensor query =
            TransferTo(ctx, ::sluice::testing::RandomTensor(dtype, {1, kHeads * kSize}, 9), device);
        recall.Recall(ctx, 0, query, 1, own);
        ASSERT_EQ(own.rows(0), kTokens);
        const Shape shape{kTokens, kKvHeads * kSize};
        const Tensor k(dtype, shape, device), v(dtype, shape, device);
        LoadKv(ctx, own.layer(0), 0, k, v);
        for (const auto& [rows, to] : {std::pair(&k, &keys[at]), std::pair(&v, &values[at])}) {
          const Tensor wide = ConvertTo(TransferTo(ctx, *rows, Device::kCpu), DType::kF32);
          to->assign(wide.data<float>(), wide.data<float>() + shape.NumElements());
        }
      }
      ASSERT_GT(stored[0].size(), 10u);
      EXPECT_EQ(stored[0], stored[1]);
      EXPECT_EQ(values[0], values[1]);
      // Keys and indices were turned: sines differ by some 2^-23, results are rounded to the dtype.
      const float close = dtype == DType::kF32 ? 4e-6f : 4e-2f;
      for (size_t i = 0; i < keys[0].size(); ++i) {
        ASSERT_NEAR(keys[0][i], keys[1][i], close) << i;
      }
      ASSERT_EQ(indices[0].size(), indices[1].size());
      for (size_t b = 0; b < indices[0].size(); ++b) {
        ASSERT_EQ(indices[0][b].size(), indices[1][b].size());
        for (size_t i = 0; i < indices[0][b].size(); ++i) {
          ASSERT_NEAR(indices[0][b][i], indices[1][b][i], 4e-6) << b << " " << i;
        }
      }
    }
  }
}

// Half a day of video at two frames a second: what is resident stops growing, budgets are kept.
TEST_P(StreamMemoryWindowTest, MemoryStaysFlatOverAHundredThousandFrames) {
  const RandomDecoder random(Config(), DType::kF32, GetParam());
  const Decoder& decoder = *random.decoder;
  MemoryOptions options{.window_tokens = 256, .recall_blocks = 8};
  options.store = {.host_bytes = 1 << 20,
                   .disk_bytes = 2 << 20,
                   .disk_directory = ::testing::TempDir(),
                   .when_full = WhenFull::kThin};
  StreamMemory memory(options, decoder.kv_geometry(), decoder.rotary_frequencies(), kPinned);
  const auto pool = std::make_shared<KvBlockPool>(decoder.kv_geometry(), 0);
  KvCache cache(pool);
  ExecContext ctx({.device = GetParam()});
  std::mt19937 generator(3);
  const auto append = [&](ConstTensorView rows) {
    SequenceStep step{&cache, rows, {}};
    decoder.Step(ctx, {&step, 1});
  };
  append(RandomRows(kPinned, generator));
  constexpr int kFrames = 100'000, kBatch = 50, kTokens = 2;
  VisualTokens tokens;
  tokens.features = RandomRows(kBatch * kTokens, generator);
  tokens.origins.resize(kBatch * kTokens);
  int64_t most_early = 0, most = 0;
  for (int frame = 0; frame < kFrames; frame += kBatch) {
    for (int i = 0; i < kBatch * kTokens; ++i) {
      tokens.origins[i].frame = frame + i / kTokens;
      tokens.origins[i].time = MediaTime::FromSeconds(0.5 * (frame + i / kTokens));
    }
    const int64_t first = cache.length();
    append(tokens.features);
    memory.Arrived(ctx, cache, tokens, first);
    memory.Trim(ctx, cache);
    memory.Settle();
    const StreamMemory::Counts counts = memory.counts();
    ASSERT_LE(counts.host_bytes, options.store.host_bytes);
    ASSERT_LE(counts.disk_bytes, options.store.disk_bytes);
    most = std::max(most, cache.SizeBytes() + memory.SizeBytes());
    if (frame == kFrames / 4) most_early = most;
  }
  EXPECT_EQ(most, most_early);
  EXPECT_EQ(memory.counts().blocks + memory.counts().dropped, kFrames);
  EXPECT_GT(memory.counts().disk_blocks, 0);
  EXPECT_LT(memory.blocks().front().time.seconds(), 1000);  // thinned, not cut off
  StreamRecall recall(memory, cache, 3);
  KvCache own(pool, KvPositions::kRows);
  own.Advance(cache.length());
  const Tensor logits(DType::kF32, {1, kVocabulary}, ctx.device());
  const Tensor question = RandomRows(5, generator);
  SequenceStep step{&own, question, logits, nullptr, &recall};
  decoder.Step(ctx, {&step, 1});
  EXPECT_TRUE(std::isfinite(TransferTo(ctx, logits, Device::kCpu).data<float>()[0]));
  EXPECT_EQ(recall.chosen().front().size(), 8u);
}

}  // namespace
}  // namespace sluice
