#include "streaming/session_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <random>

#include "compression/registry.h"
#include "runtime/archive.h"
#include "runtime/error.h"
#include "streaming/pipeline.h"
#include "tests/support/temporary_directory.h"
#include "tests/support/tiny_stream.h"

namespace sluice {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

std::vector<FramePtr> NoiseFrames(int first, int count) {
  std::vector<FramePtr> frames;
  for (int i = first; i < first + count; ++i) frames.push_back(NoiseFrame(i, 7, 74 * 74));
  return frames;
}

class SessionFileTest : public testing::Test {
 protected:
  static SessionOptions Options() {
    SessionOptions options;
    options.system_prompt = "Be brief.";
    options.duplicate_threshold = 1;
    options.cacher = StcCacherOptions{.interval = 4};
    options.generate.max_new_tokens = 8;
    options.generate.stop_strings = {"never seen"};
    return options;
  }
  std::vector<int32_t> Answer(Session& session) {
    return Ask(*ctx_, session, "What is there?", nullptr).ids;
  }
  void Saved(const SessionOptions& options) {
    const auto session = engine_.NewSession(options);
    Ingest(*ctx_, *session, NoiseFrames(0, 5));
    Answer(*session);
    SaveSession(*ctx_, *session, file_);
  }

  TemporaryDirectory directory_;
  const std::filesystem::path file_ = directory_.path() / "stream";
  Engine engine_{TinyOptions()};
  std::unique_ptr<ExecContext> ctx_ = engine_.NewContext();
};

// Saves in the middle of everything: of the cacher's schedule, with tokens that wait, with turns.
void GoesOn(const Engine& engine, const SessionOptions& options, const std::filesystem::path& file,
            int frames) {
  const auto ctx = engine.NewContext();
  const auto answer = [&](Session& session) {
    return Ask(*ctx, session, "What is there?", nullptr).ids;
  };
  const auto session = engine.NewSession(options);
  for (int i = 0; i < frames; i += 5) {
    Ingest(*ctx, *session, NoiseFrames(i, 5));
    if (i == 5) answer(*session);
  }
  EXPECT_EQ(session->cache.gone() > 0, options.memory.has_value());
  SaveSession(*ctx, *session, file);
  const Engine other(TinyOptions());
  const auto loaded =
      LoadSession(*ctx, other, file, options.memory ? options.memory->store : BlockStoreOptions());
  EXPECT_EQ(loaded->frames_seen, session->frames_seen);
  EXPECT_EQ(loaded->visual_tokens, session->visual_tokens);
  EXPECT_EQ(loaded->last_time, session->last_time);
  EXPECT_EQ(loaded->transcript.size(), session->transcript.size());
  EXPECT_EQ(loaded->waiting.size(), session->waiting.size());
  EXPECT_EQ(loaded->cache.length(), session->cache.length());
  for (int round = 0; round < 2; ++round) {
    EXPECT_EQ(answer(*loaded), answer(*session));
    for (Session* one : {session.get(), loaded.get()}) {
      Ingest(*ctx, *one, NoiseFrames(frames + 5 * round, 5));
    }
  }
  EXPECT_EQ(answer(*loaded), answer(*session));
  EXPECT_EQ(loaded->SizeBytes(), session->SizeBytes());
  EXPECT_EQ(loaded->reuse->counts().fresh, session->reuse->counts().fresh);
  EXPECT_EQ(loaded->duplicates->duplicates(), session->duplicates->duplicates());
}

TEST_F(SessionFileTest, AStreamGoesOnAsIfNothingHadHappened) {
  for (const PyramidMode mode : {PyramidMode::kOff, PyramidMode::kQuestion, PyramidMode::kReplay,
                                 PyramidMode::kQueryFree, PyramidMode::kProbe}) {
    for (const CompressorEntry& entry : TokenCompressors()) {
      SCOPED_TRACE(std::string(Name(mode)) + " " + std::string(entry.name));
      SessionOptions options = Options();
      options.pyramid.mode = mode;
      options.pyramid.stages = 3;
      options.pyramid.replay_frames = 8;
      if (mode == PyramidMode::kProbe) options.pyramid.instruction = "Watch the door.";
      options.compressors = {std::string(entry.name) + (entry.default_value < 1 ? "=0.5" : "=2")};
      GoesOn(engine_, options, file_, 10);
    }
  }
}

TEST_F(SessionFileTest, AMemoryGoesOnAsWell) {
  for (const bool int8 : {false, true}) {
    SCOPED_TRACE(int8);
    SessionOptions options = Options();
    options.memory = MemoryOptions{.window_tokens = 70, .recall_blocks = 4, .int8 = int8};
    GoesOn(engine_, options, file_, 60);
  }
}

TEST_F(SessionFileTest, AMemoryTakesWhatItMayWhereItIsOpened) {
  const TemporaryDirectory there, here;
  SessionOptions options = Options();
  options.memory = MemoryOptions{.window_tokens = 70, .recall_blocks = 4};
  options.memory->store = {
      .host_bytes = 1 << 15, .disk_bytes = 1 << 20, .disk_directory = there.path()};
  const auto session = engine_.NewSession(options);
  Ingest(*ctx_, *session, NoiseFrames(0, 200));
  SaveSession(*ctx_, *session, file_);
  std::filesystem::remove_all(there.path());
  const BlockStoreOptions most = {
      .host_bytes = 1 << 14, .disk_bytes = 1 << 15, .disk_directory = here.path()};
  const auto loaded = LoadSession(*ctx_, engine_, file_, most);
  const StreamMemory::Counts counts = loaded->memory->counts();
  EXPECT_GT(session->memory->counts().disk_bytes, most.disk_bytes);
  EXPECT_LE(counts.host_bytes, most.host_bytes);
  EXPECT_LE(counts.disk_bytes, most.disk_bytes);
  EXPECT_GT(counts.disk_bytes, most.disk_bytes / 2);
  EXPECT_GT(counts.dropped, 0);
  EXPECT_FALSE(Answer(*loaded).empty());
}

TEST_F(SessionFileTest, AnotherCheckpointAndAnotherTypeAreRefused) {
  Saved(Options());
  EngineOptions in_bf16 = TinyOptions();
  in_bf16.vlm.compute_type = DType::kBF16;
  const Engine untied(TinyOptions("tiny_untied")), narrow(in_bf16);
  EXPECT_THAT([&] { LoadSession(*ctx_, untied, file_, BlockStoreOptions()); },
              ThrowsMessage<InputError>(HasSubstr("it was saved with another model")));
  EXPECT_THAT([&] { LoadSession(*ctx_, narrow, file_, BlockStoreOptions()); },
              ThrowsMessage<InputError>(HasSubstr("'compute_type': expected bf16, found f32")));
}

TEST_F(SessionFileTest, WhatIsNoStreamOfThisModelIsRefused) {
  Saved(Options());
  std::ifstream in(file_, std::ios::binary);
  const std::string whole((std::istreambuf_iterator<char>(in)), {});
  for (const size_t size : {size_t{0}, size_t{7}, whole.size() / 2, whole.size() - 1}) {
    std::ofstream(file_, std::ios::binary | std::ios::trunc) << whole.substr(0, size);
    EXPECT_THROW(LoadSession(*ctx_, engine_, file_, BlockStoreOptions()), InputError) << size;
  }
  // Every byte of the first part damaged, with a checksum that fits: an error or a stream, no
  // crash.
  for (size_t i = 8; i < std::min<size_t>(whole.size() - 4, 1500); ++i) {
    std::string bad = whole;
    bad[i] = static_cast<char>(bad[i] ^ 0x41);
    const uint32_t sum = ArchiveChecksum(std::string_view(bad).substr(0, bad.size() - 4));
    bad.replace(bad.size() - 4, 4, reinterpret_cast<const char*>(&sum), 4);
    std::ofstream(file_, std::ios::binary | std::ios::trunc) << bad;
    try {
      LoadSession(*ctx_, engine_, file_, BlockStoreOptions());
    } catch (const Error&) {
    }
  }
}

TEST_F(SessionFileTest, MemoryIsNotTakenForTokensThatTheFileDoesNotHold) {
  Saved(Options());
  std::ifstream in(file_, std::ios::binary);
  std::string bytes((std::istreambuf_iterator<char>(in)), {});
  const std::string field = "\x06lengthq";
  const size_t at = bytes.find(field);
  ASSERT_NE(at, std::string::npos);
  const int64_t length = 1 << 28;  // gigabytes of keys and values
  bytes.replace(at + field.size() + 8, 8, reinterpret_cast<const char*>(&length), 8);
  const uint32_t sum = ArchiveChecksum(std::string_view(bytes).substr(0, bytes.size() - 4));
  bytes.replace(bytes.size() - 4, 4, reinterpret_cast<const char*>(&sum), 4);
  std::ofstream(file_, std::ios::binary | std::ios::trunc) << bytes;
  EXPECT_THAT([&] { LoadSession(*ctx_, engine_, file_, BlockStoreOptions()); },
              ThrowsMessage<InputError>(HasSubstr("'length': expected what the file has room")));
}

TEST_F(SessionFileTest, ADiskThatRefusesLeavesTheOldFile) {
  Saved(Options());
  const auto before = std::filesystem::file_size(file_);
  const auto session = engine_.NewSession(Options());
  Ingest(*ctx_, *session, NoiseFrames(0, 5));
  EXPECT_THAT([&] { SaveSession(*ctx_, *session, directory_.path() / "none" / "stream"); },
              ThrowsMessage<Error>(HasSubstr("cannot write")));
  std::filesystem::create_directory(directory_.path() / "stream.partial");
  EXPECT_THROW(SaveSession(*ctx_, *session, file_), Error);
  EXPECT_EQ(std::filesystem::file_size(file_), before);
  LoadSession(*ctx_, engine_, file_, BlockStoreOptions());
}

}  // namespace
}  // namespace sluice
