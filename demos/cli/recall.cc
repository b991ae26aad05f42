#include "demos/cli/recall.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <map>
#include <memory>
#include <utility>

#include "demos/cli/atlas.h"
#include "demos/cli/clips.h"
#include "demos/cli/methods.h"
#include "demos/world/questions.h"
#include "demos/world/render.h"
#include "runtime/error.h"
#include "streaming/pipeline.h"

namespace sluice::cli {
namespace {

constexpr std::array<const char*, 3> kModes = {"recall", "window only", "everything"};

// The scene with everything at rest from the end of its film on, `frames` long.
world::Scene StandStill(world::Scene scene, int frames) {
  const auto rest = [&](std::vector<world::Leg>& legs) {
    const world::Leg& last = legs.back();
    const int slot = scene.frames;
    const auto passed = static_cast<float>(slot - last.slot);
    legs.push_back({slot, last.x + last.vx * passed, last.y + last.vy * passed, 0, 0});
  };
  for (world::Object& object : scene.objects) rest(object.legs);
  rest(scene.camera);
  scene.frames = frames;
  return scene;
}

// Questions to which what is visible at the end is no help.
std::vector<world::Question> AboutThePast(const world::Scene& scene, int frame, uint64_t seed) {
  constexpr int kAll = 64;
  std::vector<world::Question> questions = world::AskAll(scene, frame, seed, kAll);
  std::erase_if(questions, [](const world::Question& q) {
    switch (q.kind) {
      case world::Kind::kFirst:
        return false;
      case world::Kind::kLeft:
        return q.answer == "nothing left yet";
      case world::Kind::kHappened:
        return !q.answer.ends_with(" left");
      default:
        return true;
    }
  });
  return questions;
}

struct Tally {
  int64_t asked = 0, right = 0;
  double film_weight = 0;  // of the evidence, summed over answers that recalled
  double film_share = 0;   // of the frames recalled
  int64_t recalled = 0;
};

}  // namespace

Json MeasureRecall(const Engine& engine, const SessionOptions& options, const ClipSet& set,
                   std::vector<int> distances, Json head) {
  if (!options.memory) {
    throw InputError("[eval] --recall-distances compares a memory with none: add --memory");
  }
  std::sort(distances.begin(), distances.end());
  if (distances.empty() || distances.front() < 1 ||
      distances.back() > world::kMaxFrames - kRecallFilmFrames) {
    throw InputError("[eval] distances must lie in 1 to " +
                     std::to_string(world::kMaxFrames - kRecallFilmFrames) + " frames");
  }
  std::array<SessionOptions, kModes.size()> modes = {options, options, options};
  modes[1].memory->recall_blocks = 0;
  modes[2].memory.reset();
  const auto film_end = MediaTime::FromSeconds(kRecallFilmFrames * world::kSampleSeconds);

  const world::Atlas atlas = LoadAtlas();
  const auto ctx = engine.NewContext();
  // By mode, distance and kind; kind "" for all.
  std::map<std::pair<size_t, int>, std::map<std::string, Tally>> tallies;
  Progress progress;
  const int clips = set.clips * static_cast<int>(set.seeds.size());
  for (int clip = 0; clip < clips; ++clip) {
    const uint64_t seed = set.seeds[clip / set.clips];
    const Clip film = MakeClip(seed, clip % set.clips, kRecallFilmFrames);
    std::array<std::unique_ptr<Session>, kModes.size()> sessions;
    for (size_t m = 0; m < modes.size(); ++m) sessions[m] = engine.NewSession(modes[m]);
    int played = 0;
    for (const int distance : distances) {
      const int end = kRecallFilmFrames + distance;
      const world::Scene scene = StandStill(film.scene, end);
      while (played < end) {
        const int count = std::min(options.frames_per_batch, end - played);
        const std::vector<FramePtr> frames = RenderFrames(scene, atlas, played, played + count);
        for (auto& session : sessions) {
          if (!session) continue;
          try {
            Ingest(*ctx, *session, frames);
          } catch (const InputError&) {
            if (session->memory) throw;
            session.reset();  // the context is full: the table says so
          }
        }
        played += count;
        progress.Show(
            (clip + static_cast<double>(played) / (kRecallFilmFrames + distances.back())) / clips,
            std::to_string(clip) + " of " + std::to_string(clips) + " films");
      }
      for (const world::Question& question : AboutThePast(scene, end - 1, film.question_seed)) {
        for (size_t m = 0; m < modes.size(); ++m) {
          if (!sessions[m]) continue;
          const Generated answer = Ask(*ctx, *sessions[m], question.text, nullptr);
          auto& kinds = tallies[{m, distance}];
          for (Tally* tally : {&kinds[""], &kinds[std::string(world::KindName(question.kind))]}) {
            ++tally->asked;
            tally->right += answer.text == question.answer ? 1 : 0;
            if (answer.evidence.empty()) continue;
            ++tally->recalled;
            double frames = 0, of_film = 0;
            for (const Evidence& e : answer.evidence) {
              const double length =
                  (e.end.seconds() - e.begin.seconds()) / world::kSampleSeconds + 1;
              const bool in_film = e.begin < film_end;
              frames += length;
              if (in_film) of_film += length;
              if (in_film) tally->film_weight += e.weight;
            }
            tally->film_share += of_film / frames;
          }
        }
      }
    }
  }
  progress.Clear();

  Json report = std::move(head);
  report["film_frames"] = kRecallFilmFrames;
  report["methods"] = ToJson(options, MethodCounts());
  Json rows = Json::array();
  for (const auto& [key, kinds] : tallies) {
    const Tally& all = kinds.at("");
    Json row = {{"memory", kModes[key.first]}, {"distance", key.second}, {"asked", all.asked}};
    for (const auto& [kind, tally] : kinds) {
      row["right"][kind.empty() ? "all" : kind] =
          static_cast<double>(tally.right) / static_cast<double>(tally.asked);
    }
    if (all.recalled > 0) {
      row["film_frames_recalled"] = all.film_share / static_cast<double>(all.recalled);
      row["film_attention"] = all.film_weight / static_cast<double>(all.recalled);
    }
    rows.push_back(std::move(row));
  }
  report["recall"] = std::move(rows);
  return report;
}

void PrintRecall(const Json& report) {
  Table table({"memory", "frames ago", "asked", "right %", "left %", "happened %", "first %",
               "film of recalled %", "its attention %"});
  for (const Json& row : report["recall"]) {
    const auto right = [&](const char* kind) {
      return row["right"].contains(kind) ? Percent(row["right"][kind]) : "-";
    };
    const auto share = [&](const char* name) {
      return row.contains(name) ? Percent(row[name]) : "-";
    };
    table.Add({row["memory"], std::to_string(row["distance"].get<int>()),
               std::to_string(row["asked"].get<int64_t>()), right("all"), right("left"),
               right("happened"), right("first"), share("film_frames_recalled"),
               share("film_attention")});
  }
  std::printf("films of %d frames, then quiet ones\n\n%s", report["film_frames"].get<int>(),
              table.ToString().c_str());
}

}  // namespace sluice::cli
