// Pillow's antialiased bicubic resize for one pair of sizes. Private to preprocessing.
#ifndef SLUICE_VISION_RESIZE_H_
#define SLUICE_VISION_RESIZE_H_

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "runtime/exec_context.h"
#include "runtime/tensor.h"

namespace sluice {

// The filter of one axis in Pillow's fixed point: output i is
//   clamp((2^21 + sum_t weights[i * max_taps + t] * in[first[i] + t]) >> 22, 0, 255), t < count[i].
// Weights of one output sum to 2^22 up to rounding, their absolute values to less than 1.3 * 2^22,
// so 32 bits hold every partial sum.
struct ResizeTaps {
  int max_taps = 0;
  std::vector<int32_t> first, count, weights;
};
// Of the outputs [first, first + count) of `out_size`.
ResizeTaps BicubicTaps(int in_size, int out_size, int first, int count);

// Holds the taps of one pair of sizes, so that the frames of a stream share them. Immutable; safe
// for many threads.
class BicubicResizer {
 public:
  // The part of the resized picture that is computed.
  struct Window {
    int left, top, width, height;
  };
  // REQUIRES: all sizes >= 1, the window lies inside of [out_height, out_width].
  BicubicResizer(int in_width, int in_height, int out_width, int out_height, Window window);
  BicubicResizer(int in_width, int in_height, int out_width, int out_height)
      : BicubicResizer(in_width, in_height, out_width, out_height, {0, 0, out_width, out_height}) {}

  // Receives finished rows of the window, in no order, from several threads at once; y counts from
  // its top. rgbx: 4 bytes a pixel, the fourth without meaning. Must not throw.
  using RowSink = std::function<void(int y, const uint8_t* rgbx)>;
  // rgb: [in_height, in_width, 3].
  void Run(ExecContext& ctx, const uint8_t* rgb, const RowSink& sink) const;

  // On a GPU: the pictures, [in_height, in_width, 3] each in host memory, resized bit for bit as by
  // Run, then (u8 - mean) / deviation by channel, rounded as on the CPU. out: [pictures, 3, height
  // and width of the window] f32. The pictures may be changed once this returns.
  void RunOnGpu(ExecContext& ctx, std::span<const uint8_t* const> pictures,
                const std::array<float, 3>& mean, const std::array<float, 3>& deviation,
                TensorView out) const;

  bool Fits(int in_width, int in_height) const {
    return in_width == in_width_ && in_height == in_height_;
  }

 private:
  int in_width_, in_height_, out_width_, out_height_;  // out: of the window
  ResizeTaps columns_, rows_;
};

}  // namespace sluice

#endif  // SLUICE_VISION_RESIZE_H_
