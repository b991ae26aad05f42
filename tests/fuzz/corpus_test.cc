// What the fuzzers begin with and what they found, without a fuzzer.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "tests/fuzz/targets.h"

namespace sluice {
namespace {

struct Input {
  std::string name, bytes;
  bool seed() const { return name.starts_with("seed_"); }
};

std::vector<Input> Corpus(const std::string& target) {
  std::vector<Input> corpus;
  const std::filesystem::path root = SLUICE_SOURCE_DIR "/tests/fuzz/corpus";
  for (const auto& file : std::filesystem::directory_iterator(root / target)) {
    std::ifstream in(file.path(), std::ios::binary);
    corpus.push_back(
        {file.path().filename().string(), std::string(std::istreambuf_iterator<char>(in), {})});
  }
  std::sort(corpus.begin(), corpus.end(),
            [](const Input& a, const Input& b) { return a.name < b.name; });
  return corpus;
}

class CorpusTest : public testing::TestWithParam<FuzzTarget> {};

TEST_P(CorpusTest, SeedsAreTakenSoThatFuzzersBeginBehindTheFirstChecks) {
  int seeds = 0;
  for (const Input& input : Corpus(GetParam().name)) {
    if (!input.seed()) continue;
    ++seeds;
    EXPECT_NO_THROW(GetParam().run(input.bytes)) << input.name << ": run make_seeds again?";
  }
  EXPECT_GT(seeds, 0);
}

TEST_P(CorpusTest, WhatWasFoundIsTakenOrRefused) {
  for (const Input& input : Corpus(GetParam().name)) {
    SCOPED_TRACE(input.name);
    try {
      GetParam().run(input.bytes);
    } catch (const Error&) {
    } catch (const std::exception& error) {
      ADD_FAILURE() << "neither taken nor refused: " << error.what();
    }
  }
}

TEST_P(CorpusTest, DamagedSeedsAreTakenOrRefused) {
  const int each = GetParam().damaged;
  std::mt19937 random(1);
  for (const Input& input : Corpus(GetParam().name)) {
    if (!input.seed()) continue;
    for (int i = 0; i < 2 * each; ++i) {
      std::string bytes = input.bytes;
      if (i < each) {
        bytes.resize(bytes.size() * i / each);
      } else if (!bytes.empty()) {
        bytes[random() % bytes.size()] ^= static_cast<char>(1 << random() % 8);
      }
      SCOPED_TRACE(input.name + ", damage " + std::to_string(i));
      try {
        GetParam().run(bytes);
      } catch (const Error&) {
      } catch (const std::exception& error) {
        ADD_FAILURE() << "neither taken nor refused: " << error.what();
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, CorpusTest, testing::ValuesIn(kFuzzTargets),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace sluice
