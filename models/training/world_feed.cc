// Streams clips of the demo world to a trainer: one record a clip on standard output, until the
// reader closes the pipe.
//
// A record, little endian:
//   u32 magic 0x444C5257 ("WRLD"); u32 bytes that follow this field; u32 frames F; u32 questions Q
//   u8  texture[144][256][3]
//   F times  f32 tex_x0, tex_y0, tex_x1, tex_y1; f32 gain; u32 n
//            n times  f32 cx, cy, size, opacity; u8 r, g, b, mip; u16 sprite; u8 name; u8 color
//   Q times  u8 kind; u8 stale; u16 bytes of question; u16 bytes of answer; both as UTF-8
// Draws are as demos/world/scene.h and render.h define them; color is 255 where there is none.
// Stale questions come first: their answers were true at an earlier frame of the clip. They teach
// that a dialogue may hold answers which time has overtaken, and are not to be learned from.
//
// Uses the standard library alone, so a machine with a compiler can build it:
//   g++ -std=c++20 -O2 -ffp-contract=off -I. -o world_feed models/training/world_feed.cc
//   demos/world/{names,questions,scene,texture}.cc
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <iostream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "demos/world/names.h"
#include "demos/world/questions.h"
#include "demos/world/random.h"
#include "demos/world/scene.h"

namespace sluice::world {
namespace {

static_assert(std::endian::native == std::endian::little, "records are written as they lie");

constexpr uint32_t kMagic = 0x444C5257;
constexpr float kStaleShare = 0.2f;
constexpr int kMaxStale = 3;

constexpr std::string_view kUsage =
    "usage: world_feed [--seed N] [--frames-list 8,12,16] [--questions N] [--clips N]\n"
    "       world_feed --vocabulary\n"
    "  --frames-list  a clip draws its number of frames from this list (repeat one to weight it)\n"
    "  --questions    at most so many questions a clip, stale ones included\n"
    "  --clips        stop after so many; without it the feed never ends\n"
    "  --vocabulary   print kinds, names and colours and stop\n";

struct Options {
  uint64_t seed = 1;
  std::vector<int> frames = {16};
  int questions = 12;
  uint64_t clips = UINT64_MAX;
  bool vocabulary = false;
};

class Record {
 public:
  template <typename T>
  void Put(T value) {
    const size_t at = bytes_.size();
    bytes_.resize(at + sizeof(value));
    std::memcpy(bytes_.data() + at, &value, sizeof(value));
  }
  void PutBytes(const void* data, size_t size) {
    const auto* begin = static_cast<const uint8_t*>(data);
    bytes_.insert(bytes_.end(), begin, begin + size);
  }
  void Clear() { bytes_.clear(); }
  const std::vector<uint8_t>& bytes() const { return bytes_; }

