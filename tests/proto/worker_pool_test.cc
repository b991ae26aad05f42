#include "proto/worker_pool.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <future>
#include <string>
#include <vector>

namespace sluice {
namespace {

using ::testing::ElementsAre;

TEST(WorkerPoolTest, WhoPostsManyWaitsForNobodyButHimself) {
  WorkerPool pool("test", 1);
  std::promise<void> begin;
  pool.Post(nullptr, [&begin] { begin.get_future().wait(); });
  const int many = 0, few = 0;
  std::vector<std::string> order;
  const auto note = [&order](const char* what) {
    return [&order, what] { order.push_back(what); };
  };
  for (const char* what : {"many 1", "many 2", "many 3"}) pool.Post(&many, note(what));
  for (const char* what : {"few 1", "few 2"}) pool.Post(&few, note(what));
  begin.set_value();
  pool.WaitUntilIdle();
  EXPECT_THAT(order, ElementsAre("many 1", "few 1", "many 2", "few 2", "many 3"));
}

TEST(WorkerPoolTest, WhatWasPostedIsFinishedAtItsEnd) {
  int done = 0;
  {
    WorkerPool pool("test", 1);
    for (int i = 0; i < 100; ++i) pool.Post(nullptr, [&done] { ++done; });
  }
  EXPECT_EQ(done, 100);
}

}  // namespace
}  // namespace sluice
