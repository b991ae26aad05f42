#include "demos/world/questions.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <iterator>
#include <optional>
#include <set>
#include <stdexcept>
#include <utility>

#include "demos/world/names.h"
#include "demos/world/random.h"

namespace sluice::world {
namespace {

constexpr float kGridMargin = 0.04f;  // of the canvas, around the lines of the 3x3 grid
constexpr float kSideMargin = 0.12f;  // of the canvas's width

constexpr std::array<std::string_view, kNumKinds> kKindNames = {
    "visible", "count",  "total", "color", "size", "where",    "side",   "direction",
    "moving",  "exists", "first", "last",  "left", "happened", "camera", "caption"};

using List = std::vector<const Object*>;

std::string Capitalized(std::string text) {
  if (text[0] >= 'a' && text[0] <= 'z') text[0] = static_cast<char>(text[0] - 'a' + 'A');
  return text;
}

class Interviewer {
 public:
  Interviewer(const Scene& scene, int frame, uint64_t seed)
      : scene_(scene), frame_(frame), random_(seed ^ 0x5155455354494F4Eull) {
    for (const Object& o : scene.objects) {
      if (o.appear_slot >= frame) continue;
      seen_.push_back(&o);
      if (VisibleAt(o, frame)) visible_.push_back(&o);
    }
    std::sort(visible_.begin(), visible_.end(), [&](const Object* a, const Object* b) {
      const std::string_view x = NameText(a->name);
      const std::string_view y = NameText(b->name);
      if (x != y) return x < y;
      return IsShape(a->name) && ColorText(Color(*a)) < ColorText(Color(*b));
    });
  }

  std::vector<Question> Ask(int max_questions) {
    constexpr int kRounds = 4;
    std::vector<Kind> kinds;
    for (int k = 0; k < kNumKinds; ++k) kinds.push_back(static_cast<Kind>(k));
    random_.Shuffle(kinds);
    // Kinds with one question to a frame, and those that were passed over, are not tried again.
    std::set<Kind> done;
    std::vector<Question> questions;
    for (int round = 0; round < kRounds; ++round) {
      for (Kind kind : kinds) {
        if (static_cast<int>(questions.size()) >= max_questions) return questions;
        if (done.count(kind) != 0) continue;
        std::optional<Question> question = AskOne(kind);
        if (!question || AboutTheWhole(kind)) done.insert(kind);
        if (!question) continue;
        const bool again = std::any_of(questions.begin(), questions.end(),
                                       [&](const Question& q) { return q.text == question->text; });
        if (!again) questions.push_back(std::move(*question));
      }
    }
    return questions;
  }

 private:
  using Asked = std::optional<Question>;

  static bool AboutTheWhole(Kind kind) {
    switch (kind) {
      case Kind::kColor:
      case Kind::kSize:
      case Kind::kWhere:
      case Kind::kSide:
      case Kind::kDirection:
      case Kind::kExists:
      case Kind::kFirst:
        return false;
      default:
        return true;
    }
  }

  Asked AskOne(Kind kind) {
    switch (kind) {
      case Kind::kVisible:
        return Question{kind, Either("What is visible?", "What can you see?"), Listed(visible_)};
      case Kind::kCount:
        return Question{kind, Either("How many things are there now?", "How many are visible?"),
                        std::string(NumberText(static_cast<int>(visible_.size())))};
      case Kind::kTotal:
        return Question{kind, "How many different things have appeared so far?",
                        std::string(NumberText(static_cast<int>(seen_.size())))};
      case Kind::kColor:
        return AskColor();
      case Kind::kSize:
        return AskSize();
      case Kind::kWhere:
        return AskWhere();
      case Kind::kSide:
        return AskSide();
      case Kind::kDirection:
        return AskDirection();
      case Kind::kMoving:
        return AskMoving();
      case Kind::kExists:
        return AskExists();
      case Kind::kFirst:
        return AskFirst();
      case Kind::kLast:
        return AskLast();
      case Kind::kLeft:
        return AskLeft();
      case Kind::kHappened:
        return AskHappened();
      case Kind::kCamera:
        return AskCamera();
      case Kind::kCaption:
        return AskCaption();
    }
    return std::nullopt;
  }

