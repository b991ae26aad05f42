#include "demos/world/render.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "demos/world/names.h"

namespace sluice::world {
namespace {

// Two neighbours along one axis and the weight of the second, for every pixel of a row or column.
struct Tap {
  int first, second;
  float weight;
};

size_t SpriteBytes(int mip) {
  const size_t side = static_cast<size_t>(Atlas::kCell >> mip) + 2;
  return side * side * 4;
}

std::vector<Tap> TextureTaps(int pixels, float low, float high, int texels) {
  std::vector<Tap> taps(static_cast<size_t>(pixels));
  for (int i = 0; i < pixels; ++i) {
    const float u = (static_cast<float>(i) + 0.5f) / static_cast<float>(pixels);
    const float at = low + u * (high - low) - 0.5f;
    const float floor = std::floor(at);
    const int index = static_cast<int>(floor);
    taps[static_cast<size_t>(i)] = {std::clamp(index, 0, texels - 1),
                                    std::clamp(index + 1, 0, texels - 1), at - floor};
  }
  return taps;
}

// rows of the background as floats, [height, width, 3]
void DrawBackground(const Scene& scene, const FrameDraw& frame, int width, int height,
                    std::vector<float>& picture) {
  constexpr int kRow = kTextureWidth * 3;
  const std::vector<Tap> columns = TextureTaps(width, frame.tex_x0, frame.tex_x1, kTextureWidth);
  const std::vector<Tap> rows = TextureTaps(height, frame.tex_y0, frame.tex_y1, kTextureHeight);
  std::array<float, static_cast<size_t>(kRow)> line;
  float* out = picture.data();
  for (const Tap& row : rows) {
    const uint8_t* above = scene.texture.data() + static_cast<size_t>(row.first) * kRow;
    const uint8_t* below = scene.texture.data() + static_cast<size_t>(row.second) * kRow;
    for (size_t i = 0; i < line.size(); ++i) {
      const float a = above[i];
      line[i] = a + (static_cast<float>(below[i]) - a) * row.weight;
    }
    for (const Tap& column : columns) {
      const float* left = line.data() + column.first * 3;
      const float* right = line.data() + column.second * 3;
      for (int c = 0; c < 3; ++c) out[c] = left[c] + (right[c] - left[c]) * column.weight;
      out += 3;
    }
  }
}

// The pixels of one axis that a sprite touches; indices count from its transparent border.
struct SpriteAxis {
  int begin = 0;
  std::vector<Tap> taps;
};

SpriteAxis MapAxis(int pixels, float canvas, float low, float size, int texels) {
  SpriteAxis axis;
  for (int i = 0; i < pixels; ++i) {
    const float u = (static_cast<float>(i) + 0.5f) / static_cast<float>(pixels);
    const float at = (u * canvas - low) / size * static_cast<float>(texels) - 0.5f;
    if (at <= -1 || at >= static_cast<float>(texels)) continue;
    if (axis.taps.empty()) axis.begin = i;
    const float floor = std::floor(at);
    const int index = static_cast<int>(floor) + 1;
    axis.taps.push_back({index, index + 1, at - floor});
  }
  return axis;
}

void DrawSprite(const Draw& draw, const Atlas& atlas, int width, int height,
                std::vector<float>& picture) {
  const uint8_t* texels = atlas.Sprite(draw.sprite, draw.mip);
  const int side = Atlas::kCell >> draw.mip;
  const SpriteAxis across = MapAxis(width, kCanvasWidth, draw.cx - draw.size / 2, draw.size, side);
  const SpriteAxis down = MapAxis(height, kCanvasHeight, draw.cy - draw.size / 2, draw.size, side);
  const float scale = draw.opacity / 255;
  const float tint[4] = {draw.r * scale, draw.g * scale, draw.b * scale, scale};
  const size_t stride = static_cast<size_t>(side + 2) * 4;
  std::vector<float> line(stride);
  for (size_t j = 0; j < down.taps.size(); ++j) {
    const Tap& row = down.taps[j];
    const uint8_t* above = texels + static_cast<size_t>(row.first) * stride;
    const uint8_t* below = texels + static_cast<size_t>(row.second) * stride;
    for (size_t i = 0; i < stride; ++i) {
      const float a = above[i];
      line[i] = a + (static_cast<float>(below[i]) - a) * row.weight;
    }
    float* out =
        picture.data() + ((static_cast<size_t>(down.begin) + j) * static_cast<size_t>(width) +
                          static_cast<size_t>(across.begin)) *
                             3;
    for (const Tap& column : across.taps) {
      const float* left = line.data() + column.first * 4;
      const float* right = line.data() + column.second * 4;
      float p[4];
      for (int c = 0; c < 4; ++c) p[c] = (left[c] + (right[c] - left[c]) * column.weight) * tint[c];
      const float through = 1 - p[3];
      for (int c = 0; c < 3; ++c) out[c] = out[c] * through + p[c];
      out += 3;
    }
  }
}

}  // namespace

Atlas::Atlas(const uint8_t* rgba, int width, int height) {
  const int rows = (kNumSprites + kColumns - 1) / kColumns;
  if (rgba == nullptr || width != kColumns * kCell || height < rows * kCell) {
    throw std::invalid_argument("[world] the sprite sheet must be " +
                                std::to_string(kColumns * kCell) + " pixels wide and at least " +
                                std::to_string(rows * kCell) + " high, got " +
                                std::to_string(width) + "x" + std::to_string(height));
  }
  for (int mip = 0; mip < kLevels; ++mip) {
    levels_[static_cast<size_t>(mip)].assign(kNumSprites * SpriteBytes(mip), 0);
  }
  const auto texel = [&](int mip, int sprite, int x, int y) {
    const size_t stride = static_cast<size_t>(kCell >> mip) + 2;
    return levels_[static_cast<size_t>(mip)].data() +
           static_cast<size_t>(sprite) * SpriteBytes(mip) +
           (static_cast<size_t>(y + 1) * stride + static_cast<size_t>(x + 1)) * 4;
  };
  for (int sprite = 0; sprite < kNumSprites; ++sprite) {
    for (int y = 0; y < kCell; ++y) {
      const size_t sheet_y = static_cast<size_t>(sprite / kColumns * kCell + y);
      const size_t sheet_x = static_cast<size_t>(sprite % kColumns * kCell);
      const uint8_t* in = rgba + (sheet_y * static_cast<size_t>(width) + sheet_x) * 4;
      for (int x = 0; x < kCell; ++x, in += 4) {
        uint8_t* out = texel(0, sprite, x, y);
        for (int c = 0; c < 3; ++c) out[c] = static_cast<uint8_t>((in[c] * in[3] + 127) / 255);
        out[3] = in[3];
      }
    }
    for (int mip = 1; mip < kLevels; ++mip) {
      for (int y = 0; y < kCell >> mip; ++y) {
        for (int x = 0; x < kCell >> mip; ++x) {
          for (int c = 0; c < 4; ++c) {
            const int sum = texel(mip - 1, sprite, 2 * x, 2 * y)[c] +
                            texel(mip - 1, sprite, 2 * x + 1, 2 * y)[c] +
                            texel(mip - 1, sprite, 2 * x, 2 * y + 1)[c] +
                            texel(mip - 1, sprite, 2 * x + 1, 2 * y + 1)[c];
            texel(mip, sprite, x, y)[c] = static_cast<uint8_t>((sum + 2) >> 2);
          }
        }
      }
    }
  }
}

const uint8_t* Atlas::Sprite(int sprite, int mip) const {
  if (sprite < 0 || sprite >= kNumSprites || mip < 0 || mip >= kLevels) {
    throw std::invalid_argument("[world] sprite must be below " + std::to_string(kNumSprites) +
                                " and its level below " + std::to_string(kLevels) + ", got " +
                                std::to_string(sprite) + " at " + std::to_string(mip));
  }
  return levels_[static_cast<size_t>(mip)].data() + static_cast<size_t>(sprite) * SpriteBytes(mip);
}

void Render(const Scene& scene, const FrameDraw& frame, const Atlas& atlas, int width, int height,
            uint8_t* rgb) {
  if (width <= 0 || height <= 0) {
    throw std::invalid_argument("[world] a picture's size must be positive, got " +
                                std::to_string(width) + "x" + std::to_string(height));
  }
  const size_t values = static_cast<size_t>(width) * static_cast<size_t>(height) * 3;
  std::vector<float> picture(values);
  DrawBackground(scene, frame, width, height, picture);
  for (const Draw& draw : frame.draws) DrawSprite(draw, atlas, width, height, picture);
  for (size_t i = 0; i < values; ++i) {
    rgb[i] = static_cast<uint8_t>(
        static_cast<int>(std::min(std::max(picture[i] * frame.gain + 0.5f, 0.0f), 255.0f)));
  }
}

}  // namespace sluice::world
