#include "llm/sampler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "runtime/transfer.h"
#include "tests/support/gpu_testing.h"

namespace sluice {
namespace {

using ::sluice::testing::SkippedWithout;
using ::testing::HasSubstr;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kDraws = 20000;
// Five standard deviations of a frequency over kDraws draws, at its widest.
constexpr double kTolerance = 5 * 0.5 / 141.4;

// Draws with one sampler from fresh copies of `logits`; frequency by id.
std::map<int32_t, double> Frequencies(SamplingOptions options, const std::vector<float>& logits,
                                      std::vector<int32_t> context = {}) {
  options.seed = 42;
  Sampler sampler(options, static_cast<int32_t>(logits.size()));
  std::map<int32_t, double> counts;
  for (int i = 0; i < kDraws; ++i) {
    std::vector<float> copy = logits;
    counts[sampler.Sample(copy, context)] += 1.0 / kDraws;
  }
  return counts;
}

int32_t Greedy(std::vector<float> logits, SamplingOptions options = {},
               std::vector<int32_t> context = {}) {
  return Sampler(options, static_cast<int32_t>(logits.size())).Sample(logits, context);
}

TEST(SamplerTest, GreedyTakesTheLargestAndOfEqualsTheSmallestId) {
  EXPECT_EQ(Greedy({-1, 3, 2, 3}), 1);
  EXPECT_EQ(Greedy({-kInfinity, -kInfinity, -7}), 2);
}

TEST(SamplerTest, RowsWithoutATokenAreNeverChosen) {
  Sampler sampler({.temperature = 1.0f}, 2);
  for (int i = 0; i < 100; ++i) {
    std::vector<float> logits = {0, 0, 100, std::nanf("")};
    EXPECT_LT(sampler.Sample(logits, {}), 2);
  }
}

TEST(SamplerTest, FrequenciesFollowTheSoftmaxAtTheTemperature) {
  const std::vector<float> logits = {1.0f, -0.5f, 2.0f, 0.0f};
  for (const float temperature : {0.5f, 1.0f, 3.0f}) {
    double total = 0;
    for (const float logit : logits) total += std::exp(logit / temperature);
    const auto found = Frequencies({.temperature = temperature}, logits);
    for (int32_t id = 0; id < 4; ++id) {
      EXPECT_NEAR(found.at(id), std::exp(logits[id] / temperature) / total, kTolerance);
    }
  }
}

TEST(SamplerTest, ATinyTemperatureIsGreedyAndFinite) {
  const auto found = Frequencies({.temperature = 1e-38f}, {-3, 80, 79.5f});
  EXPECT_EQ(found.size(), 1u);
  EXPECT_EQ(found.begin()->first, 1);
}

TEST(SamplerTest, TopKKeepsTheKLikeliestAndTies) {
  const auto found = Frequencies({.temperature = 1, .top_k = 2}, {0, 3, 1, 2, -1});
  EXPECT_EQ(found.size(), 2u);
  EXPECT_NEAR(found.at(1), 1 / (1 + std::exp(-1.0)), kTolerance);
  EXPECT_EQ(Frequencies({.temperature = 1, .top_k = 2}, {0, 3, 1, 1, 1}).size(), 4u);
  EXPECT_EQ(Frequencies({.temperature = 1, .top_k = 99}, {0, 1, 1}).size(), 3u);
}

TEST(SamplerTest, TopPKeepsTheFewestThatHoldTheMass) {
  // Probabilities 0.5, 0.25, 0.125, 0.125.
  const std::vector<float> logits = {-2 * std::log(2.0f), -std::log(2.0f), -3 * std::log(2.0f),
                                     -3 * std::log(2.0f)};
  const auto kept = [&](float top_p) {
    return Frequencies({.temperature = 1, .top_p = top_p}, logits).size();
  };
  EXPECT_EQ(kept(0.0f), 1u);
  EXPECT_EQ(kept(0.45f), 1u);
  EXPECT_EQ(kept(0.7f), 2u);
  EXPECT_EQ(kept(0.8f), 3u);
  EXPECT_EQ(kept(0.95f), 4u);
  EXPECT_EQ(kept(1.0f), 4u);
}

TEST(SamplerTest, TopPCountsMassWithinTopK) {
  // Within the two likeliest the first holds 2/3, so it alone reaches 0.6; of all it holds 1/2.
  const std::vector<float> logits = {std::log(4.0f), std::log(2.0f), 0, 0};
  EXPECT_EQ(Frequencies({.temperature = 1, .top_k = 2, .top_p = 0.6f}, logits).size(), 1u);
  EXPECT_EQ(Frequencies({.temperature = 1, .top_p = 0.6f}, logits).size(), 2u);
}

TEST(SamplerTest, RepetitionPenaltyCountsEachIdOnceAndLowersBothSigns) {
  const SamplingOptions options = {.repetition_penalty = 2.0f};
  EXPECT_EQ(Greedy({3.0f, 2.0f}, options, {0}), 1);
  EXPECT_EQ(Greedy({4.2f, 2.0f}, options, {0, 0, 0}), 0) << "4.2 / 2 stays above 2";
  EXPECT_EQ(Greedy({-1.0f, -1.5f}, options, {0}), 1);
  EXPECT_EQ(Greedy({3.0f, 2.0f}, options, {-1, 7, 1 << 30}), 0) << "ids outside are ignored";
}

TEST(SamplerTest, EqualSeedsDrawEqualIds) {
  const std::vector<float> logits = {0.1f, 0.2f, 0.3f, 0.4f, 0.5f};
  const auto draw = [&](uint64_t seed) {
    Sampler sampler({.temperature = 1, .top_p = 0.9f, .seed = seed}, 5);
    std::vector<int32_t> ids;
    for (int i = 0; i < 50; ++i) {
      std::vector<float> copy = logits;
      ids.push_back(sampler.Sample(copy, ids));
    }
    return ids;
  };
  EXPECT_EQ(draw(1), draw(1));
  EXPECT_NE(draw(1), draw(2));
}

TEST(SamplerTest, LogitsThatAreNoNumbersAreNamed) {
  for (const float bad : {std::nanf(""), kInfinity}) {
    for (const float temperature : {0.0f, 1.0f}) {
      try {
        Greedy({1, bad, 2}, {.temperature = temperature});
        FAIL() << "must throw";
      } catch (const Error& error) {
        EXPECT_THAT(error.what(), HasSubstr("[sampler]"));
        EXPECT_THAT(error.what(), HasSubstr("id 1"));
      }
    }
  }
  EXPECT_THROW(Greedy({-kInfinity, -kInfinity}), Error);
  std::vector<float> few = {1};
  EXPECT_THROW(Sampler({}, 2).Sample(few, {}), Error);
}

TEST(SamplerTest, OptionsOutOfRangeAreRefused) {
  const float nan = std::nanf("");
  for (const SamplingOptions& options :
       {SamplingOptions{.temperature = -1}, SamplingOptions{.temperature = nan},
        SamplingOptions{.temperature = kInfinity}, SamplingOptions{.top_k = -1},
        SamplingOptions{.top_p = -0.1f}, SamplingOptions{.top_p = 1.1f},
        SamplingOptions{.top_p = nan}, SamplingOptions{.repetition_penalty = 0},
        SamplingOptions{.repetition_penalty = -1}, SamplingOptions{.repetition_penalty = nan}}) {
    EXPECT_THROW(Sampler(options, 10), InputError);
  }
  EXPECT_THROW(Sampler({}, 0), InputError);
}

// The same seed draws the same ids on both devices. Distributions: flat as noise, peaked as a
// language model's, with ties, with ids that cannot be; small and large vocabularies.
TEST(SamplerTest, AGpuDrawsWhatTheCpuDraws) {
  if (SkippedWithout(Device::kCuda)) return;
  ExecContext gpu({.device = Device::kCuda});
  std::vector<SamplingOptions> all;
  for (const float temperature : {0.0f, 0.01f, 0.7f, 2.0f}) {
    for (const int top_k : {0, 1, 3, 50, 1000, 100000}) {
      for (const float top_p : {0.0f, 0.5f, 0.9f, 0.999f, 1.0f}) {
        all.push_back({.temperature = temperature, .top_k = top_k, .top_p = top_p});
      }
    }
  }
  int64_t draws = 0, whole = 0, different = 0;
  for (const int32_t ids : {1, 7, 300, 49152, 152064}) {
    for (const int kind : {0, 1, 2, 3}) {
      std::mt19937 random(ids + kind);
      std::normal_distribution<float> normal(0, kind == 0 ? 0.5f : 3.0f);
      std::vector<float> logits(ids + 3, std::nanf(""));  // the last three have no token
      for (int32_t id = 0; id < ids; ++id) {
        float& logit = logits[id];
        logit = normal(random) + (kind > 0 && id % 10007 == 5 ? 14.0f : 0.0f);
        if (kind == 2) logit = std::round(logit);
        if (kind == 3 && id % 3 != 1) logit = -kInfinity;
      }
      if (kind == 3 && ids == 1) logits[0] = -2;
      std::vector<int32_t> context;
      for (int i = 0; i < 500; ++i)
        context.push_back(static_cast<int32_t>(random() % (ids + 5)) - 2);
      const Tensor row(DType::kF32, {1, ids + 3}), there(DType::kF32, row.shape(), Device::kCuda);
      for (size_t o = 0; o < all.size(); ++o) {
        if (ids > 1000 && o % 3 != static_cast<size_t>(kind) % 3) continue;  // to save time
        SamplingOptions options = all[o];
        options.seed = o;
        options.repetition_penalty = o % 2 == 0 ? 1.0f : 1.3f;
        Sampler cpu_sampler(options, ids), gpu_sampler(options, ids);
        for (int draw = 0; draw < 3; ++draw) {
          std::vector<float> copy = logits;
          const int32_t want = cpu_sampler.Sample(copy, context);
          std::copy(logits.begin(), logits.end(), row.data<float>());
          Transfer(gpu, row, there);
          const int32_t got = gpu_sampler.Sample(gpu, there, context);
          ++draws;
          different += got != want;
          EXPECT_EQ(got, want) << ids << " ids, kind " << kind << ", temperature "
                               << options.temperature << ", k " << options.top_k << ", p "
                               << options.top_p << ", penalty " << options.repetition_penalty;
        }
        whole += gpu_sampler.whole_copies();
      }
    }
  }
  RecordProperty("whole_copies", std::to_string(whole) + " of " + std::to_string(draws));
  EXPECT_EQ(different, 0);
  EXPECT_LT(whole, draws / 5);
}

TEST(SamplerTest, AGpuTellsWhatIsWrongWithLogits) {
  if (SkippedWithout(Device::kCuda)) return;
  ExecContext gpu({.device = Device::kCuda});
  for (const float temperature : {0.0f, 1.0f}) {
    for (const int top_k : {0, 2}) {
      Sampler sampler({.temperature = temperature, .top_k = top_k}, 5);
      for (const float wrong : {std::nanf(""), kInfinity, -kInfinity}) {
        const Tensor row(DType::kF32, {1, 5});
        std::fill_n(row.data<float>(), 5, wrong == -kInfinity ? wrong : 0);
        row.data<float>()[3] = wrong;
        const Tensor there = TransferTo(gpu, row, Device::kCuda);
        EXPECT_THROW(sampler.Sample(gpu, there, {}), Error) << wrong << " " << temperature;
      }
    }
  }
}

}  // namespace
}  // namespace sluice
