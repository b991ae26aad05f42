#include "compression/registry.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <string>

#include "runtime/archive.h"
#include "runtime/error.h"
#include "runtime/transfer.h"
#include "tests/support/gpu_testing.h"
#include "tests/support/temporary_directory.h"

namespace sluice {
namespace {

using ::sluice::testing::SkippedWithout;
using ::testing::HasSubstr;
using ::testing::Property;
using ::testing::ThrowsMessage;

constexpr int kRows = 3, kCols = 4, kWidth = 8;

// Frames first..first+count-1 of random features.
VisualTokens RandomTokens(int first, int count, uint32_t seed, int rows = kRows, int cols = kCols,
                          int64_t width = kWidth) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  VisualTokens tokens;
  tokens.grid_rows = rows;
  tokens.grid_cols = cols;
  for (int frame = first; frame < first + count; ++frame) {
    for (int16_t row = 0; row < rows; ++row) {
      for (int16_t col = 0; col < cols; ++col) {
        tokens.origins.push_back({frame, row, col, MediaTime::FromSeconds(0.5 * frame)});
      }
    }
  }
  tokens.features = Tensor(DType::kF32, {tokens.size(), width});
  for (int64_t i = 0; i < tokens.size() * width; ++i) {
    tokens.features.data<float>()[i] = normal(random);
  }
  return tokens;
}

VisualTokens Copy(const VisualTokens& tokens) {
  return {tokens.features.Clone(), tokens.origins, tokens.grid_rows, tokens.grid_cols,
          tokens.scores};
}

// What every compressor promises, walked over the list, so that a new one is tested once listed.
class TokenCompressorTest : public ::testing::TestWithParam<CompressorEntry> {};

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

TEST_P(TokenCompressorTest, ContinuesAfterBeingSavedAsIfItHadNotBeen) {
  ExecContext ctx({});
  const TemporaryDirectory directory;
  const auto saved = GetParam().make(GetParam().default_value);
  const auto loaded = GetParam().make(GetParam().default_value);
  saved->Compress(ctx, RandomTokens(0, 2, 1));
  Archive out = Archive::ToFile(directory.path() / "state");
  saved->Persist(out);
  out.Finish();
  Archive in = Archive::FromFile(directory.path() / "state");
  loaded->Persist(in);
  loaded->Undo();  // goes no further back
  const VisualTokens a = saved->Compress(ctx, RandomTokens(2, 2, 7));
  const VisualTokens b = loaded->Compress(ctx, RandomTokens(2, 2, 7));
  ASSERT_EQ(a.size(), b.size());
  for (int64_t i = 0; i < a.size() * kWidth; ++i) {
    ASSERT_EQ(a.features.data<float>()[i], b.features.data<float>()[i]) << i;
  }
}

// Tokens on the GPU stay there and become what they become on the CPU: the same tokens, and rows
// that differ by the order of sums (copies not at all). Widths and frames of real models; the
// second batch has a frame of another length, and the third is undone and comes again.
TEST_P(TokenCompressorTest, DoesOnAGpuWhatItDoesOnTheCpu) {
  if (SkippedWithout(Device::kCuda)) return;
  ExecContext cpu({}), gpu({.device = Device::kCuda});
  const auto here = GetParam().make(GetParam().default_value);
  const auto there = GetParam().make(GetParam().default_value);
  const auto compare = [&](VisualTokens in) {
    VisualTokens copy = Copy(in);
    copy.features = TransferTo(gpu, in.features, Device::kCuda);
    VisualTokens want = here->Compress(cpu, std::move(in));
    VisualTokens got = there->Compress(gpu, std::move(copy));
    ASSERT_EQ(got.features.device(), Device::kCuda);
    ASSERT_EQ(got.size(), want.size());
    ASSERT_EQ(got.scores.size(), want.scores.size());
    const Tensor rows = TransferTo(gpu, got.features, Device::kCpu);
    const int64_t width = want.features.dim(1);
    int64_t others = 0;
    for (int64_t i = 0; i < want.size(); ++i) {
      const TokenOrigin &a = got.origins[i], &b = want.origins[i];
      if (a.frame != b.frame || a.row != b.row || a.col != b.col) {
        ++others;
        continue;
      }
      for (int64_t d = 0; d < width; ++d) {
        ASSERT_NEAR(rows.data<float>()[i * width + d], want.features.data<float>()[i * width + d],
                    1e-5)
            << "token " << i << " channel " << d;
      }
    }
    EXPECT_EQ(others, 0) << "of " << want.size() << " tokens";
    for (size_t i = 0; i < want.scores.size(); ++i) {
      ASSERT_NEAR(got.scores[i], want.scores[i], 1e-5) << "score " << i;
    }
  };
  compare(RandomTokens(0, 1, 1, 14, 14, 896));
  VisualTokens uneven = RandomTokens(1, 4, 2, 14, 14, 896);
  for (size_t i = 100; i < uneven.origins.size(); ++i) {
    uneven.origins[i].frame += i < 196 || i >= 400;
  }
  compare(std::move(uneven));
  for (int twice = 0; twice < 2; ++twice) {
    compare(RandomTokens(7, 8, 3, 14, 14, 896));
    if (twice > 0) continue;
    here->Undo();
    there->Undo();
  }
  compare(RandomTokens(15, 2, 4, 27, 27, 896));
}

TEST_P(TokenCompressorTest, GoesOnElsewhereAfterBeingSavedOnAGpu) {
  if (SkippedWithout(Device::kCuda)) return;
  ExecContext cpu({}), gpu({.device = Device::kCuda});
  const TemporaryDirectory directory;
  const auto saved = GetParam().make(GetParam().default_value);
  VisualTokens in = RandomTokens(0, 2, 1);
  in.features = TransferTo(gpu, in.features, Device::kCuda);
  saved->Compress(gpu, std::move(in));
  Archive out = Archive::ToFile(directory.path() / "state");
  saved->Persist(out);
  out.Finish();
  VisualTokens results[2];
  for (ExecContext* ctx : {&cpu, &gpu}) {
    const auto loaded = GetParam().make(GetParam().default_value);
    Archive archive = Archive::FromFile(directory.path() / "state");
    loaded->Persist(archive);
    VisualTokens next = RandomTokens(2, 2, 7);
    next.features = TransferTo(*ctx, next.features, ctx->device());
    results[ctx == &gpu] = loaded->Compress(*ctx, std::move(next));
  }
  ASSERT_EQ(results[0].size(), results[1].size());
  const Tensor rows = TransferTo(gpu, results[1].features, Device::kCpu);
  for (int64_t i = 0; i < results[0].size() * kWidth; ++i) {
    ASSERT_NEAR(rows.data<float>()[i], results[0].features.data<float>()[i], 1e-5) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(All, TokenCompressorTest,
                         ::testing::ValuesIn(TokenCompressors().begin(), TokenCompressors().end()),
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
