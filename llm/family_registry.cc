#include "llm/family_registry.h"

#include "llm/families/llava_onevision.h"

namespace sluice {
namespace {

constexpr ModelFamily kFamilies[] = {
    {"LlavaOnevisionForConditionalGeneration", "llava_onevision", LoadLlavaOnevision},
};

}  // namespace

std::span<const ModelFamily> ModelFamilies() { return kFamilies; }

}  // namespace sluice
