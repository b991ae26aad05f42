// A block takes a row, a thread every blockDim-th piece of it: of 16 bytes of the wider matrix
// where all rows begin at multiples of a piece, else an element. Which row of which matrix it is,
// the block finds once. Bound by memory; reads what is asked for once and writes it once.
#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "runtime/ops/cuda/launch.cuh"
#include "runtime/ops/cuda/rows.h"

namespace sluice::cuda {
namespace {

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Piece {
  T v[kCount];
};

// How many elements of the wider dtype of these matrices 16 bytes hold, where all their rows
// consist of whole aligned pieces of so many; else 1.
int64_t PieceOf(std::initializer_list<ConstTensorView> matrices,
                std::span<const ConstTensorView> more = {}) {
  size_t widest = 2;
  for (const ConstTensorView& x : matrices) widest = std::max(widest, SizeOf(x.dtype()));
  const auto count = static_cast<int64_t>(16 / widest);
  const auto fits = [&](const ConstTensorView& x) {
    return x.dim(1) % count == 0 && x.stride0() % count == 0 &&
           reinterpret_cast<uintptr_t>(x.raw()) % (count * SizeOf(x.dtype())) == 0;
  };
  return std::all_of(matrices.begin(), matrices.end(), fits) &&
                 std::all_of(more.begin(), more.end(), fits)
             ? count
             : 1;
}

// Threads of a block for a row of so many pieces: at most 256, with as many pieces each.
int ThreadsFor(int64_t pieces) {
  const int64_t rounds = std::max<int64_t>((pieces + 255) / 256, 1);
  return static_cast<int>(std::max<int64_t>((pieces + rounds * 32 - 1) / (rounds * 32) * 32, 32));
}

template <typename T>
struct Matrix {
  T* data;
  int64_t stride;
  template <int kCount>
  __device__ auto* Row(int64_t row) const {
    using To = Piece<std::remove_const_t<T>, kCount>;
    using Part = std::conditional_t<std::is_const_v<T>, const To, To>;
    return reinterpret_cast<Part*>(data + row * stride);
  }
};

template <typename T>
Matrix<T> MatrixOf(TensorView x) {
  return {static_cast<T*>(x.raw()), x.stride0()};
}
template <typename T>
Matrix<const T> MatrixOf(ConstTensorView x) {
  return {static_cast<const T*>(x.raw()), x.stride0()};
}

// Matrices that lie apart, so many a launch.
constexpr int64_t kMostGroups = 16;
template <typename T>
struct Groups {
  Matrix<const T> of[kMostGroups];
};
template <typename T>
Groups<T> GroupsOf(std::span<const ConstTensorView> matrices, int64_t begin, int64_t count) {
  Groups<T> groups = {};
  for (int64_t g = 0; g < count; ++g) groups.of[g] = MatrixOf<T>(matrices[begin + g]);
  return groups;
}

// RowLists on the device.
struct Lists {
  const int32_t* rows;
  int64_t stride, ahead, each;
  __device__ int64_t Row(int64_t group, int64_t i) const {
    return i < ahead ? i : ahead + rows[group * stride + i - ahead];
  }
};

Lists ListsOf(const RowLists& lists, int64_t begin = 0) {
  return {static_cast<const int32_t*>(lists.rows.raw()) + begin * lists.rows.stride0(),
          lists.rows.stride0(), lists.ahead, lists.each()};
}

// Calls run(first group, how many) for groups that one launch takes.
template <typename Run>
void ForGroups(int64_t groups, const Run& run) {
  for (int64_t g = 0; g < groups; g += kMostGroups) run(g, std::min(kMostGroups, groups - g));
}

// Calls use(integral_constant<int, count>()) with a count from PieceOf.
template <typename Use>
void WithPiece(int64_t count, const Use& use) {
  count == 8   ? use(std::integral_constant<int, 8>())
  : count == 4 ? use(std::integral_constant<int, 4>())
               : use(std::integral_constant<int, 1>());
}

template <int kCount, typename X, typename Y>
__device__ void ConvertRow(const Piece<X, kCount>* x, Piece<Y, kCount>* y, int pieces) {
  for (int at = threadIdx.x; at < pieces; at += blockDim.x) {
    if constexpr (std::is_same_v<X, Y>) {
      y[at] = x[at];
    } else {
      const Piece<X, kCount> from = x[at];
      Piece<Y, kCount> to;
#pragma unroll
      for (int i = 0; i < kCount; ++i) to.v[i] = FromFloat<Y>(ToFloat(from.v[i]));
      y[at] = to;
    }
  }
}

// y[i] = x[ids[i]], or x[i] without ids.
template <int kCount, typename X, typename Y>
__global__ void ConvertKernel(Matrix<const X> x, const int32_t* ids, Matrix<Y> y, int pieces) {
  const int64_t row = blockIdx.x;
  ConvertRow(x.template Row<kCount>(ids ? ids[row] : row), y.template Row<kCount>(row), pieces);
}

void ConvertListed(ConstTensorView x, const int32_t* ids, TensorView y, Stream stream) {
  const int64_t rows = y.dim(0), width = y.dim(1);
  if (rows * width == 0) return;
  WithType(x.dtype(), [&](auto in) {
    WithType(y.dtype(), [&](auto out) {
      WithPiece(PieceOf({x, y}), [&](auto count) {
        const auto pieces = static_cast<int>(width / count());
        ConvertKernel<count()><<<static_cast<unsigned>(rows), ThreadsFor(pieces), 0, stream>>>(
            MatrixOf<decltype(in)>(x), ids, MatrixOf<decltype(out)>(y), pieces);
      });
    });
  });
  CheckLaunch("convert rows");
}

template <int kCount, typename T>
__global__ void GatherKernel(Matrix<const T> x, Lists lists, int64_t length, Matrix<T> y,
                             int pieces) {
  const int64_t to = blockIdx.x, group = to / lists.each;
  const int64_t from = group * length + lists.Row(group, to % lists.each);
  ConvertRow(x.template Row<kCount>(from), y.template Row<kCount>(to), pieces);
}

// blockIdx: the row of a group, and the group. The threads look for the row in the group's list
// together: one wait, where a search by halves waits for one number after another.
template <int kCount, typename T>
__global__ void OverlayKernel(Groups<T> rest, Matrix<const T> x, Lists lists, Matrix<T> y,
                              int pieces) {
  const int64_t row = blockIdx.x, group = blockIdx.y;
  __shared__ int place;
  if (threadIdx.x == 0) place = -1;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < lists.each; i += blockDim.x) {
    if (lists.Row(group, i) == row) place = static_cast<int>(i);  // at most one thread
  }
  __syncthreads();
  const auto* from = place < 0 ? rest.of[group].template Row<kCount>(row)
                               : x.template Row<kCount>(group * lists.each + place);
  ConvertRow(from, y.template Row<kCount>(group * gridDim.x + row), pieces);
}

template <int kCount, typename A, typename B, typename Y>
__device__ void AddRow(const Piece<A, kCount>* a, float sign, const Piece<B, kCount>* b,
                       Piece<Y, kCount>* y, int pieces) {
  for (int at = threadIdx.x; at < pieces; at += blockDim.x) {
    const Piece<A, kCount> first = a[at];
    const Piece<B, kCount> second = b[at];
    Piece<Y, kCount> sum;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      sum.v[i] = FromFloat<Y>(ToFloat(first.v[i]) + sign * ToFloat(second.v[i]));
    }
    y[at] = sum;
  }
}

