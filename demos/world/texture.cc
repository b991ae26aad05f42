#include "demos/world/texture.h"

#include <algorithm>
#include <array>
#include <cstddef>

#include "demos/world/scene.h"

namespace sluice::world {
namespace {

// Draws from a Random are never two arguments of one call: their order would be the compiler's.
constexpr int kW = kTextureWidth;
constexpr int kH = kTextureHeight;

struct Rgb {
  float r, g, b;
};

Rgb Mix(const Rgb& a, const Rgb& b, float t) {
  return {a.r + (b.r - a.r) * t, a.g + (b.g - a.g) * t, a.b + (b.b - a.b) * t};
}

// A colour whose channels stay within `spread` of a common brightness.
Rgb MutedColor(Random& random, float low, float high, float spread) {
  const float level = random.Range(low, high);
  return {level + random.Range(-spread, spread), level + random.Range(-spread, spread),
          level + random.Range(-spread, spread)};
}

// The picture under construction, [144, 256, 3] f32, 0..255.
class Picture {
 public:
  Picture() : values_(static_cast<size_t>(kW) * kH * 3) {}

  float* Row(int y) { return values_.data() + static_cast<size_t>(y) * kW * 3; }

  void Blend(int x, int y, const Rgb& color, float alpha) {
    float* p = Row(y) + x * 3;
    p[0] += (color.r - p[0]) * alpha;
    p[1] += (color.g - p[1]) * alpha;
    p[2] += (color.b - p[2]) * alpha;
  }

  void VerticalGradient(const Rgb& top, const Rgb& bottom, int y0, int y1) {
    for (int y = y0; y < y1; ++y) {
      const Rgb c = Mix(top, bottom, static_cast<float>(y - y0) / static_cast<float>(y1 - y0));
      float* p = Row(y);
      for (int x = 0; x < kW; ++x, p += 3) {
        p[0] = c.r;
        p[1] = c.g;
        p[2] = c.b;
      }
    }
  }

  // Mean over (2 * radius + 1)^2 pixels, edges repeated; running sums.
  void BoxBlur(int radius) {
    const float scale = 1.0f / static_cast<float>(2 * radius + 1);
    std::array<float, static_cast<size_t>(kW) * 3> line;
    for (int y = 0; y < kH; ++y) {
      float* row = Row(y);
      std::copy(row, row + kW * 3, line.begin());
      for (int c = 0; c < 3; ++c) {
        float sum = 0;
        for (int x = -radius; x <= radius; ++x) sum += At(line, x, c);
        for (int x = 0; x < kW; ++x) {
          row[x * 3 + c] = sum * scale;
          sum += At(line, x + radius + 1, c) - At(line, x - radius, c);
        }
      }
    }
    std::vector<float> source(values_);
    const auto source_row = [&](int y) {
      return source.data() + static_cast<size_t>(std::clamp(y, 0, kH - 1)) * kW * 3;
    };
    line.fill(0);
    for (int y = -radius; y <= radius; ++y) {
      const float* in = source_row(y);
      for (int i = 0; i < kW * 3; ++i) line[static_cast<size_t>(i)] += in[i];
    }
    for (int y = 0; y < kH; ++y) {
      float* out = Row(y);
      const float* enters = source_row(y + radius + 1);
      const float* leaves = source_row(y - radius);
      for (int i = 0; i < kW * 3; ++i) {
        float& sum = line[static_cast<size_t>(i)];
        out[i] = sum * scale;
        sum += enters[i] - leaves[i];
      }
    }
  }

  // Darker towards the corners by `strength`.
  void Vignette(float strength) {
    for (int y = 0; y < kH; ++y) {
      const float v = (static_cast<float>(y) + 0.5f) / kH * 2 - 1;
      float* p = Row(y);
      for (int x = 0; x < kW; ++x, p += 3) {
        const float u = (static_cast<float>(x) + 0.5f) / kW * 2 - 1;
        const float factor = 1 - strength * 0.5f * (u * u + v * v);
        p[0] *= factor;
        p[1] *= factor;
        p[2] *= factor;
      }
    }
  }

  // The same random step on the three channels of a pixel, at most `amplitude`.
  void Grain(Random& random, float amplitude) {
    const float scale = amplitude / 128;
    for (int y = 0; y < kH; ++y) {
      float* p = Row(y);
      for (int x = 0; x < kW; x += 8) {
        uint64_t bits = random.Next();
        for (int i = 0; i < 8; ++i, p += 3, bits >>= 8) {
          const float step = static_cast<float>(static_cast<int>(bits & 255) - 128) * scale;
          p[0] += step;
          p[1] += step;
          p[2] += step;
        }
      }
    }
  }

