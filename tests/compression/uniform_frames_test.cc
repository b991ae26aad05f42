#include "compression/uniform_frames.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "runtime/error.h"

namespace sluice {
namespace {

TEST(UniformFramesTest, TheNewestOfEachGroupStaysHoweverFramesAreBatched) {
  ExecContext ctx({});
  for (const int batch : {1, 2, 5}) {
    UniformFrames uniform(3);
    std::vector<int> kept;
    for (int first = 0; first < 10; first += batch) {
      VisualTokens tokens;
      for (int f = first; f < std::min(10, first + batch); ++f) {
        for (int16_t t = 0; t < 2; ++t) tokens.origins.push_back({f, 0, t, {}});
      }
      tokens.features = Tensor(DType::kF32, {tokens.size(), 1});
      for (int64_t i = 0; i < tokens.size(); ++i) {
        tokens.features.data<float>()[i] = static_cast<float>(tokens.origins[i].frame);
      }
      const VisualTokens out = uniform.Compress(ctx, std::move(tokens));
      for (int64_t i = 0; i < out.size(); ++i) {
        EXPECT_EQ(out.features.data<float>()[i], static_cast<float>(out.origins[i].frame));
        kept.push_back(out.origins[i].frame);
      }
    }
    EXPECT_THAT(kept, testing::ElementsAre(2, 2, 5, 5, 8, 8)) << "batches of " << batch;
  }
}

TEST(UniformFramesTest, HalfAFrameIsRefused) {
  for (const double every : {0.0, 0.5, 2.5, -1.0}) {
    EXPECT_THROW(UniformFrames uniform(every), InputError) << every;
  }
}

}  // namespace
}  // namespace sluice