template <int kCount, typename B, typename Y>
__global__ void AddKernel(Matrix<const float> a, float sign, Matrix<const B> b, Matrix<Y> y,
                          int pieces) {
  const int64_t row = blockIdx.x;
  AddRow(a.template Row<kCount>(row), sign, b.template Row<kCount>(row),
         y.template Row<kCount>(row), pieces);
}

// blockIdx: the listed row of a group, and the group.
template <int kCount>
__global__ void SubtractListedKernel(Matrix<const float> a, Groups<float> b, Lists lists,
                                     int64_t length, Matrix<float> y, int pieces) {
  const int64_t group = blockIdx.y, row = lists.Row(group, blockIdx.x);
  AddRow(a.Row<kCount>(group * lists.each + blockIdx.x), -1.f, b.of[group].Row<kCount>(row),
         y.Row<kCount>(group * length + row), pieces);
}

template <int kCount>
__global__ void AddListedKernel(Groups<float> a, Matrix<const float> b, Lists lists, int64_t length,
                                Matrix<float> y, int pieces) {
  const int64_t group = blockIdx.y, row = lists.Row(group, blockIdx.x);
  AddRow(a.of[group].Row<kCount>(row), 1.f, b.Row<kCount>(group * length + row),
         y.Row<kCount>(group * lists.each + blockIdx.x), pieces);
}

dim3 Grid(int64_t rows, int64_t groups) {
  return dim3(static_cast<unsigned>(rows), static_cast<unsigned>(groups));
}

}  // namespace

void Convert(ConstTensorView x, TensorView y, Stream stream) {
  ConvertListed(x, nullptr, y, stream);
}

void CopyMatrix(ConstTensorView x, TensorView y, Stream stream) {
  // The kernel takes a block a row: for a few long ones the driver's copy is faster.
  constexpr int64_t kFewRows = 64, kLong = int64_t{1} << 14;
  const size_t element = SizeOf(x.dtype()), row = x.dim(1) * element;
  if (x.dim(0) < kFewRows && x.dim(1) >= kLong) {
    return CopyRows(y.raw(), y.stride0() * element, x.raw(), x.stride0() * element, row, x.dim(0),
                    stream);
  }
  ConvertListed(x, nullptr, y, stream);
}

