// Attention and the KV cache's blocks on the GPU against their references on the CPU.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "runtime/ops/attention.h"
#include "runtime/ops/embedding.h"
#include "runtime/ops/kv_layers.h"
#include "runtime/ops/rows.h"
#include "runtime/transfer.h"
#include "tests/support/gpu_testing.h"
#include "tests/support/tensor_testing.h"

namespace sluice {
namespace {

using ::sluice::testing::ExpectClose;
using ::sluice::testing::GpuTest;
using ::sluice::testing::RandomTensor;
using ::sluice::testing::RotaryFrequencies;
using ::sluice::testing::Values;

constexpr DType kTypes[] = {DType::kF32, DType::kBF16};

// Blocks of one layer in an order that is not that of their addresses, among others. What nobody
// has stored is no number on the GPU.
class Blocks {
 public:
  Blocks(ExecContext& gpu, int heads, int head_dim, DType dtype, int64_t positions, int seed) {
    const int64_t count = (positions + kKvBlockTokens - 1) / kKvBlockTokens, all = count + 3;
    const auto bytes = static_cast<int64_t>(KvBlockBytes(heads, head_dim, dtype));
    host_ = Tensor(DType::kU8, {all, bytes});
    std::fill_n(host_.data<uint8_t>(), all * bytes, 0xff);
    device_ = TransferTo(gpu, host_, Device::kCuda);
    // The reference multiplies what lies behind the last position with zero.
    std::fill_n(host_.data<uint8_t>(), all * bytes, 0);
    std::vector<int64_t> order(all);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(seed));
    for (int64_t i = 0; i < count; ++i) {
      on_host_.push_back(host_.data<uint8_t>() + order[i] * bytes);
      on_device_.push_back(static_cast<uint8_t*>(device_.view().raw()) + order[i] * bytes);
    }
    cpu = {.blocks = on_host_, .kv_heads = heads, .head_dim = head_dim, .dtype = dtype};
    cuda = {.blocks = on_device_,
            .kv_heads = heads,
            .head_dim = head_dim,
            .dtype = dtype,
            .device = Device::kCuda,
            .base = device_.view().raw()};
  }
  Blocks(const Blocks&) = delete;
  Blocks& operator=(const Blocks&) = delete;
  KvLayerView cpu, cuda;

