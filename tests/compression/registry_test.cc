#include "compression/registry.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <string>

#include "runtime/error.h"

namespace sluice {
namespace {

using testing::HasSubstr;
using testing::Property;
using testing::ThrowsMessage;

constexpr int kRows = 3, kCols = 4, kWidth = 8;

// Frames first..first+count-1 of random features.
VisualTokens RandomTokens(int first, int count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  VisualTokens tokens;
  tokens.grid_rows = kRows;
  tokens.grid_cols = kCols;
  for (int frame = first; frame < first + count; ++frame) {
    for (int16_t row = 0; row < kRows; ++row) {
      for (int16_t col = 0; col < kCols; ++col) {
        tokens.origins.push_back({frame, row, col, MediaTime::FromSeconds(0.5 * frame)});
      }
    }
  }
  tokens.features = Tensor(DType::kF32, {tokens.size(), kWidth});
  for (int64_t i = 0; i < tokens.size() * kWidth; ++i) {
    tokens.features.data<float>()[i] = normal(random);
  }
  return tokens;
}

VisualTokens Copy(const VisualTokens& tokens) {
  return {tokens.features.Clone(), tokens.origins, tokens.grid_rows, tokens.grid_cols,
          tokens.scores};
}

// What every compressor promises, walked over the list, so that a new one is tested once listed.
class TokenCompressorTest : public testing::TestWithParam<CompressorEntry> {};

TEST_P(TokenCompressorTest, KeepsOrderAndInventsNothing) {
  ExecContext ctx({});
  const auto compressor = GetParam().make(GetParam().default_value);
  EXPECT_EQ(compressor->name(), GetParam().name);
  for (int batch = 0; batch < 4; ++batch) {
    const VisualTokens in = RandomTokens(3 * batch, 3, batch % 3);
    const VisualTokens out = compressor->Compress(ctx, Copy(in));
    ASSERT_LE(out.size(), in.size());
    EXPECT_EQ(out.grid_rows, kRows);
    EXPECT_EQ(out.grid_cols, kCols);
    if (out.size() > 0) {
      EXPECT_EQ(out.features.shape(), Shape({out.size(), kWidth}));
    }
    size_t at = 0;  // each origin must be found further on in the input
    for (const TokenOrigin& origin : out.origins) {
      while (at < in.origins.size() &&
             !(in.origins[at].frame == origin.frame && in.origins[at].row == origin.row &&
               in.origins[at].col == origin.col)) {
        ++at;
      }
      ASSERT_LT(at, in.origins.size()) << "frame " << origin.frame << " row " << origin.row;
      EXPECT_EQ(in.origins[at].time, origin.time);
      ++at;
    }
  }
}

TEST_P(TokenCompressorTest, ContinuesAfterUndoAsIfTheUndoneBatchHadNeverCome) {
  ExecContext ctx({});
  const auto undone = GetParam().make(GetParam().default_value);
  const auto plain = GetParam().make(GetParam().default_value);
  undone->Compress(ctx, RandomTokens(0, 2, 1));
  plain->Compress(ctx, RandomTokens(0, 2, 1));
  undone->Compress(ctx, RandomTokens(2, 2, 7));
  undone->Undo();
  for (uint32_t seed : {1u, 7u, 7u, 2u}) {
    const VisualTokens a = undone->Compress(ctx, RandomTokens(2, 2, seed));
    const VisualTokens b = plain->Compress(ctx, RandomTokens(2, 2, seed));
    ASSERT_EQ(a.size(), b.size());
    for (int64_t i = 0; i < a.size() * kWidth; ++i) {
      ASSERT_EQ(a.features.data<float>()[i], b.features.data<float>()[i]) << i;
    }
  }
}

TEST_P(TokenCompressorTest, TakesNoTokens) {
  ExecContext ctx({});
  EXPECT_EQ(GetParam().make(GetParam().default_value)->Compress(ctx, {}).size(), 0);
}

INSTANTIATE_TEST_SUITE_P(All, TokenCompressorTest,
                         testing::ValuesIn(TokenCompressors().begin(), TokenCompressors().end()),
                         [](const auto& info) {
                           std::string name(info.param.name);
                           std::erase(name, '-');
                           return name;
                         });

TEST(CompressionRegistryTest, NamesWhatItHasWhenAskedForSomethingElse) {
  EXPECT_THAT([] { MakeTokenCompressor("turbid"); },
              ThrowsMessage<InputError>(HasSubstr("there are stc-pruner")));
  EXPECT_THAT([] { MakeTokenCompressor(""); }, ThrowsMessage<InputError>(HasSubstr("there are")));
}

TEST(CompressionRegistryTest, ReadsTheParameterAndRefusesNonsense) {
  EXPECT_EQ(MakeTokenCompressor("tome-merge")->name(), "tome-merge");
  EXPECT_EQ(MakeTokenCompressor("tome-merge=0.5")->name(), "tome-merge");
  for (const char* spec :
       {"tome-merge=", "tome-merge=high", "tome-merge=0.9x", "tome-merge=1.5", "tome-merge=nan"}) {
    EXPECT_THROW(MakeTokenCompressor(spec), InputError) << spec;
  }
}

}  // namespace
}  // namespace sluice
