#include "runtime/ops/attention.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "runtime/ops/cpu/amx.h"
#include "runtime/ops/cpu/attention.h"
#include "runtime/ops/cpu/attention_sage.h"
#include "runtime/ops/cpu/element.h"
#include "runtime/ops/cuda/activation.h"
#include "runtime/ops/cuda/attention.h"
#include "runtime/ops/cuda/kv.h"
#include "runtime/ops/kv_table.h"
#include "runtime/ops/note.h"
#include "runtime/ops/rope.h"
#include "runtime/parallel.h"
#include "runtime/transfer.h"

namespace sluice {
namespace {

std::string Describe(ConstTensorView x) { return x.shape().ToString() + " " + Name(x.dtype()); }

void CheckMatrix(const char* op, const char* what, ConstTensorView x, int64_t rows, int64_t columns,
                 DType dtype) {
  if (x.shape() == Shape{rows, columns} && x.dtype() == dtype) return;
  throw Error(std::string("[") + op + "] " + what + " must be " + Shape{rows, columns}.ToString() +
              " " + Name(dtype) + ", got " + Describe(x));
}

void CheckContiguous(const char* op, const char* what, ConstTensorView x) {
  if (x.contiguous()) return;
  throw Error(std::string("[") + op + "] " + what + " must be contiguous, got rows " +
              std::to_string(x.stride0()) + " elements apart");
}

void CheckFloat(const char* op, DType dtype) {
  if (dtype == DType::kF32 || dtype == DType::kBF16) return;
  throw Error(std::string("[") + op + "] expects f32 or bf16, got " + Name(dtype));
}

void CheckScale(const char* op, float scale) {
  if (std::isfinite(scale) && scale > 0) return;
  throw Error(std::string("[") + op + "] scale must be positive and finite, got " +
              std::to_string(scale));
}

// Rows of `batch` sequences of equal length, in all.
int64_t CheckSequences(const char* op, const char* what, ConstTensorView x, int64_t batch,
                       int heads, int head_dim, DType dtype) {
  if (batch >= 1 && heads >= 1 && head_dim >= 1 && x.shape().rank() == 2 && x.dim(0) % batch == 0) {
    CheckMatrix(op, what, x, x.dim(0), int64_t{heads} * head_dim, dtype);
    return x.dim(0);
  }
  throw Error(std::string("[") + op + "] " + what +
              " must be [batch * rows, heads * D] with batch " + std::to_string(batch) +
              ", heads " + std::to_string(heads) + ", D " + std::to_string(head_dim) + ", got " +
              Describe(x));
}

void CheckBias(const char* op, ConstTensorView bias, int64_t keys) {
  if (bias.empty() || (bias.shape() == Shape{keys} && bias.dtype() == DType::kF32)) return;
  throw Error(std::string("[") + op + "] key_bias must be " + Shape{keys}.ToString() +
              " f32, got " + Describe(bias));
}

void CheckKv(const char* op, const KvLayerView& kv, int64_t begin, int64_t count) {
  CheckFloat(op, kv.dtype);
  if (kv.kv_heads < 1 || kv.head_dim < 1) {
    throw Error(std::string("[") + op + "] kv heads and head size must be at least 1, got " +
                std::to_string(kv.kv_heads) + " and " + std::to_string(kv.head_dim));
  }
  const int64_t room = static_cast<int64_t>(kv.blocks.size()) * kKvBlockTokens;
  if (begin < 0 || begin > room || count > room - begin) {
    throw Error(std::string("[") + op + "] positions [" + std::to_string(begin) + ", " +
                std::to_string(begin) + " + " + std::to_string(count) +
                ") must lie in the cache's " + std::to_string(room) + "; reserve them first");
  }
}

// One block is written by one thread: the columns of a value row share cache lines.
template <typename T>
void StoreRows(ExecContext& ctx, ConstTensorView keys, ConstTensorView values, int64_t begin,
               const KvLayerView& kv) {
  const int64_t head_dim = kv.head_dim, area = kKvBlockTokens * head_dim;
  const int64_t end = begin + keys.dim(0), first_block = begin / kKvBlockTokens;
  const int64_t num_blocks = (end + kKvBlockTokens - 1) / kKvBlockTokens - first_block;
  ParallelFor(ctx, num_blocks * kv.kv_heads, 2, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t index = first_block + item / kv.kv_heads, head = item % kv.kv_heads;
      const int64_t block_begin = index * kKvBlockTokens;
      const int64_t from = std::max(begin, block_begin) - block_begin;
      const int64_t to = std::min(end, block_begin + kKvBlockTokens) - block_begin;
      T* k = static_cast<T*>(kv.blocks[index]) + head * area;
      T* v = k + kv.kv_heads * area;
      const int64_t row = block_begin + from - begin;
      const T* new_k = keys.data<T>() + row * keys.stride0() + head * head_dim;
      const T* new_v = values.data<T>() + row * values.stride0() + head * head_dim;
      for (int64_t t = from; t < to; ++t, new_k += keys.stride0()) {
        std::copy_n(new_k, head_dim, k + t * head_dim);
      }
      for (int64_t d = 0; d < head_dim; ++d) {
        for (int64_t t = from; t < to; ++t) {
          v[d * kKvBlockTokens + t] = new_v[(t - from) * values.stride0() + d];
        }
      }
    }
  });
}

