#include "demos/world/scene.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>

#include "demos/world/names.h"
#include "demos/world/random.h"
#include "demos/world/texture.h"

namespace sluice::world {
namespace {

constexpr int kMinEventGap = 2;      // intervals
constexpr int kMinAge = 3;           // intervals before an object may leave or change colour
constexpr int kMinLeg = 5;           // intervals between turns of an object
constexpr int kMinCameraLeg = 6;     // intervals between turns of the camera
constexpr int kMinMoverLife = 7;     // intervals an object must be there to be worth moving
constexpr int kMaxMovers = 2;        // at a time
constexpr float kMargin = 3;         // pixels between a square and the canvas's edge
constexpr float kMaxOverlap = 0.1f;  // of the smaller square
constexpr float kPanSpan = 1.5f;     // a panning scene's texture spans this many canvases
constexpr double kFadeSeconds = 0.08;

struct Box {
  float x0, y0, x1, y1;
};

double SlotTime(int slot) { return (slot + 0.5) * kSampleSeconds; }

// Which names and colours are taken; no two objects of a film ever share a phrase.
class Identities {
 public:
  explicit Identities(Random& random) : random_(random) {}

  void Assign(Object& object) {
    object.recolor_to = kNoColor;
    // Shapes that differ in colour alone make a viewer look twice.
    if (!shapes_.empty() && random_.Chance(0.2f)) {
      object.name = random_.Pick(shapes_);
      object.color = FreeColor(object.name);
      if (object.color != kNoColor) return;
    }
    if (random_.Chance(0.45f)) {
      object.name = random_.Below(kNumShapes);
      object.color = FreeColor(object.name);
      shapes_.push_back(object.name);
      if (object.color != kNoColor) return;
    }
    object.color = kNoColor;
    do {
      object.name = kNumShapes + random_.Below(kNumThings);
    } while (things_[static_cast<size_t>(object.name - kNumShapes)]);
    things_[static_cast<size_t>(object.name - kNumShapes)] = true;
  }

  // A colour nothing of this shape has had; kNoColor when all are used up.
  int FreeColor(int shape) {
    auto& taken = colors_[static_cast<size_t>(shape)];
    std::vector<int> free;
    for (int c = 0; c < kNumColors; ++c) {
      if (!taken[static_cast<size_t>(c)]) free.push_back(c);
    }
    if (free.empty()) return kNoColor;
    const int color = random_.Pick(free);
    taken[static_cast<size_t>(color)] = true;
    return color;
  }