 private:
  std::vector<uint8_t> bytes_;
};

void PutFrame(Record& record, const FrameDraw& frame) {
  for (float value : {frame.tex_x0, frame.tex_y0, frame.tex_x1, frame.tex_y1, frame.gain}) {
    record.Put(value);
  }
  record.Put(static_cast<uint32_t>(frame.draws.size()));
  for (const Draw& d : frame.draws) {
    for (float value : {d.cx, d.cy, d.size, d.opacity}) record.Put(value);
    for (uint8_t value : {d.r, d.g, d.b, d.mip}) record.Put(value);
    record.Put(d.sprite);
    record.Put(d.name);
    record.Put(d.color);
  }
}

void PutQuestion(Record& record, const Question& question, bool stale) {
  record.Put(static_cast<uint8_t>(question.kind));
  record.Put(static_cast<uint8_t>(stale));
  record.Put(static_cast<uint16_t>(question.text.size()));
  record.Put(static_cast<uint16_t>(question.answer.size()));
  record.PutBytes(question.text.data(), question.text.size());
  record.PutBytes(question.answer.data(), question.answer.size());
}

// Fills `record` with everything after the two leading fields.
void MakeRecord(Record& record, Random& random, const Options& options) {
  SceneOptions scene_options;
  scene_options.frames = random.Pick(options.frames);
  const Scene scene = MakeScene(random.Next(), scene_options);
  const int last = scene.frames - 1;
  std::vector<Question> stale;
  if (random.Chance(kStaleShare)) {
    const int count = std::min(random.Between(1, kMaxStale), options.questions);
    const int earlier = random.Between(std::min(3, last - 1), last - 1);
    stale = AskAll(scene, earlier, random.Next(), count);
  }
  const int room = options.questions - static_cast<int>(stale.size());
  const std::vector<Question> fresh = AskAll(scene, last, random.Next(), room);

  record.Clear();
  record.Put(static_cast<uint32_t>(scene.frames));
  record.Put(static_cast<uint32_t>(stale.size() + fresh.size()));
  record.PutBytes(scene.texture.data(), scene.texture.size());
  for (int k = 0; k < scene.frames; ++k) PutFrame(record, DrawAt(scene, k * kSampleSeconds));
  for (const Question& q : stale) PutQuestion(record, q, true);
  for (const Question& q : fresh) PutQuestion(record, q, false);
}

void PrintVocabulary() {
  for (int i = 0; i < kNumKinds; ++i) {
    std::cout << "kind " << i << ' ' << KindName(static_cast<Kind>(i)) << '\n';
  }
  for (int i = 0; i < kNumNames; ++i) std::cout << "name " << i << ' ' << NameText(i) << '\n';
  for (int i = 0; i < kNumColors; ++i) std::cout << "color " << i << ' ' << ColorText(i) << '\n';
}

uint64_t ParseNumber(std::string_view flag, std::string_view text, uint64_t low, uint64_t high) {
  uint64_t value = 0;
  bool good = !text.empty() && text.size() <= 18;
  for (char c : text) {
    good = good && c >= '0' && c <= '9';
    value = value * 10 + static_cast<uint64_t>(c - '0');
  }
  if (!good || value < low || value > high) {
    throw std::invalid_argument("[world_feed] " + std::string(flag) + " must be a number in " +
                                std::to_string(low) + ".." + std::to_string(high) + ", got '" +
                                std::string(text) + "'");
  }
  return value;
}

Options ParseOptions(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view flag = argv[i];
    if (flag == "--vocabulary") {
      options.vocabulary = true;
      continue;
    }
    if (i + 1 >= argc) {
      throw std::invalid_argument("[world_feed] unknown or incomplete option '" +
                                  std::string(flag) + "'; see --help");
    }
    const std::string_view value = argv[++i];
    constexpr uint64_t kHuge = 999'999'999'999'999'999;
    if (flag == "--seed") {
      options.seed = ParseNumber(flag, value, 0, kHuge);
    } else if (flag == "--questions") {
      options.questions = static_cast<int>(ParseNumber(flag, value, 1, 64));
    } else if (flag == "--clips") {
      options.clips = ParseNumber(flag, value, 0, kHuge);
    } else if (flag == "--frames-list") {
      options.frames.clear();
      for (size_t begin = 0; begin <= value.size();) {
        const size_t end = std::min(value.find(',', begin), value.size());
        options.frames.push_back(static_cast<int>(
            ParseNumber(flag, value.substr(begin, end - begin), kMinFrames, kMaxFrames)));
        begin = end + 1;
      }
    } else {
      throw std::invalid_argument("[world_feed] unknown option '" + std::string(flag) +
                                  "'; see --help");
    }
  }
  return options;
}

int Main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (std::string_view(argv[i]) == "--help") {
      std::cout << kUsage;
      return 0;
    }
  }
  const Options options = ParseOptions(argc, argv);
  if (options.vocabulary) {
    PrintVocabulary();
    return 0;
  }
  Random random(options.seed);
  Record record;
  for (uint64_t clip = 0; clip < options.clips; ++clip) {
    MakeRecord(record, random, options);
    const uint32_t head[2] = {kMagic, static_cast<uint32_t>(record.bytes().size())};
    if (std::fwrite(head, sizeof(head), 1, stdout) != 1 ||
        std::fwrite(record.bytes().data(), record.bytes().size(), 1, stdout) != 1) {
      return 0;  // the reader has had enough
    }
  }
  return std::fflush(stdout) == 0 ? 0 : 1;
}

}  // namespace
}  // namespace sluice::world

int main(int argc, char** argv) {
  try {
    return sluice::world::Main(argc, argv);
  } catch (const std::invalid_argument& error) {
    std::cerr << error.what() << '\n';
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "[world_feed] " << error.what() << '\n';
    return 1;
  }
}
