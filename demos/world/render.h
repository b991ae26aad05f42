// Turns the draws of a frame into pixels.
//
// The definition, which every renderer of the world follows (f32 throughout). A pixel (i, j) of a
// picture of W x H pixels has its centre at u = (i + 0.5) / W, v = (j + 0.5) / H of the canvas.
//   background  texture coordinates x = tex_x0 + u * (tex_x1 - tex_x0), y alike; texel (m, n) has
//               its centre at (m + 0.5, n + 0.5); bilinear, texels beyond the edge repeat it.
//   draws       in order. Sprite coordinates s = (u * 640 - (cx - size / 2)) / size * S with
//               S = 128 >> mip, t alike from v * 360; texel (m, n) has its centre at
//               (m + 0.5, n + 0.5); bilinear on premultiplied texels p, transparent outside.
//               pixel = pixel * (1 - p.a / 255 * opacity) + p.rgb * tint / 255 * opacity
//   output      pixel * gain + 0.5, clamped to 0..255 and cut to an integer.
// Sprites: straight alpha is premultiplied as (c * a + 127) / 255; the next level is the mean of
// 2x2 premultiplied texels as (a + b + c + d + 2) >> 2.
#ifndef SLUICE_DEMOS_WORLD_RENDER_H_
#define SLUICE_DEMOS_WORLD_RENDER_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "demos/world/scene.h"

namespace sluice::world {

// The sprites at every level, made from the decoded sheet. Read-only once made: may be shared.
class Atlas {
 public:
  static constexpr int kCell = 128;
  static constexpr int kColumns = 8;
  static constexpr int kLevels = 3;

  // `rgba` is [height, width, 4] u8 with straight alpha: cells of 128x128, 8 a row, in the order
  // of names.h. Throws std::invalid_argument unless width is 1024 and all sprites fit.
  Atlas(const uint8_t* rgba, int width, int height);

  // Premultiplied texels of a sprite, [S + 2, S + 2, 4] u8 with S = 128 >> mip: one transparent
  // texel around it. Throws std::invalid_argument for a sprite or level that is not there.
  const uint8_t* Sprite(int sprite, int mip) const;

 private:
  std::array<std::vector<uint8_t>, kLevels> levels_;  // kNumSprites sprites each
};

// Draws a frame of the scene at any size; `rgb` is [height, width, 3] u8, owned by the caller.
// About 2 ms at 640x360 on one core.
// Throws std::invalid_argument for a size that is not positive or a draw of an unknown sprite.
void Render(const Scene& scene, const FrameDraw& frame, const Atlas& atlas, int width, int height,
            uint8_t* rgb);

}  // namespace sluice::world

#endif  // SLUICE_DEMOS_WORLD_RENDER_H_
