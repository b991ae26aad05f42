// Clips of the demo world, as pictures or as files.
#ifndef SLUICE_DEMOS_CLI_CLIPS_H_
#define SLUICE_DEMOS_CLI_CLIPS_H_

#include <cstdint>
#include <filesystem>
#include <vector>

#include "demos/world/render.h"
#include "demos/world/scene.h"
#include "vision/frame.h"

namespace sluice::cli {

inline constexpr int kClipFps = 25;

// The lengths that clips have, in turn, when none is asked for: those the bundled model is trained
// around, in frames at two a second.
inline constexpr int kClipLengths[] = {8, 12, 16, 24, 32};

// Clip `index` of an evaluation with `seed`, `frames` sampled frames long (0: kClipLengths in
// turn). Seeds of scenes are drawn from a stream of their own, apart from the trainer's.
struct Clip {
  world::Scene scene;
  uint64_t question_seed;
};
Clip MakeClip(uint64_t seed, int index, int frames);

// The sampled frames, two a second, at the world's own size: all of them, or [begin, end).
std::vector<FramePtr> RenderFrames(const world::Scene& scene, const world::Atlas& atlas);
std::vector<FramePtr> RenderFrames(const world::Scene& scene, const world::Atlas& atlas, int begin,
                                   int end);

// The same scene in continuous time as H.264 at kClipFps, half a second for every sampled frame.
void WriteClip(const world::Scene& scene, const world::Atlas& atlas,
               const std::filesystem::path& mp4);

// The sampled frames of a scene after a way through H.264 and back; writes `mp4` on the way.
std::vector<FramePtr> ReadBack(const world::Scene& scene, const world::Atlas& atlas,
                               const std::filesystem::path& mp4);

}  // namespace sluice::cli

#endif  // SLUICE_DEMOS_CLI_CLIPS_H_
