// An engine on the tiny golden checkpoints, and frames of their size.
#ifndef SLUICE_TESTS_SUPPORT_TINY_STREAM_H_
#define SLUICE_TESTS_SUPPORT_TINY_STREAM_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <random>
#include <string>

#include "streaming/engine.h"

namespace sluice {

// In f32 on one thread.
inline EngineOptions TinyOptions(const std::string& checkpoint = "tiny_tied") {
  EngineOptions options;
  options.model = std::filesystem::path(SLUICE_SOURCE_DIR) / "tests/golden" / checkpoint;
  options.vlm.compute_type = DType::kF32;
  options.num_threads = 1;
  return options;
}

// Noise that is the same for all frames of a film, but for its first `renewed` values: of them one
// frame in three repeats the one before.
inline FramePtr NoiseFrame(int index, uint32_t film, int renewed = 0) {
  constexpr int kSide = 74;
  auto frame = std::make_shared<Frame>();
  frame->width = frame->height = kSide;
  frame->rgb.resize(kSide * kSide * 3);
  std::mt19937 random(film);
  for (uint8_t& value : frame->rgb) value = static_cast<uint8_t>(random());
  random.seed(film + 1000 + (index - index % 3 / 2));
  for (int i = 0; i < renewed; ++i) frame->rgb[i] = static_cast<uint8_t>(random());
  frame->index = index;
  frame->time = MediaTime::FromSeconds(0.5 * index);
  return frame;
}

}  // namespace sluice

#endif  // SLUICE_TESTS_SUPPORT_TINY_STREAM_H_