template <typename T>
void LoadRows(ExecContext& ctx, const KvLayerView& kv, int64_t begin, TensorView keys,
              TensorView values) {
  const int64_t head_dim = kv.head_dim, area = kKvBlockTokens * head_dim;
  ParallelFor(ctx, keys.dim(0), 16, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t at = (begin + row) % kKvBlockTokens;
      const T* k = static_cast<const T*>(kv.blocks[(begin + row) / kKvBlockTokens]);
      T* to_k = keys.data<T>() + row * keys.stride0();
      T* to_v = values.data<T>() + row * values.stride0();
      for (int64_t head = 0; head < kv.kv_heads; ++head) {
        std::copy_n(k + head * area + at * head_dim, head_dim, to_k + head * head_dim);
        const T* v = k + (kv.kv_heads + head) * area + at;
        for (int64_t d = 0; d < head_dim; ++d) to_v[head * head_dim + d] = v[d * kKvBlockTokens];
      }
    }
  });
}

// All positions that `rows` names must exist; returns the end of the last of them.
int64_t CheckRows(const char* op, const KvLayerView& kv, std::span<const int32_t> rows) {
  CheckKv(op, kv, 0, 0);
  const int64_t room = static_cast<int64_t>(kv.blocks.size()) * kKvBlockTokens;
  int64_t end = 0;
  for (const int32_t row : rows) {
    end = std::max<int64_t>(end, int64_t{row} + 1);
    if (row >= 0 && row < room) continue;
    throw Error(std::string("[") + op + "] rows must lie in the cache's " + std::to_string(room) +
                " positions, got " + std::to_string(row));
  }
  return end;
}

template <typename T>
void GatherRows(ExecContext& ctx, const KvLayerView& from, std::span<const int32_t> rows,
                const KvLayerView& to) {
  const int64_t head_dim = from.head_dim, area = kKvBlockTokens * head_dim;
  const auto count = static_cast<int64_t>(rows.size());
  const int64_t num_blocks = (count + kKvBlockTokens - 1) / kKvBlockTokens;
  // One block is written by one thread, as in StoreRows.
  ParallelFor(ctx, num_blocks * from.kv_heads, 2, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t index = item / from.kv_heads, head = item % from.kv_heads;
      T* k = static_cast<T*>(to.blocks[index]) + head * area;
      T* v = k + from.kv_heads * area;
      const int64_t end = std::min<int64_t>(count - index * kKvBlockTokens, kKvBlockTokens);
      for (int64_t t = 0; t < end; ++t) {
        const int64_t row = rows[index * kKvBlockTokens + t], at = row % kKvBlockTokens;
        const T* old_k = static_cast<const T*>(from.blocks[row / kKvBlockTokens]) + head * area;
        const T* old_v = old_k + from.kv_heads * area;
        std::copy_n(old_k + at * head_dim, head_dim, k + t * head_dim);
        for (int64_t d = 0; d < head_dim; ++d) {
          v[d * kKvBlockTokens + t] = old_v[d * kKvBlockTokens + at];
        }
      }
    }
  });
}

// Eight sums, so that the compiler may use vectors.
template <typename T>
float Dot(const T* a, const T* b, int size) {
  constexpr int kLanes = 8;
  float sums[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) sums[j] += cpu::ToFloat(a[i + j]) * cpu::ToFloat(b[i + j]);
  }
  for (; i < size; ++i) sums[0] += cpu::ToFloat(a[i]) * cpu::ToFloat(b[i]);
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

template <typename T>
void MeanRow(ExecContext& ctx, const T* q, int heads, float scale, const KvLayerView& kv,
             std::span<const int32_t> rows, ConstTensorView more, std::span<float> out) {
  const int head_dim = kv.head_dim, group = heads / kv.kv_heads;
  const int64_t area = int64_t{kKvBlockTokens} * head_dim;
  const auto cached = static_cast<int64_t>(rows.size()), count = static_cast<int64_t>(out.size());
  // One scratch row a head: heads are independent until the mean.
  Workspace::Scope scope(ctx.workspace());
  const TensorView weights = ctx.workspace().Allocate(DType::kF32, {heads, count});
  ParallelFor(ctx, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      const int64_t kv_head = head / group;
      const T* query = q + head * head_dim;
      float* w = weights.data<float>() + head * count;
      float max = -INFINITY;
      for (int64_t i = 0; i < count; ++i) {
        const T* key = i < cached
                           ? static_cast<const T*>(kv.blocks[rows[i] / kKvBlockTokens]) +
                                 kv_head * area + rows[i] % kKvBlockTokens * head_dim
                           : more.data<T>() + (i - cached) * more.stride0() + kv_head * head_dim;
        w[i] = Dot(query, key, head_dim) * scale;
        max = std::max(max, w[i]);
      }
      double sum = 0;
      for (int64_t i = 0; i < count; ++i) sum += w[i] = std::exp(w[i] - max);
      const auto factor = static_cast<float>(1 / (sum * heads));
      for (int64_t i = 0; i < count; ++i) w[i] *= factor;
    }
  });
  for (int64_t i = 0; i < count; ++i) {
    float sum = 0;
    for (int head = 0; head < heads; ++head) sum += weights.data<float>()[head * count + i];
    out[i] = sum;
  }
}

// ---- on a GPU -------------------------------------------------------------------------------

void CheckDevice(const char* op, const ExecContext& ctx, const KvLayerView& kv) {
  if (kv.device == ctx.device()) {
    // A step that recurs is the same only with the same pool.
    if (ctx.recorder()) NoteScalars(ctx, kv.base);
    return;
  }
  throw Error(std::string("[") + op + "] expected a cache on the " + Name(ctx.device()) +
              ", got one on the " + Name(kv.device));
}