  // The first wording twice as often as the second.
  std::string Either(const char* usual, const char* other) {
    return random_.Below(3) < 2 ? usual : other;
  }

  int Color(const Object& o) const { return ColorAt(o, frame_); }
  std::string Name(const Object& o) const { return Phrase(o.name, Color(o)); }
  std::string One(const Object& o) const { return WithArticle(o.name, Color(o)); }

  // "a cat, a dog and a red star"; nothing is "nothing".
  std::string Listed(const List& objects) const {
    if (objects.empty()) return "nothing";
    std::string text;
    for (size_t i = 0; i < objects.size(); ++i) {
      if (i > 0) text += i + 1 == objects.size() ? " and " : ", ";
      text += One(*objects[i]);
    }
    return text;
  }

  bool Recolored(const Object& o) const { return o.recolor_slot < frame_; }

  bool CameraSteady() const { return SteadyAt(scene_.camera, frame_); }
  bool CameraStill() const {
    const Leg& leg = LegAt(scene_.camera, frame_);
    return CameraSteady() && leg.vx == 0 && leg.vy == 0;
  }
  bool Steady(const Object& o) const { return VisibleAt(o, frame_) && SteadyAt(o.legs, frame_); }
  bool AllSteady() const {
    return CameraSteady() && std::all_of(visible_.begin(), visible_.end(),
                                         [&](const Object* o) { return Steady(*o); });
  }
  bool Moves(const Object& o) const {
    const Leg& leg = LegAt(o.legs, frame_);
    return leg.vx != 0 || leg.vy != 0;
  }
  List Movers() const {
    List movers;
    std::copy_if(visible_.begin(), visible_.end(), std::back_inserter(movers),
                 [&](const Object* o) { return Moves(*o); });
    return movers;
  }
  static std::string Heading(const Leg& leg) {
    if (leg.vx != 0) return leg.vx < 0 ? "left" : "right";
    return leg.vy < 0 ? "up" : "down";
  }

  Asked AskColor() {
    List alone;
    for (const Object* o : visible_) {
      if (!IsShape(o->name)) continue;
      const auto same = std::count_if(visible_.begin(), visible_.end(),
                                      [&](const Object* p) { return p->name == o->name; });
      if (same == 1) alone.push_back(o);
    }
    if (alone.empty()) return std::nullopt;
    const Object& o = *random_.Pick(alone);
    return Question{Kind::kColor, "What color is the " + std::string(NameText(o.name)) + "?",
                    std::string(ColorText(Color(o)))};
  }

  Asked AskSize() {
    if (visible_.empty()) return std::nullopt;
    const bool want_big = random_.Chance(0.55f);
    List matching;
    std::copy_if(visible_.begin(), visible_.end(), std::back_inserter(matching),
                 [&](const Object* o) { return o->big == want_big; });
    const Object& o = *random_.Pick(matching.empty() ? visible_ : matching);
    return Question{Kind::kSize, "Is the " + Name(o) + " big or small?", o.big ? "big" : "small"};
  }

  // 0, 1 or 2, or nothing within the margin of a line.
  static std::optional<int> Third(float at, float extent) {
    const float share = at / extent;
    if (std::abs(share - 1.0f / 3) < kGridMargin || std::abs(share - 2.0f / 3) < kGridMargin) {
      return std::nullopt;
    }
    return share < 1.0f / 3 ? 0 : share < 2.0f / 3 ? 1 : 2;
  }

