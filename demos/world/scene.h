// The demo world: short rendered films whose every fact is known, so that any question about them
// has a checked answer. The same definition trains the default model, draws the demo clips and
// tests the engine.
//
// A scene lives on a canvas of 640x360 pixels (x right, y down, the pixel (i, j) covers
// [i, i+1) x [j, j+1)) in continuous time. It is meant to be sampled twice a second: frame k is
// the scene at t = k * 0.5 s. Everything discrete - an object appears, leaves, changes colour,
// starts, stops or turns round, the camera turns round - happens at a slot s, at
// t = (s + 0.5) * 0.5 s, half-way between frames s and s + 1, so a sampling error of some 20 ms
// never changes what a frame shows. Slot -1 is before the film: what has it was always there.
//
// Everything here is a value; functions are pure and may run on any thread.
#ifndef SLUICE_DEMOS_WORLD_SCENE_H_
#define SLUICE_DEMOS_WORLD_SCENE_H_

#include <cstdint>
#include <vector>

namespace sluice::world {

inline constexpr int kCanvasWidth = 640;
inline constexpr int kCanvasHeight = 360;
inline constexpr int kTextureWidth = 256;
inline constexpr int kTextureHeight = 144;
inline constexpr double kSampleSeconds = 0.5;
inline constexpr int kMaxVisible = 5;
inline constexpr int kMaxObjects = 8;
inline constexpr int kMaxEvents = 8;        // appear, leave, recolour
inline constexpr int kSteadyIntervals = 3;  // of the same motion before it can be told
inline constexpr int kMinFrames = 4;
inline constexpr int kMaxFrames = 4096;
inline constexpr int kBeforeTheFilm = -1;
inline constexpr int kNever = 1 << 20;

// Uniform motion from a slot on, until the next leg begins.
struct Leg {
  int slot;
  float x, y;    // canvas pixels at the beginning of the leg
  float vx, vy;  // canvas pixels per sample interval; at most one of them is not zero
};

struct Object {
  int name;        // names.h
  int color;       // kNoColor for a thing
  int recolor_to;  // the colour from recolor_slot on
  int recolor_slot = kNever;
  bool big;
  float size;  // side of the sprite's square, canvas pixels
  int appear_slot;
  int leave_slot = kNever;
  std::vector<Leg> legs;  // centre of the square, at camera offset 0; first at appear_slot
};

struct Scene {
  int frames;
  std::vector<Object> objects;  // in drawing order
  std::vector<Leg> camera;      // what the camera looks at has moved by (x, y); first at slot -1
  bool pans;                    // whether the camera ever moves; objects are then all at rest
  float gain, gain_drift, gain_period_s, gain_phase;
  std::vector<uint8_t> texture;  // background, [144, 256, 3] u8
};

struct SceneOptions {
  int frames = 16;  // in [kMinFrames, kMaxFrames]
};

// One sprite of a frame. Squares with side `size`, centre (cx, cy), canvas pixels.
struct Draw {
  float cx, cy, size, opacity;
  uint8_t r, g, b;  // tint
  uint8_t mip;      // sprite level: 0 is 128 texels a side, 1 is 64, 2 is 32
  uint16_t sprite;
  uint8_t name;
  uint8_t color;  // 255 for none
};

// Everything a renderer needs besides the texture and the sprites.
struct FrameDraw {
  float tex_x0, tex_y0, tex_x1, tex_y1;  // texture coordinates of the canvas's edges
  float gain;
  std::vector<Draw> draws;  // back to front
};

// The scene of a seed, the same on every platform. At most kMaxVisible objects at a time,
// kMaxObjects and kMaxEvents in all whatever the length, no two slots of events closer than two
// intervals, squares inside the canvas that overlap by at most a tenth of the smaller.
// Throws std::invalid_argument for a frame count outside its limits.
Scene MakeScene(uint64_t seed, const SceneOptions& options);

// The picture at t seconds. Objects fade in and out within 0.08 s of their slot's time.
FrameDraw DrawAt(const Scene& scene, double t);

// The facts of a sampled frame.
bool VisibleAt(const Object& object, int frame);
int ColorAt(const Object& object, int frame);
const Leg& LegAt(const std::vector<Leg>& legs, int frame);
// Whether the leg of this frame has lasted for the kSteadyIntervals before it; never before
// so many frames have gone by.
bool SteadyAt(const std::vector<Leg>& legs, int frame);
struct Point {
  float x, y;
};
Point CenterAt(const Scene& scene, const Object& object, int frame);  // on the canvas

}  // namespace sluice::world

#endif  // SLUICE_DEMOS_WORLD_SCENE_H_