// Of the rows of segments of one pool that follow each other; returns how many.
int64_t CheckQkv(const char* op, const ExecContext& ctx, ConstTensorView qkv, int heads,
                 std::span<const KvSegment> segments) {
  const KvLayerView& first = segments.front().kv;
  int64_t rows = 0;
  for (const KvSegment& segment : segments) {
    const KvLayerView& kv = segment.kv;
    CheckKv(op, kv, segment.begin, segment.rows);
    CheckDevice(op, ctx, kv);
    if (kv.kv_heads != first.kv_heads || kv.head_dim != first.head_dim || kv.base != first.base) {
      throw Error(std::string("[") + op + "] segments must be of one pool, got caches of " +
                  std::to_string(first.kv_heads) + " and " + std::to_string(kv.kv_heads) +
                  " kv heads of " + std::to_string(first.head_dim) + " and " +
                  std::to_string(kv.head_dim));
    }
    if (segment.row != rows) {
      throw Error(std::string("[") + op + "] segments must follow each other, got one at row " +
                  std::to_string(segment.row) + " behind " + std::to_string(rows) + " rows");
    }
    rows += segment.rows;
  }
  const int64_t width = (int64_t{heads} + 2 * first.kv_heads) * first.head_dim;
  CheckMatrix(op, "qkv", qkv, rows, width, first.dtype);
  return rows;
}

void CheckRotation(const char* op, int64_t rows, int64_t head_dim,
                   std::span<const int32_t> positions, ConstTensorView inv_freq) {
  if (positions.size() == static_cast<size_t>(rows) && inv_freq.shape() == Shape{head_dim / 2} &&
      inv_freq.dtype() == DType::kF32) {
    return;
  }
  throw Error(std::string("[") + op + "] expected " + std::to_string(rows) + " positions and " +
              std::to_string(head_dim / 2) + " frequencies in f32, got " +
              std::to_string(positions.size()) + " and " + Describe(inv_freq));
}

cuda::KvBlocks BlocksOf(const KvLayerView& kv) {
  return {const_cast<void*>(kv.base), kv.kv_heads, kv.head_dim, kv.dtype};
}

// Checks rows that go between a cache and matrices, and moves them where that is the GPU's work.
bool MoveOnGpu(const char* op, ExecContext& ctx, const KvLayerView& kv, int64_t begin,
               ConstTensorView keys, ConstTensorView values, decltype(cuda::StoreKv)& move) {
  const int64_t count = keys.shape().rank() == 2 ? keys.dim(0) : 0;
  CheckKv(op, kv, begin, count);
  const int64_t width = int64_t{kv.kv_heads} * kv.head_dim;
  CheckMatrix(op, "keys", keys, count, width, kv.dtype);
  CheckMatrix(op, "values", values, count, width, kv.dtype);
  CheckDevice(op, ctx, kv);
  if (!OnGpu(op, ctx, {keys, values})) return false;
  if (count == 0) return true;
  const Workspace::Scope scope(ctx.workspace());
  std::vector<int32_t> where = {static_cast<int32_t>(begin % kKvBlockTokens)};
  AppendBlocks(kv, begin, begin + count, where);
  const cuda::KvRows rows = {const_cast<void*>(keys.raw()), const_cast<void*>(values.raw()),
                             keys.stride0(), values.stride0(), count};
  ctx.Queue(move, BlocksOf(kv), Within(ctx, where), rows);
  return true;
}

constexpr int64_t kTogether = 64;  // tables grow by so many blocks: lengths that are one step

// Scratch memory of an op, which is part of what a replay must find the same.
void* ScratchOf(ExecContext& ctx, size_t bytes) {
  void* const room = ctx.workspace().Allocate(DType::kU8, {static_cast<int64_t>(bytes)}).raw();
  NoteScalars(ctx, room);
  return room;
}

// Whether these rows can be read 16 bytes at once, as the copy engine and tensor cores want them.
bool ReadWide(std::initializer_list<ConstTensorView> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const ConstTensorView& rows) {
    return reinterpret_cast<uintptr_t>(rows.raw()) % 16 == 0 && rows.stride0() % 8 == 0;
  });
}

// Attention with the matrix kernels.
void FlashAttention(ExecContext& ctx, const cuda::AttentionArgs& args) {
  const Workspace::Scope scope(ctx.workspace());
  const size_t bytes = cuda::AttentionWorkspaceBytes(args);
  ctx.Queue(cuda::Attention, args, ScratchOf(ctx, bytes), bytes);
}

// How the rows of DecodeOnGpu are rotated and stored first, where they are.
struct Rotation {
  std::span<const int32_t> positions;
  ConstTensorView inv_freq;  // empty: they have been
};

// One row of each of consecutive segments. q: the first of them, at q_stride from the next.
void DecodeOnGpu(ExecContext& ctx, const void* q, int64_t q_stride,
                 std::span<const KvSegment> segments, int heads, float scale,
                 const Rotation& rotation, TensorView out) {
  const Workspace::Scope scope(ctx.workspace());
  int64_t blocks = 0;
  for (const KvSegment& segment : segments) {
    blocks = std::max(blocks, (segment.begin + kKvBlockTokens) / kKvBlockTokens);
  }
  const int64_t pitch = (blocks + kTogether - 1) / kTogether * kTogether + 1;
  std::vector<int32_t> numbers;
  for (const KvSegment& segment : segments) {
    const size_t end = numbers.size() + pitch;
    numbers.push_back(static_cast<int32_t>(segment.begin + 1));
    AppendBlocks(segment.kv, 0, segment.begin + 1, numbers);
    numbers.resize(end, 0);
  }
  const size_t tables = numbers.size();
  numbers.insert(numbers.end(), rotation.positions.begin(), rotation.positions.end());
  const int32_t* const there = Within(ctx, numbers);
  const KvLayerView& kv = segments.front().kv;
  const cuda::DecodeAttentionArgs args = {
      .q = q,
      .q_stride = q_stride,
      .out = out.raw(),
      .heads = heads,
      .kv_heads = kv.kv_heads,
      .head_dim = kv.head_dim,
      .scale = scale,
      .base = kv.base,
      .tables = there,
      .table_pitch = pitch,
      .sequences = static_cast<int64_t>(segments.size()),
      .inv_freq = static_cast<const float*>(rotation.inv_freq.raw()),
      .positions = there + tables};
  ctx.Queue(cuda::DecodeAttention, args, ScratchOf(ctx, cuda::DecodeWorkspaceBytes(args)));
}

