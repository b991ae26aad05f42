#include "llm/vlm.h"

#include "llm/config_object.h"
#include "llm/family_registry.h"
#include "runtime/error.h"

namespace sluice {

std::shared_ptr<const Vlm> Vlm::Load(const std::filesystem::path& directory,
                                     const VlmOptions& options) {
  std::error_code error;
  if (!std::filesystem::is_directory(directory, error)) {
    throw InputError(
        "[vlm] a checkpoint is a directory with config.json, tokenizer.json and " +
        std::string("safetensors files, got ") + directory.string() +
        (std::filesystem::exists(directory, error) ? " (not a directory)" : " (not there)"));
  }
  const ConfigObject config = ConfigObject::Read(directory / "config.json");
  std::string name;
  if (const nlohmann::json* architectures = config.Find({"architectures"})) {
    if (!architectures->is_array() || architectures->size() != 1 ||
        !architectures->front().is_string()) {
      config.Refuse("architectures", "a list of one name");
    }
    name = architectures->front().get<std::string>();
  } else {
    name = config.String({"model_type"}, "");
    if (name.empty()) config.Refuse("architectures", "a list of one name");
  }
  std::string known;
  for (const ModelFamily& family : ModelFamilies()) {
    if (name == family.architecture || name == family.model_type) {
      return family.load(directory, options);
    }
    known += (known.empty() ? "" : ", ") + std::string(family.architecture);
  }
  throw InputError("[vlm] " + config.file().string() + ": the architecture must be one of " +
                   known + ", got " + name);
}

}  // namespace sluice