  Asked AskWhere() {
    constexpr std::array<const char*, 9> kCells = {"top left",    "top",    "top right",
                                                   "left",        "center", "right",
                                                   "bottom left", "bottom", "bottom right"};
    std::vector<std::pair<const Object*, int>> clear;
    for (const Object* o : visible_) {
      const Point at = CenterAt(scene_, *o, frame_);
      const auto column = Third(at.x, kCanvasWidth);
      const auto row = Third(at.y, kCanvasHeight);
      if (column && row) clear.emplace_back(o, *row * 3 + *column);
    }
    if (clear.empty()) return std::nullopt;
    const auto& [o, cell] = random_.Pick(clear);
    return Question{Kind::kWhere, "Where is the " + Name(*o) + "?",
                    kCells[static_cast<size_t>(cell)]};
  }

  Asked AskSide() {
    std::vector<std::pair<const Object*, const Object*>> pairs;
    for (const Object* a : visible_) {
      for (const Object* b : visible_) {
        const float distance = CenterAt(scene_, *a, frame_).x - CenterAt(scene_, *b, frame_).x;
        if (std::abs(distance) >= kSideMargin * kCanvasWidth) pairs.emplace_back(a, b);
      }
    }
    if (pairs.empty()) return std::nullopt;
    const auto& [a, b] = random_.Pick(pairs);
    const bool left = CenterAt(scene_, *a, frame_).x < CenterAt(scene_, *b, frame_).x;
    return Question{Kind::kSide,
                    "Is the " + Name(*a) + " to the left or to the right of the " + Name(*b) + "?",
                    left ? "to the left" : "to the right"};
  }

  Asked AskDirection() {
    if (!CameraStill()) return std::nullopt;
    List moving;
    List resting;
    for (const Object* o : visible_) {
      if (Steady(*o)) (Moves(*o) ? moving : resting).push_back(o);
    }
    if (moving.empty() && (resting.empty() || !random_.Chance(0.15f))) return std::nullopt;
    const bool rest = moving.empty() || (!resting.empty() && random_.Chance(0.2f));
    const Object& o = *random_.Pick(rest ? resting : moving);
    return Question{Kind::kDirection, "Which way is the " + Name(o) + " moving?",
                    rest ? "it is not moving" : Heading(LegAt(o.legs, frame_))};
  }

  Asked AskMoving() {
    if (!AllSteady() || !CameraStill() || visible_.empty()) return std::nullopt;
    const List movers = Movers();
    if (movers.empty() && !random_.Chance(0.3f)) return std::nullopt;
    return Question{Kind::kMoving, "What is moving?", Listed(movers)};
  }

  // Half of the answers are "no", and half of those are about something that was nearly there.
  Asked AskExists() {
    if (random_.Chance(0.55f)) {
      if (visible_.empty()) return std::nullopt;
      return Exists(One(*random_.Pick(visible_)), true);
    }
    std::set<std::string> present;
    for (const Object* o : visible_) present.insert(One(*o));
    if (random_.Chance(0.5f)) {
      std::vector<std::string> near;
      for (const Object* o : seen_) {
        near.push_back(One(*o));
        if (!IsShape(o->name)) continue;
        near.push_back(WithArticle(o->name, o->color));
        near.push_back(WithArticle(o->name, random_.Below(kNumColors)));
      }
      near.erase(std::remove_if(near.begin(), near.end(),
                                [&](const std::string& n) { return present.count(n) != 0; }),
                 near.end());
      if (!near.empty()) return Exists(random_.Pick(near), false);
    }
    for (;;) {
      const bool shape = random_.Chance(0.5f);
      const int name = shape ? random_.Below(kNumShapes) : kNumShapes + random_.Below(kNumThings);
      const std::string absent = WithArticle(name, shape ? random_.Below(kNumColors) : kNoColor);
      if (present.count(absent) == 0) return Exists(absent, false);
    }
  }
  static Question Exists(const std::string& what, bool yes) {
    return {Kind::kExists, "Is there " + what + "?", yes ? "yes" : "no"};
  }