bool IsFlash(GpuAttention kernel) {
  return kernel == GpuAttention::kFlash || kernel == GpuAttention::kFlashMma;
}

// Times what was asked to be quantised under the name of what it became.
class SageTrace {
 public:
  SageTrace(ExecContext& ctx, AttentionPrecision precision, bool quantised, int64_t rows)
      : trace_(precision == AttentionPrecision::kExact ? nullptr : &ctx.tracer(),
               quantised ? "attention/sage" : "attention/exact", rows) {}

 private:
  TraceScope trace_;
};

bool IsSage(AttentionKernel kernel) {
  return kernel == AttentionKernel::kSage || kernel == AttentionKernel::kSageReference;
}

// The quantised kernel over a segment's keys and values, gathered: it reads them once only, to
// quantise them. Its launches depend on how many there are: their shape tells steps that recur.
void SageOnGpu(ExecContext& ctx, ConstTensorView q, const KvSegment& segment, int heads,
               float scale, TensorView out) {
  const Workspace::Scope scope(ctx.workspace());
  const KvLayerView& kv = segment.kv;
  const int64_t seen = segment.begin + segment.rows;
  const Shape shape{seen, int64_t{kv.kv_heads} * kv.head_dim};
  const TensorView keys = ctx.workspace().Allocate(kv.dtype, shape);
  const TensorView values = ctx.workspace().Allocate(kv.dtype, shape);
  MoveOnGpu("causal_attention", ctx, kv, 0, keys, values, cuda::LoadKv);
  FlashAttention(ctx, {.q = q.raw(),
                       .k = keys.raw(),
                       .v = values.raw(),
                       .out = out.raw(),
                       .q_stride = q.stride0(),
                       .k_stride = keys.stride0(),
                       .v_stride = values.stride0(),
                       .out_stride = out.stride0(),
                       .q_len = segment.rows,
                       .kv_len = seen,
                       .heads = heads,
                       .kv_heads = kv.kv_heads,
                       .head_dim = kv.head_dim,
                       .scale = scale,
                       .causal = true,
                       .precision = cuda::QuantizedPrecision(cuda::ComputeCapability())});
}

// The rows of one segment; q and out are theirs.
void SegmentOnGpu(ExecContext& ctx, ConstTensorView q, const KvSegment& segment, int heads,
                  float scale, AttentionPrecision precision, TensorView out) {
  const Workspace::Scope scope(ctx.workspace());
  const KvLayerView& kv = segment.kv;
  const int64_t seen = segment.begin + segment.rows;
  const GpuAttention kernel =
      ChooseGpuAttention(cuda::ComputeCapability(), segment.rows, heads, kv.kv_heads, kv.head_dim,
                         kv.dtype, /*causal=*/true, /*biased=*/false, precision);
  const bool quantised = kernel == GpuAttention::kSage && ReadWide({q});
  const SageTrace trace(ctx, precision, quantised, segment.rows);
  if (kernel == GpuAttention::kDecode && ReadWide({q})) {
    const KvSegment alone{.row = 0, .rows = 1, .begin = segment.begin, .kv = kv};
    return DecodeOnGpu(ctx, q.raw(), q.stride0(), {&alone, 1}, heads, scale, {}, out);
  }
  if (quantised) return SageOnGpu(ctx, q, segment, heads, scale, out);
  std::vector<int32_t> table = {static_cast<int32_t>(seen)};
  AppendBlocks(kv, 0, seen, table);
  // Room for more, so that lengths near each other are the same step.
  table.resize((table.size() + kTogether) / kTogether * kTogether, 0);
  const int32_t* const there = Within(ctx, table);
  if (IsFlash(kernel) && ReadWide({q})) {
    return FlashAttention(ctx, {.q = q.raw(),
                                .out = out.raw(),
                                .blocks = kv.base,
                                .table = there,
                                .q_stride = q.stride0(),
                                .out_stride = out.stride0(),
                                .q_len = segment.rows,
                                .heads = heads,
                                .kv_heads = kv.kv_heads,
                                .head_dim = kv.head_dim,
                                .scale = scale,
                                .causal = true});
  }
  cuda::PlainAttentionArgs args;
  args.q = q.raw();
  args.q_stride = q.stride0();
  args.out = out.raw();
  args.heads = heads;
  args.kv_heads = kv.kv_heads;
  args.head_dim = kv.head_dim;
  args.dtype = kv.dtype;
  args.scale = scale;
  args.q_len = segment.rows;
  args.base = kv.base;
  args.table = there;
  ctx.Queue(cuda::PlainAttention, args);
}

// Whether they are consecutive rows, one a segment, that the kernel for decoding takes.
bool AllDecode(std::span<const KvSegment> segments, int heads) {
  for (size_t i = 0; i < segments.size(); ++i) {
    const KvSegment& s = segments[i];
    if (s.rows != 1 || s.row != segments[0].row + static_cast<int64_t>(i) ||
        s.kv.base != segments[0].kv.base) {
      return false;
    }
  }
  const KvLayerView& kv = segments.front().kv;
  return ChooseGpuAttention(cuda::ComputeCapability(), 1, heads, kv.kv_heads, kv.head_dim, kv.dtype,
                            true, false) == GpuAttention::kDecode;
}

void CausalOnGpu(ExecContext& ctx, ConstTensorView q, std::span<const KvSegment> segments,
                 int heads, float scale, AttentionPrecision precision, TensorView out) {
  if (ReadWide({q}) && AllDecode(segments, heads)) {
    const SageTrace trace(ctx, precision, false, static_cast<int64_t>(segments.size()));
    return DecodeOnGpu(ctx, q.Slice(segments[0].row, segments[0].row + 1).raw(), q.stride0(),
                       segments, heads, scale, {}, out);
  }
  int64_t done = 0;
  for (const KvSegment& s : segments) {
    if (s.rows > 0) {
      SegmentOnGpu(ctx, q.Slice(s.row, s.row + s.rows), s, heads, scale, precision,
                   out.Slice(done, done + s.rows));
    }
    done += s.rows;
  }
}

