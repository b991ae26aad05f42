#include "llm/kv_cache.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
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

TEST(KvCacheTest, AGeometryWithoutHeadsIsRefused) {
  EXPECT_THROW(KvBlockPool({.num_layers = 1, .kv_heads = 0, .head_dim = 8}, 0), InputError);
}

}  // namespace
}  // namespace sluice
