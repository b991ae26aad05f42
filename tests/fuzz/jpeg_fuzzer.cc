#include "tests/fuzz/picture.h"
#include "tests/fuzz/targets.h"

namespace sluice {

void FuzzJpeg(std::string_view bytes) { FuzzPicture(ImageFormat::kJpeg, bytes); }

}  // namespace sluice