// By head, then the mean of them: softmax(scores) [batch * rows, keys] to mean [batch, keys].
void MeanOfScores(ExecContext& ctx, const cuda::KeyScoreArgs& scores, float* mean) {
  ctx.Queue(cuda::KeyScores, scores);
  const int64_t rows = scores.queries * scores.heads, keys = scores.row_count + scores.keys;
  ctx.Queue(cuda::Softmax,
            TensorView(scores.scores, DType::kF32, {scores.batch * rows, keys}, -1, Device::kCuda));
  ctx.Queue(cuda::MeanOfRows, scores.scores, scores.batch, rows, keys, mean);
}

}  // namespace

const char* Name(AttentionPrecision precision) {
  switch (precision) {
    case AttentionPrecision::kExact:
      return "exact";
    case AttentionPrecision::kSage:
      return "sage";
    case AttentionPrecision::kSageAlways:
      return "sage, always";
  }
  return "?";
}

const char* Name(AttentionKernel kernel) {
  switch (kernel) {
    case AttentionKernel::kReference:
      return "reference";
    case AttentionKernel::kSimd:
      return "simd";
    case AttentionKernel::kAmx:
      return "amx";
    case AttentionKernel::kSageReference:
      return "sage, reference";
    case AttentionKernel::kSage:
      return "sage (int8 scores)";
  }
  return "?";
}

AttentionKernel ChooseAttention(int64_t queries, int64_t /*keys*/, int /*head_dim*/, DType dtype,
                                bool amx, bool reference, AttentionPrecision precision,
                                bool int8_dot) {
  // Every key is quantised once for its queries, which takes as long as 64 of them gain: measured
  // at 64 and 128 channels, 200 to 16,000 keys.
  constexpr int64_t kFewestQueries = 96;
  const bool exact = precision == AttentionPrecision::kExact;
  if (reference) return exact ? AttentionKernel::kReference : AttentionKernel::kSageReference;
  if (precision == AttentionPrecision::kSageAlways) return AttentionKernel::kSage;
  // Tiles win at every size: a single query reads its keys no slower, and the products are free.
  // Next to them quantising scores gains nothing: half as many products for the scores alone, the
  // conversions left out, take 3 to 15 % off the time, and those cost as much.
  if (amx && dtype == DType::kBF16) return AttentionKernel::kAmx;
  return !exact && int8_dot && queries >= kFewestQueries ? AttentionKernel::kSage
                                                         : AttentionKernel::kSimd;
}

const char* Name(GpuAttention kernel) {
  switch (kernel) {
    case GpuAttention::kPlain:
      return "plain";
    case GpuAttention::kFlash:
      return "flash (sm_90a)";
    case GpuAttention::kFlashMma:
      return "flash (mma.sync)";
    case GpuAttention::kDecode:
      return "decode";
    case GpuAttention::kSage:
      return "sage (scores in int8)";
  }
  return "?";
}

GpuAttention ChooseGpuAttention(int capability, int64_t queries, int heads, int kv_heads,
                                int head_dim, DType dtype, bool causal, bool biased,
                                AttentionPrecision precision) {
  if (dtype != DType::kBF16 || biased) return GpuAttention::kPlain;
  if (causal && queries == 1 && cuda::CanDecode(heads, kv_heads, head_dim, dtype)) {
    return GpuAttention::kDecode;
  }
  const bool size = head_dim == 64 || head_dim == 72 || head_dim == 80 || head_dim == 128;
  if (!size || capability < 80) return GpuAttention::kPlain;
  const GpuAttention exact = capability == 90 ? GpuAttention::kFlash : GpuAttention::kFlashMma;
  if (precision == AttentionPrecision::kExact) return exact;
  const bool pays = cuda::FastestAttention({.q_len = queries,
                                            .heads = heads,
                                            .kv_heads = kv_heads,
                                            .head_dim = head_dim,
                                            .causal = causal}) != cuda::AttentionPrecision::kBF16;
  return pays || precision == AttentionPrecision::kSageAlways ? GpuAttention::kSage : exact;
}

size_t KvBlockBytes(int kv_heads, int head_dim, DType dtype) {
  return size_t{2} * kv_heads * kKvBlockTokens * head_dim * SizeOf(dtype);
}

