// Both passes multiply 8-bit pixels with 23-bit weights in 32-bit lanes, which is exact. Pixels
// travel as four bytes (red, green, blue and one without meaning), so that a pixel never straddles
// lanes; the horizontal pass puts the same column of several rows beside each other, so that one
// broadcast weight serves a whole vector.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "vision/resize.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// After foreach_target.
#include <algorithm>
#include <cstring>

#include "hwy/highway.h"
#include "vision/resize.h"

#ifndef SLUICE_VISION_RESIZE_ONCE
#define SLUICE_VISION_RESIZE_ONCE

namespace sluice {

inline constexpr int kWeightBits = 22;

// `rows` source rows (at most RowsAtOnce()) and where their resized pixels go.
struct HorizontalJob {
  const uint8_t* in;   // [rows, in_width, 3]
  const uint8_t* end;  // of the whole picture: nothing is read from here on
  int rows;
  int in_width;
  int out_width;
  uint8_t* staged;  // in_width * 4 * RowsAtOnce() bytes
  uint8_t* out;     // [rows, out_stride]
  int64_t out_stride;
};

}  // namespace sluice

#endif  // SLUICE_VISION_RESIZE_ONCE

HWY_BEFORE_NAMESPACE();
namespace sluice {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

const hn::ScalableTag<int32_t> kI32;
const hn::Rebind<uint8_t, decltype(kI32)> kU8;  // as many bytes as there are 32-bit lanes

int RowsAtOnce() { return static_cast<int>(hn::Lanes(kI32)) / 4; }

void ResizeRowsHorizontally(const HorizontalJob& job, const ResizeTaps& taps) {
  const int group = RowsAtOnce();
  const int64_t column_bytes = 4 * group;
  for (int r = 0; r < group; ++r) {
    // A last, incomplete group repeats a row; its results are not stored.
    const uint8_t* from = job.in + int64_t{3} * job.in_width * std::min(r, job.rows - 1);
    uint8_t* to = job.staged + 4 * r;
    // Four bytes a pixel, of which the fourth belongs to the next; the picture's last has none.
    const int whole =
        from + int64_t{3} * job.in_width + 1 <= job.end ? job.in_width : job.in_width - 1;
    for (int x = 0; x < whole; ++x) std::memcpy(to + x * column_bytes, from + 3 * x, 4);
    for (int x = whole; x < job.in_width; ++x) std::memcpy(to + x * column_bytes, from + 3 * x, 3);
  }
  HWY_ALIGN uint8_t result[HWY_MAX_BYTES];
  for (int x = 0; x < job.out_width; ++x) {
    const int32_t* weights = taps.weights.data() + int64_t{x} * taps.max_taps;
    const uint8_t* column = job.staged + taps.first[x] * column_bytes;
    auto sum = hn::Set(kI32, 1 << (kWeightBits - 1));
    for (int t = 0; t < taps.count[x]; ++t) {
      const auto pixels = hn::PromoteTo(kI32, hn::LoadU(kU8, column + t * column_bytes));
      sum = hn::Add(sum, hn::Mul(pixels, hn::Set(kI32, weights[t])));
    }
    hn::StoreU(hn::DemoteTo(kU8, hn::ShiftRight<kWeightBits>(sum)), kU8, result);
    for (int r = 0; r < job.rows; ++r) {
      std::memcpy(job.out + r * job.out_stride + int64_t{4} * x, result + 4 * r, 4);
    }
  }
}

// out[i] = clamp((2^21 + sum_t weights[t] * in[t * stride + i]) >> 22) for i < stride.
// REQUIRES: stride is a multiple of 64.
void ResizeRowVertically(const uint8_t* in, int64_t stride, const int32_t* weights, int count,
                         uint8_t* out) {
  const int64_t lanes = hn::Lanes(kI32);
  const auto half = hn::Set(kI32, 1 << (kWeightBits - 1));
  for (int64_t i = 0; i < stride; i += 2 * lanes) {
    auto sum0 = half, sum1 = half;
    for (int t = 0; t < count; ++t) {
      const uint8_t* pixels = in + t * stride + i;
      const auto weight = hn::Set(kI32, weights[t]);
      sum0 = hn::Add(sum0, hn::Mul(hn::PromoteTo(kI32, hn::LoadU(kU8, pixels)), weight));
      sum1 = hn::Add(sum1, hn::Mul(hn::PromoteTo(kI32, hn::LoadU(kU8, pixels + lanes)), weight));
    }
    hn::StoreU(hn::DemoteTo(kU8, hn::ShiftRight<kWeightBits>(sum0)), kU8, out + i);
    hn::StoreU(hn::DemoteTo(kU8, hn::ShiftRight<kWeightBits>(sum1)), kU8, out + i + lanes);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sluice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#include <cmath>

#include "runtime/ops/cuda/resize.h"
#include "runtime/parallel.h"
#include "runtime/transfer.h"

namespace sluice {

HWY_EXPORT(RowsAtOnce);
HWY_EXPORT(ResizeRowsHorizontally);
HWY_EXPORT(ResizeRowVertically);

namespace {

// Keys (1981) with a = -0.5, evaluated as Pillow does (the order of operations is part of the
// result).
double Bicubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

}  // namespace

ResizeTaps BicubicTaps(int in_size, int out_size, int first_out, int count_out) {
  const double scale = static_cast<double>(in_size) / out_size;
  const double filter_scale = std::max(scale, 1.0);
  const double support = 2.0 * filter_scale;
  ResizeTaps taps;
  taps.max_taps = std::min(static_cast<int>(std::ceil(support)) * 2 + 1, in_size);
  taps.first.resize(count_out);
  taps.count.resize(count_out);
  taps.weights.resize(static_cast<size_t>(count_out) * taps.max_taps);
  std::vector<double> weights(taps.max_taps);
  for (int i = 0; i < count_out; ++i) {
    const double center = (first_out + i + 0.5) * scale;
    const int first = std::max(static_cast<int>(center - support + 0.5), 0);
    const int last = std::min(static_cast<int>(center + support + 0.5), in_size);
    const int count = last - first;
    double sum = 0;
    for (int t = 0; t < count; ++t) {
      weights[t] = Bicubic((t + first - center + 0.5) * (1.0 / filter_scale));
      sum += weights[t];
    }
    for (int t = 0; t < count; ++t) {
      const double scaled = (sum != 0.0 ? weights[t] / sum : weights[t]) * (1 << kWeightBits);
      taps.weights[static_cast<size_t>(i) * taps.max_taps + t] =
          static_cast<int32_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    }
    taps.first[i] = first;
    taps.count[i] = count;
  }
  return taps;
}

BicubicResizer::BicubicResizer(int in_width, int in_height, int out_width, int out_height,
                               Window window)
    : in_width_(in_width),
      in_height_(in_height),
      out_width_(window.width),
      out_height_(window.height),
      columns_(BicubicTaps(in_width, out_width, window.left, window.width)),
      rows_(BicubicTaps(in_height, out_height, window.top, window.height)) {}

void BicubicResizer::Run(ExecContext& ctx, const uint8_t* rgb, const RowSink& sink) const {
  const int group = HWY_DYNAMIC_DISPATCH(RowsAtOnce)();
  const int64_t stride = (int64_t{4} * out_width_ + 63) / 64 * 64;
  const int64_t staged_bytes = int64_t{4} * group * in_width_;
  const int workers = ctx.num_threads();
  Workspace::Scope scope(ctx.workspace());
  const TensorView narrow = ctx.workspace().Allocate(DType::kU8, {in_height_, stride});
  const TensorView staged = ctx.workspace().Allocate(DType::kU8, {workers, staged_bytes});
  const TensorView finished = ctx.workspace().Allocate(DType::kU8, {workers, stride});

  const uint8_t* end = rgb + int64_t{3} * in_width_ * in_height_;
  const int64_t groups = (in_height_ + group - 1) / group;
  ParallelFor(ctx, workers, 1, [&](int64_t begin_worker, int64_t end_worker) {
    for (int64_t w = begin_worker; w < end_worker; ++w) {
      for (int64_t g = groups * w / workers; g < groups * (w + 1) / workers; ++g) {
        const int64_t row = g * group;
        HWY_DYNAMIC_DISPATCH(ResizeRowsHorizontally)
        ({.in = rgb + 3 * row * in_width_,
          .end = end,
          .rows = static_cast<int>(std::min<int64_t>(group, in_height_ - row)),
          .in_width = in_width_,
          .out_width = out_width_,
          .staged = staged.data<uint8_t>() + w * staged_bytes,
          .out = narrow.data<uint8_t>() + row * stride,
          .out_stride = stride},
         columns_);
      }
    }
  });
  ParallelFor(ctx, workers, 1, [&](int64_t begin_worker, int64_t end_worker) {
    for (int64_t w = begin_worker; w < end_worker; ++w) {
      uint8_t* row = finished.data<uint8_t>() + w * stride;
      for (int64_t y = out_height_ * w / workers; y < out_height_ * (w + 1) / workers; ++y) {
        HWY_DYNAMIC_DISPATCH(ResizeRowVertically)
        (narrow.data<uint8_t>() + rows_.first[y] * stride, stride,
         rows_.weights.data() + y * rows_.max_taps, rows_.count[y], row);
        sink(static_cast<int>(y), row);
      }
    }
  });
}

void BicubicResizer::RunOnGpu(ExecContext& ctx, std::span<const uint8_t* const> pictures,
                              const std::array<float, 3>& mean,
                              const std::array<float, 3>& deviation, TensorView out) const {
  OnGpu("resize", ctx, {out});
  // A batch of large pictures goes in parts that the scratch holds.
  constexpr int64_t kMostBytes = int64_t{64} << 20;
  const int64_t picture_bytes = int64_t{3} * in_width_ * in_height_;
  const auto count = static_cast<int64_t>(pictures.size());
  const int64_t at_once = std::clamp<int64_t>(kMostBytes / picture_bytes, 1, count);

  cuda::ResizeArgs args;
  args.in_width = in_width_;
  args.in_height = in_height_;
  args.out_width = out_width_;
  args.out_height = out_height_;
  args.top = rows_.first.front();
  args.used_height = rows_.first.back() + rows_.count.back() - args.top;
  std::copy(mean.begin(), mean.end(), args.mean);
  std::copy(deviation.begin(), deviation.end(), args.deviation);

  std::vector<int32_t> numbers;
  for (const ResizeTaps* taps : {&columns_, &rows_}) {
    for (const auto* list : {&taps->first, &taps->count, &taps->weights}) {
      numbers.insert(numbers.end(), list->begin(), list->end());
    }
  }
  const Workspace::Scope scope(ctx.workspace());
  const auto scratch = [&](DType dtype, int64_t size) {
    return ctx.workspace().Allocate(dtype, {size}).raw();
  };
  auto* const there = static_cast<int32_t*>(scratch(DType::kI32, numbers.size()));
  auto* const rgb = static_cast<uint8_t*>(scratch(DType::kU8, at_once * picture_bytes));
  args.rgb = rgb;
  args.narrow = static_cast<uint8_t*>(
      scratch(DType::kU8, at_once * int64_t{4} * args.used_height * out_width_));
  const auto place = [](const ResizeTaps& taps, const int32_t* begin) {
    const size_t size = taps.first.size();
    return cuda::AxisTaps{taps.max_taps, begin, begin + size, begin + 2 * size};
  };
  args.columns = place(columns_, there);
  args.rows = place(rows_, there + 2 * columns_.first.size() + columns_.weights.size());
  ctx.Queue([&](cuda::Stream stream) {
    cuda::Send(there, numbers.data(), numbers.size() * sizeof(int32_t), stream);
    for (int64_t begin = 0; begin < count; begin += at_once) {
      args.frames = static_cast<int>(std::min(at_once, count - begin));
      for (int i = 0; i < args.frames; ++i) {
        cuda::Send(rgb + i * picture_bytes, pictures[begin + i], picture_bytes, stream);
      }
      args.out = static_cast<float*>(out.Slice(begin, begin + args.frames).raw());
      cuda::ResizeAndNormalise(args, stream);
    }
  });
}

}  // namespace sluice

#endif  // HWY_ONCE
