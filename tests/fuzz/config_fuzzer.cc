#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "llm/vlm.h"
#include "runtime/error.h"
#include "tests/fuzz/targets.h"
#include "tests/support/temporary_directory.h"

namespace sluice {
namespace {

// Loads all of `checkpoint`, with one file replaced.
void LoadWith(const std::string& checkpoint, const std::string& file, std::string_view bytes) {
  static const TemporaryDirectory root;
  const std::filesystem::path from =
      std::filesystem::path(SLUICE_SOURCE_DIR) / "tests/golden" / checkpoint;
  const std::filesystem::path directory = root.path() / checkpoint;
  if (!std::filesystem::exists(directory)) std::filesystem::copy(from, directory);
  // The index is read only where there is no single file of weights.
  const bool index = file == "model.safetensors.index.json";
  const std::filesystem::path weights = directory / "model.safetensors";
  const std::filesystem::path shard = directory / "shard.safetensors";
  if (index) std::filesystem::rename(weights, shard);
  std::ofstream(directory / file, std::ios::binary)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  const auto restore = [&] {
    if (index) std::filesystem::rename(shard, weights);
    std::filesystem::remove(directory / file);
    if (std::filesystem::exists(from / file)) {
      std::filesystem::copy_file(from / file, directory / file);
    }
  };
  try {
    VlmOptions options;
    options.compute_type = DType::kF32;
    const auto vlm = Vlm::Load(directory, options);
    vlm->prompt_format().EncodePrefix(vlm->tokenizer());
    vlm->prompt_format().EncodeQuestion(vlm->tokenizer(), "What is there?", true);
  } catch (...) {
    restore();
    throw;
  }
  restore();
}

}  // namespace

void FuzzConfig(std::string_view bytes) {
  if (bytes.empty()) throw InputError("[fuzz] expected a first byte, got none");
  constexpr size_t kFiles = std::size(kConfigFiles), kCheckpoints = std::size(kConfigCheckpoints);
  const auto choice = static_cast<uint8_t>(bytes[0]);
  LoadWith(kConfigCheckpoints[choice / kFiles % kCheckpoints], kConfigFiles[choice % kFiles],
           bytes.substr(1));
}

}  // namespace sluice
