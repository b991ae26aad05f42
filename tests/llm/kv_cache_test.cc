#include "llm/kv_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <set>
#include <thread>
#include <vector>

#include "runtime/error.h"

namespace sluice {
namespace {

constexpr KvGeometry kGeometry = {
    .num_layers = 3, .kv_heads = 2, .head_dim = 8, .dtype = DType::kF32};
constexpr int64_t kBlockBytes = 2 * 2 * kKvBlockTokens * 8 * 4;

TEST(KvCacheTest, ReserveContinuesWhereTheLastOneEnded) {
  KvCache cache(std::make_shared<KvBlockPool>(kGeometry, 0));
  EXPECT_EQ(cache.Reserve(5), 0);
  EXPECT_EQ(cache.Reserve(kKvBlockTokens), 5);
  EXPECT_EQ(cache.length(), kKvBlockTokens + 5);
  EXPECT_EQ(cache.Reserve(0), kKvBlockTokens + 5);
  EXPECT_EQ(cache.SizeBytes(), 3 * 2 * kBlockBytes);
}

TEST(KvCacheTest, LayersNeverShareBlocksAndKeepThemWhenTheCacheGrows) {
  KvCache cache(std::make_shared<KvBlockPool>(kGeometry, 0));
  cache.Reserve(2 * kKvBlockTokens);
  std::vector<std::vector<void*>> before;
  for (int layer = 0; layer < kGeometry.num_layers; ++layer) {
    const KvLayerView view = cache.layer(layer);
    EXPECT_EQ(view.kv_heads, 2);
    EXPECT_EQ(view.head_dim, 8);
    before.emplace_back(view.blocks.begin(), view.blocks.end());
  }
  cache.Reserve(500);
  std::set<void*> seen;
  for (int layer = 0; layer < kGeometry.num_layers; ++layer) {
    const KvLayerView view = cache.layer(layer);
    ASSERT_EQ(view.blocks.size(), (2 * kKvBlockTokens + 500 + kKvBlockTokens - 1) / kKvBlockTokens);
    for (size_t i = 0; i < before[layer].size(); ++i) EXPECT_EQ(view.blocks[i], before[layer][i]);
    for (void* block : view.blocks) EXPECT_TRUE(seen.insert(block).second);
  }
}

TEST(KvCacheTest, RewindingGivesWholeBlocksBackAndKeepsTheRest) {
  auto pool = std::make_shared<KvBlockPool>(kGeometry, 0);
  {
    KvCache cache(pool);
    cache.Reserve(kKvBlockTokens + 10);
    const KvCache::Mark mark = cache.MarkHere();
    void* const first = cache.layer(1).blocks[0];
    cache.Reserve(3 * kKvBlockTokens);
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
  auto pool = std::make_shared<KvBlockPool>(kGeometry, 0);
  KvCache cache(pool);
  const int64_t begun = 2 * kKvBlockTokens + 10;
  cache.Reserve(begun);
  Fill(cache, 0, begun, 0.5f);
  auto first = cache.Branch(), second = cache.Branch();
  EXPECT_EQ(first->length(), begun);
  EXPECT_EQ(pool->bytes_in_use(), 3 * 3 * kBlockBytes);  // nothing is copied yet
  first->Reserve(80);
  Fill(*first, begun, begun + 80, 0.25f);
  cache.Reserve(100);
  Fill(cache, begun, begun + 100, 0.75f);
  second->Reserve(1);
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

TEST(KvCacheTest, ABranchOutlivesItsOriginAndAnOriginThatIsRewoundUnderIt) {
  auto pool = std::make_shared<KvBlockPool>(kGeometry, 0);
  auto cache = std::make_unique<KvCache>(pool);
  cache->Reserve(3 * kKvBlockTokens);
  Fill(*cache, 0, 3 * kKvBlockTokens, 0.5f);
  const auto branch = cache->Branch();
  cache->RewindTo({kKvBlockTokens + 7});
  cache->Reserve(kKvBlockTokens);
  Fill(*cache, kKvBlockTokens + 7, 2 * kKvBlockTokens + 7, 0.75f);
  EXPECT_TRUE(Holds(*branch, 0, 3 * kKvBlockTokens, 0.5f));
  EXPECT_TRUE(Holds(*cache, 0, kKvBlockTokens + 7, 0.5f));
  cache.reset();
  EXPECT_TRUE(Holds(*branch, 0, 3 * kKvBlockTokens, 0.5f));
  EXPECT_EQ(pool->bytes_in_use(), branch->SizeBytes());
}

TEST(KvCacheTest, ABranchThatFindsNoRoomToCopyLeavesBothAsTheyWere) {
  auto pool = std::make_shared<KvBlockPool>(kGeometry, 5 * kBlockBytes);  // one to spare of three
  KvCache cache(pool);
  cache.Reserve(10);
  Fill(cache, 0, 10, 0.5f);
  {
    const auto branch = cache.Branch();
    EXPECT_THROW(branch->Reserve(1), ResourceExhausted);
    EXPECT_EQ(branch->length(), 10);
    EXPECT_TRUE(Holds(*branch, 0, 10, 0.5f) && Holds(cache, 0, 10, 0.5f));
  }
  EXPECT_EQ(pool->bytes_in_use(), 3 * kBlockBytes);
}

TEST(KvCacheTest, AnExhaustedBudgetLeavesTheCacheUnchanged) {
  // Room for 7 blocks: two of each of the three layers, and one.
  auto pool = std::make_shared<KvBlockPool>(kGeometry, 7 * kBlockBytes + 100);
  KvCache cache(pool), other(pool);
  cache.Reserve(kKvBlockTokens);
  other.Reserve(1);
  const int64_t before = pool->bytes_in_use();
  try {
    cache.Reserve(1);
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
  EXPECT_EQ(cache.Reserve(1), kKvBlockTokens);
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
      for (int round = 0; round < 50; ++round) {
        KvCache cache(pool);
        try {
          for (int i = 0; i < 8; ++i) {
            cache.Reserve(kKvBlockTokens);
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
  for (const KvPositions positions : {KvPositions::kTokens, KvPositions::kRows}) {
    KvCache cache(std::make_shared<KvBlockPool>(kGeometry, 0), positions);
    cache.Reserve(4);
    const std::vector<int32_t> all = {4, 5, 6, 7, 8}, some = {5, 8};
    cache.ReserveRows(0, all);
    cache.ReserveRows(1, all);
    cache.ReserveRows(2, some);
    cache.Advance(5);
    EXPECT_EQ(cache.Reserve(2), 9);
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
    EXPECT_EQ(cache.Reserve(1), 4);
    EXPECT_EQ(cache.rows(2), 5);
    EXPECT_EQ(cache.TokenOf(2, 4), 4);
  }
}

TEST(KvCacheTest, HiddenRowsComeBackWhenTheCacheIsRewound) {
  ExecContext ctx({});
  auto pool = std::make_shared<KvBlockPool>(kGeometry, 0);
  KvCache cache(pool);
  cache.Reserve(200);
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
  cache.Reserve(70);
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
  cache.Reserve(100);
  Fill(cache, 1, 0);
  std::vector<int32_t> rows(90);
  std::iota(rows.begin(), rows.end(), 5);
  EXPECT_THROW(cache.KeepRows(ctx, 1, rows), ResourceExhausted);
  EXPECT_EQ(pool->bytes_in_use(), 6 * kBlockBytes);
  EXPECT_EQ(cache.rows(1), 100);
  ExpectFilled(cache, 1);
  KvCache turning(std::make_shared<KvBlockPool>(kGeometry, 0), KvPositions::kRows);
  turning.Reserve(100);
  EXPECT_THROW(turning.KeepRows(ctx, 1, rows), Error);
}

TEST(KvCacheTest, AGeometryWithoutHeadsIsRefused) {
  EXPECT_THROW(KvBlockPool({.num_layers = 1, .kv_heads = 0, .head_dim = 8}, 0), InputError);
}

}  // namespace
}  // namespace sluice
