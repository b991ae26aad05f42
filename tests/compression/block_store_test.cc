#include "compression/block_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <random>
#include <thread>
#include <vector>

#include "runtime/error.h"

namespace sluice {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

std::vector<uint8_t> Bytes(int64_t number, size_t size) {
  std::mt19937 random(static_cast<uint32_t>(number));
  std::vector<uint8_t> bytes(size);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  return bytes;
}

void ExpectHolds(const BlockStore& store, int64_t number, size_t size) {
  const std::vector<uint8_t> want = Bytes(number, size);
  std::vector<uint8_t> got(size - 3);
  ASSERT_TRUE(store.Has(number)) << number;
  store.Read(number, 3, got);
  EXPECT_TRUE(std::equal(got.begin(), got.end(), want.begin() + 3)) << number;
}

class BlockStoreTest : public testing::Test {
 protected:
  BlockStoreTest() {
    directory_ = std::filesystem::path(testing::TempDir()) /
                 ("sluice_block_store_" + std::to_string(getpid()));
    std::filesystem::create_directories(directory_);
  }
  ~BlockStoreTest() override { std::filesystem::remove_all(directory_); }
  BlockStoreOptions OnDisk(int64_t host, int64_t disk, WhenFull when_full) const {
    return {.host_bytes = host,
            .disk_bytes = disk,
            .disk_directory = directory_,
            .when_full = when_full};
  }
  std::filesystem::path directory_;
};

TEST_F(BlockStoreTest, OldBlocksMoveToTheDiskAndTheOldestGoWhenItIsFull) {
  BlockStore store(OnDisk(300, 400, WhenFull::kOldest));
  for (int64_t i = 0; i < 7; ++i) EXPECT_THAT(store.Add(i, Bytes(i, 100)), IsEmpty());
  EXPECT_THAT(store.Add(7, Bytes(7, 100)), ElementsAre(0));
  EXPECT_EQ(store.host_blocks(), 3);
  EXPECT_EQ(store.disk_blocks(), 4);
  EXPECT_EQ(store.host_bytes(), 300);
  EXPECT_EQ(store.disk_bytes(), 400);
  for (int64_t i = 1; i < 8; ++i) ExpectHolds(store, i, 100);
  EXPECT_EQ(store.dropped(), 1);
}

TEST_F(BlockStoreTest, SeveralThreadsReadAtOnceFromTheHostAndTheDisk) {
  BlockStore store(OnDisk(300, 400, WhenFull::kOldest));
  for (int64_t i = 0; i < 7; ++i) store.Add(i, Bytes(i, 100));
  std::vector<std::thread> readers;
  for (int t = 0; t < 4; ++t) {
    readers.emplace_back([&] {
      for (int64_t i = 0; i < 700; ++i) ExpectHolds(store, i % 7, 100);
    });
  }
  for (std::thread& reader : readers) reader.join();
}

TEST_F(BlockStoreTest, ThinningDropsEverySecondBlockOfTheOldestHalf) {
  BlockStore store({.host_bytes = 800, .when_full = WhenFull::kThin});
  for (int64_t i = 0; i < 8; ++i) EXPECT_THAT(store.Add(i, Bytes(i, 100)), IsEmpty());
  EXPECT_THAT(store.Add(8, Bytes(8, 100)), ElementsAre(1, 3));
  EXPECT_THAT(store.Add(9, Bytes(9, 100)), IsEmpty());
  EXPECT_THAT(store.Add(10, Bytes(10, 100)), ElementsAre(2, 5));
  EXPECT_EQ(store.dropped(), 4);
}

// Sizes differ, blocks leave from everywhere: whatever is held is whole and budgets are kept.
TEST_F(BlockStoreTest, FreedPartsOfTheFileAreUsedAgainWithoutHarmToTheRest) {
  for (const WhenFull when_full : {WhenFull::kOldest, WhenFull::kThin}) {
    BlockStore store(OnDisk(1000, 5000, when_full));
    std::mt19937 random(5);
    std::map<int64_t, size_t> held;
    for (int64_t i = 0; i < 2000; ++i) {
      held[i] = 10 + random() % 400;
      for (const int64_t gone : store.Add(i, Bytes(i, held[i]))) held.erase(gone);
      if (i % 7 == 0 && held.contains(i - 5)) {
        store.Remove(i - 5);
        held.erase(i - 5);
      }
      ASSERT_LE(store.host_bytes(), 1000);
      ASSERT_LE(store.disk_bytes(), 5000);
    }
    EXPECT_EQ(store.host_blocks() + store.disk_blocks(), static_cast<int64_t>(held.size()));
    EXPECT_GT(store.disk_bytes(), 2500);
    for (const auto& [number, size] : held) ExpectHolds(store, number, size);
  }
}

TEST_F(BlockStoreTest, ABlockLargerThanAllBudgetsIsDropped) {
  BlockStore store(OnDisk(100, 200, WhenFull::kThin));
  EXPECT_THAT(store.Add(0, Bytes(0, 500)), ElementsAre(0));
  EXPECT_EQ(store.host_bytes() + store.disk_bytes(), 0);
}

TEST_F(BlockStoreTest, AFullDiskGivesOneWarningAndTheHostGoesOnAlone) {
  BlockStore store(OnDisk(300, 100'000, WhenFull::kOldest));
  rlimit before;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small = {.rlim_cur = 250, .rlim_max = before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  int64_t dropped = 0;
  for (int64_t i = 0; i < 20; ++i) {
    dropped += static_cast<int64_t>(store.Add(i, Bytes(i, 100)).size());
  }
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  const std::optional<std::string> warning = store.TakeWarning();
  ASSERT_TRUE(warning.has_value());
  EXPECT_THAT(*warning, testing::HasSubstr("[memory] cannot write"));
  EXPECT_FALSE(store.TakeWarning().has_value());
  EXPECT_EQ(store.disk_blocks(), 2);
  EXPECT_EQ(store.host_blocks(), 3);
  EXPECT_EQ(dropped, 15);
  ExpectHolds(store, 1, 100);
  ExpectHolds(store, 19, 100);
}

TEST_F(BlockStoreTest, AKilledProcessLeavesNoFiles) {
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    BlockStore store(OnDisk(100, 10'000, WhenFull::kOldest));
    for (int64_t i = 0; i < 20; ++i) store.Add(i, Bytes(i, 100));
    if (store.disk_blocks() == 19) kill(getpid(), SIGKILL);
    _exit(1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFSIGNALED(status));
  EXPECT_TRUE(std::filesystem::is_empty(directory_));
}

TEST_F(BlockStoreTest, WhatCannotWorkIsRefused) {
  EXPECT_THROW(BlockStore({.host_bytes = -1}), InputError);
  EXPECT_THROW(BlockStore({.disk_bytes = 10}), InputError);
  EXPECT_THROW(BlockStore({.disk_bytes = 10, .disk_directory = directory_ / "nowhere"}),
               InputError);
}

}  // namespace
}  // namespace sluice