void EmbedRows(ConstTensorView table, const int32_t* ids, TensorView y, Stream stream) {
  ConvertListed(table, ids, y, stream);
}

void ZeroRows(TensorView y, Stream stream) {
  const size_t element = SizeOf(y.dtype());
  const cudaError_t error =
      cudaMemset2DAsync(y.raw(), y.stride0() * element, 0, y.dim(1) * element, y.dim(0), stream);
  if (error != cudaSuccess) {
    throw Error(std::string("[cuda zero rows] failed: ") + cudaGetErrorString(error));
  }
}

void GatherRows(ConstTensorView x, const RowLists& lists, TensorView y, Stream stream) {
  const int64_t width = x.dim(1);
  if (y.dim(0) * width == 0) return;
  WithType(x.dtype(), [&](auto element) {
    using T = decltype(element);
    WithPiece(PieceOf({x, y}), [&](auto count) {
      const auto pieces = static_cast<int>(width / count());
      GatherKernel<count()><<<static_cast<unsigned>(y.dim(0)), ThreadsFor(pieces), 0, stream>>>(
          MatrixOf<T>(x), ListsOf(lists), x.dim(0) / lists.groups(), MatrixOf<T>(y), pieces);
    });
  });
  CheckLaunch("gather rows");
}

void OverlayRows(std::span<const ConstTensorView> rest, ConstTensorView x, const RowLists& lists,
                 TensorView y, Stream stream) {
  const int64_t width = y.dim(1), each = lists.each();
  if (y.dim(0) * width == 0) return;
  const int64_t length = y.dim(0) / lists.groups();
  WithType(y.dtype(), [&](auto element) {
    using T = decltype(element);
    WithPiece(PieceOf({x, y}, rest), [&](auto count) {
      const auto pieces = static_cast<int>(width / count());
      ForGroups(lists.groups(), [&](int64_t g, int64_t some) {
        OverlayKernel<count()><<<Grid(length, some), ThreadsFor(pieces), 0, stream>>>(
            GroupsOf<T>(rest, g, some), MatrixOf<T>(x.Slice(g * each, (g + some) * each)),
            ListsOf(lists, g), MatrixOf<T>(y.Slice(g * length, (g + some) * length)), pieces);
      });
    });
  });
  CheckLaunch("overlay rows");
}

void AddRows(ConstTensorView a, float sign, ConstTensorView b, TensorView y, Stream stream) {
  const int64_t rows = y.dim(0), width = y.dim(1);
  if (rows * width == 0) return;
  WithType(b.dtype(), [&](auto second) {
    WithType(y.dtype(), [&](auto out) {
      WithPiece(PieceOf({a, b, y}), [&](auto count) {
        const auto pieces = static_cast<int>(width / count());
        AddKernel<count()><<<static_cast<unsigned>(rows), ThreadsFor(pieces), 0, stream>>>(
            MatrixOf<float>(a), sign, MatrixOf<decltype(second)>(b), MatrixOf<decltype(out)>(y),
            pieces);
      });
    });
  });
  CheckLaunch("add rows");
}

void SubtractListed(ConstTensorView a, std::span<const ConstTensorView> b, const RowLists& lists,
                    TensorView y, Stream stream) {
  const int64_t width = y.dim(1), each = lists.each();
  if (a.dim(0) * width == 0) return;
  const int64_t length = y.dim(0) / lists.groups();
  WithPiece(PieceOf({a, y}, b), [&](auto count) {
    const auto pieces = static_cast<int>(width / count());
    ForGroups(lists.groups(), [&](int64_t g, int64_t some) {
      SubtractListedKernel<count()><<<Grid(each, some), ThreadsFor(pieces), 0, stream>>>(
          MatrixOf<float>(a.Slice(g * each, (g + some) * each)), GroupsOf<float>(b, g, some),
          ListsOf(lists, g), length, MatrixOf<float>(y.Slice(g * length, (g + some) * length)),
          pieces);
    });
  });
  CheckLaunch("subtract listed rows");
}

void AddListed(std::span<const ConstTensorView> a, ConstTensorView b, const RowLists& lists,
               TensorView y, Stream stream) {
  const int64_t width = y.dim(1), each = lists.each();
  if (y.dim(0) * width == 0) return;
  const int64_t length = b.dim(0) / lists.groups();
  WithPiece(PieceOf({b, y}, a), [&](auto count) {
    const auto pieces = static_cast<int>(width / count());
    ForGroups(lists.groups(), [&](int64_t g, int64_t some) {
      AddListedKernel<count()><<<Grid(each, some), ThreadsFor(pieces), 0, stream>>>(
          GroupsOf<float>(a, g, some), MatrixOf<float>(b.Slice(g * length, (g + some) * length)),
          ListsOf(lists, g), length, MatrixOf<float>(y.Slice(g * each, (g + some) * each)), pieces);
    });
  });
  CheckLaunch("add listed rows");
}

}  // namespace sluice::cuda
