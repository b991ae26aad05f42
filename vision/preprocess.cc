#include "vision/preprocess.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "runtime/transfer.h"
#include "vision/resize.h"

namespace sluice {
namespace {

constexpr int kMaxCropSide = 2000;
static_assert(int64_t{kMaxCropSide} * kMaxPictureSide < int64_t{1} << 31);

void CheckPicture(const char* place, size_t bytes, int width, int height) {
  if (width < 1 || height < 1 || width > kMaxPictureSide || height > kMaxPictureSide) {
    throw InputError(std::string("[") + place + "] picture sizes must be 1.." +
                     std::to_string(kMaxPictureSide) + ", got " + std::to_string(width) + "x" +
                     std::to_string(height));
  }
  const int64_t expected = int64_t{3} * width * height;
  if (static_cast<int64_t>(bytes) != expected) {
    throw InputError(std::string("[") + place + "] a picture of " + std::to_string(width) + "x" +
                     std::to_string(height) + " has " + std::to_string(expected) +
                     " bytes of RGB, got " + std::to_string(bytes));
  }
}

void CheckConfig(const PreprocessConfig& config) {
  // Larger inputs would make the resized picture's longer side exceed 31 bits.
  if (config.fit == PictureFit::kCenterCrop &&
      (config.width != config.height || config.width > kMaxCropSide)) {
    throw Error("[preprocess] a centre crop must be square with sides of at most " +
                std::to_string(kMaxCropSide) + ", got " + std::to_string(config.width) + "x" +
                std::to_string(config.height));
  }
}

BicubicResizer MakeResizer(const Frame& frame, const PreprocessConfig& config) {
  if (config.fit == PictureFit::kStretch) {
    return BicubicResizer(frame.width, frame.height, config.width, config.height);
  }
  const int64_t side = config.width, shorter = std::min(frame.width, frame.height);
  const auto width = static_cast<int>(side * frame.width / shorter);
  const auto height = static_cast<int>(side * frame.height / shorter);
  return BicubicResizer(frame.width, frame.height, width, height,
                        {.left = (width - config.width) / 2,
                         .top = (height - config.height) / 2,
                         .width = config.width,
                         .height = config.height});
}

// Frames of the same size go together.
void PreprocessOnGpu(ExecContext& ctx, std::span<const FramePtr> frames,
                     const PreprocessConfig& config, const std::array<float, 3>& mean,
                     const std::array<float, 3>& deviation, TensorView out) {
  for (size_t begin = 0, end = 0; begin < frames.size(); begin = end) {
    const BicubicResizer resizer = MakeResizer(*frames[begin], config);
    std::vector<const uint8_t*> pictures;
    for (; end < frames.size() && resizer.Fits(frames[end]->width, frames[end]->height); ++end) {
      pictures.push_back(frames[end]->rgb.data());
    }
    resizer.RunOnGpu(ctx, pictures, mean, deviation, out.Slice(begin, end));
  }
}

// rgb: [height, width of the resizer's window, 3].
void ResizeInto(ExecContext& ctx, const BicubicResizer& resizer, const uint8_t* in, int width,
                uint8_t* rgb) {
  resizer.Run(ctx, in, [&](int y, const uint8_t* rgbx) {
    uint8_t* row = rgb + int64_t{3} * width * y;
    for (int x = 0; x < width; ++x) std::memcpy(row + 3 * x, rgbx + 4 * x, 3);
  });
}

}  // namespace

void ResizeBicubic(ExecContext& ctx, std::span<const uint8_t> in, int in_width, int in_height,
                   std::span<uint8_t> out, int out_width, int out_height) {
  CheckPicture("resize", in.size(), in_width, in_height);
  CheckPicture("resize", out.size(), out_width, out_height);
  const BicubicResizer resizer(in_width, in_height, out_width, out_height);
  ResizeInto(ctx, resizer, in.data(), out_width, out.data());
}

Frame ResizeForTower(ExecContext& ctx, const Frame& frame, const PreprocessConfig& config) {
  CheckConfig(config);
  CheckPicture("preprocess", frame.rgb.size(), frame.width, frame.height);
  Frame resized;
  resized.width = config.width;
  resized.height = config.height;
  resized.time = frame.time;
  resized.index = frame.index;
  resized.thumbnail = frame.thumbnail;
  resized.rgb.resize(size_t{3} * config.width * config.height);
  ResizeInto(ctx.host(), MakeResizer(frame, config), frame.rgb.data(), config.width,
             resized.rgb.data());
  return resized;
}

void Preprocess(ExecContext& ctx, std::span<const FramePtr> frames, const PreprocessConfig& config,
                TensorView out) {
  const int64_t width = config.width, height = config.height;
  const Shape expected{static_cast<int64_t>(frames.size()), 3, height, width};
  if (out.shape() != expected || out.dtype() != DType::kF32 || !out.contiguous()) {
    throw Error("[preprocess] out must be contiguous " + expected.ToString() + " f32, got " +
                out.shape().ToString() + " " + Name(out.dtype()));
  }
  CheckConfig(config);
  std::array<float, 3> mean, deviation;
  for (int c = 0; c < 3; ++c) {
    mean[c] = config.mean[c] * 255.0f;
    deviation[c] = config.std[c] * 255.0f;
    if (!(deviation[c] > 0)) throw InputError("[preprocess] std must be positive");
  }
  for (const FramePtr& frame : frames) {
    CheckPicture("preprocess", frame->rgb.size(), frame->width, frame->height);
  }
  if (OnGpu("preprocess", ctx, {out}))
    return PreprocessOnGpu(ctx, frames, config, mean, deviation, out);
  float normalised[3][256];
  for (int c = 0; c < 3; ++c) {
    for (int v = 0; v < 256; ++v) {
      normalised[c][v] = (static_cast<float>(v) - mean[c]) / deviation[c];
    }
  }
  std::optional<BicubicResizer> resizer;
  for (size_t f = 0; f < frames.size(); ++f) {
    const Frame& frame = *frames[f];
    float* planes = out.data<float>() + f * 3 * height * width;
    if (frame.width == width && frame.height == height) {  // every weight would be 0 or 1
      for (int64_t i = 0; i < height * width; ++i) {
        for (int c = 0; c < 3; ++c) {
          planes[c * height * width + i] = normalised[c][frame.rgb[3 * i + c]];
        }
      }
      continue;
    }
    if (!resizer || !resizer->Fits(frame.width, frame.height)) {
      resizer.emplace(MakeResizer(frame, config));
    }
    resizer->Run(ctx, frame.rgb.data(), [&](int y, const uint8_t* rgbx) {
      for (int c = 0; c < 3; ++c) {
        float* row = planes + (c * height + y) * width;
        for (int64_t x = 0; x < width; ++x) row[x] = normalised[c][rgbx[4 * x + c]];
      }
    });
  }
}

}  // namespace sluice