void EncoderAttention(ExecContext& ctx, ConstTensorView q, ConstTensorView k, ConstTensorView v,
                      int64_t batch, int heads, int head_dim, float scale, TensorView out,
                      ConstTensorView key_bias, AttentionPrecision precision) {
  constexpr char kOp[] = "encoder_attention";
  CheckFloat(kOp, q.dtype());
  CheckScale(kOp, scale);
  const int64_t queries = CheckSequences(kOp, "q", q, batch, heads, head_dim, q.dtype());
  const int64_t keys = CheckSequences(kOp, "k", k, batch, heads, head_dim, q.dtype());
  CheckMatrix(kOp, "v", v, keys, k.dim(1), q.dtype());
  CheckMatrix(kOp, "out", out, queries, k.dim(1), q.dtype());
  CheckContiguous(kOp, "out", out);
  CheckBias(kOp, key_bias, keys);
  if (queries == 0) return;
  if (keys == 0) throw Error(std::string("[") + kOp + "] queries need at least one key");
  if (OnGpu(kOp, ctx, {q, k, v, out, key_bias})) {
    const GpuAttention kernel =
        ChooseGpuAttention(cuda::ComputeCapability(), queries / batch, heads, heads, head_dim,
                           q.dtype(), false, !key_bias.empty(), precision);
    const bool quantised = kernel == GpuAttention::kSage && ReadWide({q, k, v, out});
    const SageTrace trace(ctx, precision, quantised, queries);
    if (quantised || (IsFlash(kernel) && ReadWide({q, k, v, out}))) {
      return FlashAttention(
          ctx, {.q = q.raw(),
                .k = k.raw(),
                .v = v.raw(),
                .out = out.raw(),
                .q_stride = q.stride0(),
                .k_stride = k.stride0(),
                .v_stride = v.stride0(),
                .out_stride = out.stride0(),
                .batch = batch,
                .q_len = queries / batch,
                .kv_len = keys / batch,
                .heads = heads,
                .kv_heads = heads,
                .head_dim = head_dim,
                .scale = scale,
                .precision = quantised ? cuda::QuantizedPrecision(cuda::ComputeCapability())
                                       : cuda::AttentionPrecision::kBF16});
    }
    cuda::PlainAttentionArgs args;
    args.q = q.raw();
    args.q_stride = q.stride0();
    args.out = out.raw();
    args.heads = args.kv_heads = heads;
    args.head_dim = head_dim;
    args.dtype = q.dtype();
    args.scale = scale;
    args.k = k.raw();
    args.v = v.raw();
    args.k_stride = k.stride0();
    args.v_stride = v.stride0();
    args.batch = batch;
    args.q_len = queries / batch;
    args.kv_len = keys / batch;
    args.key_bias = static_cast<const float*>(key_bias.raw());
    return ctx.Queue(cuda::PlainAttention, args);
  }
  const AttentionKernel kernel =
      ChooseAttention(queries / batch, keys / batch, head_dim, q.dtype(), cpu::AmxAllowed(),
                      ctx.reference_kernels(), precision, cpu::HasInt8Dot());
  const SageTrace trace(ctx, precision, IsSage(kernel), queries);
  switch (kernel) {
    case AttentionKernel::kReference:
      return cpu::EncoderAttentionReference(ctx, q, k, v, batch, heads, head_dim, scale, out,
                                            key_bias);
    case AttentionKernel::kSimd:
      return cpu::EncoderAttentionSimd(ctx, q, k, v, batch, heads, head_dim, scale, out, key_bias);
    case AttentionKernel::kAmx:
      return cpu::EncoderAttentionAmx(ctx, q, k, v, batch, heads, head_dim, scale, out, key_bias);
    case AttentionKernel::kSageReference:
      return cpu::EncoderAttentionSageReference(ctx, q, k, v, batch, heads, head_dim, scale, out,
                                                key_bias);
    case AttentionKernel::kSage:
      return cpu::EncoderAttentionSage(ctx, q, k, v, batch, heads, head_dim, scale, out, key_bias);
  }
}

void AttentionReceived(ExecContext& ctx, ConstTensorView q, ConstTensorView k, int64_t batch,
                       int heads, int head_dim, float scale, ConstTensorView key_bias,
                       TensorView received) {
  constexpr char kOp[] = "attention_received";
  CheckFloat(kOp, q.dtype());
  CheckScale(kOp, scale);
  const int64_t queries = CheckSequences(kOp, "q", q, batch, heads, head_dim, q.dtype());
  const int64_t keys = CheckSequences(kOp, "k", k, batch, heads, head_dim, q.dtype());
  CheckBias(kOp, key_bias, keys);
  CheckMatrix(kOp, "received", received, batch, keys / batch, DType::kF32);
  if (queries == 0) throw Error(std::string("[") + kOp + "] needs at least one query");
  Workspace::Scope scope(ctx.workspace());
  if (OnGpu(kOp, ctx, {q, k, key_bias, received})) {
    CheckContiguous(kOp, "received", received);
    cuda::KeyScoreArgs args;
    args.q = q.raw();
    args.q_stride = q.stride0();
    args.batch = batch;
    args.queries = queries / batch;
    args.heads = args.kv_heads = heads;
    args.head_dim = head_dim;
    args.dtype = q.dtype();
    args.scale = scale;
    args.k = k.raw();
    args.k_stride = k.stride0();
    args.keys = keys / batch;
    args.key_bias = static_cast<const float*>(key_bias.raw());
    args.scores = static_cast<float*>(
        ctx.workspace().Allocate(DType::kF32, {queries * heads, args.keys}).raw());
    return MeanOfScores(ctx, args, static_cast<float*>(received.raw()));
  }
  // A row for each head: heads are independent until the mean.
  const TensorView by_head = ctx.workspace().Allocate(DType::kF32, {batch * heads, keys / batch});
  if (ctx.reference_kernels()) {
    cpu::AttentionReceivedReference(ctx, q, k, batch, heads, head_dim, scale, key_bias, by_head);
  } else {
    cpu::AttentionReceivedSimd(ctx, q, k, batch, heads, head_dim, scale, key_bias, by_head);
  }
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < keys / batch; ++i) {
      float sum = 0;
      for (int64_t h = 0; h < heads; ++h) {
        sum += by_head.data<float>()[(b * heads + h) * by_head.dim(1) + i];
      }
      received.data<float>()[b * received.stride0() + i] = sum / static_cast<float>(heads);
    }
  }
}

void StoreKv(ExecContext& ctx, ConstTensorView keys, ConstTensorView values, int64_t begin,
             const KvLayerView& kv) {
  if (MoveOnGpu("store_kv", ctx, kv, begin, keys, values, cuda::StoreKv)) return;
  cpu::WithType(kv.dtype,
                [&](auto element) { StoreRows<decltype(element)>(ctx, keys, values, begin, kv); });
}

