// A thread takes an element: a warp reads and writes 64 to 128 bytes in a row. Bound by memory.
#include "runtime/ops/cuda/launch.cuh"
#include "runtime/ops/cuda/rows.h"

namespace sluice::cuda {
namespace {

struct Places {
  const int32_t* indices;
  int64_t per_group, length;  // indices and rows of a group
  __device__ int64_t operator[](int64_t i) const {
    return indices ? i / per_group * length + indices[i] : i;
  }
};

Places PlacesOf(const RowList& list, int64_t rows) {
  return {list.indices, std::max<int64_t>(list.count / list.groups, 1), rows / list.groups};
}

template <bool kGather, typename T>
__global__ void MoveKernel(const T* x, int64_t x_stride, Places places, int64_t rows, int64_t width,
                           T* y, int64_t y_stride) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; at < rows * width; at += step) {
    const int64_t i = at / width, column = at % width, place = places[i];
    const int64_t from = kGather ? place : i, to = kGather ? i : place;
    y[to * y_stride + column] = x[from * x_stride + column];
  }
}

template <bool kGather>
void Move(ConstTensorView x, const RowList& list, int64_t all, TensorView y, Stream stream) {
  const int64_t width = x.dim(1);
  if (list.count * width == 0) return;
  WithType(x.dtype(), [&](auto element) {
    using T = decltype(element);
    MoveKernel<kGather><<<BlocksFor(list.count * width), kThreads, 0, stream>>>(
        static_cast<const T*>(x.raw()), x.stride0(), PlacesOf(list, all), list.count, width,
        static_cast<T*>(y.raw()), y.stride0());
  });
  CheckLaunch("move rows");
}

template <typename B, typename Y>
__global__ void AddKernel(const float* a, int64_t a_stride, float sign, const B* b,
                          int64_t b_stride, Y* y, int64_t y_stride, Places places, Listed listed,
                          int64_t rows, int64_t width) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; at < rows * width; at += step) {
    const int64_t i = at / width, column = at % width, place = places[i];
    const auto row = [&](bool whole) { return whole ? place : i; };
    const float sum =
        a[row(listed.a) * a_stride + column] + sign * ToFloat(b[row(listed.b) * b_stride + column]);
    y[row(listed.y) * y_stride + column] = FromFloat<Y>(sum);
  }
}

template <typename X, typename Y>
__global__ void ConvertKernel(const X* x, int64_t x_stride, const int32_t* ids, Y* y,
                              int64_t y_stride, int64_t rows, int64_t width) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; at < rows * width; at += step) {
    const int64_t i = at / width, column = at % width, from = ids ? ids[i] : i;
    y[i * y_stride + column] = FromFloat<Y>(ToFloat(x[from * x_stride + column]));
  }
}

void ConvertListed(ConstTensorView x, const int32_t* ids, TensorView y, Stream stream) {
  const int64_t rows = y.dim(0), width = y.dim(1);
  if (rows * width == 0) return;
  WithType(x.dtype(), [&](auto in) {
    WithType(y.dtype(), [&](auto out) {
      using X = decltype(in);
      using Y = decltype(out);
      ConvertKernel<<<BlocksFor(rows * width), kThreads, 0, stream>>>(
          static_cast<const X*>(x.raw()), x.stride0(), ids, static_cast<Y*>(y.raw()), y.stride0(),
          rows, width);
    });
  });
  CheckLaunch("convert rows");
}

}  // namespace

void Convert(ConstTensorView x, TensorView y, Stream stream) {
  ConvertListed(x, nullptr, y, stream);
}

void EmbedRows(ConstTensorView table, const int32_t* ids, TensorView y, Stream stream) {
  ConvertListed(table, ids, y, stream);
}

void GatherRows(ConstTensorView x, const RowList& list, TensorView y, Stream stream) {
  Move<true>(x, list, x.dim(0), y, stream);
}

void ScatterRows(ConstTensorView x, const RowList& list, TensorView y, Stream stream) {
  Move<false>(x, list, y.dim(0), y, stream);
}

void AddRows(ConstTensorView a, float sign, ConstTensorView b, TensorView y, const RowList& list,
             Listed listed, Stream stream) {
  const int64_t rows = list.indices ? list.count : y.dim(0), width = y.dim(1);
  if (rows * width == 0) return;
  const int64_t all = listed.a ? a.dim(0) : listed.b ? b.dim(0) : y.dim(0);
  WithType(b.dtype(), [&](auto second) {
    WithType(y.dtype(), [&](auto out) {
      using B = decltype(second);
      using Y = decltype(out);
      AddKernel<<<BlocksFor(rows * width), kThreads, 0, stream>>>(
          static_cast<const float*>(a.raw()), a.stride0(), sign, static_cast<const B*>(b.raw()),
          b.stride0(), static_cast<Y*>(y.raw()), y.stride0(), PlacesOf(list, all), listed, rows,
          width);
    });
  });
  CheckLaunch("add rows");
}

}  // namespace sluice::cuda
