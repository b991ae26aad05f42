#include "llm/kv_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "runtime/error.h"
#include "runtime/transfer.h"
#include "tests/support/gpu_testing.h"

namespace sluice {
namespace {

constexpr KvGeometry kGeometry = {
    .num_layers = 3, .kv_heads = 2, .head_dim = 8, .dtype = DType::kF32};
constexpr int64_t kBlockBytes = 2 * 2 * kKvBlockTokens * 8 * 4;

TEST(KvCacheTest, ReserveContinuesWhereTheLastOneEnded) {
  ExecContext ctx({});
  KvCache cache(std::make_shared<KvBlockPool>(kGeometry, 0));
  EXPECT_EQ(cache.Reserve(ctx, 5), 0);
  EXPECT_EQ(cache.Reserve(ctx, kKvBlockTokens), 5);
  EXPECT_EQ(cache.length(), kKvBlockTokens + 5);
  EXPECT_EQ(cache.Reserve(ctx, 0), kKvBlockTokens + 5);
  EXPECT_EQ(cache.SizeBytes(), 3 * 2 * kBlockBytes);
}

TEST(KvCacheTest, LayersNeverShareBlocksAndKeepThemWhenTheCacheGrows) {
  ExecContext ctx({});
  KvCache cache(std::make_shared<KvBlockPool>(kGeometry, 0));
  cache.Reserve(ctx, 2 * kKvBlockTokens);
  std::vector<std::vector<void*>> before;
  for (int layer = 0; layer < kGeometry.num_layers; ++layer) {
    const KvLayerView view = cache.layer(layer);
    EXPECT_EQ(view.kv_heads, 2);
    EXPECT_EQ(view.head_dim, 8);
    before.emplace_back(view.blocks.begin(), view.blocks.end());
  }
  cache.Reserve(ctx, 500);
  std::set<void*> seen;
  for (int layer = 0; layer < kGeometry.num_layers; ++layer) {
    const KvLayerView view = cache.layer(layer);
    ASSERT_EQ(view.blocks.size(), (2 * kKvBlockTokens + 500 + kKvBlockTokens - 1) / kKvBlockTokens);
    for (size_t i = 0; i < before[layer].size(); ++i) EXPECT_EQ(view.blocks[i], before[layer][i]);
    for (void* block : view.blocks) EXPECT_TRUE(seen.insert(block).second);
  }
}

TEST(KvCacheTest, RewindingGivesWholeBlocksBackAndKeepsTheRest) {
  ExecContext ctx({});
  auto pool = std::make_shared<KvBlockPool>(kGeometry, 0);
  {
    KvCache cache(pool);
    cache.Reserve(ctx, kKvBlockTokens + 10);
    const KvCache::Mark mark = cache.MarkHere();
    void* const first = cache.layer(1).blocks[0];
    cache.Reserve(ctx, 3 * kKvBlockTokens);
    EXPECT_EQ(pool->bytes_in_use(), 3 * 5 * kBlockBytes);
    cache.RewindTo(mark);
    EXPECT_EQ(cache.length(), kKvBlockTokens + 10);
    EXPECT_EQ(pool->bytes_in_use(), 3 * 2 * kBlockBytes);
    EXPECT_EQ(cache.layer(1).blocks[0], first);
  }
  EXPECT_EQ(pool->bytes_in_use(), 0);
}

// Fills rows [begin, end) of every layer's blocks with `value`.
void Fill(const KvCache& cache, int64_t begin, int64_t end, float value) {
  for (int layer = 0; layer < kGeometry.num_layers; ++layer) {
    for (int64_t row = begin; row < end; ++row) {
      auto* block = static_cast<float*>(cache.layer(layer).blocks[row / kKvBlockTokens]);
      block[(row % kKvBlockTokens) * 8] = value + static_cast<float>(row) + 1000.0f * layer;
    }
  }
}
bool Holds(const KvCache& cache, int64_t begin, int64_t end, float value) {
  for (int layer = 0; layer < kGeometry.num_layers; ++layer) {
    for (int64_t row = begin; row < end; ++row) {
      const auto* block = static_cast<float*>(cache.layer(layer).blocks[row / kKvBlockTokens]);
      if (block[(row % kKvBlockTokens) * 8] != value + static_cast<float>(row) + 1000.0f * layer) {
        return false;
      }
    }
  }
  return true;
}

TEST(KvCacheTest, ABranchSharesBlocksAndGoesOnByItself) {
  ExecContext ctx({});
  auto pool = std::make_shared<KvBlockPool>(kGeometry, 0);
  KvCache cache(pool);
  const int64_t begun = 2 * kKvBlockTokens + 10;
  cache.Reserve(ctx, begun);
  Fill(cache, 0, begun, 0.5f);
  auto first = cache.Branch(), second = cache.Branch();
  EXPECT_EQ(first->length(), begun);
  EXPECT_EQ(pool->bytes_in_use(), 3 * 3 * kBlockBytes);  // nothing is copied yet
  first->Reserve(ctx, 80);
  Fill(*first, begun, begun + 80, 0.25f);
  cache.Reserve(ctx, 100);
  Fill(cache, begun, begun + 100, 0.75f);
  second->Reserve(ctx, 1);
  Fill(*second, begun, begun + 1, 0.125f);
  EXPECT_TRUE(Holds(cache, 0, begun, 0.5f) && Holds(cache, begun, begun + 100, 0.75f));
  EXPECT_TRUE(Holds(*first, 0, begun, 0.5f) && Holds(*first, begun, begun + 80, 0.25f));
  EXPECT_TRUE(Holds(*second, 0, begun, 0.5f) && Holds(*second, begun, begun + 1, 0.125f));
  // Two full blocks for all; then 2, 2 and 1 of each one's own.
  EXPECT_EQ(pool->bytes_in_use(), 3 * (2 + 2 + 2 + 1) * kBlockBytes);
  first.reset();
  EXPECT_EQ(pool->bytes_in_use(), 3 * (2 + 2 + 1) * kBlockBytes);
  second.reset();
  EXPECT_EQ(cache.SizeBytes(), pool->bytes_in_use());
}

// Nothing waits between the steps: their order in the stream is enough.
TEST(KvCacheTest, BranchesOnAGpuGoOnByThemselves) {
  if (::sluice::testing::SkippedWithout(Device::kCuda)) return;
  ExecContext ctx({.device = Device::kCuda});
  KvGeometry geometry = kGeometry;
  geometry.device = Device::kCuda;
  const auto pool = std::make_shared<KvBlockPool>(geometry, 0);
  const auto store = [&](KvCache& cache, int64_t begin, int64_t count, float value) {
    cache.Reserve(ctx, count);
    const Tensor rows(DType::kF32, {count, 16});
    std::fill_n(rows.data<float>(), 16 * count, value);
    const Tensor there = TransferTo(ctx, rows, Device::kCuda);
    for (int i = 0; i < geometry.num_layers; ++i) StoreKv(ctx, there, there, begin, cache.layer(i));
  };
  const auto expect = [&](const KvCache& cache, const std::vector<float>& want) {
    const auto count = static_cast<int64_t>(want.size());
    for (int i = 0; i < geometry.num_layers; ++i) {
      const Tensor keys(DType::kF32, {count, 16}, Device::kCuda);
      const Tensor values(DType::kF32, {count, 16}, Device::kCuda);
      LoadKv(ctx, cache.layer(i), 0, keys, values);
      for (const Tensor* rows : {&keys, &values}) {
        const Tensor got = TransferTo(ctx, *rows, Device::kCpu);
        for (int64_t j = 0; j < 16 * count; ++j) {
          ASSERT_EQ(got.data<float>()[j], want[j / 16]) << "layer " << i << ", row " << j / 16;
        }
      }
    }
  };
  std::vector<float> want(70, 0.5f);
  KvCache cache(pool);
  store(cache, 0, 70, 0.5f);
  for (int round = 0; round < 20; ++round) {
    const auto branch = cache.Branch();
    store(*branch, 70, 3, 0.25f);
    store(cache, 70, 2, 0.75f);
    std::vector<float> branched = want, grown = want;
    branched.resize(73, 0.25f);
    grown.resize(72, 0.75f);
    expect(*branch, branched);
    expect(cache, grown);
    cache.RewindTo({70});
  }
}

TEST(KvCacheTest, ABranchOutlivesItsOriginAndAnOriginThatIsRewoundUnderIt) {
  ExecContext ctx({});
  auto pool = std::make_shared<KvBlockPool>(kGeometry, 0);
  auto cache = std::make_unique<KvCache>(pool);
  cache->Reserve(ctx, 3 * kKvBlockTokens);
  Fill(*cache, 0, 3 * kKvBlockTokens, 0.5f);
  const auto branch = cache->Branch();
  cache->RewindTo({kKvBlockTokens + 7});
  cache->Reserve(ctx, kKvBlockTokens);
  Fill(*cache, kKvBlockTokens + 7, 2 * kKvBlockTokens + 7, 0.75f);
  EXPECT_TRUE(Holds(*branch, 0, 3 * kKvBlockTokens, 0.5f));
  EXPECT_TRUE(Holds(*cache, 0, kKvBlockTokens + 7, 0.5f));
  cache.reset();
  EXPECT_TRUE(Holds(*branch, 0, 3 * kKvBlockTokens, 0.5f));
  EXPECT_EQ(pool->bytes_in_use(), branch->SizeBytes());
}

TEST(KvCacheTest, ABranchThatFindsNoRoomToCopyLeavesBothAsTheyWere) {
  ExecContext ctx({});
  auto pool = std::make_shared<KvBlockPool>(kGeometry, 5 * kBlockBytes);  // one to spare of three
  KvCache cache(pool);
  cache.Reserve(ctx, 10);
  Fill(cache, 0, 10, 0.5f);
  {
    const auto branch = cache.Branch();
    EXPECT_THROW(branch->Reserve(ctx, 1), ResourceExhausted);
    EXPECT_EQ(branch->length(), 10);
    EXPECT_TRUE(Holds(*branch, 0, 10, 0.5f) && Holds(cache, 0, 10, 0.5f));
  }
  EXPECT_EQ(pool->bytes_in_use(), 3 * kBlockBytes);
}

TEST(KvCacheTest, AnExhaustedBudgetLeavesTheCacheUnchanged) {
  ExecContext ctx({});
  // Room for 7 blocks: two of each of the three layers, and one.
  auto pool = std::make_shared<KvBlockPool>(kGeometry, 7 * kBlockBytes + 100);
  KvCache cache(pool), other(pool);
  cache.Reserve(ctx, kKvBlockTokens);
  other.Reserve(ctx, 1);
  const int64_t before = pool->bytes_in_use();
  try {
    cache.Reserve(ctx, 1);
    FAIL() << "the budget holds one more block, three are needed";
  } catch (const ResourceExhausted& error) {
    EXPECT_NE(std::string(error.what()).find(std::to_string(7 * kBlockBytes + 100)),
              std::string::npos)
        << error.what();
  }
  EXPECT_EQ(cache.length(), kKvBlockTokens);
  EXPECT_EQ(cache.layer(0).blocks.size(), 1u);
  EXPECT_EQ(pool->bytes_in_use(), before);
  other.RewindTo({0});
  EXPECT_EQ(cache.Reserve(ctx, 1), kKvBlockTokens);
}

TEST(KvCacheTest, BlocksHoldFiniteNumbersFromTheStart) {
  KvBlockPool pool(kGeometry, 0);
  std::vector<void*> blocks;
  for (int i = 0; i < 40; ++i) blocks.push_back(pool.Acquire());
  for (void* block : blocks) {
    for (int64_t i = 0; i < kBlockBytes / 4; ++i) {
      ASSERT_TRUE(std::isfinite(static_cast<float*>(block)[i]));
    }
    pool.Release(block);
  }
}

TEST(KvCacheTest, ThreadsShareAPoolWithinItsBudget) {
  auto pool = std::make_shared<KvBlockPool>(kGeometry, 60 * kBlockBytes);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&pool, t] {
      ExecContext ctx({});
      for (int round = 0; round < 50; ++round) {
        KvCache cache(pool);
        try {
          for (int i = 0; i < 8; ++i) {
            cache.Reserve(ctx, kKvBlockTokens);
            for (int layer = 0; layer < kGeometry.num_layers; ++layer) {
              std::memset(cache.layer(layer).blocks.back(), t, kBlockBytes);
            }
          }
        } catch (const ResourceExhausted&) {
        }
        for (int layer = 0; layer < kGeometry.num_layers; ++layer) {
          for (void* block : cache.layer(layer).blocks) {
            if (static_cast<char*>(block)[kBlockBytes - 1] != t) ADD_FAILURE() << "shared block";
          }
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(pool->bytes_in_use(), 0);
}

// Stores the number of its token in every key and value of a row, from `token` on to the end.
void Fill(KvCache& cache, int layer, int64_t first_row) {
  ExecContext ctx({});
  const int64_t count = cache.rows(layer) - first_row;
  const Tensor rows(DType::kF32, {count, 16});
  for (int64_t i = 0; i < count; ++i) {
    std::fill_n(rows.data<float>() + 16 * i, 16, 1.0f * cache.TokenOf(layer, first_row + i));
  }
  StoreKv(ctx, rows, rows, first_row, cache.layer(layer));
}

void ExpectFilled(const KvCache& cache, int layer) {
  for (int64_t row = 0; row < cache.rows(layer); ++row) {
    const auto* block = static_cast<const float*>(cache.layer(layer).blocks[row / kKvBlockTokens]);
    const auto token = static_cast<float>(cache.TokenOf(layer, row));
    for (int head = 0; head < 2; ++head) {
      for (int d = 0; d < 8; ++d) {
        const int64_t at = row % kKvBlockTokens, area = kKvBlockTokens * 8;
        ASSERT_EQ(block[head * area + at * 8 + d], token) << "key of row " << row;
        ASSERT_EQ(block[(2 + head) * area + d * kKvBlockTokens + at], token)
            << "value of row " << row;
      }
    }
  }
}

TEST(KvCacheTest, LayersMayHoldFewerRowsThanTokens) {
  ExecContext ctx({});
  for (const KvPositions positions : {KvPositions::kTokens, KvPositions::kRows}) {
    KvCache cache(std::make_shared<KvBlockPool>(kGeometry, 0), positions);
    cache.Reserve(ctx, 4);
    const std::vector<int32_t> all = {4, 5, 6, 7, 8}, some = {5, 8};
    cache.ReserveRows(ctx, 0, all);
    cache.ReserveRows(ctx, 1, all);
    cache.ReserveRows(ctx, 2, some);
    cache.Advance(5);
    EXPECT_EQ(cache.Reserve(ctx, 2), 9);
    EXPECT_EQ(cache.rows(0), 11);
    EXPECT_EQ(cache.rows(2), 8);
    EXPECT_EQ(cache.RowsOfAllLayers(), 30);
    EXPECT_EQ(cache.MeanRowsSince(6), (5 + 5 + 3) / 3);
    const int32_t tokens[] = {0, 1, 2, 3, 5, 8, 9, 10};
    for (int row = 0; row < 8; ++row) {
      EXPECT_EQ(cache.TokenOf(2, row), tokens[row]);
      EXPECT_EQ(cache.PositionOf(2, row), positions == KvPositions::kRows ? row : tokens[row]);
    }
    cache.RewindTo({8});
    EXPECT_EQ(cache.rows(0), 8);
    EXPECT_EQ(cache.rows(2), 5);
    cache.RewindTo({4});
    EXPECT_EQ(cache.Reserve(ctx, 1), 4);
    EXPECT_EQ(cache.rows(2), 5);
    EXPECT_EQ(cache.TokenOf(2, 4), 4);
  }
}

TEST(KvCacheTest, HiddenRowsComeBackWhenTheCacheIsRewound) {
  ExecContext ctx({});
  auto pool = std::make_shared<KvBlockPool>(kGeometry, 0);
  KvCache cache(pool);
  cache.Reserve(ctx, 200);
  for (int layer = 0; layer < 3; ++layer) Fill(cache, layer, 0);
  const int64_t bytes = pool->bytes_in_use();
  const KvCache::Mark mark = cache.MarkHere();
  std::vector<int32_t> odd, few = {0, 40, 70, 99};
  for (int32_t row = 1; row < 200; row += 2) odd.push_back(row);
  cache.KeepRows(ctx, 1, odd);
  cache.KeepRows(ctx, 2, odd);
  cache.KeepRows(ctx, 2, few);
  EXPECT_EQ(cache.rows(0), 200);
  EXPECT_EQ(cache.rows(1), 100);
  EXPECT_EQ(cache.rows(2), 4);
  EXPECT_EQ(cache.TokenOf(2, 3), 199);
  cache.Reserve(ctx, 70);
  for (int layer = 0; layer < 3; ++layer) Fill(cache, layer, cache.rows(layer) - 70);
  cache.RewindTo({230});  // within what came behind: the selection stays
  EXPECT_EQ(cache.rows(2), 34);
  for (int layer = 0; layer < 3; ++layer) ExpectFilled(cache, layer);
  EXPECT_EQ(cache.SizeBytes(), pool->bytes_in_use());
  cache.RewindTo(mark);
  EXPECT_EQ(pool->bytes_in_use(), bytes);
  for (int layer = 0; layer < 3; ++layer) {
    EXPECT_EQ(cache.rows(layer), 200);
    ExpectFilled(cache, layer);
  }
  cache.KeepRows(ctx, 0, odd);
  cache.RewindTo({10});  // before what was hidden
  EXPECT_EQ(cache.rows(0), 10);
  EXPECT_EQ(pool->bytes_in_use(), 3 * kBlockBytes);
}

TEST(KvCacheTest, HidingRowsWithoutMemoryChangesNothing) {
  ExecContext ctx({});
  auto pool = std::make_shared<KvBlockPool>(kGeometry, 7 * kBlockBytes);
  KvCache cache(pool);
  cache.Reserve(ctx, 100);
  Fill(cache, 1, 0);
  std::vector<int32_t> rows(90);
  std::iota(rows.begin(), rows.end(), 5);
  EXPECT_THROW(cache.KeepRows(ctx, 1, rows), ResourceExhausted);
  EXPECT_EQ(pool->bytes_in_use(), 6 * kBlockBytes);
  EXPECT_EQ(cache.rows(1), 100);
  ExpectFilled(cache, 1);
  KvCache turning(std::make_shared<KvBlockPool>(kGeometry, 0), KvPositions::kRows);
  turning.Reserve(ctx, 100);
  EXPECT_THROW(turning.KeepRows(ctx, 1, rows), Error);
}

TEST(KvCacheTest, AGeometryWithoutHeadsIsRefused) {
  EXPECT_THROW(KvBlockPool({.num_layers = 1, .kv_heads = 0, .head_dim = 8}, 0), InputError);
}

// Slides a cache of random keys again and again, and looks at all that it holds.
TEST(KvCacheTest, SlidingKeepsPinnedRowsTurnedAndTheNewestRowsAsTheyWere) {
  ExecContext ctx({.num_threads = 2});
  const Tensor frequencies(DType::kF32, {4});
  for (int i = 0; i < 4; ++i) {
    frequencies.data<float>()[i] = static_cast<float>(std::pow(100.0, -i / 4.0));
  }
  for (const int64_t pinned : {0, 5, 64, 70}) {
    SCOPED_TRACE(pinned);
    auto pool = std::make_shared<KvBlockPool>(kGeometry, 0);
    KvCache cache(pool);
    constexpr int64_t kTokens = 900;
    std::vector<Tensor> keys, values;
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    for (int layer = 0; layer < kGeometry.num_layers; ++layer) {
      for (auto* rows : {&keys, &values}) {
        rows->emplace_back(DType::kF32, Shape{kTokens, 16});
        for (int64_t i = 0; i < kTokens * 16; ++i) rows->back().data<float>()[i] = normal(random);
      }
    }
    int64_t gone = 0;
    for (const auto& [more, blocks] :
         {std::pair(pinned + 64, 1), std::pair(int64_t{300}, 2), std::pair(int64_t{1}, 1),
          std::pair(int64_t{63}, 1), std::pair(int64_t{130}, 2)}) {
      const int64_t begin = cache.Reserve(ctx, more), row = begin - gone;
      for (int layer = 0; layer < kGeometry.num_layers; ++layer) {
        StoreKv(ctx, keys[layer].view().Slice(begin, begin + more),
                values[layer].view().Slice(begin, begin + more), row, cache.layer(layer));
      }
      cache.Slide(ctx, frequencies, pinned, blocks);
      gone += blocks * kKvBlockTokens;
      ASSERT_EQ(cache.gone(), gone);
      const int64_t held = cache.length() - gone;
      EXPECT_EQ(cache.Reach(), held);
      EXPECT_EQ(pool->bytes_in_use(), (held + 63) / 64 * kGeometry.num_layers * kBlockBytes);
      const Tensor k(DType::kF32, {held, 16}), v(DType::kF32, {held, 16});
      for (int layer = 0; layer < kGeometry.num_layers; ++layer) {
        ASSERT_EQ(cache.rows(layer), held);
        LoadKv(ctx, cache.layer(layer), 0, k, v);
        for (int64_t i = 0; i < held; ++i) {
          const int64_t token = i < pinned ? i : i + gone;
          ASSERT_EQ(cache.TokenOf(layer, i), token);
          ASSERT_EQ(cache.PositionOf(layer, i), i + gone);
          for (int c = 0; c < 16; ++c) {
            ASSERT_EQ(v.data<float>()[i * 16 + c], values[layer].data<float>()[token * 16 + c]);
            const float* key = keys[layer].data<float>() + token * 16;
            if (i >= pinned) {
              ASSERT_EQ(k.data<float>()[i * 16 + c], key[c]);
              continue;
            }
            // Turned by `gone`; the f32 product is off by 2^-24 of the angle, below 1000.
            const double angle = static_cast<double>(gone) * frequencies.data<float>()[c % 4];
            const double other = c % 8 < 4 ? -key[c + 4] : key[c - 4];
            ASSERT_NEAR(k.data<float>()[i * 16 + c],
                        key[c] * std::cos(angle) + other * std::sin(angle), 5e-4);
          }
        }
      }
    }
    const int64_t length = cache.length();
    cache.Reserve(ctx, 100);
    cache.RewindTo({length});
    EXPECT_EQ(cache.MeanRowsSince(length - 3), 3);
    EXPECT_THROW(cache.RewindTo({gone + pinned - 1}), Error);
    EXPECT_THROW(cache.Slide(ctx, frequencies, pinned + 1, 1), Error);
    EXPECT_THROW(cache.Slide(ctx, frequencies, pinned, 100), Error);
    cache.RewindTo({0});
    EXPECT_EQ(pool->bytes_in_use(), 0);
    EXPECT_EQ(cache.gone(), 0);
  }
}

TEST(KvCacheTest, ASlideThatFindsNoBlockLeavesTheCacheAsItWas) {
  ExecContext ctx({.num_threads = 1});
  const Tensor frequencies(DType::kF32, {4});
  std::fill_n(frequencies.data<float>(), 4, 1.0f);
  auto pool = std::make_shared<KvBlockPool>(kGeometry, 3 * 4 * kBlockBytes + 2 * kBlockBytes);
  KvCache cache(pool);
  cache.Reserve(ctx, 4 * kKvBlockTokens);
  const int64_t bytes = cache.SizeBytes();
  EXPECT_THROW(cache.Slide(ctx, frequencies, 5, 1), ResourceExhausted);
  EXPECT_EQ(cache.gone(), 0);
  EXPECT_EQ(cache.SizeBytes(), bytes);
  EXPECT_EQ(pool->bytes_in_use(), bytes);
  cache.Slide(ctx, frequencies, 0, 1);  // needs none
  EXPECT_EQ(cache.gone(), kKvBlockTokens);
}

}  // namespace
}  // namespace sluice
