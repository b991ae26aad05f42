// What the tokenizer tests share: the fixtures, and hashes like those of make_goldens.py.
#ifndef SLUICE_TESTS_LLM_TOKENIZER_TEST_UTIL_H_
#define SLUICE_TESTS_LLM_TOKENIZER_TEST_UTIL_H_

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>

#include "llm/tokenizer.h"

namespace sluice {

inline std::filesystem::path TokenizerGolden(const std::string& name) {
  return std::filesystem::path(SLUICE_SOURCE_DIR) / "tests/golden/tokenizer" / name;
}

inline nlohmann::json ReadGolden(const std::string& name) {
  std::ifstream in(TokenizerGolden(name));
  return nlohmann::json::parse(in);
}

// A folder of its own that goes away with the object.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "sluice-XXXXXX").string();
    path_ = ::mkdtemp(pattern.data());
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  std::filesystem::path Write(const std::string& name, std::string_view text) const {
    std::ofstream(path_ / name, std::ios::binary) << text;
    return path_ / name;
  }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

inline std::shared_ptr<const Tokenizer> LoadTokenizer(const nlohmann::json& file) {
  const TemporaryFolder folder;
  return Tokenizer::Load(folder.Write("tokenizer.json", file.dump()));
}

// FNV-1a over 64-bit values.
class GoldenHash {
 public:
  void Add(uint64_t value) { value_ = (value_ ^ value) * 0x100000001B3u; }
  void AddIds(std::span<const int32_t> ids) {
    for (const int32_t id : ids) Add(static_cast<uint64_t>(id));
    Add(~uint64_t{0});
  }
  void AddText(std::string_view text) {
    for (const char c : text) Add(static_cast<uint8_t>(c));
    Add(~uint64_t{0});
  }
  std::string Hex() const {
    char text[17];
    std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(value_));
    return text;
  }

 private:
  uint64_t value_ = 0xCBF29CE484222325u;
};

// SplitMix64.
class GoldenRandom {
 public:
  explicit GoldenRandom(uint64_t seed) : state_(seed) {}
  uint64_t Below(uint64_t n) {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (z ^ z >> 31) % n;
  }

 private:
  uint64_t state_;
};

}  // namespace sluice

#endif  // SLUICE_TESTS_LLM_TOKENIZER_TEST_UTIL_H_
