#include "vision/preprocess.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "runtime/transfer.h"
#include "tests/support/gpu_testing.h"
#include "vision/resize.h"

namespace sluice {
namespace {

struct Size {
  int width, height;
};

std::vector<uint8_t> RandomPicture(Size size, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<uint8_t> rgb(size_t{3} * size.width * size.height);
  for (uint8_t& v : rgb) v = random() >> 24;
  return rgb;
}

// The picture that make_resize_golden.py computes.
std::vector<uint8_t> GoldenPicture(Size size) {
  std::vector<uint8_t> rgb(size_t{3} * size.width * size.height);
  for (uint32_t i = 0; i < rgb.size(); ++i) {
    uint32_t h = i * 2654435761u;
    h = (h ^ (h >> 15)) * 2246822519u;
    const uint32_t run = i / 97 % 4;
    rgb[i] = run == 0 ? 0 : run == 1 ? 255 : h >> 24;
  }
  return rgb;
}

std::string Fnv1a(const std::vector<uint8_t>& data) {
  uint64_t h = 0xcbf29ce484222325u;
  for (uint8_t byte : data) h = (h ^ byte) * 0x100000001b3u;
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(h));
  return text;
}

// One axis of the specification, in 64-bit integers and without regard to speed: `count` lines of
// `in_size` values become lines of `out_size`; `step` apart inside a line, lines at `Line(n)`.
std::vector<uint8_t> ReferenceAxis(const std::vector<uint8_t>& in, Size size, bool horizontal,
                                   int out_size) {
  const int in_size = horizontal ? size.width : size.height;
  const Size out_dims = horizontal ? Size{out_size, size.height} : Size{size.width, out_size};
  std::vector<uint8_t> out(size_t{3} * out_dims.width * out_dims.height);
  const double scale = static_cast<double>(in_size) / out_size;
  const double filter_scale = std::max(scale, 1.0), support = 2 * filter_scale;
  for (int y = 0; y < out_dims.height; ++y) {
    for (int x = 0; x < out_dims.width; ++x) {
      const double center = ((horizontal ? x : y) + 0.5) * scale;
      const int begin = std::max(static_cast<int>(center - support + 0.5), 0);
      const int end = std::min(static_cast<int>(center + support + 0.5), in_size);
      std::vector<double> weights;
      double sum = 0;
      for (int j = begin; j < end; ++j) {
        const double d = std::abs((j - center + 0.5) / filter_scale);
        weights.push_back(d < 1   ? (1.5 * d - 2.5) * d * d + 1
                          : d < 2 ? -0.5 * (((d - 5) * d + 8) * d - 4)
                                  : 0);
        sum += weights.back();
      }
      for (int c = 0; c < 3; ++c) {
        int64_t total = int64_t{1} << 21;
        for (int j = begin; j < end; ++j) {
          const double w = weights[j - begin] / sum * (1 << 22);
          const size_t at = horizontal ? size_t{3} * (size_t(y) * size.width + j) + c
                                       : size_t{3} * (size_t(j) * size.width + x) + c;
          total += in[at] * static_cast<int64_t>(w < 0 ? w - 0.5 : w + 0.5);
        }
        out[size_t{3} * (size_t(y) * out_dims.width + x) + c] =
            std::clamp<int64_t>(total >> 22, 0, 255);
      }
    }
  }
  return out;
}

std::vector<uint8_t> Resize(ExecContext& ctx, const std::vector<uint8_t>& in, Size from, Size to) {
  std::vector<uint8_t> out(size_t{3} * to.width * to.height);
  ResizeBicubic(ctx, in, from.width, from.height, out, to.width, to.height);
  return out;
}

TEST(PreprocessTest, ResizeEqualsPillowBitForBit) {
  const std::filesystem::path path =
      std::filesystem::path(SLUICE_SOURCE_DIR) / "tests/golden/resize.json";
  std::ifstream file(path);
  const nlohmann::json golden = nlohmann::json::parse(file);
  ExecContext ctx({.num_threads = 2});
  for (const auto& c : golden["cases"]) {
    const Size in{c["in"][0], c["in"][1]}, out{c["out"][0], c["out"][1]};
    const std::vector<uint8_t> result = Resize(ctx, GoldenPicture(in), in, out);
    if (c.contains("bytes")) {
      EXPECT_EQ(result, c["bytes"].get<std::vector<uint8_t>>()) << c["in"] << c["out"];
    }
    EXPECT_EQ(Fnv1a(result), c["fnv1a"].get<std::string>()) << c["in"] << c["out"];
  }
}

TEST(PreprocessTest, ResizeEqualsThePlainTwoPassReference) {
  const std::pair<Size, Size> cases[] = {
      {{31, 17}, {13, 29}}, {{1, 1}, {1, 1}},    {{1, 9}, {33, 1}},  {{16, 16}, {16, 16}},
      {{5, 3}, {64, 48}},   {{257, 3}, {4, 90}}, {{3, 129}, {7, 8}}, {{100, 75}, {99, 76}},
  };
  for (int threads : {1, 3}) {
    ExecContext ctx({.num_threads = threads});
    for (const auto& [from, to] : cases) {
      const std::vector<uint8_t> in = RandomPicture(from, from.width * 1000 + from.height);
      const std::vector<uint8_t> expected = ReferenceAxis(
          ReferenceAxis(in, from, true, to.width), {to.width, from.height}, false, to.height);
      EXPECT_EQ(Resize(ctx, in, from, to), expected)
          << from.width << "x" << from.height << " to " << to.width << "x" << to.height;
    }
  }
}

TEST(PreprocessTest, NormalisesWithTheFusedFormulaBitForBit) {
  ExecContext ctx({.num_threads = 2});
  PreprocessConfig config;
  config.width = 24;
  config.height = 20;
  config.mean = {0.5f, 0.48145466f, 0.4578275f};
  config.std = {0.5f, 0.26862954f, 0.27577711f};
  std::vector<FramePtr> frames;
  for (const Size size : {Size{50, 40}, Size{50, 40}, Size{9, 70}}) {
    auto frame = std::make_shared<Frame>();
    frame->width = size.width;
    frame->height = size.height;
    frame->rgb = RandomPicture(size, 7 + static_cast<int>(frames.size()));
    frames.push_back(frame);
  }
  Tensor out(DType::kF32, {3, 3, config.height, config.width});
  Preprocess(ctx, frames, config, out);
  for (size_t f = 0; f < frames.size(); ++f) {
    const std::vector<uint8_t> resized =
        Resize(ctx, frames[f]->rgb, {frames[f]->width, frames[f]->height}, {24, 20});
    for (int c = 0; c < 3; ++c) {
      for (int i = 0; i < 24 * 20; ++i) {
        const float expected = (static_cast<float>(resized[3 * i + c]) - config.mean[c] * 255.0f) /
                               (config.std[c] * 255.0f);
        ASSERT_EQ(out.data<float>()[(f * 3 + c) * 24 * 20 + i], expected)
            << "frame " << f << " channel " << c << " pixel " << i;
      }
    }
  }
}

TEST(PreprocessTest, CentreCropsAreCutOutOfTheWholeResizedPicture) {
  ExecContext ctx({.num_threads = 2});
  PreprocessConfig config;
  config.width = config.height = 21;
  config.fit = PictureFit::kCenterCrop;
  config.mean = {0.48145466f, 0.4578275f, 0.40821073f};
  config.std = {0.26862954f, 0.26130258f, 0.27577711f};
  const struct {
    Size in, resized;
    int left, top;
  } cases[] = {{{64, 48}, {28, 21}, 3, 0},     {{33, 50}, {21, 31}, 0, 5},
               {{37, 36}, {21, 21}, 0, 0},     {{100, 5}, {420, 21}, 199, 0},
               {{21, 22}, {21, 22}, 0, 0},     {{9, 9}, {21, 21}, 0, 0},
               {{1, 400}, {21, 8400}, 0, 4189}};
  std::vector<FramePtr> frames;
  for (const auto& c : cases) {
    auto frame = std::make_shared<Frame>();
    frame->width = c.in.width;
    frame->height = c.in.height;
    frame->rgb = RandomPicture(c.in, c.in.width);
    frames.push_back(frame);
  }
  Tensor out(DType::kF32, {static_cast<int64_t>(frames.size()), 3, 21, 21});
  Preprocess(ctx, frames, config, out);
  for (size_t f = 0; f < frames.size(); ++f) {
    const auto& c = cases[f];
    const std::vector<uint8_t> whole = Resize(ctx, frames[f]->rgb, c.in, c.resized);
    for (int i = 0; i < 3 * 21 * 21; ++i) {
      const int channel = i / (21 * 21), y = c.top + i / 21 % 21, x = c.left + i % 21;
      const float value = whole[size_t{3} * (y * c.resized.width + x) + channel];
      ASSERT_EQ(out.data<float>()[f * 3 * 21 * 21 + i],
                (value - config.mean[channel] * 255.0f) / (config.std[channel] * 255.0f))
          << c.in.width << "x" << c.in.height << " at " << i;
    }
  }
  // What would be resized to 21 x 344,064 pixels is never made; a longer side is refused.
  const auto line_of = [](int height) {
    auto line = std::make_shared<Frame>();
    line->width = 1;
    line->height = height;
    line->rgb = RandomPicture({1, height}, 3);
    return std::vector<FramePtr>{line};
  };
  const std::vector<FramePtr> lines = line_of(kMaxPictureSide);
  Preprocess(ctx, lines, config, out.view().Slice(0, 1));
  EXPECT_THROW(Preprocess(ctx, line_of(kMaxPictureSide + 1), config, out.view().Slice(0, 1)),
               InputError);

  Tensor flat(DType::kF32, {1, 3, 20, 21});
  config.height = 20;
  EXPECT_THROW(Preprocess(ctx, lines, config, flat), Error);
}

TEST(PreprocessTest, SizesThatDoNotFitTheBytesAreRefused) {
  ExecContext ctx({.num_threads = 1});
  std::vector<uint8_t> in(3 * 4 * 5), out(3 * 2 * 2);
  EXPECT_THROW(ResizeBicubic(ctx, in, 4, 6, out, 2, 2), InputError);
  EXPECT_THROW(ResizeBicubic(ctx, in, 4, 5, out, 2, 3), InputError);
  EXPECT_THROW(ResizeBicubic(ctx, in, 0, 5, out, 2, 2), InputError);
  EXPECT_THROW(ResizeBicubic(ctx, in, -4, -5, out, 2, 2), InputError);
  // 3 * 65536 * 65536 bytes is a multiple of 2^32: 32-bit arithmetic would see 0.
  EXPECT_THROW(ResizeBicubic(ctx, {}, 65536, 65536, out, 2, 2), InputError);
  Tensor wrong(DType::kF32, {1, 3, 8, 9});
  auto frame = std::make_shared<Frame>();
  frame->width = 4;
  frame->height = 5;
  frame->rgb = in;
  const std::vector<FramePtr> frames = {frame};
  EXPECT_THROW(Preprocess(ctx, frames, {.width = 8, .height = 8}, wrong), Error);
}

// Larger and smaller, wide and tall, one pixel, sizes that change within a batch, pictures that the
// staging takes in several pieces, and more than are resized at once.
TEST(PreprocessTest, APictureResizedOnAGpuIsTheSameBitForBit) {
  if (::sluice::testing::SkippedWithout(Device::kCuda)) return;
  ExecContext cpu({.num_threads = 2}), gpu({.device = Device::kCuda});
  const std::vector<std::vector<Size>> batches = {
      {{640, 480}, {640, 480}, {640, 480}},
      {{384, 384}},
      {{31, 17}, {1, 1}, {1, 1}, {9, 70}, {640, 360}},
      {{1920, 1080}, {1920, 1080}, {1080, 1920}},
      {{3, 2000}, {2000, 3}},
      std::vector<Size>(12, {1920, 1080}),
  };
  uint32_t seed = 0;
  for (const PictureFit fit : {PictureFit::kStretch, PictureFit::kCenterCrop}) {
    for (const int side : {384, 24, 336}) {
      for (const std::vector<Size>& batch : batches) {
        if (batch.size() > 8 && side != 384) continue;
        PreprocessConfig config;
        config.width = side;
        config.height = fit == PictureFit::kStretch ? side + 6 : side;
        config.fit = fit;
        config.mean = {0.5f, 0.48145466f, 0.4578275f};
        config.std = {0.5f, 0.26862954f, 0.27577711f};
        std::vector<FramePtr> frames;
        for (const Size size : batch) {
          auto frame = std::make_shared<Frame>();
          frame->width = size.width;
          frame->height = size.height;
          frame->rgb = RandomPicture(size, ++seed);
          frames.push_back(frame);
        }
        const Shape shape{static_cast<int64_t>(batch.size()), 3, config.height, config.width};
        const Tensor want(DType::kF32, shape), there(DType::kF32, shape, Device::kCuda);
        Preprocess(cpu, frames, config, want);
        Preprocess(gpu, frames, config, there);
        const Tensor got = TransferTo(gpu, there, Device::kCpu);
        int64_t different = 0;
        for (int64_t i = 0; i < shape.NumElements(); ++i) {
          different += got.data<float>()[i] != want.data<float>()[i];
        }
        EXPECT_EQ(different, 0) << shape.ToString() << " from " << batch[0].width << "x"
                                << batch[0].height;
      }
    }
  }
}

}  // namespace
}  // namespace sluice
