#include "tests/fuzz/picture.h"
#include "tests/fuzz/targets.h"

namespace sluice {

void FuzzPng(std::string_view bytes) { FuzzPicture(ImageFormat::kPng, bytes); }

}  // namespace sluice