  Asked AskFirst() {
    std::vector<std::pair<const Object*, const Object*>> pairs;
    for (const Object* a : seen_) {
      for (const Object* b : seen_) {
        if (a->appear_slot != b->appear_slot && !Recolored(*a) && !Recolored(*b)) {
          pairs.emplace_back(a, b);
        }
      }
    }
    if (pairs.empty()) return std::nullopt;
    const auto& [a, b] = random_.Pick(pairs);
    return Question{Kind::kFirst,
                    "Which appeared first, the " + Name(*a) + " or the " + Name(*b) + "?",
                    "the " + Name(a->appear_slot < b->appear_slot ? *a : *b)};
  }

  Asked AskLast() {
    const Object* last = nullptr;
    for (const Object* o : seen_) {
      if (o->appear_slot > (last ? last->appear_slot : kBeforeTheFilm)) last = o;
    }
    if (!last || Recolored(*last)) return std::nullopt;
    return Question{Kind::kLast, "What appeared last?", One(*last)};
  }

  Asked AskLeft() {
    const Object* last = nullptr;
    for (const Object* o : seen_) {
      if (o->leave_slot < frame_ && (!last || o->leave_slot > last->leave_slot)) last = o;
    }
    if (!last && !random_.Chance(0.15f)) return std::nullopt;
    return Question{Kind::kLeft, "What left last?", last ? One(*last) : "nothing left yet"};
  }

  Asked AskHappened() {
    int when = kBeforeTheFilm;
    std::string what = "nothing changed";
    const auto consider = [&](int slot, const std::string& event) {
      if (slot <= when || slot >= frame_) return;
      when = slot;
      what = event;
    };
    for (const Object* o : seen_) {
      const auto same = std::count_if(seen_.begin(), seen_.end(),
                                      [&](const Object* p) { return p->name == o->name; });
      consider(o->appear_slot, WithArticle(o->name, o->color) + " appeared");
      consider(o->leave_slot, One(*o) + " left");
      if (o->recolor_slot == kNever) continue;
      const std::string before =
          same == 1 ? std::string(NameText(o->name)) : Phrase(o->name, o->color);
      consider(o->recolor_slot,
               "the " + before + " turned " + std::string(ColorText(o->recolor_to)));
    }
    if (when == kBeforeTheFilm && !random_.Chance(0.3f)) return std::nullopt;
    return Question{Kind::kHappened, "What changed last?", what};
  }

  Asked AskCamera() {
    if (!CameraSteady()) return std::nullopt;
    const bool still = CameraStill();
    if (still && !random_.Chance(0.2f)) return std::nullopt;
    return Question{Kind::kCamera, "Is the camera moving?",
                    still ? "no" : "yes, " + CameraHeading()};
  }
  std::string CameraHeading() const {
    const std::string heading = Heading(LegAt(scene_.camera, frame_));
    return heading == "left" || heading == "right" ? "to the " + heading : heading;
  }

  Asked AskCaption() {
    if (!AllSteady()) return std::nullopt;
    std::string text = Capitalized(Listed(visible_)) + ".";
    for (const Object* o : Movers()) {
      text += " The " + Name(*o) + " is moving " + Heading(LegAt(o->legs, frame_)) + ".";
    }
    if (!CameraStill()) {
      text += " The camera is moving " + Heading(LegAt(scene_.camera, frame_)) + ".";
    }
    return Question{Kind::kCaption, Either("Describe the video.", "What is happening?"), text};
  }

  const Scene& scene_;
  const int frame_;
  Random random_;
  List seen_;     // everything that has appeared, whether it is still there or not
  List visible_;  // by noun, then colour
};

}  // namespace

std::string_view KindName(Kind kind) { return kKindNames[static_cast<size_t>(kind)]; }

std::vector<Question> AskAll(const Scene& scene, int last_frame, uint64_t seed, int max_questions) {
  if (last_frame < 0 || last_frame >= scene.frames) {
    throw std::invalid_argument("[world] last_frame must be in 0.." +
                                std::to_string(scene.frames - 1) + ", got " +
                                std::to_string(last_frame));
  }
  return Interviewer(scene, last_frame, seed).Ask(max_questions);
}

}  // namespace sluice::world
