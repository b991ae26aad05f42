// What tests of the LLaVA families do to checkpoints.
#ifndef SLUICE_TESTS_SUPPORT_LLAVA_CHECKPOINTS_H_
#define SLUICE_TESTS_SUPPORT_LLAVA_CHECKPOINTS_H_

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "llm/vlm.h"
#include "runtime/error.h"
#include "tests/support/checkpoint_copy.h"

namespace sluice {

inline std::shared_ptr<const Vlm> LoadF32(const std::filesystem::path& directory) {
  VlmOptions options;
  options.compute_type = DType::kF32;
  return Vlm::Load(directory, options);
}

// The one line of the InputError that loading throws.
inline std::string LoadError(const std::filesystem::path& directory) {
  try {
    LoadF32(directory);
  } catch (const InputError& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
    return error.what();
  } catch (const std::exception& error) {
    ADD_FAILURE() << "not an InputError: " << error.what();
  }
  return "";
}

// A value that loading must refuse, and parts of what it says.
struct BadSetting {
  const char* pointer;
  nlohmann::json value;
  std::vector<const char*> expected;
};
inline void ExpectRefused(const CheckpointCopy& copy, const char* file, const BadSetting& bad) {
  copy.EditJson(file, [&](nlohmann::json& object) {
    object[nlohmann::json::json_pointer(bad.pointer)] = bad.value;
  });
  const std::string error = LoadError(copy.directory());
  for (const char* expected : bad.expected) {
    EXPECT_THAT(error, testing::HasSubstr(expected)) << bad.pointer << " = " << bad.value;
  }
}

inline std::string Replaced(std::string text, const std::string& from, const std::string& to) {
  if (text.starts_with(from)) text.replace(0, from.size(), to);
  return text;
}

// Names of tensors in the other published layouts. Ours is D: without "vision_model", decoder below
// "language_model.model".
inline std::string LayoutA(const std::string& name) {
  return Replaced(name, "vision_tower.", "vision_tower.vision_model.");
}
inline std::string LayoutC(const std::string& name) {
  if (name == "language_model.lm_head.weight") return "lm_head.weight";
  return "model." + Replaced(name, "language_model.model.", "language_model.");
}
inline std::string LayoutB(const std::string& name) { return LayoutC(LayoutA(name)); }

}  // namespace sluice

#endif  // SLUICE_TESTS_SUPPORT_LLAVA_CHECKPOINTS_H_