void RotateAndStore(ExecContext& ctx, TensorView qkv, int heads, std::span<const int32_t> positions,
                    ConstTensorView inv_freq, std::span<const KvSegment> segments) {
  constexpr char kOp[] = "rotate_and_store";
  if (segments.empty()) return;
  const KvLayerView& first = segments.front().kv;
  const int64_t rows = CheckQkv(kOp, ctx, qkv, heads, segments);
  if (ctx.device() == Device::kCuda &&
      cuda::CanRotateAndStore(first.head_dim, qkv.stride0(), first.dtype)) {
    CheckRotation(kOp, rows, first.head_dim, positions, inv_freq);
    OnGpu(kOp, ctx, {qkv, inv_freq});
    const Workspace::Scope scope(ctx.workspace());
    std::vector<int32_t> numbers(positions.begin(), positions.end());
    for (const KvSegment& segment : segments) {
      const BlockNumbers of(segment.kv);
      for (int64_t at = segment.begin; at < segment.begin + segment.rows; ++at) {
        numbers.push_back(
            static_cast<int32_t>(of[at / kKvBlockTokens] * kKvBlockTokens + at % kKvBlockTokens));
      }
    }
    const int32_t* const there = Within(ctx, numbers);
    return ctx.Queue(cuda::RotateAndStore, BlocksOf(first), qkv.raw(), qkv.stride0(), rows, heads,
                     there, there + rows, static_cast<const float*>(inv_freq.raw()));
  }
  // Query and key heads stand beside each other.
  const int64_t q_width = int64_t{heads} * first.head_dim;
  const int64_t kv_width = int64_t{first.kv_heads} * first.head_dim;
  Rope(ctx, qkv.Columns(0, q_width + kv_width), first.head_dim, positions, inv_freq);
  for (const KvSegment& segment : segments) {
    const ConstTensorView of = qkv.Slice(segment.row, segment.row + segment.rows);
    StoreKv(ctx, of.Columns(q_width, q_width + kv_width), of.Columns(q_width + kv_width, of.dim(1)),
            segment.begin, segment.kv);
  }
}

void LoadKv(ExecContext& ctx, const KvLayerView& kv, int64_t begin, TensorView keys,
            TensorView values) {
  if (MoveOnGpu("load_kv", ctx, kv, begin, keys, values, cuda::LoadKv)) return;
  cpu::WithType(kv.dtype,
                [&](auto element) { LoadRows<decltype(element)>(ctx, kv, begin, keys, values); });
}

void GatherKv(ExecContext& ctx, const KvLayerView& from, std::span<const int32_t> rows,
              const KvLayerView& to) {
  constexpr char kOp[] = "gather_kv";
  const int64_t end = CheckRows(kOp, from, rows);
  CheckKv(kOp, to, 0, static_cast<int64_t>(rows.size()));
  if (from.kv_heads != to.kv_heads || from.head_dim != to.head_dim || from.dtype != to.dtype) {
    throw Error("[gather_kv] both caches must have the same heads, head size and dtype");
  }
  CheckDevice(kOp, ctx, from);
  CheckDevice(kOp, ctx, to);
  if (from.base != to.base) throw Error("[gather_kv] both caches must be of one pool");
  if (ctx.device() == Device::kCuda) {
    if (rows.empty()) return;
    const Workspace::Scope scope(ctx.workspace());
    const auto count = static_cast<int64_t>(rows.size());
    std::vector<int32_t> numbers(rows.begin(), rows.end());
    AppendBlocks(to, 0, count, numbers);
    const size_t source = numbers.size();
    AppendBlocks(from, 0, end, numbers);
    const int32_t* const there = Within(ctx, numbers);
    return ctx.Queue(cuda::GatherKv, BlocksOf(from), there + source, there, count, there + count);
  }
  cpu::WithType(from.dtype,
                [&](auto element) { GatherRows<decltype(element)>(ctx, from, rows, to); });
}

void MeanAttentionRow(ExecContext& ctx, ConstTensorView q, int heads, float scale,
                      const KvLayerView& kv, std::span<const int32_t> rows, ConstTensorView more,
                      std::span<float> out) {
  constexpr char kOp[] = "mean_attention_row";
  CheckScale(kOp, scale);
  const int64_t end = CheckRows(kOp, kv, rows);
  if (heads < 1 || heads % kv.kv_heads != 0) {
    throw Error(std::string("[") + kOp + "] heads must be a multiple of the " +
                std::to_string(kv.kv_heads) + " kv heads, got " + std::to_string(heads));
  }
  const int64_t count = more.shape().rank() == 2 ? more.dim(0) : 0;
  CheckMatrix(kOp, "q", q, 1, int64_t{heads} * kv.head_dim, kv.dtype);
  CheckMatrix(kOp, "more", more, count, int64_t{kv.kv_heads} * kv.head_dim, kv.dtype);
  if (out.size() != rows.size() + static_cast<size_t>(count)) {
    throw Error(std::string("[") + kOp + "] out must hold " + std::to_string(rows.size() + count) +
                " values, one a key, got " + std::to_string(out.size()));
  }
  CheckDevice(kOp, ctx, kv);
  if (OnGpu(kOp, ctx, {q, more})) {
    const Workspace::Scope scope(ctx.workspace());
    const auto keys = static_cast<int64_t>(out.size());
    if (keys == 0) return;
    std::vector<int32_t> numbers(rows.begin(), rows.end());
    AppendBlocks(kv, 0, end, numbers);
    const int32_t* const there = Within(ctx, numbers);
    cuda::KeyScoreArgs args;
    args.q = q.raw();
    args.q_stride = q.stride0();
    args.heads = heads;
    args.kv_heads = kv.kv_heads;
    args.head_dim = kv.head_dim;
    args.dtype = kv.dtype;
    args.scale = scale;
    args.k = more.raw();
    args.k_stride = more.stride0();
    args.keys = count;
    args.base = kv.base;
    args.table = there + rows.size();
    args.rows = there;
    args.row_count = static_cast<int64_t>(rows.size());
    args.scores = static_cast<float*>(ctx.workspace().Allocate(DType::kF32, {heads, keys}).raw());
    const TensorView mean = ctx.workspace().Allocate(DType::kF32, {keys});
    MeanOfScores(ctx, args, static_cast<float*>(mean.raw()));
    return Transfer(ctx, mean, TensorView(out.data(), DType::kF32, {keys}));
  }
  cpu::WithType(kv.dtype, [&](auto element) {
    MeanRow(ctx, q.data<decltype(element)>(), heads, scale, kv, rows, more, out);
  });
}

