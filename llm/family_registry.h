// The model families this runtime knows. Adding one is a file in llm/families and a line in
// family_registry.cc.
#ifndef SLUICE_LLM_FAMILY_REGISTRY_H_
#define SLUICE_LLM_FAMILY_REGISTRY_H_

#include <filesystem>
#include <memory>
#include <span>

#include "llm/vlm.h"

namespace sluice {

struct ModelFamily {
  const char* architecture;  // as config.json's "architectures" names it
  const char* model_type;    // as "model_type" names it, for files without "architectures"
  std::shared_ptr<const Vlm> (*load)(const std::filesystem::path& directory,
                                     const VlmOptions& options);
};

std::span<const ModelFamily> ModelFamilies();

}  // namespace sluice

#endif  // SLUICE_LLM_FAMILY_REGISTRY_H_
