// What can be seen in the demo world: eight shapes in eight colours and 64 named things.
// The order is part of the sprite sheet (assets/make_atlas.py) and of the trainer's feed.
#ifndef SLUICE_DEMOS_WORLD_NAMES_H_
#define SLUICE_DEMOS_WORLD_NAMES_H_

#include <cstdint>
#include <string>
#include <string_view>

namespace sluice::world {

inline constexpr int kNumShapes = 8;
inline constexpr int kNumThings = 64;
inline constexpr int kNumNames = kNumShapes + kNumThings;  // shapes come first
inline constexpr int kNumColors = 8;
inline constexpr int kNoColor = -1;
// Shapes, the same shapes in black (their outline is light, no tint can make that), things.
inline constexpr int kNumSprites = 2 * kNumShapes + kNumThings;

struct Tint {
  uint8_t r, g, b;
};

inline bool IsShape(int name) { return name < kNumShapes; }

// REQUIRES: 0 <= name < kNumNames, 0 <= color < kNumColors.
std::string_view NameText(int name);
std::string_view ColorText(int color);

// Which sprite shows an object, and what it is multiplied by. `color` is kNoColor for things.
int SpriteOf(int name, int color);
Tint TintOf(int name, int color);

// "red star" or "cat".
std::string Phrase(int name, int color);
// "a red star", "an orange star", "an apple".
std::string WithArticle(int name, int color);
// Zero to eight in words. REQUIRES: 0 <= number <= 8.
std::string_view NumberText(int number);

}  // namespace sluice::world

#endif  // SLUICE_DEMOS_WORLD_NAMES_H_
