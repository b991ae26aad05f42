#include "llm/family_registry.h"

#include "llm/families/llava_next.h"
#include "llm/families/llava_onevision.h"

namespace sluice {
namespace {

constexpr ModelFamily kFamilies[] = {
    {"LlavaOnevisionForConditionalGeneration", "llava_onevision", LoadLlavaOnevision},
    {"LlavaNextVideoForConditionalGeneration", "llava_next_video", LoadLlavaNextVideo},
    {"LlavaNextForConditionalGeneration", "llava_next", LoadLlavaNext},
    {"LlavaForConditionalGeneration", "llava", LoadLlava15},
};

}  // namespace

std::span<const ModelFamily> ModelFamilies() { return kFamilies; }

}  // namespace sluice
