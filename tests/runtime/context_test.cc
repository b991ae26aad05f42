// Scratch memory, tracing, threads, time and what the machine offers.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <omp.h>

#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "runtime/clock.h"
#include "runtime/cpu_info.h"
#include "runtime/error.h"
#include "runtime/exec_context.h"
#include "runtime/parallel.h"

namespace sluice {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

TEST(WorkspaceTest, GivesAlignedViewsThatDoNotOverlap) {
  Workspace workspace;
  const Workspace::Scope scope(workspace);
  std::vector<TensorView> views;
  for (int64_t i = 1; i < 40; ++i) {
    views.push_back(workspace.Allocate(DType::kU8, {i * 3001}));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(views.back().raw()) % 64, 0u);
    std::memset(views.back().raw(), static_cast<int>(i), views.back().SizeBytes());
  }
  for (int64_t i = 1; i < 40; ++i) {
    const uint8_t* bytes = views[i - 1].data<uint8_t>();
    for (int64_t j = 0; j < i * 3001; ++j) ASSERT_EQ(bytes[j], i);
  }
}

TEST(WorkspaceTest, ScopeGivesBackWhatFollowedIt) {
  Workspace workspace;
  const Workspace::Scope outer(workspace);
  workspace.Allocate(DType::kF32, {100});
  const void* inside = nullptr;
  {
    const Workspace::Scope scope(workspace);
    inside = workspace.Allocate(DType::kF32, {100}).raw();
  }
  EXPECT_EQ(workspace.Allocate(DType::kF32, {7}).raw(), inside);
}

