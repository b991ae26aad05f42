#include "demos/world/names.h"

#include <array>

namespace sluice::world {
namespace {

constexpr std::array<std::string_view, kNumNames> kNames = {
    "circle", "cross", "diamond", "heart", "ring", "square", "star", "triangle",
    // animals
    "bee", "butterfly", "cat", "chick", "crab", "dog", "elephant", "fish", "frog", "giraffe",
    "ladybug", "octopus", "owl", "panda", "penguin", "pig", "snail", "snake", "turtle", "whale",
    // vehicles
    "airplane", "bicycle", "bus", "car", "helicopter", "rocket", "sailboat", "tractor", "train",
    "truck",
    // food
    "apple", "banana", "broccoli", "cake", "carrot", "cheese", "corn", "donut", "grape",
    "hamburger", "lemon", "mushroom", "pineapple", "pizza", "strawberry", "watermelon",
    // tools, household, plants
    "ball", "balloon", "bell", "cactus", "camera", "chair", "clock", "cup", "drum", "gift",
    "guitar", "hammer", "hat", "key", "robot", "sunflower", "tree", "umbrella"};

constexpr std::array<std::string_view, kNumColors> kColors = {"black",  "blue", "green", "orange",
                                                              "purple", "red",  "white", "yellow"};
constexpr int kBlack = 0;

constexpr std::array<Tint, kNumColors> kTints = {{{255, 255, 255},  // baked into the sprite
                                                  {40, 90, 240},
                                                  {35, 170, 60},
                                                  {255, 130, 10},
                                                  {155, 45, 205},
                                                  {225, 30, 40},
                                                  {255, 255, 255},
                                                  {255, 228, 40}}};

}  // namespace

std::string_view NameText(int name) { return kNames[static_cast<size_t>(name)]; }
std::string_view ColorText(int color) { return kColors[static_cast<size_t>(color)]; }

int SpriteOf(int name, int color) {
  if (!IsShape(name)) return kNumShapes + name;
  return color == kBlack ? kNumShapes + name : name;
}

Tint TintOf(int name, int color) {
  return IsShape(name) ? kTints[static_cast<size_t>(color)] : Tint{255, 255, 255};
}

std::string Phrase(int name, int color) {
  std::string phrase;
  if (IsShape(name)) phrase.append(ColorText(color)).append(" ");
  return phrase.append(NameText(name));
}

std::string WithArticle(int name, int color) {
  const std::string phrase = Phrase(name, color);
  const bool vowel = std::string_view("aeiou").find(phrase[0]) != std::string_view::npos;
  return (vowel ? "an " : "a ") + phrase;
}

std::string_view NumberText(int number) {
  constexpr std::array<std::string_view, 9> kNumbers = {"zero", "one", "two",   "three", "four",
                                                        "five", "six", "seven", "eight"};
  return kNumbers[static_cast<size_t>(number)];
}

}  // namespace sluice::world
