#include "runtime/ops/cuda/attention.h"

#include <algorithm>
#include <limits>
#include <string>

#include "runtime/error.h"

namespace sluice::cuda {
namespace {

constexpr size_t kAlign = 256;  // what the copy engine and wide loads ask for, with room

size_t Take(size_t& used, size_t bytes) {
  const size_t at = used;
  used = (used + bytes + kAlign - 1) / kAlign * kAlign;
  return at;
}

std::string Sizes(const AttentionArgs& a) {
  return "batch " + std::to_string(a.batch) + ", q_len " + std::to_string(a.q_len) + ", kv_len " +
         std::to_string(a.kv_len) + ", heads " + std::to_string(a.heads) + ", kv_heads " +
         std::to_string(a.kv_heads) + ", head_dim " + std::to_string(a.head_dim);
}

bool IsInt4(AttentionPrecision precision) {
  return precision == AttentionPrecision::kInt4Fp8 || precision == AttentionPrecision::kInt4Fp16;
}

bool HasFp8(AttentionPrecision precision) {
  return precision == AttentionPrecision::kInt8Fp8 ||
         precision == AttentionPrecision::kInt8Fp8HalfSums ||
         precision == AttentionPrecision::kInt4Fp8;
}

}  // namespace

void CheckAttention(const AttentionArgs& a) {
  constexpr char kOp[] = "[cuda attention] ";
  constexpr int64_t kMax = std::numeric_limits<int>::max() / 2;
  if (a.head_dim != 64 && a.head_dim != 72 && a.head_dim != 80 && a.head_dim != 128) {
    throw Error(std::string(kOp) + "head_dim must be 64, 72, 80 or 128, got " +
                std::to_string(a.head_dim));
  }
  if (a.batch < 1 || a.q_len < 1 || (a.kv_len < 1 && !a.blocks) || a.kv_heads < 1 ||
      a.heads < a.kv_heads || a.heads % a.kv_heads != 0 || a.q_len > kMax || a.kv_len > kMax ||
      a.heads > 1024 || a.batch > kMax / a.heads / ((a.q_len + 63) / 64)) {
    throw Error(std::string(kOp) +
                "sizes must be positive, heads a multiple of kv_heads, and batch * heads * q_len / "
                "64 below 2^30, got " +
                Sizes(a));
  }
  if (a.blocks && (!a.causal || a.batch != 1 || a.precision != AttentionPrecision::kBF16 ||
                   reinterpret_cast<uintptr_t>(a.blocks) % 16 != 0 || a.table == nullptr)) {
    throw Error(std::string(kOp) +
                "blocks at a multiple of 16 bytes need a table, causal attention in bf16 and batch "
                "1, got " +
                Sizes(a));
  }
  if (!a.blocks && a.causal && a.kv_len < a.q_len) {
    throw Error(std::string(kOp) + "causal attention needs kv_len >= q_len, got " + Sizes(a));
  }
  if (!(a.scale > 0) || a.scale > std::numeric_limits<float>::max()) {
    throw Error(std::string(kOp) + "scale must be positive and finite, got " +
                std::to_string(a.scale));
  }
  const auto check = [&](const char* name, const void* data, int64_t stride, int heads) {
    const int64_t width = int64_t{heads} * a.head_dim;
    if (data == nullptr || reinterpret_cast<uintptr_t>(data) % 16 != 0 || stride % 8 != 0 ||
        stride < width || stride > (int64_t{1} << 32)) {
      throw Error(std::string(kOp) + name + " must begin at a multiple of 16 bytes with rows a " +
                  "multiple of 8 elements and at least " + std::to_string(width) +
                  " apart, got rows " + std::to_string(stride) + " apart");
    }
  };
  check("q", a.q, a.q_stride, a.heads);
  if (!a.blocks) {
    check("k", a.k, a.k_stride, a.kv_heads);
    check("v", a.v, a.v_stride, a.kv_heads);
  }
  check("out", a.out, a.out_stride, a.heads);
}

QuantizedKvLayout LayOutQuantizedKv(const AttentionArgs& a) {
  QuantizedKvLayout layout;
  const size_t all = static_cast<size_t>(a.batch) * a.kv_heads;
  const int64_t tiles = (a.kv_len + layout.kTileKeys - 1) / layout.kTileKeys;
  layout.padded_len = tiles * layout.kTileKeys;
  layout.key_pitch = (a.head_dim + 15) / 16 * 16;
  size_t& used = layout.bytes;
  layout.counter = Take(used, sizeof(uint32_t));
  layout.key_mean = Take(used, all * a.head_dim * sizeof(float));
  layout.value_channels = Take(used, all * a.head_dim * sizeof(float));
  layout.key_scales = Take(used, all * tiles * layout.kKeyScales * sizeof(float));
  layout.value_scales = Take(used, all * tiles * sizeof(float));
  layout.keys = Take(used, all * layout.padded_len * layout.key_pitch);
  layout.values = Take(used, all * layout.padded_len * a.head_dim);
  return layout;
}

MmaKvLayout LayOutMmaKv(const AttentionArgs& a) {
  const bool int4 = IsInt4(a.precision);
  MmaKvLayout layout;
  const size_t all = static_cast<size_t>(a.batch) * a.kv_heads;
  const int64_t tiles = (a.kv_len + layout.kTileKeys - 1) / layout.kTileKeys;
  layout.padded_len = tiles * layout.kTileKeys;
  layout.q_tiles = (a.q_len + layout.kTileQueries - 1) / layout.kTileQueries;
  layout.channels = (a.head_dim + 15) / 16 * 16;
  // A product takes 32 bytes of a key at once: 32 or 64 channels.
  layout.key_pitch = int4 ? (a.head_dim + 63) / 64 * 32 : (a.head_dim + 31) / 32 * 32;
  size_t& used = layout.bytes;
  layout.key_mean = Take(used, all * a.head_dim * sizeof(float));
  layout.value_channels = Take(used, all * a.head_dim * sizeof(float));
  layout.key_scales = Take(used, all * tiles * layout.kKeyScales * sizeof(float));
  layout.value_scales = Take(used, all * tiles * sizeof(float));
  layout.keys = Take(used, all * layout.padded_len * layout.key_pitch);
  layout.values =
      Take(used, all * layout.padded_len * layout.channels * (HasFp8(a.precision) ? 1 : 2));
  if (int4) {
    const size_t query_tiles = static_cast<size_t>(a.batch) * a.heads * layout.q_tiles;
    layout.query_means = Take(used, query_tiles * a.head_dim * sizeof(float));
    layout.mean_scores = Take(used, query_tiles * layout.padded_len * sizeof(float));
  }
  return layout;
}

AttentionVariant ChooseAttentionVariant(int capability, const AttentionArgs& args) {
  using Family = AttentionFamily;
  using Precision = AttentionPrecision;
  const auto refuse = [&](const std::string& what) {
    throw Error("[cuda attention] " + what + ", got " + std::to_string(capability / 10) + "." +
                std::to_string(capability % 10));
  };
  const Precision precision = args.precision;
  if (capability < 80) refuse("the device must have compute capability 8.0 or later");
  if (args.family == Family::kHopper && capability != 90) {
    refuse("the Hopper kernels need compute capability 9.0");
  }
  const bool on_hopper = precision == Precision::kBF16 || precision == Precision::kInt8Fp8;
  if (args.family == Family::kHopper && (!on_hopper || args.groups == ScaleGroups::kWarp)) {
    throw Error("[cuda attention] the Hopper kernels have bf16, and int8 with fp8 by thread only");
  }
  if (args.family != Family::kMma && capability == 90 && on_hopper &&
      args.groups != ScaleGroups::kWarp) {
    return {Family::kHopper, ScaleGroups::kThread};
  }
  // mma.sync in fp8 came with Ada, and is emulated by f16 on the chips between Ada and the second
  // Blackwell; in int4 it went with Hopper.
  const bool emulate = args.family == Family::kMma;
  if (HasFp8(precision) && capability < 89) {
    refuse("fp8 values need compute capability 8.9 or later");
  }
  if (HasFp8(precision) && capability != 89 && capability < 120 && !emulate) {
    refuse("fp8 values by mma.sync need compute capability 8.9, or 12.0 and later");
  }
  if (IsInt4(precision) && capability > (emulate ? 90 : 89)) {
    refuse("scores in int4 need compute capability 8.0 to 8.9");
  }
  if (args.groups != ScaleGroups::kByChip) return {Family::kMma, args.groups};
  return {Family::kMma, capability >= 120 ? ScaleGroups::kWarp : ScaleGroups::kThread};
}

AttentionPrecision QuantizedPrecision(int capability) {
  // SageAttention2++ (arXiv 2505.21136) measures sums in f16 as the faster ones on Ada and the
  // small Blackwells; Hopper's own kernel has none.
  if (capability == 89 || capability >= 120) return AttentionPrecision::kInt8Fp8HalfSums;
  return capability == 90 ? AttentionPrecision::kInt8Fp8 : AttentionPrecision::kInt8Fp16;
}

AttentionPrecision FastestAttention(const AttentionArgs& args) {
  // Each key is quantised once and multiplied with every query that sees it, and with narrow heads
  // the exponentials, which are the same for both, take longer than the products. On an H100, times
  // of exact attention in those of quantised attention, heads of 128, gathering the keys from
  // blocks included where causal:
  //   28 heads on 4, 16,384 keys: 784 rows 0.84, 1,024: 1.00, 2,048: 1.07, 4,096: 1.21
  //   32 heads on 8, 16,384 keys: 1,024 rows 0.85, 2,048: 0.98, 4,096: 1.19
  //   32 heads on 32, 16,384 keys: 2,048 rows 0.74, 4,096: 1.19 (0.82 at 4,096 keys)
  //   32 heads on 32, full, 32,768 rows and keys: 1.33
  const int64_t group = args.kv_heads > 0 ? args.heads / args.kv_heads : 1;
  const int64_t queries = args.q_len * group / (args.causal ? 2 : 1);
  return args.head_dim == 128 && queries >= 4096 ? AttentionPrecision::kInt8Fp8
                                                 : AttentionPrecision::kBF16;
}

int PlanGroups(const AttentionArgs& args, int processors) {
  // Blocks take one tile after the other. Measured on an H100 (729 keys, heads of 72), tiles of 64,
  // 128 and 192 queries take 10, 13.5 and 15.5 us.
  constexpr int kTimes[] = {20, 27, 31};
  const auto time = [&](int groups) {
    const int64_t rows = int64_t{64} * groups;
    const int64_t tiles = (args.q_len + rows - 1) / rows * args.heads * args.batch;
    return (tiles + processors - 1) / processors * kTimes[groups - 1];
  };
  const int fewer = time(1) < time(2) ? 1 : 2;
  return time(fewer) < time(3) ? fewer : 3;
}

PagedPlan PlanPaged(const AttentionArgs& args) {
  constexpr int kProcessors = 132;  // of an H100 or H200
  constexpr int kMostParts = 64;
  constexpr int kGroupRows = 64;
  const int groups = MostGroups(args.head_dim);
  const auto tiles_of = [&](int tokens) {
    return static_cast<int>((args.q_len + int64_t{tokens} * groups - 1) / (tokens * groups));
  };
  // Of a tile's time over all keys: rounds of pieces, and with several parts what writing and
  // joining their results takes. Measured at 4,096 to 32,768 keys a part costs 0.2 to 0.04 of the
  // products of its rows; nothing here may depend on how many keys there are.
  constexpr double kPartCost = 0.12;
  const double products =
      static_cast<double>(args.q_len) * args.heads / (kGroupRows * groups) / kProcessors;
  PagedPlan best;
  double least = std::numeric_limits<double>::infinity();
  const auto consider = [&](int heads_together, int tokens) {
    const int tiles = tiles_of(tokens);
    for (int parts = 1; parts <= kMostParts; ++parts) {
      const int pieces = tiles * (args.heads / heads_together) * parts;
      const int rounds = (pieces + kProcessors - 1) / kProcessors;
      const double time =
          static_cast<double>(rounds) / parts + (parts > 1 ? kPartCost * parts * products : 0);
      if (time < 0.97 * least) {
        least = time;
        best = {.heads_together = heads_together, .tokens = tokens, .tiles = tiles, .parts = parts};
      }
    }
  };
  consider(1, kGroupRows);
  const int group = args.heads / args.kv_heads;
  if (group > 1 && group <= kGroupRows) consider(group, kGroupRows / group);
  return best;
}

size_t AttentionWorkspaceBytes(const AttentionArgs& args) {
  if (ChooseAttentionVariant(ComputeCapability(), args).family == AttentionFamily::kMma) {
    return args.precision == AttentionPrecision::kBF16 ? kAlign : LayOutMmaKv(args).bytes;
  }
  if (args.precision == AttentionPrecision::kInt8Fp8) return LayOutQuantizedKv(args).bytes;
  if (!args.blocks) return kAlign;  // a counter
  // Of each part, query and head the values, their maximum and sum in f32.
  const int parts = PlanPaged(args).parts;
  return kAlign +
         (parts > 1 ? parts * args.q_len * args.heads * (args.head_dim + 2) * sizeof(float) : 0);
}

}  // namespace sluice::cuda