TEST(WorkspaceTest, GrowsOnceToItsHighWaterMark) {
  Workspace workspace;
  const auto step = [&] {
    const Workspace::Scope scope(workspace);
    void* first = nullptr;
    for (int i = 0; i < 20; ++i) {
      void* p = workspace.Allocate(DType::kU8, {300'000}).raw();
      if (i == 0) first = p;
    }
    return first;
  };
  step();
  const size_t high = workspace.high_water_bytes();
  EXPECT_GE(high, 6'000'000u);
  const void* first = step();
  // The second step runs in one chunk and asks for nothing new.
  EXPECT_EQ(step(), first);
  EXPECT_EQ(workspace.high_water_bytes(), high);
}

TEST(WorkspaceTest, StaysUsableAfterThereWasNoMemory) {
  Workspace workspace;
  const Workspace::Scope scope(workspace);
  workspace.Allocate(DType::kF32, {10});
  EXPECT_THROW(workspace.Allocate(DType::kF32, {int64_t{1} << 58}), ResourceExhausted);
  EXPECT_THROW(workspace.Allocate(DType::kF32, {int64_t{1} << 62}), ResourceExhausted);
  const TensorView view = workspace.Allocate(DType::kF32, {1000});
  std::memset(view.raw(), 1, view.SizeBytes());
}

TEST(TracerTest, SumsCallsOfOneName) {
  Tracer tracer;
  for (int i = 0; i < 3; ++i) {
    TraceScope scope(&tracer, "encode", 2);
    scope.AddWork(100, 10);
    scope.AddItems(1);
  }
  { TraceScope scope(&tracer, "decode"); }
  ASSERT_EQ(tracer.stages().size(), 2u);
  const StageCost& cost = tracer.stages().at("encode");
  EXPECT_EQ(cost.calls, 3);
  EXPECT_EQ(cost.items, 9);
  EXPECT_EQ(cost.flops, 300);
  EXPECT_EQ(cost.bytes, 30);
  EXPECT_GE(cost.seconds, 0);
  tracer.Clear();
  EXPECT_TRUE(tracer.stages().empty());
}

TEST(TracerTest, ScopeWithoutTracerDoesNothing) {
  TraceScope scope(nullptr, "encode", 2);
  scope.AddWork(1, 1);
}

TEST(ExecContextTest, RefusesNoThreads) {
  EXPECT_THAT([] { ExecContext context({.num_threads = 0}); },
              ThrowsMessage<InputError>(HasSubstr("at least 1, got 0")));
}

TEST(ExecContextTest, SetsTheThreadCountOfWhoeverUsesIt) {
  const ExecContext context({.num_threads = 3});
  std::thread([&] {
    // OpenMP keeps the count for each thread; this one has its own until it uses the context.
    omp_set_num_threads(1);
    context.UseThreads();
    EXPECT_EQ(omp_get_max_threads(), 3);
  }).join();
}

TEST(ExecContextTest, SplitsWorkAmongContextsOfOneThread) {
  ExecContext ctx({.num_threads = 3, .kernels = KernelChoice::kReference});
  for (int round = 0; round < 2; ++round) {
    std::vector<const ExecContext*> used(3);
    std::vector<int> inner(3);
    ctx.tracer().Clear();
    ctx.Split(3, [&](ExecContext& own, int part) {
      used[part] = &own;
      EXPECT_TRUE(own.reference_kernels());
      const Workspace::Scope scope(own.workspace());
      own.workspace().Allocate(DType::kF32, {1000}).data<float>()[999] = 1;
      own.tracer().Add("work", {.calls = 1, .items = part, .seconds = 3});
      ParallelFor(own, 10, 1, [&](int64_t begin, int64_t end) { inner[part] += end - begin; });
    });
    EXPECT_THAT(inner, ::testing::Each(10));
    EXPECT_NE(used[0], used[1]);
    EXPECT_NE(used[1], used[2]);
    const StageCost& work = ctx.tracer().stages().at("work");
    EXPECT_EQ(work.calls, 3);
    EXPECT_EQ(work.items, 3);
    EXPECT_DOUBLE_EQ(work.seconds, 3);  // they ran beside each other
  }
  const ExecContext* alone = nullptr;
  ctx.Split(1, [&](ExecContext& own, int) { alone = &own; });
  EXPECT_EQ(alone, &ctx);
}

TEST(ExecContextTest, SplitHandsOnWhatAPartThrows) {
  ExecContext ctx({.num_threads = 2});
  EXPECT_THAT(
      [&] {
        ctx.Split(2, [](ExecContext&, int part) {
          if (part == 1) throw Error("[part] broken");
        });
      },
      ThrowsMessage<Error>(HasSubstr("[part] broken")));
  EXPECT_THAT([&] { ctx.Split(3, [](ExecContext&, int) {}); },
              ThrowsMessage<Error>(HasSubstr("3 parts")));
}

TEST(ParallelForTest, CoversEveryIndexOnceWhateverTheGrain) {
  ExecContext context({.num_threads = 4});
  for (int64_t count : {0, 1, 2, 3, 7, 64, 1001}) {
    for (int64_t grain : {1, 2, 10, 5000}) {
      std::vector<std::atomic<int>> seen(count);
      std::atomic<int> calls = 0;
      ParallelFor(context, count, grain, [&](int64_t begin, int64_t end) {
        ++calls;
        for (int64_t i = begin; i < end; ++i) ++seen[i];
      });
      for (int64_t i = 0; i < count; ++i) EXPECT_EQ(seen[i], 1);
      EXPECT_LE(calls, std::max<int64_t>(1, (count + grain - 1) / grain));
    }
  }
}

TEST(CpuInfoTest, FindsACoreAndMemoryHere) {
  const CpuInfo info = CpuInfo::Detect();
  EXPECT_GE(info.physical_cores, 1);
  EXPECT_LE(info.physical_cores, static_cast<int>(std::thread::hardware_concurrency()));
  EXPECT_GT(info.memory_bytes, int64_t{64} << 20);
  EXPECT_FALSE(info.model_name.empty());
}

TEST(CpuInfoTest, HonoursAffinity) {
  std::thread([] {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    ASSERT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
    EXPECT_EQ(CpuInfo::Detect().physical_cores, 1);
  }).join();
}

TEST(CpuInfoTest, NamesTheBestInstructionSet) {
  CpuInfo info;
  EXPECT_EQ(info.IsaName(), "baseline");
  info.avx2 = true;
  EXPECT_EQ(info.IsaName(), "AVX2");
  info.avx512 = true;
  EXPECT_EQ(info.IsaName(), "AVX-512");
  info.avx512_bf16 = true;
  EXPECT_EQ(info.IsaName(), "AVX512-BF16");
  info.amx_bf16 = true;
  EXPECT_EQ(info.IsaName(), "AMX-BF16");
}

TEST(MediaTimeTest, PrintsHoursToMilliseconds) {
  EXPECT_EQ(MediaTime().ToString(), "00:00:00.000");
  EXPECT_EQ(MediaTime::FromSeconds(62.345).ToString(), "00:01:02.345");
  EXPECT_EQ(MediaTime::FromSeconds(59.9996).ToString(), "00:01:00.000");
  EXPECT_EQ(MediaTime::FromSeconds(-1.5).ToString(), "-00:00:01.500");
  EXPECT_EQ(MediaTime::FromSeconds(100 * 3600).ToString(), "100:00:00.000");
}

TEST(MediaTimeTest, AddsAndCompares) {
  const MediaTime a = MediaTime::FromSeconds(1.25), b = MediaTime::FromNanoseconds(250'000'000);
  EXPECT_EQ((a - b).seconds(), 1.0);
  EXPECT_EQ((a + b).nanoseconds(), 1'500'000'000);
  EXPECT_LT(b, a);
}

}  // namespace
}  // namespace sluice
