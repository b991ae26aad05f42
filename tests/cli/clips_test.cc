#include "demos/cli/clips.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "demos/cli/atlas.h"
#include "demos/cli/video_writer.h"
#include "runtime/error.h"
#include "streaming/source.h"

namespace sluice::cli {
namespace {

TEST(ClipsTest, SameSeedMakesTheSameClipAndOthersDiffer) {
  const Clip clip = MakeClip(7, 3, 0), again = MakeClip(7, 3, 0);
  EXPECT_EQ(clip.scene.texture, again.scene.texture);
  EXPECT_EQ(clip.question_seed, again.question_seed);
  EXPECT_NE(clip.scene.texture, MakeClip(7, 4, 0).scene.texture);
  EXPECT_NE(clip.scene.texture, MakeClip(8, 3, 0).scene.texture);
}

TEST(ClipsTest, NeighbouringSeedsShareNoClip) {
  // Clip i of seed s must not be clip i - 1 of seed s + 1, or two evaluations would overlap.
  for (int i = 1; i < 20; ++i) {
    EXPECT_NE(MakeClip(7, i, 8).question_seed, MakeClip(8, i - 1, 8).question_seed);
  }
}

TEST(ClipsTest, LengthsTakeTurnsUnlessOneIsAskedFor) {
  EXPECT_EQ(MakeClip(1, 0, 0).scene.frames, kClipLengths[0]);
  EXPECT_EQ(MakeClip(1, 1, 0).scene.frames, kClipLengths[1]);
  EXPECT_EQ(MakeClip(1, 0, 20).scene.frames, 20);
}

TEST(ClipsTest, VideoReadBackShowsTheRenderedFramesAtTheirTimes) {
  const world::Atlas atlas = LoadAtlas();
  const Clip clip = MakeClip(11, 0, 8);
  const auto mp4 = std::filesystem::path(::testing::TempDir()) / "clips_test.mp4";
  WriteClip(clip.scene, atlas, mp4);
  const std::vector<FramePtr> rendered = RenderFrames(clip.scene, atlas);

  SourceOptions options;
  options.rate.fps = 2;
  const auto source = Source::Open(mp4.string(), options);
  size_t count = 0;
  while (const FramePtr frame = source->Next()) {
    ASSERT_LT(count, rendered.size());
    const Frame& expected = *rendered[count];
    // The clip has 25 frames a second: odd samples fall between two of them.
    EXPECT_NEAR(frame->time.seconds(), expected.time.seconds(), 0.021);
    ASSERT_EQ(frame->rgb.size(), expected.rgb.size());
    double difference = 0;
    for (size_t i = 0; i < frame->rgb.size(); ++i) {
      difference += std::abs(int{frame->rgb[i]} - int{expected.rgb[i]});
    }
    // Chroma is halved and quantised; a wrong frame or swapped colours differ by far more.
    EXPECT_LT(difference / static_cast<double>(frame->rgb.size()), 4.0) << "frame " << count;
    ++count;
  }
  EXPECT_EQ(count, rendered.size());
  std::filesystem::remove(mp4);
}

TEST(VideoWriterTest, UnwritablePathIsAnErrorThatNamesIt) {
  const std::string path = "/nonexistent/directory/clip.mp4";
  try {
    VideoWriter writer(path, 64, 64, 25);
    const std::vector<uint8_t> rgb(64 * 64 * 3, 90);
    for (int i = 0; i < 4; ++i) writer.Write(rgb);
    writer.Finish();
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(path), std::string::npos) << error.what();
  }
}

TEST(VideoWriterTest, FrameOfAnotherSizeIsRefused) {
  const auto mp4 = std::filesystem::path(::testing::TempDir()) / "video_writer_test.mp4";
  VideoWriter writer(mp4, 64, 64, 25);
  EXPECT_THROW(writer.Write(std::vector<uint8_t>(64 * 63 * 3)), Error);
  EXPECT_THROW(VideoWriter(mp4, 62, 64, 25), Error);
  std::filesystem::remove(mp4);
}

}  // namespace
}  // namespace sluice::cli