 private:
  Random& random_;
  std::vector<int> shapes_;
  std::array<std::array<bool, kNumColors>, kNumShapes> colors_{};
  std::array<bool, kNumThings> things_{};
};

bool ThereAt(const Object& object, int slot) {
  return object.appear_slot < slot && object.leave_slot > slot;
}

// Slots in [1, frames - 2] for the events, ascending, kMinEventGap apart. Half of the films end
// quietly, so that there is something steady to ask about.
std::vector<int> DrawEventSlots(Random& random, int frames) {
  const int longest = std::min(kMaxEvents, 1 + frames / 3);
  const int count = random.Between(std::min(2, longest), longest);
  const int last = random.Chance(0.55f) ? std::max(1, frames - 5) : frames - 2;
  std::vector<int> slots;
  for (int attempt = 0; attempt < 40 && static_cast<int>(slots.size()) < count; ++attempt) {
    const int slot = random.Between(1, last);
    const bool apart = std::all_of(slots.begin(), slots.end(), [&](int other) {
      return std::abs(other - slot) >= kMinEventGap;
    });
    if (apart) slots.push_back(slot);
  }
  std::sort(slots.begin(), slots.end());
  return slots;
}

void DrawLook(Random& random, Object& object) {
  object.big = random.Chance(0.45f);
  object.size = object.big ? random.Range(140, 175) : random.Range(70, 90);
}

// Who appears, leaves and changes colour when.
std::vector<Object> DrawStory(Random& random, int frames) {
  Identities identities(random);
  std::vector<Object> objects;
  const auto add = [&](int slot) {
    Object object;
    identities.Assign(object);
    DrawLook(random, object);
    object.appear_slot = slot;
    objects.push_back(object);
  };
  const int most = 2 + random.Pick(std::vector<int>{0, 1, 1, 2, 2, 2, 3, 3, 3});
  const int at_first = random.Chance(0.12f) ? 0 : random.Between(1, std::min(4, most));
  for (int i = 0; i < at_first; ++i) add(kBeforeTheFilm);
  for (int slot : DrawEventSlots(random, frames)) {
    std::vector<size_t> may_leave;
    std::vector<size_t> may_recolor;
    int visible = 0;
    for (size_t i = 0; i < objects.size(); ++i) {
      const Object& o = objects[i];
      if (!ThereAt(o, slot)) continue;
      ++visible;
      if (slot - o.appear_slot < kMinAge) continue;
      may_leave.push_back(i);
      if (IsShape(o.name) && o.recolor_slot == kNever) may_recolor.push_back(i);
    }
    const bool may_appear = visible < most && static_cast<int>(objects.size()) < kMaxObjects;
    const int appear_weight = may_appear ? (visible <= 2 ? 70 : 45) : 0;
    const int leave_weight = may_leave.empty() ? 0 : (visible <= 1 ? 12 : 32);
    const int recolor_weight = may_recolor.empty() ? 0 : 30;
    const int total = appear_weight + leave_weight + recolor_weight;
    if (total == 0) continue;
    const int what = random.Below(total);
    if (what < appear_weight) {
      add(slot);
    } else if (what < appear_weight + leave_weight) {
      objects[random.Pick(may_leave)].leave_slot = slot;
    } else {
      Object& o = objects[random.Pick(may_recolor)];
      const int color = identities.FreeColor(o.name);
      if (color == kNoColor) continue;
      o.recolor_slot = slot;
      o.recolor_to = color;
    }
  }
  return objects;
}

bool Overlap(int from_a, int to_a, int from_b, int to_b) {
  return std::max(from_a, from_b) < std::min(to_a, to_b);
}

// Marks who moves: at most kMaxMovers whose stays overlap.
std::vector<bool> DrawMovers(Random& random, const std::vector<Object>& objects, int frames) {
  std::vector<bool> moves(objects.size(), false);
  if (!random.Chance(0.85f)) return moves;
  for (size_t i = 0; i < objects.size(); ++i) {
    const Object& o = objects[i];
    if (std::min(o.leave_slot, frames) - o.appear_slot < kMinMoverLife || !random.Chance(0.7f)) {
      continue;
    }
    int beside = 0;
    for (size_t j = 0; j < i; ++j) {
      const Object& other = objects[j];
      beside +=
          moves[j] && Overlap(o.appear_slot, o.leave_slot, other.appear_slot, other.leave_slot);
    }
    moves[i] = beside < kMaxMovers;
  }
  return moves;
}

// Walks to and fro over `leg` intervals from `slot` on, at rest before `start` and after `stop`.
// The first turn comes after leg - phase intervals of motion; `forward` says which way first.
struct Patrol {
  int leg, phase, start, stop;
  bool forward;
  bool vertical;
  float speed;
};

// Where along the way a patrol is when it starts, relative to its lower end.
float PatrolStart(const Patrol& p) {
  return static_cast<float>(p.forward ? p.phase : p.leg - p.phase) * p.speed;
}

std::vector<Leg> PatrolLegs(const Patrol& p, int slot, float x, float y, int end) {
  std::vector<Leg> legs;
  float at = 0;
  const auto add = [&](int from, float velocity) {
    legs.push_back({from, p.vertical ? x : x + at, p.vertical ? y + at : y,
                    p.vertical ? 0 : velocity, p.vertical ? velocity : 0});
  };
  const int stop = std::min(p.stop, end);
  int now = p.start;
  if (slot < now) add(slot, 0);
  int left = p.leg - p.phase;
  float velocity = p.forward ? p.speed : -p.speed;
  while (now < stop) {
    add(now, velocity);
    const int run = std::min(left, stop - now);
    at += velocity * static_cast<float>(run);
    now += run;
    left = p.leg;
    velocity = -velocity;
  }
  add(now, 0);
  return legs;
}

// REQUIRES: room >= 12 * shortest pixels.
Patrol DrawPatrol(Random& random, float room, int shortest, float fastest, int slot, int end,
                  bool vertical) {
  Patrol p;
  p.vertical = vertical;
  p.speed = random.Range(12, std::min(fastest, room / static_cast<float>(shortest)));
  const int longest = std::max(shortest, static_cast<int>(room / p.speed));
  p.leg = random.Between(shortest, std::min(longest, shortest + 12));
  p.phase = random.Below(p.leg);
  p.forward = random.Chance(0.5f);
  p.start = slot;
  p.stop = end;
  const int life = end - slot;
  if (life >= 9 && random.Chance(0.25f)) p.start = slot + random.Between(3, life - 5);
  if (end - p.start >= 9 && random.Chance(0.3f)) p.stop = random.Between(p.start + 4, end - 4);
  return p;
}

struct Span {
  float low, high;
};

// A centre for an object at rest: in four of five cases well inside a random cell of the 3x3 grid.
Point DrawCenter(Random& random, const Span& xs, const Span& ys) {
  const auto draw = [&](const Span& span, float extent, int cell, bool in_cell) {
    const float third = extent / 3;
    const float inset = extent * 0.045f;
    const float low = std::max(span.low, third * static_cast<float>(cell) + inset);
    const float high = std::min(span.high, third * static_cast<float>(cell + 1) - inset);
    return in_cell && low < high ? random.Range(low, high) : random.Range(span.low, span.high);
  };
  const int cell = random.Below(9);
  const bool in_cell = random.Chance(0.8f);
  const float x = draw(xs, kCanvasWidth, cell % 3, in_cell);
  const float y = draw(ys, kCanvasHeight, cell / 3, in_cell);
  return {x, y};
}

// Everything the square of an object ever covers.
Box Swept(const Object& object) {
  Box box = {1e9f, 1e9f, -1e9f, -1e9f};
  const float half = object.size / 2;
  for (const Leg& leg : object.legs) {  // ends at rest, so the beginnings are all the extremes
    box.x0 = std::min(box.x0, leg.x - half);
    box.y0 = std::min(box.y0, leg.y - half);
    box.x1 = std::max(box.x1, leg.x + half);
    box.y1 = std::max(box.y1, leg.y + half);
  }
  return box;
}

bool Crowded(const Object& a, const Object& b) {
  if (!Overlap(a.appear_slot, a.leave_slot, b.appear_slot, b.leave_slot)) return false;
  const Box p = Swept(a);
  const Box q = Swept(b);
  const float width = std::min(p.x1, q.x1) - std::max(p.x0, q.x0);
  const float height = std::min(p.y1, q.y1) - std::max(p.y0, q.y0);
  const float smaller = std::min(a.size, b.size);
  return width > 0 && height > 0 && width * height > kMaxOverlap * smaller * smaller;
}

// Gives every object its way over the canvas; false if no room was found.
bool PlaceAll(Random& random, Scene& scene, const std::vector<bool>& moves, const Span& pan_x,
              const Span& pan_y) {
  constexpr int kTries = 40;
  for (size_t i = 0; i < scene.objects.size(); ++i) {
    Object& o = scene.objects[i];
    const int end = std::min(o.leave_slot, scene.frames);
    bool placed = false;
    for (int attempt = 0; attempt < kTries && !placed; ++attempt) {
      const float edge = o.size / 2 + kMargin;
      const Span xs = {edge + pan_x.high, kCanvasWidth - edge + pan_x.low};
      const Span ys = {edge + pan_y.high, kCanvasHeight - edge + pan_y.low};
      if (xs.low >= xs.high || ys.low >= ys.high) return false;
      const Point center = DrawCenter(random, xs, ys);
      // Crowded canvases give up motion before they give up the film.
      if (moves[i] && attempt < kTries * 3 / 4) {
        const bool vertical = random.Chance(0.45f);
        const float room = vertical ? ys.high - ys.low : xs.high - xs.low;
        const Patrol patrol = DrawPatrol(random, room, kMinLeg, 26, o.appear_slot, end, vertical);
        const float reach = static_cast<float>(patrol.leg) * patrol.speed;
        const float low = (vertical ? ys : xs).low;
        const float start =
            low + random.Unit() * std::max(0.0f, room - reach) + PatrolStart(patrol);
        o.legs = PatrolLegs(patrol, o.appear_slot, vertical ? center.x : start,
                            vertical ? start : center.y, end);
        // Most films end in the middle of a leg: what moves can then be told.
        if (o.leave_slot == kNever && !SteadyAt(o.legs, scene.frames - 1) && random.Chance(0.7f)) {
          continue;
        }
      } else {
        o.legs = {{o.appear_slot, center.x, center.y, 0, 0}};
      }
      placed = true;
      for (size_t j = 0; j < i && placed; ++j) placed = !Crowded(o, scene.objects[j]);
    }
    if (!placed) return false;
  }
  return true;
}

// The camera's way: to and fro within [-reach / 2, reach / 2] along one axis.
void DrawPan(Random& random, Scene& scene, Span& pan_x, Span& pan_y) {
  const bool vertical = random.Chance(0.4f);
  const float room = vertical ? 110.0f : 190.0f;
  const Patrol patrol =
      DrawPatrol(random, room, kMinCameraLeg, 24, kBeforeTheFilm, scene.frames, vertical);
  const float reach = static_cast<float>(patrol.leg) * patrol.speed;
  const float start = PatrolStart(patrol) - reach / 2;
  scene.camera =
      PatrolLegs(patrol, kBeforeTheFilm, vertical ? 0 : start, vertical ? start : 0, scene.frames);
  (vertical ? pan_y : pan_x) = {-reach / 2, reach / 2};
}

bool DrawScene(Random& random, Scene& scene) {
  scene.pans = random.Chance(0.27f);
  Span pan_x = {0, 0};
  Span pan_y = {0, 0};
  scene.camera = {{kBeforeTheFilm, 0, 0, 0, 0}};
  if (scene.pans) DrawPan(random, scene, pan_x, pan_y);
  scene.objects = DrawStory(random, scene.frames);
  if (scene.objects.empty()) return false;
  std::vector<bool> moves(scene.objects.size(), false);
  if (!scene.pans) moves = DrawMovers(random, scene.objects, scene.frames);
  return PlaceAll(random, scene, moves, pan_x, pan_y);
}

Point PositionAt(const std::vector<Leg>& legs, double t) {
  const double slots = t / kSampleSeconds - 0.5;
  const Leg* leg = &legs.front();
  for (const Leg& next : legs) {
    if (next.slot <= slots) leg = &next;
  }
  const auto since = static_cast<float>(std::max(0.0, slots - leg->slot));
  return {leg->x + leg->vx * since, leg->y + leg->vy * since};
}

// 0 well before the slot, 1 well after it.
float Fade(int slot, double t) {
  const double since = t - SlotTime(slot);
  return static_cast<float>(std::clamp(0.5 + since / (2 * kFadeSeconds), 0.0, 1.0));
}

float GainAt(const Scene& scene, double t) {
  const auto turns = static_cast<float>(t) / scene.gain_period_s + scene.gain_phase;
  const float phase = turns - static_cast<float>(static_cast<int>(turns));
  const float wave = phase < 0.5f ? 4 * phase - 1 : 3 - 4 * phase;
  return scene.gain + scene.gain_drift * wave;
}

}  // namespace

Scene MakeScene(uint64_t seed, const SceneOptions& options) {
  if (options.frames < kMinFrames || options.frames > kMaxFrames) {
    throw std::invalid_argument("[world] frames must be in " + std::to_string(kMinFrames) + ".." +
                                std::to_string(kMaxFrames) + ", got " +
                                std::to_string(options.frames));
  }
  Random random(seed * 0xD1342543DE82EF95ull + static_cast<uint64_t>(options.frames));
  Scene scene;
  scene.frames = options.frames;
  // One story in a few finds no room on the canvas; a story of one object always does.
  while (!DrawScene(random, scene)) {
  }
  scene.gain = random.Range(0.78f, 1.17f);
  scene.gain_drift = random.Range(0, 0.03f);
  scene.gain_period_s = random.Range(8, 24);
  scene.gain_phase = random.Unit();
  scene.texture = MakeTexture(random, scene.pans ? Detail::kDetailed : Detail::kAny);
  return scene;
}

FrameDraw DrawAt(const Scene& scene, double t) {
  FrameDraw frame;
  const float span = scene.pans ? kPanSpan : 1.0f;
  const float width = kTextureWidth / span;
  const float height = kTextureHeight / span;
  const Point camera = PositionAt(scene.camera, t);
  frame.tex_x0 = (kTextureWidth - width) / 2 + camera.x * (width / kCanvasWidth);
  frame.tex_y0 = (kTextureHeight - height) / 2 + camera.y * (height / kCanvasHeight);
  frame.tex_x1 = frame.tex_x0 + width;
  frame.tex_y1 = frame.tex_y0 + height;
  frame.gain = GainAt(scene, t);
  for (const Object& o : scene.objects) {
    float opacity = o.appear_slot == kBeforeTheFilm ? 1 : Fade(o.appear_slot, t);
    if (o.leave_slot != kNever) opacity = std::min(opacity, 1 - Fade(o.leave_slot, t));
    if (opacity <= 0) continue;
    const bool recolored = o.recolor_slot != kNever && t >= SlotTime(o.recolor_slot);
    const int color = recolored ? o.recolor_to : o.color;
    const Point at = PositionAt(o.legs, t);
    const Tint tint = TintOf(o.name, color);
    Draw draw;
    draw.cx = at.x - camera.x;
    draw.cy = at.y - camera.y;
    draw.size = o.size;
    draw.opacity = opacity;
    draw.r = tint.r;
    draw.g = tint.g;
    draw.b = tint.b;
    // The level whose texels are just larger than pixels: soft, but never aliased.
    draw.mip = o.size >= 128 ? 0 : o.size >= 64 ? 1 : 2;
    draw.sprite = static_cast<uint16_t>(SpriteOf(o.name, color));
    draw.name = static_cast<uint8_t>(o.name);
    draw.color = static_cast<uint8_t>(color == kNoColor ? 255 : color);
    frame.draws.push_back(draw);
  }
  return frame;
}

bool VisibleAt(const Object& object, int frame) {
  return object.appear_slot < frame && frame <= object.leave_slot;
}

int ColorAt(const Object& object, int frame) {
  return object.recolor_slot < frame ? object.recolor_to : object.color;
}

const Leg& LegAt(const std::vector<Leg>& legs, int frame) {
  const Leg* leg = &legs.front();
  for (const Leg& next : legs) {
    if (next.slot < frame) leg = &next;
  }
  return *leg;
}

bool SteadyAt(const std::vector<Leg>& legs, int frame) {
  return LegAt(legs, frame).slot < frame - kSteadyIntervals;
}

Point CenterAt(const Scene& scene, const Object& object, int frame) {
  const double t = frame * kSampleSeconds;
  const Point at = PositionAt(object.legs, t);
  const Point camera = PositionAt(scene.camera, t);
  return {at.x - camera.x, at.y - camera.y};
}

}  // namespace sluice::world
