#include "tests/fuzz/picture.h"
#include "tests/fuzz/targets.h"

namespace sluice {

void FuzzWebp(std::string_view bytes) { FuzzPicture(ImageFormat::kWebp, bytes); }

}  // namespace sluice
