// How causal attention is cut into pieces for threads. Private to runtime/; shared by the SIMD and
// the AMX path, which differ only in how many rows a tile has.
#ifndef SLUICE_RUNTIME_OPS_CPU_ATTENTION_PLAN_H_
#define SLUICE_RUNTIME_OPS_CPU_ATTENTION_PLAN_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "runtime/ops/attention.h"

namespace sluice::cpu {

inline constexpr int64_t CeilDiv(int64_t value, int64_t by) { return (value + by - 1) / by; }
inline constexpr int64_t RoundUp(int64_t value, int64_t to) { return CeilDiv(value, to) * to; }

// The query heads that share one kv head are rows beside each other: row r of a kv head is position
// r / heads_per_kv and head r % heads_per_kv of its group. A unit of work is one tile of rows over
// one range of keys of one kv head; tiles run fastest, then ranges, then kv heads.
struct CausalPlan {
  CausalPlan(int64_t begin, int64_t queries, int heads, int kv_heads, int tile_rows, int threads)
      : begin(begin),
        keys(begin + queries),
        num_blocks(CeilDiv(keys, kKvBlockTokens)),
        heads_per_kv(heads / kv_heads),
        rows(queries * heads_per_kv),
        tile_rows(tile_rows),
        tiles(CeilDiv(rows, tile_rows)),
        threads(threads) {
    // Ranges of keys exist only where heads and tiles alone leave threads idle: when few tokens are
    // decoded. Each range costs a pass over the outputs.
    const int64_t pieces = kv_heads * tiles, wanted = 4 * threads;
    if (threads > 1 && pieces < wanted) {
      ranges = std::clamp<int64_t>(keys / kRangeKeys, 1, CeilDiv(wanted, pieces));
    }
    units = pieces * ranges;
    CutUnits(kv_heads);
  }

  struct Unit {
    int64_t kv_head, range, tile;
  };
  Unit At(int64_t unit) const {
    return {unit / (ranges * tiles), unit / tiles % ranges, unit % tiles};
  }
  // Keys [RangeBegin(i), RangeBegin(i + 1)) belong to range i; it begins with a block.
  int64_t RangeBegin(int64_t range) const { return num_blocks * range / ranges * kKvBlockTokens; }
  // The units of a thread are [FirstUnit(thread), FirstUnit(thread + 1)): about equal costs.
  int64_t FirstUnit(int64_t thread) const { return first_units_[thread]; }

  int64_t begin, keys, num_blocks;
  int heads_per_kv;
  int64_t rows;  // of one kv head
  int tile_rows;
  int64_t tiles;  // of one kv head
  int64_t ranges = 1;
  int64_t units = 0;
  int threads;

 private:
  static constexpr int64_t kRangeKeys = 512;  // fewer are not worth a range of their own

  // The cost of a unit is the keys it visits, plus what a tile costs anyway; it is the same for
  // every kv head.
  void CutUnits(int kv_heads) {
    std::vector<int64_t> costs;
    costs.reserve(ranges * tiles);
    int64_t total = 0;
    for (int64_t range = 0; range < ranges; ++range) {
      const int64_t first = RangeBegin(range), last = RangeBegin(range + 1);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t last_row = std::min(rows, (tile + 1) * tile_rows) - 1;
        const int64_t sees = begin + last_row / heads_per_kv + 1;
        costs.push_back(std::max<int64_t>(0, std::min(sees, last) - first) + kKvBlockTokens);
        total += costs.back();
      }
    }
    total *= kv_heads;
    first_units_.reserve(threads + 1);
    int64_t unit = 0, before = 0;
    for (int kv_head = 0; kv_head < kv_heads; ++kv_head) {
      for (int64_t cost : costs) {
        while (before * threads >= total * static_cast<int64_t>(first_units_.size())) {
          first_units_.push_back(unit);
        }
        before += cost;
        ++unit;
      }
    }
    first_units_.resize(threads + 1, units);
  }

  std::vector<int64_t> first_units_;  // of every thread, and where the last one ends
};

}  // namespace sluice::cpu

#endif  // SLUICE_RUNTIME_OPS_CPU_ATTENTION_PLAN_H_
