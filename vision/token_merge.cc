#include "vision/token_merge.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace sluice {

void MergeRows(ConstTensorView x, std::span<const float> sizes, std::span<const int32_t> places,
               TensorView merged, std::span<float> merged_sizes) {
  const int64_t width = x.dim(1);
  const auto row_of = [](auto view, int64_t row) {
    return view.template data<float>() + row * view.stride0();
  };
  std::vector<int32_t> members(merged_sizes.size());
  std::fill(merged_sizes.begin(), merged_sizes.end(), 0.0f);
  for (size_t i = 0; i < places.size(); ++i) {
    ++members[places[i]];
    merged_sizes[places[i]] += sizes[i];
  }
  // Sums of the places with several members, one behind another.
  std::vector<int32_t> slots(members.size(), -1);
  std::vector<double> sums;
  for (size_t i = 0; i < places.size(); ++i) {
    const int32_t place = places[i];
    const float* from = row_of(x, i);
    if (members[place] == 1) {
      std::memcpy(row_of(merged, place), from, width * sizeof(float));
      continue;
    }
    if (slots[place] < 0) {
      slots[place] = static_cast<int32_t>(sums.size() / width);
      sums.resize(sums.size() + width);
    }
    double* sum = sums.data() + slots[place] * width;
    for (int64_t d = 0; d < width; ++d) sum[d] += double{sizes[i]} * from[d];
  }
  for (size_t place = 0; place < slots.size(); ++place) {
    if (slots[place] < 0) continue;
    const double* sum = sums.data() + slots[place] * width;
    float* to = row_of(merged, place);
    const double share = 1.0 / merged_sizes[place];
    for (int64_t d = 0; d < width; ++d) to[d] = static_cast<float>(sum[d] * share);
  }
}

}  // namespace sluice
