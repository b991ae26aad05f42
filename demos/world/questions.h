// Questions about a scene and their answers, as somebody who has seen the frames 0 .. last would
// give them.
#ifndef SLUICE_DEMOS_WORLD_QUESTIONS_H_
#define SLUICE_DEMOS_WORLD_QUESTIONS_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "demos/world/scene.h"

namespace sluice::world {

enum class Kind : uint8_t {
  kVisible,    // what is there now
  kCount,      // how many are there now
  kTotal,      // how many there have been
  kColor,      // of the one star, heart, ...
  kSize,       // big or small
  kWhere,      // on a 3x3 grid
  kSide,       // left or right of another
  kDirection,  // which way one moves
  kMoving,     // who moves
  kExists,     // whether something is there now
  kFirst,      // which of two appeared first
  kLast,       // who appeared last
  kLeft,       // who left last
  kHappened,   // the last appearance, departure or change of colour
  kCamera,     // whether and which way the camera moves
  kCaption,    // all of it in sentences
};
inline constexpr int kNumKinds = 16;

std::string_view KindName(Kind kind);

struct Question {
  Kind kind;
  std::string text;
  std::string answer;
};

// Up to `max_questions` questions about frame `last_frame` with the frames before it in mind, no
// two the same; one of every kind that has a clear answer, in random order, then further rounds.
// A kind is passed over where its answer would hang on a margin - a centre near a grid line, a
// motion that has lasted fewer than three intervals - and often where the answer is its commonest.
// Throws std::invalid_argument if last_frame is not in [0, scene.frames).
std::vector<Question> AskAll(const Scene& scene, int last_frame, uint64_t seed, int max_questions);

}  // namespace sluice::world

#endif  // SLUICE_DEMOS_WORLD_QUESTIONS_H_