 private:
  Tensor host_, device_;
  std::vector<void*> on_host_, on_device_;
};

class CudaKvTest : public GpuTest {
 protected:
  // f32: exponentials good to 2 ulp and sums of up to some thousand terms in another order. bf16:
  // probabilities and results are rounded to 2^-9 on either side.
  void ExpectEqual(const Tensor& on_gpu, const Tensor& want, const std::string& what) {
    const Tensor got = Here(on_gpu);
    const bool wide = want.dtype() == DType::kF32;
    ExpectClose(got, Values(want), wide ? 1e-5 : 1e-2, wide ? 1e-4 : 3e-2, what);
  }
  void Fill(const Blocks& blocks, int64_t count, int seed) {
    const int64_t width = int64_t{blocks.cpu.kv_heads} * blocks.cpu.head_dim;
    const Tensor keys = RandomTensor(blocks.cpu.dtype, {count, width}, seed);
    const Tensor values = RandomTensor(blocks.cpu.dtype, {count, width}, seed + 1);
    StoreKv(reference_, keys, values, 0, blocks.cpu);
    StoreKv(*gpu_, There(keys), There(values), 0, blocks.cuda);
  }
};

TEST_F(CudaKvTest, RowsComeBackFromBlocksAsTheyWereStored) {
  for (const DType dtype : kTypes) {
    for (const auto& [heads, size] : {std::pair(1, 8), std::pair(2, 64), std::pair(3, 72)}) {
      const int64_t width = int64_t{heads} * size;
      const Blocks blocks(*gpu_, heads, size, dtype, 450, 1);
      for (const auto& [begin, count] : {std::pair(0, 1), std::pair(1, 63), std::pair(64, 64),
                                         std::pair(130, 100), std::pair(299, 1)}) {
        SCOPED_TRACE(std::string(Name(dtype)) + " " + std::to_string(width) + " from " +
                     std::to_string(begin));
        const Tensor both = RandomTensor(dtype, {count, 2 * width}, 3);
        const Tensor there = There(both), back(dtype, {count, 2 * width}, Device::kCuda);
        StoreKv(*gpu_, there.view().Columns(0, width), there.view().Columns(width, 2 * width),
                begin, blocks.cuda);
        LoadKv(*gpu_, blocks.cuda, begin, back.view().Columns(0, width),
               back.view().Columns(width, 2 * width));
        EXPECT_EQ(Values(Here(back)), Values(both));
      }
      Fill(blocks, 300, 5);
      std::vector<int32_t> rows;
      for (int32_t i = 1; i < 300; i += 2 + i % 3) rows.push_back(i);
      KvLayerView to = blocks.cuda, to_host = blocks.cpu;
      to.blocks = to.blocks.subspan(5);
      to_host.blocks = to_host.blocks.subspan(5);
      GatherKv(*gpu_, blocks.cuda, rows, to);
      GatherKv(reference_, blocks.cpu, rows, to_host);
      const auto count = static_cast<int64_t>(rows.size());
      const Tensor keys(dtype, {count, width}), values(dtype, {count, width});
      const Tensor k(dtype, {count, width}, Device::kCuda), v(dtype, {count, width}, Device::kCuda);
      LoadKv(reference_, to_host, 0, keys, values);
      LoadKv(*gpu_, to, 0, k, v);
      EXPECT_EQ(Values(Here(k)), Values(keys));
      EXPECT_EQ(Values(Here(v)), Values(values));
    }
  }
}

TEST_F(CudaKvTest, CausalAttentionEqualsTheReference) {
  struct Case {
    int kv_heads, group, head_dim;
    int64_t begin, queries;
  };
  // Plain, decoding and matrix kernels; one key, ends of blocks, several parts.
  const Case cases[] = {{1, 1, 8, 0, 1},
                        {2, 3, 40, 5, 7},
                        {1, 5, 64, 0, 1},
                        {1, 5, 64, 63, 1},
                        {2, 7, 64, 64, 1},
                        {2, 7, 64, 1500, 1},
                        {1, 4, 128, 777, 1},
                        {1, 8, 128, 127, 1},
                        {2, 7, 64, 0, 49},
                        {2, 7, 64, 301, 50},
                        {1, 7, 128, 200, 17},
                        {1, 2, 200, 70, 3},
                        // Cut into parts of the keys, of which some queries see none.
                        {2, 7, 64, 1500, 50},
                        {1, 4, 128, 1100, 196},
                        {1, 1, 64, 0, 1030},
                        // Heads that share keys in one tile, or not; narrow heads; blocks' ends.
                        {2, 7, 64, 3000, 196},
                        {4, 7, 128, 1337, 24},
                        {1, 2, 72, 100, 37},
                        {2, 1, 80, 191, 66},
                        {1, 3, 80, 2000, 130},
                        {1, 80, 64, 130, 3},
                        {1, 8, 64, 4095, 1},
                        {4, 7, 128, 2049, 1}};
  for (const Case& c : cases) {
    for (const DType dtype : kTypes) {
      const int heads = c.kv_heads * c.group;
      const int64_t seen = c.begin + c.queries, width = int64_t{heads} * c.head_dim;
      SCOPED_TRACE(std::to_string(c.kv_heads) + " x " + std::to_string(c.group) + " x " +
                   std::to_string(c.head_dim) + " from " + std::to_string(c.begin) + " " +
                   Name(dtype));
      const Blocks blocks(*gpu_, c.kv_heads, c.head_dim, dtype, seen, 7);
      Fill(blocks, seen, 8);
      const Tensor q = RandomTensor(dtype, {c.queries, width + 8}, 9);
      const Tensor gq = There(q);
      const Tensor want(dtype, {c.queries, width}), got(dtype, {c.queries, width}, Device::kCuda);
      const float scale = 1 / std::sqrt(static_cast<float>(c.head_dim));
      CausalAttention(reference_, q.view().Columns(0, width), c.begin, heads, scale, blocks.cpu,
                      want);
      CausalAttention(*gpu_, gq.view().Columns(0, width), c.begin, heads, scale, blocks.cuda, got);
      ExpectEqual(got, want, "causal attention");
    }
  }
}

TEST_F(CudaKvTest, RowsAreRotatedAndStoredInOneStep) {
  struct Case {
    int heads, kv_heads, head_dim;
  };
  for (const Case& c : {Case{14, 2, 64}, Case{3, 1, 128}, Case{2, 2, 72}, Case{4, 2, 40}}) {
    for (const DType dtype : kTypes) {
      for (const int64_t gap : {0, 5, 8}) {
        SCOPED_TRACE(std::to_string(c.head_dim) + " " + Name(dtype) + " " + std::to_string(gap));
        const int64_t kv_width = int64_t{c.kv_heads} * c.head_dim;
        const int64_t width = int64_t{c.heads} * c.head_dim + 2 * kv_width;
        const Blocks all(*gpu_, c.kv_heads, c.head_dim, dtype, 640, 4);
        // Two sequences side by side: one in the middle of a block, one over several.
        std::vector<KvSegment> cuda, cpu;
        int64_t row = 0;
        for (const auto& [begin, count] : {std::pair(70, 1), std::pair(50, 200)}) {
          for (const bool gpu : {false, true}) {
            KvLayerView kv = gpu ? all.cuda : all.cpu;
            kv.blocks = kv.blocks.subspan(row == 0 ? 0 : 5, 5);
            (gpu ? cuda : cpu).push_back({.row = row, .rows = count, .begin = begin, .kv = kv});
          }
          row += count;
        }
        std::vector<int32_t> positions(row);
        for (int64_t i = 0; i < row; ++i) positions[i] = static_cast<int32_t>(331 * i);
        const Tensor frequencies = RotaryFrequencies(c.head_dim, 1e6);
        const Tensor x = RandomTensor(dtype, {row, width + gap}, 6), gx = There(x);
        RotateAndStore(reference_, x.view().Columns(0, width), c.heads, positions, frequencies,
                       cpu);
        RotateAndStore(*gpu_, gx.view().Columns(0, width), c.heads, positions, There(frequencies),
                       cuda);
        ExpectEqual(gx, x, "rotated");
        for (size_t i = 0; i < cpu.size(); ++i) {
          const Shape shape{cpu[i].rows, kv_width};
          const Tensor k(dtype, shape), v(dtype, shape);
          const Tensor gk(dtype, shape, Device::kCuda), gv(dtype, shape, Device::kCuda);
          LoadKv(reference_, cpu[i].kv, cpu[i].begin, k, v);
          LoadKv(*gpu_, cuda[i].kv, cuda[i].begin, gk, gv);
          ExpectEqual(gk, k, "keys");
          ExpectEqual(gv, v, "values");
        }
      }
    }
  }
}

TEST_F(CudaKvTest, SequencesThatDecodeTogetherEqualThoseAlone) {
  constexpr int kHeads = 14, kSize = 64;
  std::vector<std::unique_ptr<Blocks>> caches;
  std::vector<KvSegment> segments, on_host;
  // All blocks must lie in one range, so one allocation serves all sequences.
  const int64_t lengths[] = {1, 64, 65, 700, 129};
  for (const bool together : {false, true}) {
    caches.clear();
    segments.clear();
    on_host.clear();
    const Blocks all(*gpu_, 2, kSize, DType::kBF16, 5 * 704, 3);
    int64_t row = 0;
    for (const int64_t length : lengths) {
      KvLayerView cuda = all.cuda, cpu = all.cpu;
      cuda.blocks = all.cuda.blocks.subspan(row * 11, 11);
      cpu.blocks = all.cpu.blocks.subspan(row * 11, 11);
      const Tensor keys = RandomTensor(DType::kBF16, {length, 2 * kSize}, 20 + row);
      const Tensor values = RandomTensor(DType::kBF16, {length, 2 * kSize}, 40 + row);
      StoreKv(reference_, keys, values, 0, cpu);
      StoreKv(*gpu_, There(keys), There(values), 0, cuda);
      segments.push_back({.row = row, .rows = 1, .begin = length - 1, .kv = cuda});
      on_host.push_back({.row = row, .rows = 1, .begin = length - 1, .kv = cpu});
      ++row;
    }
    const Tensor q = RandomTensor(DType::kBF16, {row, kHeads * kSize}, 9);
    const Tensor want(DType::kBF16, q.shape()), got(DType::kBF16, q.shape(), Device::kCuda);
    CausalAttention(reference_, q, on_host, kHeads, 0.125f, want);
    const Tensor gq = There(q);
    if (together) {
      CausalAttention(*gpu_, gq, segments, kHeads, 0.125f, got);
    } else {
      for (int64_t i = 0; i < row; ++i) {
        CausalAttention(*gpu_, gq, {&segments[i], 1}, kHeads, 0.125f, got.view().Slice(i, i + 1));
      }
    }
    ExpectEqual(got, want, together ? "together" : "alone");
  }
}

TEST_F(CudaKvTest, RowsThatDecodeAreRotatedStoredAndAttendedToInOneStep) {
  struct Case {
    int heads, kv_heads, head_dim;
    DType dtype = DType::kBF16;
  };
  // The first few go to the kernel for decoding, the others to the ops one by one.
  for (const Case& c : {Case{14, 2, 64}, Case{28, 4, 128}, Case{8, 1, 64}, Case{5, 5, 128},
                        Case{9, 1, 64}, Case{2, 2, 72}, Case{4, 2, 64, DType::kF32}}) {
    // Own rows at both ends of a block, of a warp's chunk and of a part; one sequence and many,
    // which take other kernels.
    const std::vector<int64_t> lengths = {1, 2, 63, 64, 65, 129, 16, 17, 700, 1283};
    for (const size_t sequences : {size_t{1}, lengths.size()}) {
      for (size_t at = 0; at < lengths.size(); at += sequences) {
        SCOPED_TRACE(std::to_string(c.heads) + " heads of " + std::to_string(c.head_dim) + " " +
                     Name(c.dtype) + ", " + std::to_string(lengths[at]) + " keys of the first of " +
                     std::to_string(sequences));
        constexpr int64_t kBlocksEach = 21;
        const int64_t kv_width = int64_t{c.kv_heads} * c.head_dim;
        const int64_t q_width = int64_t{c.heads} * c.head_dim;
        const Blocks all(*gpu_, c.kv_heads, c.head_dim, c.dtype,
                         static_cast<int64_t>(sequences) * kBlocksEach * kKvBlockTokens, 5);
        std::vector<KvSegment> cuda, cpu;
        std::vector<int32_t> positions;
        for (size_t i = 0; i < sequences; ++i) {
          const auto row = static_cast<int64_t>(i);
          const int64_t before = lengths[at + i] - 1;
          for (const bool gpu : {false, true}) {
            KvLayerView kv = gpu ? all.cuda : all.cpu;
            kv.blocks = kv.blocks.subspan(row * kBlocksEach, kBlocksEach);
            const Tensor keys = RandomTensor(c.dtype, {before, kv_width}, 20 + i);
            const Tensor values = RandomTensor(c.dtype, {before, kv_width}, 40 + i);
            if (gpu) {
              StoreKv(*gpu_, There(keys), There(values), 0, kv);
            } else {
              StoreKv(reference_, keys, values, 0, kv);
            }
            (gpu ? cuda : cpu).push_back({.row = row, .rows = 1, .begin = before, .kv = kv});
          }
          positions.push_back(static_cast<int32_t>(9973 * i + 17));
        }
        gpu_->Synchronize();
        const Tensor frequencies = RotaryFrequencies(c.head_dim, 1e6);
        const auto rows = static_cast<int64_t>(sequences);
        const Tensor qkv = RandomTensor(c.dtype, {rows, q_width + 2 * kv_width + 8}, 9);
        const Tensor there = There(qkv);
        const Tensor want(c.dtype, {rows, q_width}), got(c.dtype, {rows, q_width}, Device::kCuda);
        const int64_t width = q_width + 2 * kv_width;
        RotateStoreAndAttend(reference_, qkv.view().Columns(0, width), c.heads, positions,
                             frequencies, cpu, 0.125f, want);
        RotateStoreAndAttend(*gpu_, there.view().Columns(0, width), c.heads, positions,
                             There(frequencies), cuda, 0.125f, got);
        ExpectEqual(got, want, "attended to");
        for (size_t i = 0; i < sequences; ++i) {
          const Shape all_rows{cpu[i].begin + 1, kv_width};
          const Tensor k(c.dtype, all_rows), v(c.dtype, all_rows);
          const Tensor gk(c.dtype, all_rows, Device::kCuda), gv(c.dtype, all_rows, Device::kCuda);
          LoadKv(reference_, cpu[i].kv, 0, k, v);
          LoadKv(*gpu_, cuda[i].kv, 0, gk, gv);
          ExpectEqual(gk, k, "keys");
          ExpectEqual(gv, v, "values");
        }
      }
    }
  }
}

TEST_F(CudaKvTest, EncoderAttentionEqualsTheReference) {
  struct Case {
    int64_t batch, queries, keys;
    int heads, head_dim;
    bool biased;
  };
  const Case cases[] = {{1, 1, 1, 1, 8, false},
                        {2, 5, 9, 3, 24, true},
                        {3, 49, 49, 2, 64, false},
                        {2, 100, 130, 2, 72, false},
                        {1, 33, 70, 4, 72, true}};
  for (const Case& c : cases) {
    for (const DType dtype : kTypes) {
      const int64_t width = int64_t{c.heads} * c.head_dim;
      SCOPED_TRACE(std::to_string(c.queries) + " x " + std::to_string(width) + " " + Name(dtype));
      const Tensor q = RandomTensor(dtype, {c.batch * c.queries, width}, 1);
      const Tensor kv = RandomTensor(dtype, {c.batch * c.keys, 2 * width}, 2);
      const Tensor bias = c.biased ? RandomTensor(DType::kF32, {c.batch * c.keys}, 3) : Tensor();
      const Tensor gq = There(q), gkv = There(kv), gbias = c.biased ? There(bias) : Tensor();
      const Tensor want(dtype, q.shape()), got(dtype, q.shape(), Device::kCuda);
      const float scale = 1 / std::sqrt(static_cast<float>(c.head_dim));
      EncoderAttention(reference_, q, kv.view().Columns(0, width),
                       kv.view().Columns(width, 2 * width), c.batch, c.heads, c.head_dim, scale,
                       want, bias);
      EncoderAttention(*gpu_, gq, gkv.view().Columns(0, width),
                       gkv.view().Columns(width, 2 * width), c.batch, c.heads, c.head_dim, scale,
                       got, gbias);
      ExpectEqual(got, want, "encoder attention");
      const Tensor received(DType::kF32, {c.batch, c.keys});
      const Tensor there(DType::kF32, {c.batch, c.keys}, Device::kCuda);
      AttentionReceived(reference_, q, kv.view().Columns(0, width), c.batch, c.heads, c.head_dim,
                        scale, bias, received);
      AttentionReceived(*gpu_, gq, gkv.view().Columns(0, width), c.batch, c.heads, c.head_dim,
                        scale, gbias, there);
      ExpectEqual(there, received, "attention received");
    }
  }
}

TEST_F(CudaKvTest, AQuerysMeanAttentionEqualsTheReference) {
  for (const DType dtype : kTypes) {
    const Blocks blocks(*gpu_, 2, 40, dtype, 200, 1);
    Fill(blocks, 200, 2);
    const Tensor q = RandomTensor(dtype, {1, 6 * 40}, 3), more = RandomTensor(dtype, {9, 80}, 4);
    std::vector<int32_t> rows;
    for (int32_t i = 0; i < 200; i += 3) rows.push_back(i);
    std::vector<float> want(rows.size() + 9), got(want.size());
    MeanAttentionRow(reference_, q, 6, 0.2f, blocks.cpu, rows, more, want);
    MeanAttentionRow(*gpu_, There(q), 6, 0.2f, blocks.cuda, rows, There(more), got);
    // Softmax values of at most 1, exponentials good to 2 ulp.
    for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(got[i], want[i], 2e-6) << i;
  }
}

TEST_F(CudaKvTest, RowsAreConvertedAndEmbedded) {
  for (const DType dtype : kTypes) {
    const Tensor table = RandomTensor(dtype, {50, 37}, 1), gtable = There(table);
    const std::vector<int32_t> ids = {49, 0, 7, 7};
    const Tensor want(DType::kF32, {4, 37}), got(DType::kF32, {4, 37}, Device::kCuda);
    Embed(reference_, table, ids, want);
    Embed(*gpu_, gtable, ids, got);
    EXPECT_EQ(Values(Here(got)), Values(want));
    for (const DType to : kTypes) {
      const Tensor y(to, {50, 30}), gy(to, {50, 30}, Device::kCuda);
      Convert(reference_, table.view().Columns(3, 33), y);
      Convert(*gpu_, gtable.view().Columns(3, 33), gy);
      EXPECT_EQ(Values(Here(gy)), Values(y));
    }
  }
}

TEST_F(CudaKvTest, RowsNeedNotAscend) {
  for (const DType dtype : kTypes) {
    const Blocks blocks(*gpu_, 2, 40, dtype, 450, 1);
    Fill(blocks, 200, 2);
    const std::vector<int32_t> rows = {130, 5, 199, 0, 64};
    KvLayerView to = blocks.cuda, to_host = blocks.cpu;
    to.blocks = to.blocks.subspan(5);
    to_host.blocks = to_host.blocks.subspan(5);
    GatherKv(*gpu_, blocks.cuda, rows, to);
    GatherKv(reference_, blocks.cpu, rows, to_host);
    const Tensor keys(dtype, {5, 80}), values(dtype, {5, 80});
    const Tensor k(dtype, {5, 80}, Device::kCuda), v(dtype, {5, 80}, Device::kCuda);
    LoadKv(reference_, to_host, 0, keys, values);
    LoadKv(*gpu_, to, 0, k, v);
    EXPECT_EQ(Values(Here(k)), Values(keys));
    EXPECT_EQ(Values(Here(v)), Values(values));
    const Tensor q = RandomTensor(dtype, {1, 6 * 40}, 3), none(dtype, {0, 80});
    std::vector<float> want(rows.size()), got(rows.size());
    MeanAttentionRow(reference_, q, 6, 0.2f, blocks.cpu, rows, none, want);
    MeanAttentionRow(*gpu_, There(q), 6, 0.2f, blocks.cuda, rows, There(none), got);
    for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(got[i], want[i], 2e-6) << i;
  }
}

// The matrix kernels read 16 bytes at once.
TEST_F(CudaKvTest, RowsAtAnyDistanceAreAttendedTo) {
  constexpr int kHeads = 4, kSize = 64;
  constexpr int64_t kQueries = 70, kWidth = kHeads * kSize;
  for (const DType dtype : kTypes) {
    const Blocks blocks(*gpu_, 2, kSize, dtype, 100, 7);
    Fill(blocks, 100, 8);
    const Tensor q = RandomTensor(dtype, {kQueries, kWidth + 3}, 9), gq = There(q);
    const Tensor want(dtype, {kQueries, kWidth}), got(dtype, {kQueries, kWidth}, Device::kCuda);
    for (const int64_t begin : {0, 3}) {
      const auto columns = [&](const Tensor& x) { return x.view().Columns(begin, begin + kWidth); };
      CausalAttention(reference_, columns(q), 30, kHeads, 0.125f, blocks.cpu, want);
      CausalAttention(*gpu_, columns(gq), 30, kHeads, 0.125f, blocks.cuda, got);
      ExpectEqual(got, want, "causal attention");
      const Tensor one(dtype, {1, kWidth}), decoded(dtype, {1, kWidth}, Device::kCuda);
      CausalAttention(reference_, columns(q).Slice(5, 6), 99, kHeads, 0.125f, blocks.cpu, one);
      CausalAttention(*gpu_, columns(gq).Slice(5, 6), 99, kHeads, 0.125f, blocks.cuda, decoded);
      ExpectEqual(decoded, one, "decoding");
      EncoderAttention(reference_, columns(q), columns(q), columns(q), 2, kHeads, kSize, 0.125f,
                       want);
      EncoderAttention(*gpu_, columns(gq), columns(gq), columns(gq), 2, kHeads, kSize, 0.125f, got);
      ExpectEqual(got, want, "encoder attention");
    }
  }
}

TEST_F(CudaKvTest, RowsOfAllLayersArePackedAsOnTheCpu) {
  constexpr int kLayers = 3;
  const auto bytes = [](const Tensor& x) {
    return std::vector<uint8_t>(x.data<uint8_t>(), x.data<uint8_t>() + x.SizeBytes());
  };
  for (const DType dtype : kTypes) {
    for (const auto& [heads, size] : {std::pair(1, 8), std::pair(4, 128), std::pair(3, 6)}) {
      const int64_t width = int64_t{heads} * size;
      const Blocks all(*gpu_, heads, size, dtype, 2 * kLayers * 6 * kKvBlockTokens, 1);
      std::vector<KvLayerView> cpu, cuda, cpu_to, cuda_to;
      for (int i = 0; i < 2 * kLayers; ++i) {
        KvLayerView host = all.cpu, there = all.cuda;
        host.blocks = host.blocks.subspan(6 * i, 6);
        there.blocks = there.blocks.subspan(6 * i, 6);
        (i < kLayers ? cpu : cpu_to).push_back(host);
        (i < kLayers ? cuda : cuda_to).push_back(there);
      }
      for (int i = 0; i < kLayers; ++i) {
        const Tensor rows = RandomTensor(dtype, {640, width}, 10 + i);
        const Tensor there = There(rows);
        StoreKv(reference_, rows.view().Slice(0, 320), rows.view().Slice(320, 640), 0, cpu[i]);
        StoreKv(*gpu_, there.view().Slice(0, 320), there.view().Slice(320, 640), 0, cuda[i]);
      }
      for (const auto& [begin, count] : {std::pair(0, 0), std::pair(0, 1), std::pair(63, 2),
                                         std::pair(77, 196), std::pair(0, 320)}) {
        SCOPED_TRACE(std::string(Name(dtype)) + " " + std::to_string(width) + " from " +
                     std::to_string(begin) + ", " + std::to_string(count));
        for (const KvPacking packing : {KvPacking::kPlain, KvPacking::kInt8}) {
          const Shape shape{kLayers * PackedKvBytes(cpu[0], count, packing)};
          const Tensor want(DType::kU8, shape), got(DType::kU8, shape, Device::kCuda);
          if (count == 0) {
            std::fill_n(want.data<uint8_t>(), want.SizeBytes(), uint8_t{0});
            Transfer(*gpu_, want, got);
          }
          PackKv(reference_, cpu, begin, count, packing, want);
          PackKv(*gpu_, cuda, begin, count, packing, got);
          EXPECT_EQ(bytes(Here(got)), bytes(want))
              << (packing == KvPacking::kInt8 ? "int8" : "plain");
          if (packing == KvPacking::kInt8 || count == 0) continue;
          UnpackKv(reference_, want, count, cpu_to, 5);
          UnpackKv(*gpu_, got, count, cuda_to, 5);
          const Tensor again(DType::kU8, shape), back(DType::kU8, shape, Device::kCuda);
          PackKv(reference_, cpu_to, 5, count, packing, again);
          PackKv(*gpu_, cuda_to, 5, count, packing, back);
          EXPECT_EQ(bytes(again), bytes(want));
          EXPECT_EQ(bytes(Here(back)), bytes(want));
        }
      }
      if (size % 2 != 0) continue;
      const Tensor frequencies = RotaryFrequencies(size, 1e4);
      const std::vector<int32_t> counts = {1, 100, 49, 64};
      // The angles of the last are formed in double.
      for (const int32_t first : {70, 20'000, 1'000'000}) {
        const Shape shape{4, kLayers * width};
        const Tensor want(DType::kF32, shape), got(DType::kF32, shape, Device::kCuda);
        MeanKeys(reference_, cpu, 70, counts, first, frequencies, want);
        MeanKeys(*gpu_, cuda, 70, counts, first, There(frequencies), got);
        // Sines good to 2 ulp, and sums of at most 100 terms in another order.
        ExpectClose(Here(got), Values(want), 2e-6, 1e-5, "means");
      }
    }
  }
}

TEST_F(CudaKvTest, MeansOfKeysAreReplayedFromThePositionTheyAreGiven) {
  const Blocks blocks(*gpu_, 2, 8, DType::kF32, 100, 1);
  Fill(blocks, 100, 2);
  const std::vector<KvLayerView> cpu = {blocks.cpu}, cuda = {blocks.cuda};
  const std::vector<int32_t> counts = {30, 40};
  const Tensor frequencies = RotaryFrequencies(8, 1e4), want(DType::kF32, {2, 16});
  const Tensor there = There(frequencies), got(DType::kF32, want.shape(), Device::kCuda);
  for (int run = 0; run < 8; ++run) {
    const int32_t first = run % 2 == 0 ? 70 : 20'000;
    MeanKeys(reference_, cpu, 10, counts, first, frequencies, want);
    gpu_->Recurring("means", [&] { MeanKeys(*gpu_, cuda, 10, counts, first, there, got); });
    // As above.
    ExpectClose(Here(got), Values(want), 2e-6, 1e-5, "run " + std::to_string(run));
  }
  EXPECT_EQ(gpu_->recorder()->counts().replayed, 5);
}

TEST_F(CudaKvTest, QuantisedRowsAreWidenedAsOnTheCpu) {
  constexpr int64_t kRows = 77, kHeads = 3, kWidth = 3 * 24;
  Tensor x(DType::kI8, {kRows, kWidth}), runs(DType::kI32, {kRows});
  std::mt19937 random(1);
  for (int64_t i = 0; i < kRows * kWidth; ++i) {
    x.data<int8_t>()[i] = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
  }
  for (int64_t i = 0; i < kRows; ++i) runs.data<int32_t>()[i] = static_cast<int32_t>(i / 20);
  const Tensor scales = RandomTensor(DType::kF32, {4, kHeads}, 2);
  for (const DType dtype : kTypes) {
    const Tensor want(dtype, x.shape()), got(dtype, x.shape(), Device::kCuda);
    DequantiseKv(reference_, x, runs, scales, want);
    DequantiseKv(*gpu_, There(x), There(runs), There(scales), got);
    EXPECT_EQ(Values(Here(got)), Values(want));
  }
}

}  // namespace
}  // namespace sluice
