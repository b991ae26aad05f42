#include "demos/cli/clips.h"

#include <iterator>
#include <string>
#include <utility>

#include "demos/cli/video_writer.h"
#include "demos/world/random.h"
#include "runtime/error.h"
#include "streaming/source.h"

namespace sluice::cli {
namespace {

// Keeps the scenes of `sluice eval --seed S` apart from those a trainer draws from seed S.
constexpr uint64_t kStream = 0x534C554943454556ull;

}  // namespace

Clip MakeClip(uint64_t seed, int index, int frames) {
  world::Random per_run(seed ^ kStream);
  world::Random random(per_run.Next() + static_cast<uint64_t>(index));
  if (frames == 0) frames = kClipLengths[static_cast<size_t>(index) % std::size(kClipLengths)];
  const uint64_t scene_seed = random.Next();
  return {world::MakeScene(scene_seed, {.frames = frames}), random.Next()};
}

std::vector<FramePtr> RenderFrames(const world::Scene& scene, const world::Atlas& atlas) {
  return RenderFrames(scene, atlas, 0, scene.frames);
}

std::vector<FramePtr> RenderFrames(const world::Scene& scene, const world::Atlas& atlas, int begin,
                                   int end) {
  std::vector<FramePtr> frames;
  for (int i = begin; i < end; ++i) {
    auto frame = std::make_shared<Frame>();
    frame->width = world::kCanvasWidth;
    frame->height = world::kCanvasHeight;
    frame->rgb.resize(size_t{3} * world::kCanvasWidth * world::kCanvasHeight);
    frame->index = i;
    frame->time = MediaTime::FromSeconds(i * world::kSampleSeconds);
    world::Render(scene, world::DrawAt(scene, i * world::kSampleSeconds), atlas, frame->width,
                  frame->height, frame->rgb.data());
    frames.push_back(std::move(frame));
  }
  return frames;
}

void WriteClip(const world::Scene& scene, const world::Atlas& atlas,
               const std::filesystem::path& mp4) {
  VideoWriter writer(mp4, world::kCanvasWidth, world::kCanvasHeight, kClipFps);
  std::vector<uint8_t> rgb(size_t{3} * world::kCanvasWidth * world::kCanvasHeight);
  const double seconds = scene.frames * world::kSampleSeconds;
  for (int i = 0; i < static_cast<int>(seconds * kClipFps); ++i) {
    const double t = static_cast<double>(i) / kClipFps;
    world::Render(scene, world::DrawAt(scene, t), atlas, world::kCanvasWidth, world::kCanvasHeight,
                  rgb.data());
    writer.Write(rgb);
  }
  writer.Finish();
}

std::vector<FramePtr> ReadBack(const world::Scene& scene, const world::Atlas& atlas,
                               const std::filesystem::path& mp4) {
  WriteClip(scene, atlas, mp4);
  SourceOptions options;
  options.rate.fps = 1.0 / world::kSampleSeconds;
  const auto source = Source::Open(mp4.string(), options);
  std::vector<FramePtr> frames;
  while (FramePtr frame = source->Next()) frames.push_back(std::move(frame));
  if (static_cast<int>(frames.size()) != scene.frames) {
    throw Error("[eval] wrote " + std::to_string(scene.frames) + " sampled frames to " +
                mp4.string() + ", read back " + std::to_string(frames.size()));
  }
  return frames;
}

}  // namespace sluice::cli