void CausalAttention(ExecContext& ctx, ConstTensorView q, int64_t begin, int heads, float scale,
                     const KvLayerView& kv, TensorView out, AttentionPrecision precision) {
  const int64_t count = q.shape().rank() == 2 ? q.dim(0) : 0;
  const KvSegment whole{.row = 0, .rows = count, .begin = begin, .kv = kv};
  CausalAttention(ctx, q, {&whole, 1}, heads, scale, out, precision);
}

void CausalAttention(ExecContext& ctx, ConstTensorView q, std::span<const KvSegment> segments,
                     int heads, float scale, TensorView out, AttentionPrecision precision) {
  constexpr char kOp[] = "causal_attention";
  CheckScale(kOp, scale);
  if (segments.empty()) return;
  const int64_t all = q.shape().rank() == 2 ? q.dim(0) : 0;
  int64_t count = 0;
  for (const KvSegment& segment : segments) {
    const KvLayerView& kv = segment.kv;
    CheckKv(kOp, kv, segment.begin, segment.rows);
    CheckDevice(kOp, ctx, kv);
    if (heads < 1 || heads % kv.kv_heads != 0) {
      throw Error(std::string("[") + kOp + "] heads must be a multiple of the " +
                  std::to_string(kv.kv_heads) + " kv heads, got " + std::to_string(heads));
    }
    CheckMatrix(kOp, "q", q, all, int64_t{heads} * kv.head_dim, kv.dtype);
    if (const KvLayerView& first = segments.front().kv;
        kv.kv_heads != first.kv_heads || kv.head_dim != first.head_dim) {
      throw Error(std::string("[") + kOp + "] all sequences must have " +
                  std::to_string(first.kv_heads) + " kv heads of size " +
                  std::to_string(first.head_dim) + ", got " + std::to_string(kv.kv_heads) + " of " +
                  std::to_string(kv.head_dim));
    }
    count += segment.rows;
  }
  CheckMatrix(kOp, "out", out, count, q.dim(1), q.dtype());
  CheckContiguous(kOp, "out", out);
  if (count == 0) return;
  if (OnGpu(kOp, ctx, {q, out})) {
    return CausalOnGpu(ctx, q, segments, heads, scale, precision, out);
  }
  int64_t done = 0;
  for (const KvSegment& segment : segments) {
    const int64_t rows = segment.rows, begin = segment.begin;
    if (rows == 0) continue;
    const KvLayerView& kv = segment.kv;
    const ConstTensorView queries = q.Slice(segment.row, segment.row + rows);
    const TensorView to = out.Slice(done, done + rows);
    done += rows;
    const AttentionKernel kernel =
        ChooseAttention(rows * (heads / kv.kv_heads), begin + rows, kv.head_dim, kv.dtype,
                        cpu::AmxAllowed(), ctx.reference_kernels(), precision, cpu::HasInt8Dot());
    const SageTrace trace(ctx, precision, IsSage(kernel), rows);
    switch (kernel) {
      case AttentionKernel::kReference:
        cpu::CausalAttentionReference(ctx, queries, begin, heads, scale, kv, to);
        break;
      case AttentionKernel::kSimd:
        cpu::CausalAttentionSimd(ctx, queries, begin, heads, scale, kv, to);
        break;
      case AttentionKernel::kAmx:
        cpu::CausalAttentionAmx(ctx, queries, begin, heads, scale, kv, to);
        break;
      case AttentionKernel::kSageReference:
        cpu::CausalAttentionSageReference(ctx, queries, begin, heads, scale, kv, to);
        break;
      case AttentionKernel::kSage:
        cpu::CausalAttentionSage(ctx, queries, begin, heads, scale, kv, to);
        break;
    }
  }
}

void RotateStoreAndAttend(ExecContext& ctx, TensorView qkv, int heads,
                          std::span<const int32_t> positions, ConstTensorView inv_freq,
                          std::span<const KvSegment> segments, float scale, TensorView out,
                          AttentionPrecision precision) {
  constexpr char kOp[] = "rotate_store_and_attend";
  if (segments.empty()) return;
  const int64_t rows = CheckQkv(kOp, ctx, qkv, heads, segments);
  const KvLayerView& first = segments.front().kv;
  const ConstTensorView q = qkv.Columns(0, int64_t{heads} * first.head_dim);
  if (ctx.device() == Device::kCuda && heads % first.kv_heads == 0 && ReadWide({qkv}) &&
      AllDecode(segments, heads)) {
    CheckRotation(kOp, rows, first.head_dim, positions, inv_freq);
    CheckScale(kOp, scale);
    CheckMatrix(kOp, "out", out, rows, q.dim(1), q.dtype());
    CheckContiguous(kOp, "out", out);
    OnGpu(kOp, ctx, {qkv, inv_freq, out});
    const SageTrace trace(ctx, precision, false, rows);
    return DecodeOnGpu(ctx, qkv.raw(), qkv.stride0(), segments, heads, scale, {positions, inv_freq},
                       out);
  }
  RotateAndStore(ctx, qkv, heads, positions, inv_freq, segments);
  CausalAttention(ctx, q, segments, heads, scale, out, precision);
}

}  // namespace sluice
