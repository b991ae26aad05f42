// From decoded pictures to what a vision tower reads. Equal to Pillow bit for bit (the Hugging Face
// video processor, which resizes with torchvision, differs by one level in less than 1 % of
// values).
#ifndef SLUICE_VISION_PREPROCESS_H_
#define SLUICE_VISION_PREPROCESS_H_

#include <array>
#include <cstdint>
#include <span>

#include "runtime/exec_context.h"
#include "runtime/tensor.h"
#include "vision/frame.h"

namespace sluice {

// Longer sides are refused: with this, what resizing a picture costs is bounded whatever its shape.
constexpr int kMaxPictureSide = 1 << 14;

// How a picture fills the tower's input.
enum class PictureFit {
  kStretch,     // resized to it; the aspect ratio is not kept
  kCenterCrop,  // resized until its shorter side fills it, then the centre is cut out
};

struct PreprocessConfig {
  int width = 384;  // pixels of the tower's input
  int height = 384;
  PictureFit fit = PictureFit::kStretch;           // kCenterCrop needs width == height
  std::array<float, 3> mean = {0.5f, 0.5f, 0.5f};  // of values in 0..1
  std::array<float, 3> std = {0.5f, 0.5f, 0.5f};
};

// Pillow's antialiased bicubic resize (Keys a = -0.5) of interleaved 8-bit RGB: horizontal pass,
// round and clamp, vertical pass, round and clamp, in Pillow's fixed point. (Pillow 13 turns the
// passes round for tall pictures; earlier releases and the Hugging Face processor do not.) `out` is
// [out_height, out_width, 3]. Throws InputError on sizes < 1 or when `in` is not in_width *
// in_height * 3 bytes.
void ResizeBicubic(ExecContext& ctx, std::span<const uint8_t> in, int in_width, int in_height,
                   std::span<uint8_t> out, int out_width, int out_height);

// Resizes and normalises: (u8 - 255 mean) / (255 std) in f32. With kCenterCrop the longer side
// becomes floor(width * longer / shorter), of which floor(half the surplus) is cut off in front.
// out: [frames.size(), 3, height, width] f32 where `ctx` works; on a GPU the decoded pictures are
// copied there, and the result is the same bit for bit.
void Preprocess(ExecContext& ctx, std::span<const FramePtr> frames, const PreprocessConfig& config,
                TensorView out);

// The first half of Preprocess, in host memory: `frame` with its picture in the size of the tower's
// input, of which Preprocess makes the same values bit for bit. Throws InputError as it does.
Frame ResizeForTower(ExecContext& ctx, const Frame& frame, const PreprocessConfig& config);

}  // namespace sluice

#endif  // SLUICE_VISION_PREPROCESS_H_