  std::vector<uint8_t> Quantized() const {
    std::vector<uint8_t> out(values_.size());
    for (size_t i = 0; i < out.size(); ++i) {
      out[i] = static_cast<uint8_t>(std::min(std::max(values_[i] + 0.5f, 0.0f), 255.0f));
    }
    return out;
  }

 private:
  static float At(const std::array<float, static_cast<size_t>(kW) * 3>& line, int x, int c) {
    return line[static_cast<size_t>(std::clamp(x, 0, kW - 1) * 3 + c)];
  }

  std::vector<float> values_;
};

// Sum of octaves of value noise, [144, 256] f32 in about 0..1. The coarsest lattice has cells of
// cell_x x cell_y pixels; each octave halves the cells and multiplies the weight by `roughness`.
std::vector<float> LayeredNoise(Random& random, int cell_x, int cell_y, int octaves,
                                float roughness) {
  std::vector<float> sum(static_cast<size_t>(kW) * kH, 0.0f);
  float weight = 1;
  float total = 0;
  for (int octave = 0; octave < octaves; ++octave) {
    const int columns = kW / cell_x + 2;
    const int rows = kH / cell_y + 2;
    std::vector<float> lattice(static_cast<size_t>(columns) * static_cast<size_t>(rows));
    for (float& value : lattice) value = random.Unit() * weight;
    std::array<int, kW> column;
    std::array<float, kW> across;
    const auto smooth = [](float t) { return t * t * (3 - 2 * t); };
    for (int x = 0; x < kW; ++x) {
      const auto i = static_cast<size_t>(x);
      column[i] = x / cell_x;
      across[i] = smooth(static_cast<float>(x % cell_x) / static_cast<float>(cell_x));
    }
    std::vector<float> line(static_cast<size_t>(columns));
    for (int y = 0; y < kH; ++y) {
      const float* above = lattice.data() + static_cast<size_t>(y / cell_y) * line.size();
      const float* below = above + columns;
      const float down = smooth(static_cast<float>(y % cell_y) / static_cast<float>(cell_y));
      for (size_t i = 0; i < line.size(); ++i) line[i] = above[i] + (below[i] - above[i]) * down;
      float* out = sum.data() + static_cast<size_t>(y) * kW;
      for (size_t x = 0; x < kW; ++x) {
        const float* at = line.data() + column[x];
        out[x] += at[0] + (at[1] - at[0]) * across[x];
      }
    }
    total += weight;
    weight *= roughness;
    cell_x = std::max(1, cell_x / 2);
    cell_y = std::max(1, cell_y / 2);
  }
  for (float& value : sum) value /= total;
  return sum;
}

// From dark to light along the noise.
struct Palette {
  std::array<Rgb, 3> stops;
  int cell_x, cell_y;
};

void PaintNoise(Picture& picture, Random& random, const Palette& palette, int y0, int y1) {
  const int octaves = random.Between(4, 5);
  const float roughness = random.Range(0.4f, 0.7f);
  const std::vector<float> noise =
      LayeredNoise(random, palette.cell_x, palette.cell_y, octaves, roughness);
  // Sums of octaves crowd around the middle: stretch them.
  const float contrast = random.Range(1.3f, 2.2f);
  std::array<Rgb, 256> colors;
  for (int i = 0; i < 256; ++i) {
    const float t = static_cast<float>(i) / 255;
    colors[static_cast<size_t>(i)] = t < 0.5f ? Mix(palette.stops[0], palette.stops[1], t * 2)
                                              : Mix(palette.stops[1], palette.stops[2], t * 2 - 1);
  }
  for (int y = y0; y < y1; ++y) {
    float* p = picture.Row(y);
    const float* value = noise.data() + static_cast<size_t>(y) * kW;
    for (int x = 0; x < kW; ++x, p += 3) {
      const float t = std::clamp((value[x] - 0.5f) * contrast + 0.5f, 0.0f, 1.0f);
      const Rgb& c = colors[static_cast<size_t>(t * 255)];
      p[0] = c.r;
      p[1] = c.g;
      p[2] = c.b;
    }
  }
}

Palette MaterialPalette(Random& random) {
  switch (random.Below(7)) {
    case 0:  // sky
      return {{{{110, 150, 190}, {160, 190, 215}, {225, 230, 235}}}, 64, 24};
    case 1:  // grass
      return {{{{58, 78, 44}, {92, 116, 66}, {136, 152, 98}}}, 32, 32};
    case 2:  // sand
      return {{{{164, 144, 110}, {196, 178, 142}, {220, 206, 176}}}, 48, 24};
    case 3:  // wood
      return {{{{88, 66, 48}, {128, 98, 70}, {166, 134, 100}}}, 128, 8};
    case 4:  // water
      return {{{{52, 80, 100}, {84, 116, 134}, {138, 164, 172}}}, 64, 12};
    case 5:  // stone
      return {{{{84, 84, 88}, {124, 122, 120}, {168, 166, 162}}}, 24, 24};
    default: {
      const Rgb dark = MutedColor(random, 30, 110, 22);
      const Rgb light = MutedColor(random, 120, 225, 22);
      return {{{dark, Mix(dark, light, random.Range(0.35f, 0.65f)), light}},
              random.Chance(0.5f) ? 64 : 32,
              random.Chance(0.5f) ? 48 : 16};
    }
  }
}

struct Vertex {
  float x, y;
};

// Fills a convex polygon, or any whose rows are single runs.
void FillPolygon(Picture& picture, const std::vector<Vertex>& points, const Rgb& color,
                 float alpha) {
  float top = points[0].y;
  float bottom = points[0].y;
  for (const Vertex& p : points) {
    top = std::min(top, p.y);
    bottom = std::max(bottom, p.y);
  }
  const int y0 = std::max(0, static_cast<int>(top));
  const int y1 = std::min(kH - 1, static_cast<int>(bottom));
  for (int y = y0; y <= y1; ++y) {
    const float at = static_cast<float>(y) + 0.5f;
    float left = kW;
    float right = 0;
    for (size_t i = 0; i < points.size(); ++i) {
      const Vertex& a = points[i];
      const Vertex& b = points[(i + 1) % points.size()];
      if ((a.y <= at) == (b.y <= at)) continue;
      const float x = a.x + (b.x - a.x) * ((at - a.y) / (b.y - a.y));
      left = std::min(left, x);
      right = std::max(right, x);
    }
    const int x0 = std::max(0, static_cast<int>(left + 0.5f));
    const int x1 = std::min(kW, static_cast<int>(right + 0.5f));
    for (int x = x0; x < x1; ++x) picture.Blend(x, y, color, alpha);
  }
}

void FillBlob(Picture& picture, float cx, float cy, float rx, float ry, const Rgb& color,
              float alpha) {
  const int y0 = std::max(0, static_cast<int>(cy - ry));
  const int y1 = std::min(kH - 1, static_cast<int>(cy + ry));
  const int x0 = std::max(0, static_cast<int>(cx - rx));
  const int x1 = std::min(kW - 1, static_cast<int>(cx + rx));
  for (int y = y0; y <= y1; ++y) {
    const float v = (static_cast<float>(y) + 0.5f - cy) / ry;
    for (int x = x0; x <= x1; ++x) {
      const float u = (static_cast<float>(x) + 0.5f - cx) / rx;
      const float fall = 1 - u * u - v * v;
      if (fall > 0) picture.Blend(x, y, color, alpha * std::min(1.0f, fall * 3));
    }
  }
}

// Pieces of furniture, walls, poles and leaves as a camera out of focus sees them.
void PaintPieces(Picture& picture, Random& random, int count, float largest) {
  for (int i = 0; i < count; ++i) {
    const Rgb color = MutedColor(random, 35, 215, 20);
    const float alpha = random.Range(0.35f, 0.85f);
    const float cx = random.Range(0, kW);
    const float cy = random.Range(0, kH);
    const float rx = random.Range(6, largest);
    const float ry = random.Range(6, largest);
    const int what = random.Below(10);
    if (what < 4) {  // a slanted quadrilateral
      const float slant = random.Range(-0.3f, 0.3f) * rx;
      const float taper = random.Range(0.6f, 1.0f);
      FillPolygon(picture,
                  {{cx - rx * taper + slant, cy - ry},
                   {cx + rx * taper + slant, cy - ry * random.Range(0.7f, 1.0f)},
                   {cx + rx, cy + ry},
                   {cx - rx, cy + ry * random.Range(0.7f, 1.0f)}},
                  color, alpha);
    } else if (what < 7) {
      FillBlob(picture, cx, cy, rx, ry, color, alpha);
    } else {  // a long thin bar, upright, level or slanted
      const float width = random.Range(0.8f, 3.0f);
      const float dx = what == 7 ? 0 : random.Range(20, 150);
      const float dy = what == 8 ? 0 : random.Range(15, 90);
      const float ex = dy >= dx ? width : 0;
      const float ey = dy >= dx ? 0 : width;
      FillPolygon(picture,
                  {{cx - dx - ex, cy - dy - ey},
                   {cx - dx + ex, cy - dy + ey},
                   {cx + dx + ex, cy + dy + ey},
                   {cx + dx - ex, cy + dy - ey}},
                  color, alpha);
    }
  }
}

void PaintClutter(Picture& picture, Random& random) {
  const int horizon = random.Between(kH / 4, kH * 4 / 5);
  const Rgb far = MutedColor(random, 110, 225, 16);
  const Rgb near = MutedColor(random, 50, 170, 18);
  picture.VerticalGradient(far, MutedColor(random, 100, 220, 16), 0, horizon);
  if (random.Chance(0.4f)) {
    PaintNoise(picture, random, MaterialPalette(random), horizon, kH);
  } else {
    picture.VerticalGradient(near, MutedColor(random, 40, 180, 18), horizon, kH);
  }
  PaintPieces(picture, random, random.Between(6, 16), 48);
  picture.BoxBlur(random.Between(2, 6));
  PaintPieces(picture, random, random.Between(3, 12), 26);
  picture.BoxBlur(random.Between(1, 2));
}

void PaintStripes(Picture& picture, Random& random) {
  const Rgb a = MutedColor(random, 50, 210, 24);
  const Rgb other = MutedColor(random, 50, 210, 24);
  const Rgb b = Mix(a, other, random.Range(0.4f, 1.0f));
  const float period = random.Range(10, 60);
  const float share = random.Range(0.3f, 0.7f);
  const float soft = random.Range(1.0f, 4.0f) / period;
  const float along_x = random.Chance(0.4f) ? 0.0f : random.Range(-1, 1);
  const float along_y = along_x == 0 ? 1.0f : (random.Chance(0.5f) ? 0.0f : random.Range(-1, 1));
  for (int y = 0; y < kH; ++y) {
    for (int x = 0; x < kW; ++x) {
      float phase = (static_cast<float>(x) * along_x + static_cast<float>(y) * along_y) / period;
      phase -= static_cast<float>(static_cast<int>(phase + 1024) - 1024);
      const float t = std::clamp((phase - share) / soft, 0.0f, 1.0f) -
                      std::clamp((phase - 1 + soft) / soft, 0.0f, 1.0f);
      picture.Blend(x, y, Mix(a, b, t), 1);
    }
  }
}

void PaintGradient(Picture& picture, Random& random) {
  const Rgb top = MutedColor(random, 40, 225, 28);
  const Rgb bottom = MutedColor(random, 40, 225, 28);
  picture.VerticalGradient(top, bottom, 0, kH);
  const Rgb side = MutedColor(random, 40, 225, 28);
  for (int y = 0; y < kH; ++y) {
    for (int x = 0; x < kW; ++x) picture.Blend(x, y, side, 0.8f * static_cast<float>(x) / kW);
  }
}

}  // namespace

std::vector<uint8_t> MakeTexture(Random& random, Detail detail) {
  Picture picture;
  const bool detailed = detail == Detail::kDetailed;
  const int kind = detailed ? random.Between(40, 99) : random.Below(100);
  if (kind < 10) {
    const Rgb color = MutedColor(random, 40, 225, 28);
    picture.VerticalGradient(color, color, 0, kH);
  } else if (kind < 22) {
    PaintGradient(picture, random);
  } else if (kind < 32) {
    PaintStripes(picture, random);
  } else if (kind < 60) {
    Palette palette = MaterialPalette(random);
    if (detailed) palette.cell_x = palette.cell_y = 32;  // grain of wood has no left and right
    PaintNoise(picture, random, palette, 0, kH);
  } else {
    PaintClutter(picture, random);
  }
  if (random.Chance(0.4f)) picture.Vignette(random.Range(0.1f, 0.4f));
  if (random.Chance(0.6f)) picture.Grain(random, random.Range(2, 9));
  return picture.Quantized();
}

}  // namespace sluice::world
